# SPDX-License-Identifier: Apache-2.0
"""`cta`, backward: one program per batch tile and group, W_hh^T on chip; gate gradients only.

What a step reads does not depend on the gradient, so it is loaded while the steps visited before it
compute: one step ahead by hand, or by the compiler's pipeline (STAGES > 1), which brings 32-bit
values straight to where the layout of the products reads them.
"""

import triton
import triton.language as tl

from .problem import Chunk, turned
from .tile import (
    is_backwards,
    load_scale,
    load_weight,
    row_lengths,
    store_gate,
    time_of,
)
from .tile_backward import (
    chunk_begin,
    gate_gradients,
    load_gate_gradients,
    load_gates,
    pass_back,
    previous_state,
    store_gradients,
)
from .tiling import Config, cdiv


@triton.jit
def load_step(
    grad_output_ptr,  # (T, B, G*H) or None
    h0_ptr,  # (G, B, H)
    reset_mask_ptr,  # (T, B) or None
    reset_state_ptr,  # (G, B, H) or None
    output_ptr,  # (T, B, G*H)
    workspace_ptr,  # (chunk, B, G, S*H)
    t,
    base,
    length,
    first_row,
    g,
    units,
    lane,
    in_rows,
    inside,
    B,
    G,
    backwards,
    CELL: tl.constexpr,
    H: tl.constexpr,
):
    """q, r, z, n, p and grad_output of the step at time t, as stored; 0 where it is not valid."""
    live = inside & (lane * 0 + t < length)[None, :]
    row = ((t - base) * B + first_row) * G + g
    q, r, z, n = load_gates(workspace_ptr, row, units, lane, live, G, CELL, H)
    p = previous_state(
        h0_ptr, output_ptr, reset_mask_ptr, reset_state_ptr, t, length, first_row, g, units, lane,
        in_rows, inside, B, G, backwards, H,
    )  # fmt: skip
    dy = 0.0
    if grad_output_ptr is not None:
        at = ((t * B + first_row) * G + g) * H + lane[None, :] * (G * H) + units[:, None]
        dy = tl.load(grad_output_ptr + at, mask=live, other=0.0)
    return q, r, z, n, p, dy


