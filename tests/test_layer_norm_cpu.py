# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels of the layer-normalised GRU: every instruction set, the order of summation."""

from typing import Any

import pytest
import torch
from torch import Tensor

from cases import FEATURES, Case
from gru_fast import LayerNormGRU, ops, ops_norm, reference_norm
from helpers import assert_parity
from norm_cases import GRADIENTS, backward_arguments, cast, norm_arguments, with_recompute
from torch_threads import torch_threads

if not ops.HAS_CPU_KERNELS:
    pytest.skip("no compiled CPU kernels", allow_module_level=True)
from gru_fast import _C

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DTYPES = (torch.float32, torch.float64)
BOTH = (False, True)
# Longer than a block of the sum over k, and not a multiple of a tile.
WIDE = 270
RESULTS = ("output", "h_n", "workspace", "rstd")


def same_bits(name: str, a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape and torch.equal(a, b), name


def rows_of(arguments: list[Any], rows: slice) -> list[Any]:
    """The same call for some rows of the batch."""
    axes = {0: 1, 1: 1, 5: 0, 6: 1, 7: 1, 8: 0}
    return [
        a if i not in axes or a is None else a[(slice(None),) * axes[i] + (rows,)].contiguous()
        for i, a in enumerate(arguments)
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestOrderOfSummation:
    """Batch, time chunks and threads never change a bit."""

    @pytest.mark.parametrize("features, H", [("plain", 19), ("everything", 19), ("plain", WIDE)])
    def test_batch_slices(self, isa: str, features: str, H: int, dtype: torch.dtype) -> None:
        arguments = norm_arguments(Case("reset_after", features, BOTH, T=3, B=19, H=H), dtype)
        results = ops_norm.norm_scan(*arguments)
        for begin, end in ((0, 1), (1, 3), (3, 7), (7, 15), (15, 19)):
            rows = slice(begin, end)
            some = ops_norm.norm_scan(*rows_of(arguments, rows))
            for name, part, whole in zip(RESULTS, some, results, strict=True):
                same_bits(name, part, whole[:, rows])

    @pytest.mark.parametrize("B", (1, 3))
    def test_time_chunks(self, isa: str, B: int, dtype: torch.dtype) -> None:
        arguments = norm_arguments(Case(T=7, B=B, H=WIDE), dtype)
        output, h_n, _, _ = ops_norm.norm_scan(*arguments)
        for chunks in ((1,) * 7, (2, 1, 4)):
            state, begin = arguments[1], 0
            for length in chunks:
                gates_x = arguments[0][begin : begin + length]
                some, state, _, _ = ops_norm.norm_scan(gates_x, state, *arguments[2:])
                same_bits("output", some, output[begin : begin + length])
                begin += length
            same_bits("h_n", state, h_n)

    @pytest.mark.parametrize("B", (1, 3, 40))
    def test_threads(self, isa: str, B: int, dtype: torch.dtype) -> None:
        case = Case("reset_after", "everything", BOTH, T=12, B=B, H=WIDE)
        arguments = norm_arguments(case, dtype)
        grads = [torch.randn(12, B, 2 * WIDE).to(dtype), torch.randn(2, B, WIDE).to(dtype)]
        results = []
        for threads in (1, 2, 3):
            with torch_threads(threads):
                given = backward_arguments(ops_norm.norm_scan, arguments, False, grads)
                found = ops_norm.norm_scan_backward(*given)
                results.append((*ops_norm.norm_scan(*arguments), *found))
        for other in results[1:]:
            for name, a, b in zip((*RESULTS, *GRADIENTS), results[0], other, strict=True):
                same_bits(name, a, b)

    def test_gradients_of_batch_slices(self, isa: str, dtype: torch.dtype) -> None:
        arguments = norm_arguments(Case(T=40, B=9, H=21), dtype)
        grads = [torch.randn(40, 9, 21).to(dtype), None]
        given = backward_arguments(ops_norm.norm_scan, arguments, False, grads)
        whole = ops_norm.norm_scan_backward(*given)
        for rows in (slice(0, 1), slice(1, 9)):
            part = rows_of(arguments, rows)
            given = backward_arguments(ops_norm.norm_scan, part, False, [grads[0][:, rows], None])
            some = ops_norm.norm_scan_backward(*given)
            for k in (0, 1):
                same_bits(GRADIENTS[k], some[k], whole[k][:, rows])

    @pytest.mark.parametrize("features", ("plain", "everything"))
    def test_recompute(self, isa: str, features: str, dtype: torch.dtype) -> None:
        arguments = norm_arguments(Case("reset_after", features, BOTH, T=70, B=5, H=21), dtype)
        grads = [torch.randn(70, 5, 42).to(dtype), torch.randn(2, 5, 21).to(dtype)]
        saved, rebuilt = (
            ops_norm.norm_scan_backward(
                *backward_arguments(ops_norm.norm_scan, arguments, recompute, grads)
            )
            for recompute in (False, True)
        )
        for name, a, b in zip(GRADIENTS, saved, rebuilt, strict=True):
            same_bits(name, a, b)

    @pytest.mark.parametrize("features", FEATURES)
    def test_gradients_before_the_first_step(
        self, isa: str, features: str, dtype: torch.dtype, threads: int
    ) -> None:
        """Where none of them is asked for, their product is left out; the others keep every bit."""
        before = ("h0", "reset_state", "h_scale")
        for T, B in ((1, 3), (2, 20), (5, 3)):
            arguments = norm_arguments(Case("reset_after", features, BOTH, T=T, B=B, H=37), dtype)
            *given, all_wanted = backward_arguments(ops_norm.norm_scan, arguments)
            every = ops_norm.norm_scan_backward(*given, all_wanted)
            for asked in ("", *before):
                wanted = [name == asked or name not in before for name in GRADIENTS]
                some = ops_norm.norm_scan_backward(*given, wanted)
                for name, want, a, b in zip(GRADIENTS, wanted, some, every, strict=True):
                    if want:
                        same_bits(name, a, b)


@pytest.mark.parametrize("features", ("plain", "everything"))
def test_every_instruction_set(isa: str, features: str) -> None:
    # Short, as errors grow from step to step: those of a long scan are a matter of luck.
    for H, B, T in ((2, 40, 6), (7, 3, 9), (33, 18, 4), (65, 2, 5)):
        found: list[list[list[Tensor]]] = [[], [], []]
        for draw in range(8):
            case = Case("reset_after", features, BOTH, T=T, B=B, H=H)
            single = norm_arguments(case, torch.float32, draw=draw)
            exact = cast(single, torch.float64)
            grads = [torch.randn(T, B, 2 * H), torch.randn(2, B, H)]
            for values, module, arguments in (
                (found[0], ops_norm, single),
                (found[1], reference_norm, single),
                (found[2], reference_norm, exact),
            ):
                given = [g.to(arguments[0].dtype) for g in grads]
                results = module.norm_scan(*arguments)
                after = backward_arguments(module.norm_scan, arguments, False, given)
                values.append([*results, *module.norm_scan_backward(*after)])
        for k, name in enumerate((*RESULTS, *GRADIENTS)):
            assert_parity(name, *([draw[k] for draw in side] for side in found))


def test_fast_path_fires() -> None:
    rnn = LayerNormGRU(4, 5, num_layers=2, bidirectional=True)
    before = _C.launches()
    output, _ = rnn(torch.randn(3, 2, 4))
    assert _C.launches() == before + 2
    output.sum().backward()
    assert _C.launches() == before + 4
    rnn.backend = "reference"
    rnn(torch.randn(3, 2, 4))
    assert _C.launches() == before + 4


def test_strided_gates_are_read_in_place() -> None:
    arguments = norm_arguments(Case(T=6, B=5, H=9), torch.float32)
    expected = ops_norm.norm_scan(*arguments)[0]
    wider = torch.zeros(6, 5, 1, 40)
    wider[..., 3:30] = arguments[0]
    batch_first = arguments[0].transpose(0, 1).contiguous().transpose(0, 1)
    for gates_x in (batch_first, wider[..., 3:30], arguments[0].flip(3).flip(3)):
        same_bits("output", ops_norm.norm_scan(gates_x, *arguments[1:])[0], expected)


def test_saves_nothing_where_nothing_is_differentiated() -> None:
    arguments = norm_arguments(Case(T=3, B=2, H=5), torch.float32)
    for recompute in (False, True):
        *_, workspace, rstd = ops_norm.norm_scan(*with_recompute(arguments, recompute))
        assert (workspace.numel(), rstd.numel()) == ((0, 0) if recompute else (180, 6))
