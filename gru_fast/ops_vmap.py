# SPDX-License-Identifier: Apache-2.0
"""Batching rules: what `torch.vmap` over the ops means.

A batch over what differs per sequence (x, h0, lengths, resets, h_scale) is a larger B. A batch over
parameters is more groups. Everything else, and the backward ops, which sum over B, is a loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Per op: position of each argument -> name of its role.
_ROLES = {
    "layer": (
        "x", "h0", "weight", "weight", "bias", "bias", "lengths", "reset_mask", "reset_state",
        "h_scale",
    ),
    "scan": ("x", "h0", "weight", "bias", "lengths", "reset_mask", "reset_state", "h_scale"),
}  # fmt: skip


def _front(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """With the batch dimension first, expanded if there is none."""
    if dim is None:
        return tensor.expand(size, *tensor.shape)
    return tensor.movedim(dim, 0)


def _into_batch(role: str, tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    if tensor is None or role in ("weight", "bias"):
        return tensor
    v = _front(tensor, dim, size)
    if role in ("lengths", "h_scale"):
        return v.flatten(0, 1)
    return v.movedim(0, 1).flatten(1, 2)


def _into_groups(role: str, tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    if tensor is None or role in ("lengths", "reset_mask"):
        return tensor
    if role == "h_scale":
        return _front(tensor, dim, size).movedim(0, 1).flatten(1, 2)
    if role != "x":
        return _front(tensor, dim, size).flatten(0, 1)
    return tensor


def _steps_into_groups(tensor: Tensor, dim: int | None, size: int, groups: int) -> Tensor:
    """Fold x or gates_x; an unbatched x (T, B, I) stays shared by all groups."""
    per_group = tensor.dim() - (dim is not None) == 4
    if dim is None and not per_group:
        return tensor
    v = _front(tensor, dim, size).movedim(0, 2)
    if not per_group:
        v = v.unsqueeze(3).expand(*v.shape[:3], groups, v.shape[-1])
    return v.flatten(2, 3)


def _loop(
    op: Callable[..., tuple[Tensor, ...]], size: int, in_dims: Sequence[Any], args: Sequence[Any]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    def slices(v: int) -> list[Any]:
        return [
            a.select(d, v) if isinstance(a, Tensor) and d is not None else a
            for a, d in zip(args, in_dims, strict=True)
        ]

    if size == 0:
        raise RuntimeError("torch.vmap over a dimension of size 0 is not supported here")
    columns = zip(*[op(*slices(v)) for v in range(size)], strict=True)
    outputs = tuple(torch.stack(column) for column in columns)
    return outputs, (0,) * len(outputs)


def _forward_rule(name: str) -> Callable[..., Any]:
    op = getattr(torch.ops.gru_fast, name).default
    roles = _ROLES[name]
    count = len(roles)

    def rule(info: Any, in_dims: Sequence[Any], *args: Any) -> Any:
        size = info.batch_size
        cell, reverse, recompute = args[count:]
        batched = {r for r, d in zip(roles, in_dims, strict=False) if d is not None}
        entries = list(zip(roles, args[:count], in_dims[:count], strict=True))
        if not batched & {"weight", "bias"}:
            folded = [_into_batch(r, a, d, size) for r, a, d in entries]
            output, h_n, workspace = op(*folded, cell, reverse, recompute)
            split = (size, output.shape[1] // max(size, 1))
            saved = workspace if recompute else workspace.unflatten(1, split)
            return (
                output.unflatten(1, split),
                h_n.unflatten(1, split),
                saved,
            ), (1, 1, None if recompute else 1)
        if not batched & {"lengths", "reset_mask"}:
            h0, h0_dim = args[1], in_dims[1]
            groups = (h0 if h0_dim is None else h0.movedim(h0_dim, 0)[0]).shape[0]
            steps = _steps_into_groups(args[0], in_dims[0], size, groups)
            folded = [steps, *[_into_groups(r, a, d, size) for r, a, d in entries[1:]]]
            output, h_n, workspace = op(*folded, cell, list(reverse) * size, recompute)
            saved = workspace if recompute else workspace.unflatten(2, (size, groups))
            return (
                output.unflatten(2, (size, groups * h_n.shape[2])),
                h_n.unflatten(0, (size, groups)),
                saved,
            ), (2, 0, None if recompute else 2)
        return _loop(op, size, in_dims, args)

    return rule


def _backward_rule(name: str) -> Callable[..., Any]:
    op = getattr(torch.ops.gru_fast, name).default

    def rule(info: Any, in_dims: Sequence[Any], *args: Any) -> Any:
        return _loop(op, info.batch_size, in_dims, args)

    return rule


def register(lib: torch.library.Library) -> None:
    """Register the rules of all four ops."""
    for name in ("layer", "scan"):
        torch.library.register_vmap(f"gru_fast::{name}", _forward_rule(name), lib=lib)
        torch.library.register_vmap(
            f"gru_fast::{name}_backward", _backward_rule(f"{name}_backward"), lib=lib
        )
