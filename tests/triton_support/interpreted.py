# SPDX-License-Identifier: Apache-2.0
"""Parity of the Triton kernels under the interpreter; run by test_triton_interpreter.py.

Each test is named after the kernel it runs, or is of "support": what the tests stand on.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from cases import CELLS, FEATURES, Case, layer_inputs
from gru_fast import kernels, reference
from gru_fast.kernels import chunks, grid, ops, problem, registry, tiling
from gru_fast.kernels.tile import load_weight
from gru_fast.kernels.tiling import Config, Device, Sizes
from helpers import assert_parity
from norm_cases import is_float
from op_calls import scan_arguments
from triton_support import interpreter
from triton_support.mutants import GRID_MUTANTS, installed
from triton_support.outcome import RESULTS, outcome

interpreter.install_numerics()
interpreter.install_bounds()

# Triton 3.6's interpreter under NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0")

KERNELS = tuple(kernels.KERNELS)
SCAN_GRADIENTS = ("gates_x", "h0", "weight_hh", "bias_hh", "reset_state", "h_scale")


@pytest.fixture(autouse=True)
def exact_products(poisoned_memory: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem, "dot_precision", lambda tensor: "ieee")


@contextmanager
def small_tiles(
    kernel: str, seed: int = 0, limit: int = 100_000, resident: bool = True, stages: int = 1
) -> Iterator[None]:
    """Run a kernel on tiles so small that a call has several; those of `grid` interleaved.

    resident: whether `grid` keeps the weights on chip.
    stages: of the pipeline that `cta` leaves loads to.
    """

    def config(device: Device, sizes: Sizes, direction: str) -> Config:
        if kernel != "cta":
            return Config(16, 16, 16, 4, 1, resident)
        return Config(16, max(16, triton.next_power_of_2(sizes.H)), 0, 4, stages)

    before = registry.KERNELS[kernel]
    registry.KERNELS[kernel] = replace(before, config=config)
    interleaved = interpreter.concurrent_grid(seed, limit) if kernel == "grid" else nullcontext()
    try:
        with interleaved:
            yield
    finally:
        registry.KERNELS[kernel] = before


def compare(
    kernel: str,
    case: Case,
    dtype: torch.dtype = torch.float32,
    *,
    recompute: bool = False,
    weight_bits: int | None = None,
    draws: int = 1,
    seed: int = 0,
    **schedule: Any,
) -> None:
    """Forward and every gradient of a layer against the reference, by the parity rule.

    weight_bits: round the reference's W_hh, where the kernel rounds in its products.
    draws: how many, from `seed` on; programs of `grid` are interleaved differently in each.
    schedule: as in `small_tiles`.
    """
    collected: list[dict[str, list[Tensor]]] = [{}, {}, {}]
    for draw in range(seed, seed + draws):
        inputs = theirs = layer_inputs(case, dtype, draw=draw)
        if weight_bits is not None:
            weight = torch.from_numpy(interpreter.rounded(inputs.weight_hh.numpy(), weight_bits))
            theirs = replace(inputs, weight_hh=weight)
        with small_tiles(kernel, draw, **schedule):
            mine = outcome(
                partial(kernels.layer, kernel=kernel),
                partial(kernels.layer_backward, kernel=kernel),
                inputs, dtype, recompute,
            )  # fmt: skip
        layer = (reference.layer, reference.layer_backward)
        expected = outcome(*layer, theirs, dtype, recompute)
        truth = outcome(*layer, inputs, torch.float64, recompute)
        for values, found in zip((mine, expected, truth), collected, strict=True):
            for name, value in values.items():
                found.setdefault(name, []).append(value)
        assert all(value.is_contiguous() for value in mine.values())
    for name in RESULTS:
        assert_parity(name, *(found[name] for found in collected))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("kernel", KERNELS)
class TestParity:
    def test_odd_sizes_without_bias(self, kernel, cell):
        case = Case(cell, T=2, B=17, H=19, bias=False)
        compare(kernel, case, draws=3)

    def test_everything_in_both_directions(self, kernel, cell):
        case = Case(cell, "everything", (False, True), T=3, B=3, H=7, shared_x=cell == CELLS[0])
        compare(kernel, case, draws=3)

    def test_bfloat16(self, kernel, cell):
        case = Case(cell, T=4, B=3, H=20)
        compare(kernel, case, torch.bfloat16)

    def test_recompute_in_chunks(self, kernel, cell, monkeypatch):
        monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", (1, 2 * 3 * 2 * 7 * 4))
        case = Case(cell, "everything", (True, False), T=5, B=3, H=7)
        compare(kernel, case, recompute=True)


@pytest.mark.parametrize("reverse", [(True, False) * 17, (True,) * 34], ids=["both", "one"])
def test_cta_with_more_groups_than_bits(reverse):
    """As the same groups in calls of few."""
    inputs = layer_inputs(Case("no_reset", "resets", reverse, T=2, B=2, H=3), torch.float32)
    gates_x, h0, weight, bias, *rest = scan_arguments(inputs)
    with small_tiles("cta"):
        _, h_n, _ = kernels.scan(gates_x, h0, weight, bias, *rest, kernel="cta")
        for some in (slice(4), slice(29, 34)):
            few = [gates_x[:, :, some], h0[some], weight[some], bias[some], *rest[:-2]]
            part = kernels.scan(*few, reverse[some], False, kernel="cta")
            assert torch.equal(part[1], h_n[some])


def test_grid_with_more_tiles_than_fit(monkeypatch):
    """Three launches, each of no more programs than run at once."""
    monkeypatch.setattr(tiling, "assumed", replace(tiling.assumed, processors=4))
    case = Case("no_reset", "lengths", (False, True), T=2, B=35, H=20)
    compare("grid", case)
    call = problem.problem_of(*scan_arguments(layer_inputs(case, torch.float32))[:-1])
    launches = list(grid.grid_launches(call, Config(16, 16, 16, 4)))
    assert [launch.grid for launch in launches] == [(1, 2, 2)] * 3


@pytest.mark.parametrize("recompute", [False, True])
def test_cta_scan_in_chunks(recompute, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", (1, 2 * 3 * 2 * 7 * 4))
    found: list[list[list[Tensor]]] = [[], [], []]
    for draw in range(3):
        case = Case(features="everything", reverse=(True, False), T=5, B=3, H=7)
        inputs = layer_inputs(case, torch.float32, draw=draw)
        arguments = scan_arguments(inputs, recompute=recompute)
        exact = [a.double() if is_float(a) else a for a in arguments]
        given = torch.randn(5, 3, 14), torch.randn(2, 3, 7)
        mine = partial(kernels.scan, kernel="cta"), partial(kernels.scan_backward, kernel="cta")
        theirs = reference.scan, reference.scan_backward
        for values, (forward, backward), taken in (
            (found[0], mine, arguments), (found[1], theirs, arguments), (found[2], theirs, exact),
        ):  # fmt: skip
            grads = [g.to(taken[0].dtype) for g in given]
            with small_tiles("cta"):
                output, h_n, workspace = forward(*taken)
                saved = (*taken[:-3], output, workspace, *taken[-3:])
                values.append([output, h_n, *backward(*grads, None, *saved, [True] * 6)])
    for k, gradient in enumerate(("output", "h_n", *SCAN_GRADIENTS)):
        assert_parity(gradient, *([draw[k] for draw in side] for side in found))


@pytest.mark.parametrize("recompute", [False, True])
def test_several_tiles_of_what_entered(recompute):
    """Of `rebuild`, whose tiles are 8 rows and 64 units."""
    case = Case("reset_before", "everything", (False, True), T=2, B=17, H=70)
    compare("cta", case, recompute=recompute)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.slow
class TestParityWidely:
    @pytest.mark.parametrize("features", FEATURES)
    @pytest.mark.parametrize("reverse", [(False,), (True,), (True, False, False)], ids=str)
    def test_float32(self, kernel, cell, features, reverse):
        compare(kernel, Case(cell, features, reverse), draws=6)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_sixteen_bits(self, kernel, cell, dtype):
        case = Case(cell, "everything", (False, True), T=5, B=5, H=40)
        compare(kernel, case, dtype)

    @pytest.mark.parametrize("precision, bits", [("tf32", 10), ("tf32x3", 20)])
    def test_rounded_products(self, kernel, cell, precision, bits, monkeypatch):
        monkeypatch.setattr(problem, "dot_precision", lambda tensor: precision)
        compare(kernel, Case(cell, T=4, B=4, H=32), weight_bits=bits)

    @pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 5, 3), (2, 1, 64), (7, 33, 2)], ids=str)
    def test_sizes(self, kernel, cell, sizes):
        T, B, H = sizes
        compare(kernel, Case(cell, "resets", T=T, B=B, H=H), draws=3)


@pytest.mark.parametrize("kernel", KERNELS)
class TestCalls:
    def test_one_step_of_one_row(self, kernel):
        compare(kernel, Case(T=1, B=1, H=5), draws=24)

    @pytest.mark.parametrize("T, B", [(0, 3), (3, 0)])
    def test_nothing_to_do(self, kernel, T, B):
        h0, w_ih, w_hh, b = (torch.randn(2, *s) for s in ((B, 4), (12, 5), (12, 4), (12,)))
        arguments = [torch.randn(T, B, 5), h0, w_ih, w_hh, b, b, *[None] * 4]
        mode = (CELLS[0], [False, True], False)
        output, h_n, workspace = kernels.layer(*arguments, *mode, kernel=kernel)
        assert output.shape == (T, B, 8) and workspace.shape == (T, B, 2, 16)
        assert torch.equal(h_n, h0) and h_n is not h0
        gradients = kernels.layer_backward(
            output, h_n, workspace, *arguments, output, workspace, *mode, [True] * 8, kernel=kernel
        )
        assert torch.equal(gradients[1], h_n)
        for gradient, argument in zip(gradients[:6], arguments[:6], strict=True):
            assert gradient.shape == argument.shape
        assert not any(bool(g.any()) for g in gradients[2:])

    def test_padding_is_not_read(self, kernel):
        inputs = layer_inputs(Case(features="lengths", T=4, B=3, H=5), torch.float32)
        padding = torch.arange(4)[:, None] >= inputs.lengths
        dirty = replace(inputs, x=torch.where(padding[..., None], torch.nan, inputs.x))
        with small_tiles(kernel):
            clean = kernels.layer(*inputs.arguments(), kernel=kernel)
            result = kernels.layer(*dirty.arguments(), kernel=kernel)
            tail = [*inputs.arguments()[1:10], result[0], result[2], inputs.cell, [False], False]
            ones = torch.ones_like(result[0])
            gradients = kernels.layer_backward(
                ones, None, None, dirty.x, *tail, [True] * 8, kernel=kernel
            )
        assert all(bool(t.isfinite().all()) for t in (*result, *gradients))
        assert torch.equal(clean[0], result[0])

    def test_lengths_are_brought_into_range(self, kernel):
        """Nobody looks at values on a device."""
        case = Case(features="everything", reverse=(False, True), T=4, B=3, H=5)
        inputs = layer_inputs(case, torch.float32)
        found = []
        for lengths in ([-3, 9, 2], [0, 4, 2]):
            with small_tiles(kernel):
                results = outcome(
                    partial(kernels.layer, kernel=kernel),
                    partial(kernels.layer_backward, kernel=kernel),
                    replace(inputs, lengths=torch.tensor(lengths)), torch.float32, False,
                )  # fmt: skip
            found.append(results.values())
        assert all(map(torch.equal, *found))

    def test_strided_inputs(self, kernel):
        inputs = layer_inputs(Case(T=3, B=3, H=5), torch.float32)
        gates_x = reference.project(inputs.x, inputs.weight_ih, inputs.bias_ih)
        arguments = [gates_x, inputs.h0, inputs.weight_hh, inputs.bias_hh, *[None] * 4]
        turned = [
            gates_x.transpose(0, 1).contiguous().transpose(0, 1),
            inputs.h0[:, :1].expand(1, 3, 5),
            inputs.weight_hh.transpose(1, 2).contiguous().transpose(1, 2),
            *arguments[3:],
        ]
        arguments[1] = turned[1].contiguous()
        mode = (inputs.cell, [False], False)
        with small_tiles(kernel):
            first = kernels.scan(*arguments, *mode, kernel=kernel)
            second = kernels.scan(*turned, *mode, kernel=kernel)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def test_inputs_are_left_alone(self, kernel):
        inputs = layer_inputs(Case(features="everything", T=3, B=3, H=5), torch.float32)
        result = reference.layer(*inputs.arguments())
        arguments = [
            torch.ones_like(result[0]), torch.ones_like(result[1]), torch.ones_like(result[2]),
            *inputs.arguments()[:10], result[0], result[2],
        ]  # fmt: skip
        before = [a.clone() for a in arguments]
        with small_tiles(kernel):
            for _ in range(2):
                kernels.layer_backward(
                    *arguments, inputs.cell, [False], False, [True] * 8, kernel=kernel
                )
        assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))

    @pytest.mark.parametrize("cell", CELLS)
    @pytest.mark.parametrize("recompute", [False, True])
    def test_results_share_no_memory(self, kernel, cell, recompute):
        inputs = layer_inputs(Case(cell, T=3, B=3, H=5), torch.float32)
        with small_tiles(kernel):
            found = outcome(
                partial(kernels.layer, kernel=kernel),
                partial(kernels.layer_backward, kernel=kernel),
                inputs, torch.float32, recompute,
            )  # fmt: skip
        held = [t.untyped_storage().data_ptr() for t in found.values() if t.numel()]
        given = [t.untyped_storage().data_ptr() for t in inputs.leaves().values()]
        assert len(set(held + given)) == len(held + given)

    def test_gradients_that_nobody_wants(self, kernel):
        inputs = layer_inputs(Case(features="everything", T=3, B=3, H=5), torch.float32)
        result = reference.layer(*inputs.arguments())
        tail = [
            *inputs.arguments()[:10], result[0], result[2], inputs.cell, [False], False,
        ]  # fmt: skip
        ones = torch.ones_like(result[1])
        with small_tiles(kernel):
            full = kernels.layer_backward(None, ones, None, *tail, [True] * 8, kernel=kernel)
            for wanted in range(0, 8, 3):
                mask = [i == wanted for i in range(8)]
                part = kernels.layer_backward(None, ones, None, *tail, mask, kernel=kernel)
                # A compiled caller warns of an operator that returns one tensor twice.
                assert len({id(gradient) for gradient in part}) == len(part)
                for i in range(8):
                    assert torch.equal(part[i], full[i]) if mask[i] else part[i].shape == (0,)


def test_support_backward_allocates_no_projected_inputs(monkeypatch):
    """The scan needs their shape only: a copy would be a third of the call's memory."""
    made = []
    monkeypatch.setattr(
        ops, "problem_of", lambda *args: made.append(problem.problem_of(*args)) or made[-1]
    )
    inputs = layer_inputs(Case(T=7, B=3, H=5), torch.float32)
    result = reference.layer(*inputs.arguments())
    kernels.layer_backward(
        result[0], None, None, *inputs.arguments()[:10], result[0], result[2], inputs.cell,
        [False], False, [True] * 8,
    )  # fmt: skip
    assert made[0].T == 7 and made[0].gates_x.untyped_storage().nbytes() == 4 * 15


