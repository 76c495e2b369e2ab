# SPDX-License-Identifier: Apache-2.0
"""Calls past the dispatcher, which costs more than a few small steps do.

The kernels are those of the ops, and so are the results, to the bit. A call goes this way only
where no part of PyTorch would miss the operator: no gradients, and no compiler, tracer, transform,
mode or profiler on this thread. Whatever is not a plain call of plain tensors returns None, and
the ops take it or say what is wrong with it. Calls on CUDA, which are `direct_gpu`'s, need no CPU
kernels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence
from torch.optim.optimizer import register_optimizer_step_post_hook

from gru_fast import direct_gpu, ops
from gru_fast.backends import counts_flops
from gru_fast.ops_past import CAN_TELL, is_unobserved

may_pass: bool = CAN_TELL
native: Any = None
native_takes: Any = None
native_backward: Any = None
if ops.HAS_CPU_KERNELS and CAN_TELL:
    from gru_fast import _C

    if _C.enable_direct(Tensor, nn.Parameter):
        native, native_takes = _C.run_direct, _C.takes_direct
        native_backward = _C.run_direct_backward

BACKENDS = ("auto", "cpu")
# bidirectional, batch_first, batch_sizes, lengths, reset_mask, num_heads
_OF_CELL = (False, False, None, None, None, 1)


def gru_cell(
    input: Tensor,
    hx: Tensor | None,
    weights: list[Tensor | None],
    cell: str,
    backend: str,
) -> Tensor | None:
    """`functional.gru_cell`, or None where the call is not plain."""
    if not may_pass or torch.is_grad_enabled() or not is_unobserved():
        return None
    done: Tensor | None = None
    if native is not None and backend in BACKENDS:
        done = native(input, hx, weights, None, True, *_OF_CELL, cell, False)
    if done is None and type(input) is Tensor and input.is_cuda:
        done = direct_gpu.gru_cell(input, hx, weights, cell, backend)
    return done


def gru(
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    params: Sequence[Tensor],
    num_layers: int,
    bias: bool,
    bidirectional: bool,
    batch_first: bool,
    lengths: Tensor | None,
    reset_mask: Tensor | None,
    num_heads: int,
    cell: str,
    backend: str,
) -> tuple[Any, Tensor] | None:
    """`functional.gru`, or None where the call is not plain."""
    if not may_pass or torch.is_grad_enabled() or not is_unobserved():
        return None
    if native is not None and backend in BACKENDS:
        done = native(
            input, hx, params, num_layers, bias, bidirectional, batch_first, None, lengths,
            reset_mask, num_heads, cell, False,
        )  # fmt: skip
        if done is not None:
            return done  # type: ignore[no-any-return]
        if type(input) is PackedSequence and lengths is reset_mask is None:
            return _packed(input, hx, params, num_layers, bias, bidirectional, num_heads, cell)
    plain = lengths is reset_mask is None and num_heads == 1 and not bidirectional
    if plain and type(input) is Tensor and input.is_cuda:
        return direct_gpu.gru(input, hx, params, num_layers, bias, batch_first, cell, backend)
    return None


def _packed(
    input: PackedSequence,
    hx: Tensor | None,
    params: Sequence[Tensor],
    num_layers: int,
    bias: bool,
    bidirectional: bool,
    num_heads: int,
    cell: str,
) -> tuple[PackedSequence, Tensor] | None:
    data, batch_sizes, sorted_indices, unsorted_indices = input
    if hx is not None and sorted_indices is not None:
        # Of too many rows the first would be taken.
        if type(hx) not in (Tensor, nn.Parameter) or hx.dim() != 3:
            return None
        if not hx.is_cpu or hx.shape[1] != len(sorted_indices):
            return None
        hx = hx.index_select(1, sorted_indices)
    done = native(
        data, hx, params, num_layers, bias, bidirectional, False, batch_sizes, None, None,
        num_heads, cell, False,
    )  # fmt: skip
    if done is None:
        return None
    output, h_n = done
    if unsorted_indices is not None:
        h_n = h_n.index_select(1, unsorted_indices)
    return PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices), h_n


def layer(
    x: Tensor,
    h0: Tensor,
    weights: Sequence[Tensor],
    directions: int,
    *,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    reset_mask: Tensor | None = None,
    num_heads: int,
    cell: str,
    backend: str,
) -> tuple[Tensor, Tensor] | None:
    """One layer over (T, B, I), or over packed rows, from (D, B, H), or None as `gru`.

    Of weights there are two or four in each of D directions.
    """
    if native is None or backend not in BACKENDS or not is_unobserved():
        return None
    bias = len(weights) > 2 * directions
    return native(  # type: ignore[no-any-return]
        x, h0, weights, 1, bias, directions == 2, False, batch_sizes, lengths, reset_mask,
        num_heads, cell, False,
    )  # fmt: skip


def is_only_watched() -> bool:
    """Whether who would see that no operator was called does nothing but look at operators.

    It repeats part of `is_unobserved`, which every small call makes and a further call would slow.
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
        or forward_ad._current_level >= 0
        or counts_flops()
    )


@contextmanager
def turned_off() -> Iterator[None]:
    """Send all calls to the operators, for who puts functions of their own in their place."""
    global may_pass, native
    before, may_pass, native = (may_pass, native), False, None
    try:
        yield
    finally:
        may_pass, native = before


def _forget_packed(*_: Any) -> None:
    """Have all weights packed again: torch 2.13 does not count the step of a fused optimiser.

    Counting it here would show to autograd, also in tensors that the step left as they were.
    """
    _C.forget_packed()


# Compiled with a step it would run once, while it is traced. What torch.compiler.disable sets:
# that function itself loads the whole compiler.
_forget_packed._torchdynamo_disable = True  # type: ignore[attr-defined]


@contextmanager
def prepacked(weights: Iterable[tuple[Tensor, str, bool, int]]) -> Iterator[None]:
    """Within it, calls that go this way find these weights packed.

    Args:
        weights: a weight, the cell that it belongs to, whether it is a weight_hh, and num_heads.
            Those that no call could bring here are ignored.
    """
    if native is None:
        yield
        return
    held = [_C.prepack(*weight) for weight in weights]
    watch = register_optimizer_step_post_hook(_forget_packed)
    try:
        yield
    finally:
        watch.remove()
        held.clear()
