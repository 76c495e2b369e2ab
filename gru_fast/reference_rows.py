# SPDX-License-Identifier: Apache-2.0
"""Gradients of the weights for each row of the batch by itself, which no kernel sums: their parts.

Names and equation numbers are those of `reference`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gru_fast.reference import SLOTS, by_group, gates, masks, previous_states, scan_order


def recurrent_factors(
    grad_gates_x: Tensor,
    gates_x: Tensor,
    h0: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    lengths: Tensor | None,
    reset_mask: Tensor | None,
    reset_state: Tensor | None,
    h_scale: Tensor | None,
    output: Tensor,
    workspace: Tensor,
    cell: str,
    reverse: Sequence[bool],
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the products and sums of equation (16) are made of, for one sum per row of the batch.

    Returns:
        P (T, B, G, N*H), s (T, B, G, H), and what the candidate's rows multiply: r * s in
        reset_before, else s.
    """
    T, H = output.shape[0], h0.shape[-1]
    valid, reset = masks(lengths, reset_mask, T, reverse)
    scale = by_group(h_scale, h0)
    start = torch.zeros_like(h0) if reset_state is None else reset_state
    p = previous_states(output, h0, valid, reset, start, reverse)
    s = p if scale is None else p * scale
    rows = scan_order(grad_gates_x.transpose(1, 2), reverse)
    candidate = s
    if cell != "no_reset":
        if recompute:
            a = scan_order(gates_x.transpose(1, 2), reverse)
            a = a if valid is None else torch.where(valid, a, 0.0)
            r = gates(a, s, weight_hh, bias_hh, cell)[-3]
        else:
            slots = scan_order(workspace.transpose(1, 2), reverse)
            r = slots.chunk(SLOTS[cell], -1)[-3]
        if cell == "reset_before":
            candidate = r * s
        else:
            rows = torch.cat([rows[..., : 2 * H], rows[..., 2 * H :] * r], -1)
    P, s, candidate = (scan_order(v, reverse).transpose(1, 2) for v in (rows, s, candidate))
    return P, s, candidate
