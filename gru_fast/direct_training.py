# SPDX-License-Identifier: Apache-2.0
"""Training past the dispatcher: as `direct`, with a node of autograd behind the results.

The gradients are the ops', to the bit. Where one is not a plain tensor, or is to be differentiated
again, the ops take it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

from gru_fast import direct, heads, ops
from gru_fast.ops_past import is_unobserved
from gru_fast.ops_rules import unwatched
from gru_fast.recurrence import BOTH, grouped
from gru_fast.stack import padded

_PER_DIRECTION = 4  # weights, of which both biases may be None
_OF_CELL = (None, None, None, 1)  # batch_sizes, lengths, reset_mask, num_heads
_OTHERS = 6  # arguments of GRULayer before those that may have a gradient


class GRULayer(torch.autograd.Function):
    """One layer, or a step of a cell, that has run already."""

    @staticmethod
    def forward(
        ctx: Any,
        results: tuple[Tensor, ...],
        cell: str,
        batch_sizes: Tensor | None,
        lengths: Tensor | None,
        reset_mask: Tensor | None,
        num_heads: int,
        *tensors: Tensor | None,
    ) -> Any:
        """Save what backward needs.

        Args:
            ctx: autograd's.
            results: output and h_n, or a cell's new state; then the workspace.
            cell: its name.
            batch_sizes: of a PackedSequence, else None.
            lengths: (B,) or None.
            reset_mask: (T, B) or None.
            num_heads: 1, or more in one direction.
            tensors: input, hx, then weight_ih, weight_hh, bias_ih, bias_hh of each direction.

        Returns:
            The results.
        """
        ctx.set_materialize_grads(False)
        ctx.cell, ctx.is_cell, ctx.batch_sizes = cell, len(results) == 2, batch_sizes
        ctx.num_heads = num_heads
        output = results[0].data if ctx.is_cell else unwatched(results[0], batch_sizes)
        ctx.save_for_backward(*tensors, output, results[-1], lengths, reset_mask)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of what forward was given, of which tensors alone have some."""
        *rest, grad_workspace = grads
        grad_output, grad_h_n = (*rest, None)[:2]
        needed = ctx.needs_input_grad[_OTHERS:]
        if grad_output is None and grad_h_n is None and grad_workspace is None:
            return (None,) * (_OTHERS + len(needed))
        x, h0, *weights, output, workspace, lengths, reset_mask = ctx.saved_tensors
        found = None
        if grad_workspace is None and not torch.is_grad_enabled() and is_unobserved():
            saved = (
                x, h0, weights, output, workspace, ctx.batch_sizes, lengths, reset_mask,
                ctx.num_heads, ctx.is_cell, ctx.cell,
            )  # fmt: skip
            found = direct.native_backward(grad_output, grad_h_n, *saved, needed)
            if found is None:
                # With batch_first, after sum() and in many other losses they lie in another order.
                dense = [
                    None if grad is None else grad.contiguous() for grad in (grad_output, grad_h_n)
                ]
                found = direct.native_backward(*dense, *saved, needed)
        if found is not None:
            return (*((None,) * _OTHERS), *found)
        # The op wants a dimension of groups, one of steps, and padding.
        if ctx.batch_sizes is not None:
            x, lengths = padded(x, ctx.batch_sizes)
            output, workspace, grad_output, grad_workspace = (
                None if t is None else padded(t, ctx.batch_sizes)[0]
                for t in (output, workspace, grad_output, grad_workspace)
            )
        if ctx.is_cell:
            x, h0, output = x.unsqueeze(0), h0.unsqueeze(0), output.unsqueeze(0)
            grad_output = None if grad_output is None else grad_output.unsqueeze(0)
        directions = len(weights) // _PER_DIRECTION
        kinds = range(_PER_DIRECTION)
        tensors = heads.by_head(h0, grouped(weights, directions), ctx.num_heads, ctx.cell)
        grad_h_n = heads.states_by_head(grad_h_n, ctx.num_heads)
        output_mask = [*needed[:2], *(any(needed[2 + i :: _PER_DIRECTION]) for i in kinds)]
        *by_op, _, _ = ops.layer_backward(
            grad_output, grad_h_n, grad_workspace, x, *tensors, lengths, reset_mask, None, None,
            output, workspace, ctx.cell, heads.flags_by_head(BOTH[:directions], ctx.num_heads),
            False, [*output_mask, False, False],
        )  # fmt: skip
        by_op[1:] = heads.whole(by_op[1:], ctx.num_heads, ctx.cell)
        of_steps = [grad.squeeze(0) if ctx.is_cell else grad for grad in by_op[:2]]
        if ctx.batch_sizes is not None and needed[0]:
            of_steps[0] = pack_padded_sequence(of_steps[0], lengths).data
        shaped = [grad if wanted else None for grad, wanted in zip(of_steps, needed, strict=False)]
        for d in range(directions):
            wanted = needed[2 + d * _PER_DIRECTION :]
            shaped += [by_op[2 + i][d] if wanted[i] else None for i in kinds]
        return (*((None,) * _OTHERS), *shaped)