class TestGridBarriers:
    """The same call right under several schedules, and wrong once a barrier is."""

    @pytest.mark.parametrize("cell", CELLS)
    def test_schedules(self, cell):
        for resident in (True, False):
            compare("grid", self.case(cell), draws=2, resident=resident)

    @pytest.mark.parametrize("mutant", GRID_MUTANTS, ids=str)
    def test_mutant_fails(self, mutant, tmp_path):
        with installed(mutant, tmp_path):
            if mutant.hangs:
                with pytest.raises(RuntimeError, match="no progress"):
                    compare("grid", self.case(mutant.cell), limit=3000)
            else:
                # Not every schedule shows every fault.
                with pytest.raises(AssertionError, match=r"error .* > bound"):
                    for seed in range(8):
                        compare("grid", self.case(mutant.cell), seed=seed)

    @staticmethod
    def case(cell):
        return Case(cell, T=3, B=3, H=20)


def test_support_messages():
    inputs = layer_inputs(Case(), torch.float32)
    with pytest.raises(ValueError, match=r"kernel: expected one of .*'nonsense'"):
        kernels.layer(*inputs.arguments(), kernel="nonsense")
    with pytest.raises(RuntimeError, match="gates_x: expected a dtype of"):
        kernels.layer(*inputs.to(torch.float64).arguments())


