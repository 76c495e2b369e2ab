# SPDX-License-Identifier: Apache-2.0
"""Calls of the Triton kernels that a fault could hide behind; run by test_triton_interpreter.py.

As interpreted.py, whose cases are the ordinary ones.
"""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from cases import Case, LayerInputs, layer_inputs
from gru_fast import kernels, reference
from gru_fast.kernels import chunks, ops, problem, products, tiling
from gru_fast.kernels.tile import sigmoid, tanh
from op_calls import scan_arguments, turned
from triton_support import interpreter
from triton_support.interpreted import KERNELS, compare, small_tiles

interpreter.install_numerics()
interpreter.install_bounds()

# Triton 3.6's interpreter under NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0")


@pytest.fixture(autouse=True)
def exact_products(poisoned_memory: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem, "dot_precision", lambda tensor: "ieee")


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `recompute`, chunks of two steps of three rows, two groups and seven units."""
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", (1, 2 * 3 * 2 * 7 * 4))


@triton.jit
def _activations(values_ptr, found_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    values = tl.load(values_ptr + at)
    tl.store(found_ptr + at, sigmoid(values))
    tl.store(found_ptr + SIZE + at, tanh(values))


def scan_both_ways(
    inputs: LayerInputs, recompute: bool, form: Callable[[Any], Any] = lambda value: value
) -> list[Tensor]:
    """Results and gradients of `scan`, all of whose tensors have been through `form`."""
    arguments = list(map(form, scan_arguments(inputs, recompute=recompute)))
    with small_tiles("cta"):
        results = kernels.scan(*arguments, kernel="cta")
        generator = torch.Generator().manual_seed(1)
        outer = [form(torch.randn(r.shape, generator=generator)) for r in results]
        saved = [form(results[0]), form(results[2])]
        if recompute:
            outer[2] = None
        gradients = kernels.scan_backward(
            *outer, *arguments[:-3], *saved, *arguments[-3:], [True] * 6, kernel="cta"
        )
    return [*results, *gradients]


class TestValues:
    @pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
    def test_sigmoid_and_tanh(self):
        """Within two roundings near 1, of tanh within one near 0, and exact where they end."""
        values = torch.cat([torch.linspace(-4, 4, 1016), torch.tensor([-1e4, -89, -45, 0] * 2)])
        values[-4:].neg_()
        found = torch.empty(2, 1024)
        _activations[(1,)](values, found, 1024)
        expected = torch.stack([values.double().sigmoid(), values.double().tanh()])
        error = (found - expected).abs()
        assert error.max() < 1.3e-7 and error[1, values.abs() < 0.3].max() < 1e-7
        assert torch.equal(found[:, [-8, -4]], torch.tensor([[0.0, 1.0], [-1.0, 1.0]]))

    @pytest.mark.parametrize("kernel", KERNELS)
    def test_the_state_is_carried_in_float32(self, kernel):
        """Steps too small to change a state in bfloat16 add up."""
        inputs = layer_inputs(Case(T=40, B=1, H=3), torch.bfloat16)
        inputs.x[1:] = inputs.x[:1]
        inputs.h0[:], inputs.bias_ih[:, 3:6] = 0.75, 5
        exact = reference.layer(*inputs.to(torch.float64).arguments())[0]
        with small_tiles(kernel):
            output, _, _ = kernels.layer(*inputs.arguments(), kernel=kernel)
        assert (output - exact).abs().max() < 2**-7

    def test_padding_is_not_read_for_the_weights_alone(self):
        """The first layer of a model: nobody wants the gradient of x."""
        inputs = layer_inputs(Case(features="lengths", T=4, B=3, H=5), torch.float32)
        padding = torch.arange(4)[:, None] >= inputs.lengths
        dirty = torch.where(padding[..., None], torch.nan, inputs.x)
        with small_tiles("cta"):
            output, _, workspace = kernels.layer(*inputs.arguments(), kernel="cta")
            mask = [k in (2, 4) for k in range(8)]
            _, _, weight, _, bias, *_ = kernels.layer_backward(
                torch.ones_like(output), None, None, dirty, *inputs.arguments()[1:10], output,
                workspace, inputs.cell, [False], False, mask, kernel="cta",
            )  # fmt: skip
        assert bool(weight.isfinite().all()) and bool(bias.isfinite().all())

    def test_sums_over_chunks_are_float32(self):
        total = products.Total()
        for value in (256.0, 1.0, 1.0):
            total.add(torch.tensor([value], dtype=torch.bfloat16))
        assert total.result().dtype == torch.bfloat16 and total.result().item() == 258


class TestTensors:
    @pytest.mark.parametrize("recompute", [False, True])
    def test_strides_do_not_show(self, recompute):
        case = Case(features="everything", reverse=(False, True), T=3, B=3, H=5)
        inputs = layer_inputs(case, torch.float32)
        plain = scan_both_ways(inputs, recompute)
        strided = scan_both_ways(inputs, recompute, turned)
        for a, b in zip(plain, strided, strict=True):
            assert torch.equal(a, b) and b.is_contiguous()

    def test_gradients_in_other_layouts(self):
        """What autograd expands for a sum, and the gradient of a transposed state."""
        case = Case(reverse=(False, True), T=3, B=3, H=5)
        inputs = layer_inputs(case, torch.float32)
        output, h_n, workspace = reference.layer(*inputs.arguments())
        ones, of_state = torch.ones(()).expand_as(output), torch.randn_like(h_n)
        permuted = of_state.transpose(0, 1).contiguous().transpose(0, 1)
        given = *inputs.arguments()[:10], output, workspace
        tail = inputs.cell, inputs.reverse, False, [True] * 8
        with small_tiles("cta"):
            found, expected = (
                kernels.layer_backward(*outer, None, *given, *tail, kernel="cta")
                for outer in ((ones, permuted), (ones.contiguous(), of_state))
            )
        assert all(map(torch.equal, found, expected))

    @pytest.mark.parametrize("kernel", KERNELS)
    def test_gradients_that_are_missing_are_zeros(self, kernel):
        inputs = layer_inputs(Case(features="everything", T=3, B=3, H=5), torch.float32)
        results = reference.layer(*inputs.arguments())
        given = *inputs.arguments()[:10], results[0], results[2]
        tail = inputs.cell, [False], False, [True] * 8
        for missing in range(3):
            absent = [torch.ones_like(result) for result in results]
            zeros = list(absent)
            zeros[missing], absent[missing] = torch.zeros_like(results[missing]), None
            with small_tiles(kernel):
                found, expected = (
                    kernels.layer_backward(*outer, *given, *tail, kernel=kernel)
                    for outer in (absent, zeros)
                )
            assert all(map(torch.equal, found, expected))

    @pytest.mark.parametrize("T, B", [(0, 3), (3, 0)])
    def test_scan_of_nothing(self, T, B):
        shapes = (T, B, 2, 12), (2, B, 4), (2, 12, 4), (2, 12)
        arguments = [*map(torch.randn, shapes), *[None] * 4]
        mode = ("reset_after", [False, True], False)
        output, h_n, workspace = kernels.scan(*arguments, *mode)
        assert torch.equal(h_n, arguments[1])
        gradients = kernels.scan_backward(
            output, h_n, None, *arguments, output, workspace, *mode, [True] * 6
        )
        for gradient, argument in zip(gradients[:4], arguments[:4], strict=True):
            assert gradient.shape == argument.shape


class TestChunks:
    @pytest.mark.parametrize("features", ["plain", "lengths", "resets", "h_scale"])
    @pytest.mark.parametrize("reverse", [(True,), (False, True)], ids=["one", "both"])
    def test_states_that_entered(self, features, reverse):
        """Of a whole sequence they are a copy of the outputs, if nothing else bears on them."""
        compare("cta", Case(features=features, reverse=reverse, T=3, B=3, H=7))

    @pytest.mark.usefixtures("short_chunks")
    @pytest.mark.parametrize(
        "case",
        [
            Case(reverse=(True,), T=9),
            Case(reverse=(True, False), T=5, shared_x=False),
            Case(reverse=(True, True), T=5, shared_x=False),
        ],
        ids=["plain", "own-x", "own-x-one-way"],
    )
    def test_recompute(self, case):
        compare("cta", case, recompute=True)

    def test_a_quarter_of_the_sequence_is_rebuilt_at_a_time(self, monkeypatch):
        """Of a workspace of four values for each of two units, 80 in all."""
        call = SimpleNamespace(T=10, B=1, G=1, H=2)
        parts = {
            (1, 10**6): [(7, 10), (4, 7), (1, 4), (0, 1)],
            (33, 10**6): [(5, 10), (0, 5)],
            (1, 16): [(8, 10), (6, 8), (4, 6), (2, 4), (0, 2)],
        }
        for limits, expected in parts.items():
            monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", limits)
            assert chunks.chunks_of(call, True) == expected
        assert chunks.chunks_of(call, False) == [(0, 10)]

    @pytest.mark.parametrize("recompute, suite", [(True, "infer"), (False, "train")])
    def test_what_saves_nothing_is_measured_as_inference(self, recompute, suite, monkeypatch):
        asked = []
        take = ops.take
        monkeypatch.setattr(ops, "take", lambda *given: asked.append(given[3]) or take(*given))
        arguments = scan_arguments(layer_inputs(Case(), torch.float32), recompute=recompute)
        with small_tiles("cta"):
            kernels.scan(*arguments, kernel="cta")
        assert asked == [suite]


class TestLaunches:
    @pytest.mark.parametrize("kernel", KERNELS)
    def test_few_groups_at_a_time(self, kernel, monkeypatch):
        """As with more directions than bits, or more groups than an axis has programs."""
        launches = problem.Problem.launches
        monkeypatch.setattr(
            problem.Problem, "launches", lambda self, most=2: launches(self, min(most, 2))
        )
        compare(kernel, Case("reset_before", "everything", (True, False, True), T=2, B=3, H=5))

    def test_cta_backward_that_leaves_loads_to_the_compiler(self):
        case = Case(features="everything", reverse=(False, True), T=3, B=3, H=7)
        compare("cta", case, stages=2)

    def test_cta_backward_with_a_sum_for_each_gate(self, monkeypatch):
        """Above 32 units, but in exact products."""
        monkeypatch.setattr(problem, "dot_precision", lambda tensor: "tf32x3")
        compare("cta", Case(T=2, B=3, H=40), weight_bits=20)

    @pytest.mark.parametrize("processors", [8, 4], ids=["together", "in-turn"])
    def test_grid_counts_each_tile_for_itself(self, processors, monkeypatch):
        """Two groups of two tiles of two programs."""
        few = replace(tiling.assumed, processors=processors)
        monkeypatch.setattr(tiling, "assumed", few)
        case = Case("no_reset", "resets", (False, True), T=2, B=17, H=20)
        compare("grid", case, draws=2)
