# SPDX-License-Identifier: Apache-2.0
"""Parity of the layer-normalised Triton kernels under the interpreter: as interpreted.py."""

import pytest
import torch
import triton
from torch import Tensor

from cases import FEATURES, Case
from gru_fast import reference_norm
from gru_fast.kernels import chunks, norm_ops, norm_tables, problem
from gru_fast.kernels.tiling import Config, Device, Sizes
from helpers import assert_parity
from norm_cases import RESULTS, backward_arguments, cast, norm_arguments, outcome
from op_calls import turned
from triton_support import interpreter

interpreter.install_numerics()
interpreter.install_bounds()

# Triton 3.6's interpreter under NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0")


@pytest.fixture(autouse=True)
def exact_products(poisoned_memory: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 products, and tiles so small that a call has several."""

    def config(device: Device, sizes: Sizes, direction: str) -> Config:
        return Config(16, max(16, triton.next_power_of_2(sizes.H)), 0, 4)

    monkeypatch.setattr(problem, "dot_precision", lambda tensor: "ieee")
    monkeypatch.setattr(norm_tables, "config", config)


def compare(
    case: Case, dtype: torch.dtype = torch.float32, recompute: bool = False, draws: int = 1
) -> None:
    found: list[list[list[Tensor]]] = [[], [], []]
    for draw in range(draws):
        arguments = norm_arguments(case, dtype, draw=draw)
        for values, module, given in (
            (found[0], norm_ops, arguments),
            (found[1], reference_norm, arguments),
            (found[2], reference_norm, cast(arguments, torch.float64)),
        ):
            values.append(outcome(module, given, recompute))
        assert all(value.is_contiguous() for value in found[0][-1])
    for k, name in enumerate(RESULTS):
        assert_parity(name, *([draw[k] for draw in side] for side in found))


class TestParity:
    def test_odd_sizes_without_bias(self):
        compare(Case(T=2, B=17, H=19, bias=False), draws=3)

    def test_everything_in_both_directions(self):
        compare(Case("reset_after", "everything", (False, True), T=3, B=3, H=7), draws=3)

    @pytest.mark.parametrize("recompute", [False, True])
    def test_bfloat16(self, recompute):
        compare(Case(T=4, B=3, H=20), torch.bfloat16, recompute)

    def test_a_power_of_two(self):
        compare(Case(T=3, B=5, H=16), draws=3)

    def test_recompute_in_chunks(self, monkeypatch):
        monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", (1, 2 * 3 * 2 * 7 * 4))
        case = Case("reset_after", "everything", (True, False), T=5, B=3, H=7)
        compare(case, recompute=True, draws=3)

    def test_recompute_without_bias(self):
        compare(Case(T=3, B=3, H=7, bias=False), recompute=True, draws=3)

    def test_few_groups_at_a_time(self, monkeypatch):
        """As with more directions than bits, or more groups than an axis has programs."""
        launches = problem.Problem.launches
        monkeypatch.setattr(
            problem.Problem, "launches", lambda self, most=2: launches(self, min(most, 2))
        )
        case = Case("reset_after", "everything", (True, False, True), T=2, B=3, H=5)
        compare(case, draws=3)


@pytest.mark.slow
class TestParityWidely:
    @pytest.mark.parametrize("features", FEATURES)
    @pytest.mark.parametrize("reverse", [(False,), (True,), (True, False, False)], ids=str)
    def test_float32(self, features, reverse):
        compare(Case("reset_after", features, reverse), draws=6)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_sixteen_bits(self, dtype):
        compare(Case("reset_after", "everything", (False, True), T=5, B=5, H=40), dtype)

    @pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 5, 3), (2, 1, 64), (7, 33, 2)], ids=str)
    def test_sizes(self, sizes):
        T, B, H = sizes
        compare(Case("reset_after", "resets", T=T, B=B, H=H), draws=12)


class TestCalls:
    @pytest.mark.parametrize("T, B", [(0, 3), (3, 0)])
    @pytest.mark.parametrize("recompute", [False, True])
    def test_nothing_to_do(self, T, B, recompute):
        h0, w, gamma, b = (torch.randn(2, *s) for s in ((B, 4), (12, 4), (12,), (12,)))
        inputs = [torch.randn(T, B, 2, 12), h0, w, gamma, b, *[None] * 4]
        mode = (1e-5, [False, True])
        results = norm_ops.norm_scan(*inputs, *mode, recompute)
        assert results[0].shape == (T, B, 8) and torch.equal(results[1], h0)
        given = [*results[:2], *inputs, results[0], *results[2:], *mode, recompute, [True] * 7]
        gradients = norm_ops.norm_scan_backward(*given)
        assert torch.equal(gradients[1], results[1])
        for gradient, argument in zip(gradients[:5], inputs[:5], strict=True):
            assert gradient.shape == argument.shape
        assert not any(bool(g.any()) for g in gradients[2:])

    def test_padding_is_not_read(self):
        arguments = norm_arguments(Case(features="lengths", T=4, B=3, H=5), torch.float32)
        padding = torch.arange(4)[:, None] >= arguments[5]
        dirty = [torch.where(padding[..., None, None], torch.nan, arguments[0]), *arguments[1:]]
        for recompute in (False, True):
            clean, found = (outcome(norm_ops, some, recompute) for some in (arguments, dirty))
            for a, b in zip(clean, found, strict=True):
                assert torch.equal(a, b)

    def test_gradients_that_are_missing_are_zeros(self):
        case = Case(features="everything", T=3, B=3, H=5)
        given = backward_arguments(norm_ops.norm_scan, norm_arguments(case, torch.float32))
        for missing in (0, 1):
            zeros, absent = list(given), list(given)
            zeros[missing], absent[missing] = torch.zeros_like(given[missing]), None
            for a, b in zip(
                norm_ops.norm_scan_backward(*zeros),
                norm_ops.norm_scan_backward(*absent),
                strict=True,
            ):
                assert torch.equal(a, b)

    def test_strides_do_not_show(self):
        case = Case(features="everything", reverse=(False, True), T=3, B=3, H=5)
        plain = backward_arguments(norm_ops.norm_scan, norm_arguments(case, torch.float32))
        strided = list(map(turned, plain))
        for a, b in zip(
            norm_ops.norm_scan_backward(*plain), norm_ops.norm_scan_backward(*strided), strict=True
        ):
            assert torch.equal(a, b)
        given = [*plain[2:11], *plain[14:17]]
        for a, b in zip(
            norm_ops.norm_scan(*given), norm_ops.norm_scan(*map(turned, given)), strict=True
        ):
            assert torch.equal(a, b)

    def test_results_share_no_memory(self):
        arguments = norm_arguments(Case(T=3, B=3, H=5), torch.float32)
        found = [t for t in outcome(norm_ops, arguments, False) if t.numel()]
        given = [a for a in arguments if isinstance(a, Tensor)]
        held = [t.untyped_storage().data_ptr() for t in found + given]
        assert len(set(held)) == len(held)

    def test_gradients_that_nobody_wants(self):
        case = Case(features="everything", T=3, B=3, H=5)
        given = backward_arguments(norm_ops.norm_scan, norm_arguments(case, torch.float32))
        full = norm_ops.norm_scan_backward(*given)
        for wanted in range(0, 7, 2):
            mask = [i == wanted for i in range(7)]
            part = norm_ops.norm_scan_backward(*given[:-1], mask)
            for i in range(7):
                assert torch.equal(part[i], full[i]) if mask[i] else part[i].shape == (0,)
