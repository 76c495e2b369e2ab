# SPDX-License-Identifier: Apache-2.0
"""Batching rules: what `torch.vmap` over the ops means.

A batch over what differs per sequence (x, h0, lengths, resets, h_scale) is a larger B. A batch over
parameters is more groups. So it is backward, but that gradients of parameters, which the kernels
sum over B, are summed here for each member of the batch. Lengths or resets that differ together
with the parameters, and a gradient of the workspace, are a loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gru_fast.autocast import without_autocast
from gru_fast.reference import project, without_padding
from gru_fast.reference_rows import recurrent_factors

Op = Callable[..., Any]
Rule = Callable[..., Any]

# Per op: position of each argument -> name of its role.
_ROLES = {
    "layer": (
        "x", "h0", "weight", "weight", "bias", "bias", "lengths", "reset_mask", "reset_state",
        "h_scale",
    ),
    "scan": ("x", "h0", "weight", "bias", "lengths", "reset_mask", "reset_state", "h_scale"),
}  # fmt: skip
DIFFERENTIABLE = {"layer": (0, 1, 2, 3, 4, 5, 8, 9), "scan": (0, 1, 2, 3, 6, 7)}
"""Positions of the arguments that have a gradient, in the order of the gradients."""

_GRADS = ("grad_output", "grad_h_n", "grad_workspace")
_SAVED = ("output", "workspace")


def front(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """With the batch dimension first, expanded if there is none."""
    if dim is None:
        return tensor.expand(size, *tensor.shape)
    return tensor.movedim(dim, 0)


def _into_batch(role: str, tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    if tensor is None or role in ("weight", "bias"):
        return tensor
    v = front(tensor, dim, size)
    if role in ("lengths", "h_scale"):
        return v.flatten(0, 1)
    return v.movedim(0, 1).flatten(1, 2)


def _into_groups(role: str, tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    if tensor is None or role in ("lengths", "reset_mask"):
        return tensor
    if role == "h_scale":
        return front(tensor, dim, size).movedim(0, 1).flatten(1, 2)
    if role in ("grad_output", "grad_workspace", "output", "workspace"):
        return front(tensor, dim, size).movedim(0, 2).flatten(2, 3)
    if role != "x":
        return front(tensor, dim, size).flatten(0, 1)
    return tensor


def _steps_into_groups(tensor: Tensor, dim: int | None, size: int, groups: int) -> Tensor:
    """Fold x or gates_x; an unbatched x (T, B, I) stays shared by all groups."""
    per_group = tensor.dim() - (dim is not None) == 4
    if dim is None and not per_group:
        return tensor
    v = front(tensor, dim, size).movedim(0, 2)
    if not per_group:
        v = v.unsqueeze(3).expand(*v.shape[:3], groups, v.shape[-1])
    return v.flatten(2, 3)


def loop(
    op: Op, size: int, in_dims: Sequence[Any], args: Sequence[Any]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The operator for one element of the batch after the other.

    Of no elements the shapes are those of one; its zeros are sums of nothing, to keep the graph.
    """

    def of_each(element: Callable[..., Tensor], *which: int) -> list[Any]:
        return [
            element(a, d, *which) if isinstance(a, Tensor) and d is not None else a
            for a, d in zip(args, in_dims, strict=True)
        ]

    if size == 0:
        outputs = tuple(out[None][:0] for out in op(*of_each(lambda a, d: a.sum(d).to(a.dtype))))
        return outputs, (0,) * len(outputs)
    columns = zip(*[op(*of_each(torch.select, v)) for v in range(size)], strict=True)
    outputs = tuple(torch.stack(column) for column in columns)
    return outputs, (0,) * len(outputs)