@triton.jit(
    do_not_specialize=["step_begin", "step_end", "T", "B", "G", "first_group", "reverse_bits"]
)
def backward_cta(
    grad_output_ptr,  # (T, B, G*H) or None
    grad_workspace_ptr,  # (T, B, G, S*H) or None
    h0_ptr,  # (G, B, H)
    turned_ptr,  # (G, N, H, H): every gate of W_hh transposed
    lengths_ptr,  # (B) or None
    reset_mask_ptr,  # (T, B) or None
    reset_state_ptr,  # (G, B, H) or None
    h_scale_ptr,  # (B, G*H) or None
    output_ptr,  # (T, B, G*H)
    workspace_ptr,  # (chunk, B, G, S*H)
    grad_gates_ptr,  # (chunk, B, G, N*H)
    grad_q_ptr,  # (chunk, B, G, H), or None but for reset_after
    grad_state_ptr,  # (G, B, H) float32: gradient of the state after the chunk, then before it
    grad_start_ptr,  # (G, B, H) float32 or None: added to
    grad_scale_ptr,  # (G, B, H) float32 or None: added to
    step_begin,
    step_end,
    T,
    B,
    G,
    first_group,
    reverse_bits,
    CELL: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,  # a power of two, at least H
    BLOCK_B: tl.constexpr,
    STAGES: tl.constexpr,  # 1: loads ahead by hand, else by the compiler
    PRECISION: tl.constexpr,
):
    N: tl.constexpr = 2 if CELL == "no_reset" else 3
    PREFETCH: tl.constexpr = STAGES == 1
    APART: tl.constexpr = BLOCK_H > 32 and PRECISION != "ieee"
    backwards = is_backwards(reverse_bits, tl.program_id(1))
    g = (first_group + tl.program_id(1)).to(tl.int64)
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_B
    lane = tl.arange(0, BLOCK_B)
    units = tl.arange(0, BLOCK_H)
    in_rows = first_row + lane < B
    inside = (units[:, None] < H) & in_rows[None, :]
    length = row_lengths(lengths_ptr, first_row, lane, in_rows, T)
    state_at = (g * B + first_row) * H + lane[None, :] * H + units[:, None]
    base = chunk_begin(step_begin, step_end, T, backwards)
    dtype = turned_ptr.dtype.element_ty

    weight_at = turned_ptr + g * (N * H * H)
    v_z = load_weight(weight_at + (N - 2) * H * H, units, units, H)
    v_n = load_weight(weight_at + (N - 1) * H * H, units, units, H)
    if CELL != "no_reset":
        v_r = load_weight(weight_at, units, units, H)
    scale = load_scale(h_scale_ptr, first_row, g, units, lane, inside, G, H)

    dp = tl.load(grad_state_ptr + state_at, mask=inside, other=0.0)
    if grad_start_ptr is not None:
        d_start = tl.load(grad_start_ptr + state_at, mask=inside, other=0.0)
    if grad_scale_ptr is not None:
        d_scale = tl.load(grad_scale_ptr + state_at, mask=inside, other=0.0)

    if PREFETCH:
        t = time_of(step_end - 1, T, backwards)
        q, r, z, n, p, dy = load_step(
            grad_output_ptr, h0_ptr, reset_mask_ptr, reset_state_ptr, output_ptr, workspace_ptr, t,
            base, length, first_row, g, units, lane, in_rows, inside, B, G, backwards, CELL, H,
        )  # fmt: skip
    for back in tl.range(0, step_end - step_begin, num_stages=STAGES):
        step = step_end - 1 - back
        t = time_of(step, T, backwards)
        if PREFETCH:
            # The last step loads once more its own; there may be no step before it in the chunk.
            t_next = time_of(tl.maximum(step - 1, step_begin), T, backwards)
            next_q, next_r, next_z, next_n, next_p, next_dy = load_step(
                grad_output_ptr, h0_ptr, reset_mask_ptr, reset_state_ptr, output_ptr,
                workspace_ptr, t_next, base, length, first_row, g, units, lane, in_rows, inside, B,
                G, backwards, CELL, H,
            )  # fmt: skip
        else:
            q, r, z, n, p, dy = load_step(
                grad_output_ptr, h0_ptr, reset_mask_ptr, reset_state_ptr, output_ptr,
                workspace_ptr, t, base, length, first_row, g, units, lane, in_rows, inside, B, G,
                backwards, CELL, H,
            )  # fmt: skip

        live = inside
        if lengths_ptr is not None:
            live = inside & (t < length)[None, :]
        row = ((t - base) * B + first_row) * G + g
        p, q, r = p.to(tl.float32), q.to(tl.float32), r.to(tl.float32)
        z, n = z.to(tl.float32), n.to(tl.float32)
        dh = dp
        if grad_output_ptr is not None:
            dh += dy.to(tl.float32)
        kept = dh * z
        if lengths_ptr is not None:
            kept = tl.where(live, kept, dp)
            dh = tl.where(live, dh, 0.0)
        q0, r0, z0, n0 = load_gate_gradients(grad_workspace_ptr, row, units, lane, live, G, CELL, H)
        ar, az, an, dq = gate_gradients(dh, p, q, r, z, n, q0, r0, z0, n0, CELL)
        store_gradients(
            grad_gates_ptr, grad_q_ptr, row, units, lane, inside, G, ar, az, an, dq, CELL, H
        )
        # A sum for each gate: one over all would be a chain of products three times as long. They
        # start from a zero that the compiler does not know, for else it joins them to that chain,
        # as it may where the chain is short, or products take many registers.
        zero = dh * 0.0 if APART else tl.zeros((BLOCK_H, BLOCK_B), tl.float32)
        ds = tl.dot(v_z, az.to(dtype), input_precision=PRECISION)
        if CELL == "reset_before":
            e = tl.dot(v_n, an.to(dtype), input_precision=PRECISION)
            ar = (e * (p * scale) + r0) * r * (1.0 - r)
            tile = lane[None, :] * (G * 3 * H) + units[:, None]
            store_gate(grad_gates_ptr, row * (3 * H), tile, 0, ar, inside, H)
            ds += e * r
        else:
            ds += tl.dot(v_n, dq.to(dtype), acc=zero, input_precision=PRECISION)
        if CELL != "no_reset":
            ds += tl.dot(v_r, ar.to(dtype), acc=zero, input_precision=PRECISION)
        dp, start = pass_back(
            kept, ds, scale, reset_mask_ptr, t, length, first_row, lane, in_rows, B, backwards
        )
        if grad_start_ptr is not None:
            d_start += start
        if grad_scale_ptr is not None:
            d_scale += ds * p
        if PREFETCH:
            q, r, z, n, p, dy = next_q, next_r, next_z, next_n, next_p, next_dy
    tl.store(grad_state_ptr + state_at, dp, mask=inside)
    if grad_start_ptr is not None:
        tl.store(grad_start_ptr + state_at, d_start, mask=inside)
    if grad_scale_ptr is not None:
        tl.store(grad_scale_ptr + state_at, d_scale, mask=inside)


def launch_backward_cta(chunk: Chunk, config: Config) -> None:
    """Run the scan steps of a chunk, from the last to the first."""
    turned_weight = turned(chunk.problem.weight_hh)
    for first_group, groups, reverse_bits in chunk.problem.launches():
        backward_cta[(cdiv(chunk.problem.B, config.BLOCK_B), groups)](
            **chunk.arguments(),
            turned_ptr=turned_weight,
            first_group=first_group,
            reverse_bits=reverse_bits,
            STAGES=config.num_stages,
            **config.arguments("BLOCK_H", "BLOCK_B"),
        )