@triton.jit
def _corner(weight_ptr, out_ptr, H: tl.constexpr):
    at = tl.arange(0, 16)
    corner = load_weight(weight_ptr, H - 16 + at, H - 16 + at, H)
    tl.store(out_ptr + at[:, None] * 16 + at[None, :], corner)


def test_support_weights_of_more_than_two_to_the_31_values():
    weight = torch.from_numpy(np.zeros((46400, 46400), np.int8))  # its pages are not there yet
    weight[-16:, -16:] = torch.arange(256).view(16, 16)
    out = torch.zeros(16, 16, dtype=torch.int8)
    _corner[(1,)](weight, out, 46400)
    assert torch.equal(out, weight[-16:, -16:])


@triton.jit
def _add(a_ptr, b_ptr, out_ptr):
    at = tl.arange(0, 16)
    tl.store(out_ptr + at, tl.load(a_ptr + at) + tl.load(b_ptr + at))


@triton.jit
def _multiply(a_ptr, b_ptr, out_ptr, PRECISION: tl.constexpr):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    product = tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), input_precision=PRECISION)
    tl.store(out_ptr + at, product)


def test_support_interpreter_still_lacks_bfloat16():
    """A canary: once it fails, Triton's interpreter is mended and the shim can go."""
    a, b = torch.randn(16).bfloat16(), torch.randn(16).bfloat16()
    out = torch.empty_like(a)
    with interpreter.original_numerics():
        _add[(1,)](a, b, out)
    assert not torch.equal(out, a + b)
    _add[(1,)](a, b, out)
    assert torch.equal(out, a + b)


@pytest.mark.parametrize(
    "precision, low, high", [("ieee", 0, 1e-5), ("tf32x3", 0, 1e-5), ("tf32", 1e-4, 2e-2)]
)
def test_support_products_round(precision, low, high):
    a, b = torch.randn(16, 16), torch.randn(16, 16)
    out = torch.empty_like(a)
    _multiply[(1,)](a, b, out, precision)
    error = float((out - a.double() @ b.double()).abs().max())
    assert low <= error <= high


def test_support_bfloat16_rounding():
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    expected = torch.from_numpy(values).bfloat16()
    assert np.array_equal(interpreter.bfloat16_bits(values), expected.view(torch.uint16).numpy())
    back = interpreter.bfloat16_values(interpreter.bfloat16_bits(values))
    assert np.array_equal(back, expected.float().numpy())