def forward_rule(op: Op, name: str) -> Rule:
    """The batching rule of `layer` or `scan`; `op` is called with the folded arguments."""
    roles = _ROLES[name]
    count = len(roles)

    def rule(info: Any, in_dims: Sequence[Any], *args: Any) -> Any:
        size = info.batch_size
        if size == 0:
            return loop(op, size, in_dims, args)
        cell, reverse, recompute = args[count:]
        batched = {r for r, d in zip(roles, in_dims, strict=False) if d is not None}
        entries = list(zip(roles, args[:count], in_dims[:count], strict=True))
        if not batched & {"weight", "bias"}:
            folded = [_into_batch(r, a, d, size) for r, a, d in entries]
            output, h_n, workspace = op(*folded, cell, reverse, recompute)
            split = (size, output.shape[1] // size)
            saved = workspace if recompute else workspace.unflatten(1, split)
            return (
                output.unflatten(1, split),
                h_n.unflatten(1, split),
                saved,
            ), (1, 1, None if recompute else 1)
        if not batched & {"lengths", "reset_mask"}:
            groups = _one(args[1], in_dims[1]).shape[0]
            steps = _steps_into_groups(args[0], in_dims[0], size, groups)
            folded = [steps, *[_into_groups(r, a, d, size) for r, a, d in entries[1:]]]
            output, h_n, workspace = op(*folded, cell, list(reverse) * size, recompute)
            saved = workspace if recompute else workspace.unflatten(2, (size, groups))
            return (
                output.unflatten(2, (size, groups * h_n.shape[2])),
                h_n.unflatten(0, (size, groups)),
                saved,
            ), (2, 0, None if recompute else 2)
        return loop(op, size, in_dims, args)

    return rule


def _one(tensor: Tensor, dim: int | None) -> Tensor:
    """A member of the batch."""
    return tensor if dim is None else tensor.select(dim, 0)


def backward_rule(op: Op, scan_backward: Op, name: str) -> Rule:
    """The batching rule of `layer_backward` or `scan_backward`.

    Args:
        op: what is called with the folded arguments.
        scan_backward: the same for `scan_backward`.
        name: "layer" or "scan".
    """
    roles = (*_GRADS, *_ROLES[name], *_SAVED)
    count = len(roles)

    def rule(info: Any, in_dims: Sequence[Any], *args: Any) -> Any:
        size = info.batch_size
        *mode, wanted = args[count:]
        batched = {r for r, d in zip(roles, in_dims, strict=False) if d is not None}
        weights = batched & {"weight", "bias"}
        if size == 0 or args[2] is not None or (weights and batched & {"lengths", "reset_mask"}):
            return loop(op, size, in_dims, args)
        entries = list(zip(roles, args[:count], in_dims[:count], strict=True))
        if mode[-1]:
            entries.pop()
        inputs = [args[len(_GRADS) + i] for i in DIFFERENTIABLE[name]]
        wanted = [w and t is not None for w, t in zip(wanted, inputs, strict=True)]
        if weights:
            grads, dims = _backward_in_groups(op, entries, size, mode, wanted)
        else:
            folded: list[Any] = [_into_batch(r, a, d, size) for r, a, d in entries]
            in_rows = _layer_backward_in_rows if name == "layer" else _scan_backward_in_rows
            with without_autocast(folded[3].device.type):
                grads, dims = in_rows(scan_backward, folded, size, mode, wanted)
        return tuple(grads), tuple(d if w else None for d, w in zip(dims, wanted, strict=True))

    return rule


def _backward_in_groups(
    op: Op, entries: list[Any], size: int, mode: list[Any], wanted: list[bool]
) -> tuple[list[Tensor], list[int]]:
    _, steps, steps_dim = entries[3]
    _, h0, h0_dim = entries[4]
    groups = _one(h0, h0_dim).shape[0]
    shared = steps.dim() - (steps_dim is not None) == 3
    if shared and steps_dim is None and wanted[0]:
        steps, steps_dim = steps.expand(size, *steps.shape), 0
    folded = [_into_groups(r, a, d, size) for r, a, d in entries]
    folded[3] = _steps_into_groups(steps, steps_dim, size, groups)
    cell, reverse, recompute = mode
    if recompute:
        folded.append(h0.new_empty(0))
    grads = list(op(*folded, cell, list(reverse) * size, recompute, wanted))
    dims = [2, *[0] * (len(grads) - 2), 1]
    for k, (dim, want) in enumerate(zip(dims, wanted, strict=True)):
        if want:
            grads[k] = _members(grads[k], dim, size)
    if wanted[0] and shared:
        grads[0] = grads[0].sum(3)
    return grads, dims


def _scan_backward_in_rows(
    op: Op, folded: list[Any], size: int, mode: list[Any], wanted: list[bool]
) -> tuple[list[Tensor], list[int]]:
    cell, _, recompute = mode
    h0 = folded[4]
    if recompute:
        folded.append(h0.new_empty(0))
    rows_wanted = wanted[0] or wanted[2] or wanted[3]
    grads = list(op(*folded, *mode, [rows_wanted, wanted[1], False, False, *wanted[4:]]))
    if wanted[2] or wanted[3]:
        hidden, s, candidate = (
            _members(v, 1, size) for v in recurrent_factors(grads[0], *folded[3:], *mode)
        )
        if wanted[2]:
            split = 2 * h0.shape[2] if cell == "reset_before" else hidden.shape[-1]
            parts = ((hidden[..., :split], s), (hidden[..., split:], candidate))
            grads[2] = torch.cat([torch.einsum("tvbgk,tvbgh->vgkh", *p) for p in parts], 2)
        if wanted[3]:
            grads[3] = hidden.sum((0, 2))
    for k, dim in ((0, 1), (1, 1), (4, 1), (5, 0)):
        if wanted[k]:
            grads[k] = _members(grads[k], dim, size)
    return grads, [1, 1, 0, 0, 1, 0]


def _members(tensor: Any, dim: int, size: int) -> Any:
    """A folded dimension, the batch's members first."""
    return tensor.unflatten(dim, (size, tensor.shape[dim] // size))


def _layer_backward_in_rows(
    scan_backward: Op, folded: list[Any], size: int, mode: list[Any], wanted: list[bool]
) -> tuple[list[Tensor], list[int]]:
    grads_in, (x, h0, weight_ih, weight_hh, bias_ih, bias_hh), rest = (
        folded[:3], folded[3:9], folded[9:],
    )  # fmt: skip
    lengths = rest[0]
    if mode[-1]:
        gates_x = project(x, weight_ih, bias_ih, lengths)
    else:
        # Of these only the shape counts: one row without memory for the others.
        gates_x = x.new_empty(weight_ih.shape[1]).expand(*x.shape[:2], *weight_ih.shape[:2])
    need_x, need_h0, need_ih, need_hh, need_b_ih, need_b_hh, *need_rest = wanted
    need_rows = need_x or need_ih or need_b_ih
    (rows, grad_h0, grad_hh, grad_b_hh, *others), _ = _scan_backward_in_rows(
        scan_backward,
        [*grads_in, gates_x, h0, weight_hh, bias_hh, *rest],
        size,
        mode,
        [need_rows, need_h0, need_hh, need_b_hh, *need_rest],
    )
    grad_x = grad_ih = grad_b_ih = x.new_empty(0)
    group = "" if x.dim() == 3 else "g"
    if need_x:
        grad_x = torch.einsum(f"tvbgk,gki->tvb{group}i", rows, weight_ih)
    if need_ih:
        steps = _members(without_padding(x, lengths), 1, size)
        grad_ih = torch.einsum(f"tvbgk,tvb{group}i->vgki", rows, steps)
    if need_b_ih:
        grad_b_ih = rows.sum((0, 2))
    return [grad_x, grad_h0, grad_ih, grad_hh, grad_b_ih, grad_b_hh, *others], [
        1, 1, 0, 0, 0, 0, 1, 0,
    ]  # fmt: skip


def register(lib: torch.library.Library) -> None:
    """Register the rules of all four ops."""
    scan_backward = torch.ops.gru_fast.scan_backward.default
    for name in _ROLES:
        op = getattr(torch.ops.gru_fast, name).default
        op_backward = getattr(torch.ops.gru_fast, f"{name}_backward").default
        torch.library.register_vmap(f"gru_fast::{name}", forward_rule(op, name), lib=lib)
        torch.library.register_vmap(
            f"gru_fast::{name}_backward", backward_rule(op_backward, scan_backward, name), lib=lib
        )
