# SPDX-License-Identifier: Apache-2.0
"""Multi-head layers: block-diagonal recurrent weights as more groups of one call.

Every head sees the whole input of the layer and its own part of the state. The tensors are those
of a plain layer, gate by gate over all units, but that each row of weight_hh has the columns of
its head only: the rule by which torch stores the weights of a grouped convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from gru_fast import recurrence
from gru_fast.checks import check_cell
from gru_fast.recurrence import FORWARD
from gru_fast.reference import GATES, SLOTS


def check_num_heads(num_heads: int, weight_hh: Tensor, cell: str) -> None:
    """Raise ValueError unless num_heads divides the H of weight_hh (N*H, *)."""
    check_cell(cell)
    H = weight_hh.shape[0] // GATES[cell]
    if num_heads < 1 or H % num_heads:
        raise ValueError(f"num_heads: expected a divisor of the hidden size {H}, got {num_heads}")


def layer(
    x: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    num_heads: int,
    cell: str,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`recurrence.layer` of D directions with K heads of H/K units each.

    Args:
        x: (T, B, I).
        h0: (D, B, H).
        weight_ih: (D, N*H, I).
        weight_hh: (D, N*H, H/K).
        bias_ih: (D, N*H) or None.
        bias_hh: (D, N*H) or None.
        num_heads: K, a divisor of H.
        cell: as in `recurrence.layer`.
        **options: the other arguments of `recurrence.layer` for D groups of H units.

    Returns:
        output (T, B, D*H) and h_n (D, B, H).

    Raises:
        RuntimeError: as `recurrence.layer`.
    """
    tensors = (weight_ih, weight_hh, bias_ih, bias_hh)
    output, h_n = _run(recurrence.layer, x, h0, tensors, num_heads, cell, options)
    return output, h_n


def layer_with_gates(
    x: Tensor, h0: Tensor, *tensors: Tensor, num_heads: int, cell: str, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """`recurrence.layer_with_gates` with heads; the workspace is that of D groups of H units."""
    run = recurrence.layer_with_gates
    output, h_n, workspace = _run(run, x, h0, tensors, num_heads, cell, options)
    D, _, H = h0.shape
    T, B = workspace.shape[:2]
    by_head = workspace.reshape(T, B, D, num_heads, SLOTS[cell], H // num_heads)
    return output, h_n, by_head.transpose(3, 4).reshape(T, B, D, SLOTS[cell] * H)


def _run(
    run: Callable[..., tuple[Tensor, ...]],
    x: Tensor,
    h0: Tensor,
    tensors: Sequence[Tensor | None],
    num_heads: int,
    cell: str,
    options: dict[str, Any],
) -> tuple[Tensor, ...]:
    D, _, H = h0.shape
    N, units = GATES[cell], H // num_heads
    weight_hh = tensors[1]
    assert weight_hh is not None
    if weight_hh.shape != (D, N * H, units):
        raise RuntimeError(
            f"weight_hh: expected shape (D, {N}*H, H/num_heads) = {(D, N * H, units)} with "
            f"num_heads={num_heads}, got {tuple(weight_hh.shape)}"
        )
    options = dict(options)
    output, h_n, *others = run(
        x,
        *by_head(h0, tensors, num_heads, cell),
        cell=cell,
        reverse=flags_by_head(options.pop("reverse", FORWARD), num_heads),
        reset_state=states_by_head(options.pop("reset_state", None), num_heads),
        **options,
    )
    return output, whole_states(h_n, num_heads), *others


def by_head(
    h0: Tensor, weights: Sequence[Tensor | None], num_heads: int, cell: str
) -> list[Tensor | None]:
    """The state (D, B, H) and the weights (D, N*H, *) of D directions as those of D*K groups."""
    rows = (_rows_by_head(weight, num_heads, cell) for weight in weights)
    return [states_by_head(h0, num_heads), *rows]


def whole(grads: Sequence[Tensor], num_heads: int, cell: str) -> list[Tensor]:
    """What `by_head` had been given, of gradients; those not asked for have no elements."""
    state, *weights = grads
    rows = (_whole_rows(grad, num_heads, cell) if grad.numel() else grad for grad in weights)
    return [whole_states(state, num_heads) if state.numel() else state, *rows]


def flags_by_head(flags: Sequence[bool], num_heads: int) -> list[bool]:
    """For each group the flag of its direction."""
    return [flag for flag in flags for _ in range(num_heads)]


def _rows_by_head(tensor: Tensor | None, num_heads: int, cell: str) -> Tensor | None:
    """(D, N*H, *) as (D*K, N*H/K, *)."""
    if tensor is None or num_heads == 1:
        return tensor
    D, rows, *columns = tensor.shape
    N = GATES[cell]
    apart = tensor.reshape(D, N, num_heads, rows // (N * num_heads), *columns).transpose(1, 2)
    return apart.reshape(D * num_heads, rows // num_heads, *columns)


def _whole_rows(tensor: Tensor, num_heads: int, cell: str) -> Tensor:
    """What `_rows_by_head` had been given."""
    if num_heads == 1:
        return tensor
    D, N, units = tensor.shape[0] // num_heads, GATES[cell], tensor.shape[1] // GATES[cell]
    by_gate = tensor.reshape(D, num_heads, N, units, *tensor.shape[2:]).transpose(1, 2)
    return by_gate.reshape(D, N * num_heads * units, *tensor.shape[2:])


def states_by_head(tensor: Tensor | None, num_heads: int) -> Tensor | None:
    """(D, B, H) as (D*K, B, H/K)."""
    if tensor is None or num_heads == 1:
        return tensor
    D, B, H = tensor.shape
    apart = tensor.reshape(D, B, num_heads, H // num_heads).transpose(1, 2)
    return apart.reshape(D * num_heads, B, H // num_heads)


def whole_states(tensor: Tensor, num_heads: int) -> Tensor:
    """What `states_by_head` had been given."""
    if num_heads == 1:
        return tensor
    groups, B, units = tensor.shape
    by_row = tensor.reshape(groups // num_heads, num_heads, B, units).transpose(1, 2)
    return by_row.reshape(groups // num_heads, B, num_heads * units)