# Function.apply, less what it does for transforms, of which none is active here.
_attach: Any = super(torch.autograd.Function, GRULayer).apply


def _is_served(input: Any, others: Sequence[Tensor | None], backend: str) -> bool:
    return (
        direct.native is not None
        and torch.is_grad_enabled()
        and backend in direct.BACKENDS
        and isinstance(input, Tensor)
        and input.is_cpu
        and any(isinstance(t, Tensor) and t.requires_grad for t in (*others, input))
    )


def _in_order(input: Tensor, hx: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
    """Copies that lie as kernels read them; None where a call was not plain for another reason.

    A learned state for several rows is expanded. The path of a call must not depend on strides:
    what `saved_tensors_hooks` keep for `torch.utils.checkpoint` may have others.
    """
    given = [t for t in (input, hx) if t is not None]
    if not all(isinstance(t, Tensor) and t.layout is torch.strided for t in given):
        return None
    if all(t.is_contiguous() for t in given):
        return None
    return input.contiguous(), None if hx is None else hx.contiguous()


def _run(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor | None],
    layers: int | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset_mask: Tensor | None,
    num_heads: int,
    cell: str,
) -> tuple[Tensor, ...] | None:
    """The results that `GRULayer` takes, or None where the call is not plain.

    Under a profiler or a mode, which sees operators, the operator computes them. What is saved
    stays the same: `torch.utils.checkpoint` compares it between its two passes, and a profiler may
    be on for one of them only.
    """
    directions = len(weights) // _PER_DIRECTION
    both = directions == 2
    call = (
        input, hx, weights, layers, True, both, False, batch_sizes, lengths, reset_mask, num_heads,
        cell, True,
    )  # fmt: skip
    if is_unobserved():
        return direct.native(*call)  # type: ignore[no-any-return]
    if hx is None or not direct.is_only_watched() or direct.native_takes(*call) is None:
        return None
    x, h0 = (input, hx) if layers else (input.unsqueeze(0), hx.unsqueeze(0))
    flags = heads.flags_by_head(BOTH[:directions], num_heads)
    rest = (reset_mask, None, None, cell, flags, False)
    with torch.no_grad():
        tensors = heads.by_head(h0, grouped(weights, directions), num_heads, cell)
        if batch_sizes is not None:
            x, lengths = padded(x, batch_sizes)
        output, h_n, workspace = ops.without_grad(ops.layer, x, *tensors, lengths, *rest)
        if batch_sizes is not None and lengths is not None:
            output, workspace = (pack_padded_sequence(t, lengths).data for t in (output, workspace))
        h_n = heads.whole_states(h_n, num_heads)
        return (output, h_n, workspace) if layers else (output.squeeze(0).clone(), workspace)


def gru_cell(
    input: Tensor, hx: Tensor | None, weights: list[Tensor | None], cell: str, backend: str
) -> Tensor | None:
    """`functional.gru_cell`, or None where the call is not plain or nothing is to be trained."""
    if not _is_served(input, (*weights, hx), backend) or input.dim() != 2:
        return None
    results = _run(input, hx, weights, None, *_OF_CELL, cell)
    if results is None and (copies := _in_order(input, hx)) is not None:
        input, hx = copies
        results = _run(input, hx, weights, None, *_OF_CELL, cell)
    if results is None:
        return None
    return _attach(results, cell, *_OF_CELL, input, hx, *weights)[0]  # type: ignore[no-any-return]


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
    """`direct.layer`, or None as `gru_cell`."""
    if not _is_served(x, (*weights, h0), backend):
        return None
    own: Sequence[Tensor | None] = weights
    if len(weights) < directions * _PER_DIRECTION:
        own = [w for d in range(directions) for w in (*weights[2 * d : 2 * d + 2], None, None)]
    options = (batch_sizes, lengths, reset_mask, num_heads)
    results = _run(x, h0, own, 1, *options, cell)
    if results is None and (copies := _in_order(x, h0)) is not None:
        x, start = copies
        assert start is not None
        results, h0 = _run(x, start, own, 1, *options, cell), start
    if results is None:
        return None
    return _attach(results, cell, *options, x, h0, *own)[:2]  # type: ignore[no-any-return]
