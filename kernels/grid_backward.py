# SPDX-License-Identifier: Apache-2.0
"""`grid`, backward: one cooperative launch per chunk, hidden units split over programs.

A program owns BLOCK_H units of one batch tile and the columns of W_hh that lead back to them, on
chip where they fit (RESIDENT). The gate gradients themselves, stored at their own time, are what
the programs exchange; only gate gradients are emitted.
"""

import triton
import triton.language as tl

from .cta_backward import load_step
from .grid import arrive, grid_launches, load_panels, load_rows, wait
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
    pass_back,
    store_gradients,
)
from .tiling import Config


@triton.jit
def _term(
    acc,
    panels,
    rows_ptr,  # (chunk, B, G, K*H), gradients of a chunk
    at,
    stride,
    weight_ptr,  # (H, H), one gate transposed
    units,
    lane,
    in_rows,
    H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + weight^T @ gradients of one gate: a term of equations (10) and (12)."""
    if RESIDENT:
        for block in tl.static_range((H + BLOCK_K - 1) // BLOCK_K):
            k = block * BLOCK_K + tl.arange(0, BLOCK_K)
            d_k = load_rows(rows_ptr, at, stride, k, lane, in_rows, H)
            acc = tl.dot(panels[block], d_k, acc=acc, input_precision=PRECISION)
    else:
        for k0 in range(0, H, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            d_k = load_rows(rows_ptr, at, stride, k, lane, in_rows, H)
            w = load_weight(weight_ptr, units, k, H)
            acc = tl.dot(w, d_k, acc=acc, input_precision=PRECISION)
    return acc


@triton.jit(
    do_not_specialize=[
        "step_begin", "step_end", "T", "B", "G", "first_group", "reverse_bits", "first_tile",
    ]
)  # fmt: skip
def backward_grid(
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
    counters_ptr,  # (groups, batch tiles) of this launch, int32, 0
    step_begin,
    step_end,
    T,
    B,
    G,
    first_group,
    reverse_bits,
    first_tile,
    CELL: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    N: tl.constexpr = 2 if CELL == "no_reset" else 3
    APART: tl.constexpr = RESIDENT and H <= 512
    programs = tl.num_programs(1)
    counter_ptr = counters_ptr + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    backwards = is_backwards(reverse_bits, tl.program_id(2))
    g = (first_group + tl.program_id(2)).to(tl.int64)
    first_row = (first_tile + tl.program_id(0)).to(tl.int64) * BLOCK_B
    lane = tl.arange(0, BLOCK_B)
    units = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    in_rows = first_row + lane < B
    inside = (units[:, None] < H) & in_rows[None, :]
    length = row_lengths(lengths_ptr, first_row, lane, in_rows, T)
    state_at = (g * B + first_row) * H + lane[None, :] * H + units[:, None]
    base = chunk_begin(step_begin, step_end, T, backwards)

    weight_r = turned_ptr + g * (N * H * H)
    weight_z = weight_r + (N - 2) * H * H
    weight_n = weight_r + (N - 1) * H * H
    v_z = load_panels(weight_z, units, H, BLOCK_K, RESIDENT)
    v_n = load_panels(weight_n, units, H, BLOCK_K, RESIDENT)
    if CELL != "no_reset":
        v_r = load_panels(weight_r, units, H, BLOCK_K, RESIDENT)
    scale = load_scale(h_scale_ptr, first_row, g, units, lane, inside, G, H)

    dp = tl.load(grad_state_ptr + state_at, mask=inside, other=0.0)
    if grad_start_ptr is not None:
        d_start = tl.load(grad_start_ptr + state_at, mask=inside, other=0.0)
    if grad_scale_ptr is not None:
        d_scale = tl.load(grad_scale_ptr + state_at, mask=inside, other=0.0)

    arrivals = programs * 0
    t = time_of(step_end - 1, T, backwards)
    q, r, z, n, p, dy = load_step(
        grad_output_ptr, h0_ptr, reset_mask_ptr, reset_state_ptr, output_ptr, workspace_ptr, t,
        base, length, first_row, g, units, lane, in_rows, inside, B, G, backwards, CELL, H,
    )  # fmt: skip
    for back in range(step_end - step_begin):
        step = step_end - 1 - back
        t = time_of(step, T, backwards)
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
        arrive(counter_ptr)
        # The last step loads once more its own; there may be no step before it in the chunk.
        t_next = time_of(tl.maximum(step - 1, step_begin), T, backwards)
        next_q, next_r, next_z, next_n, next_p, next_dy = load_step(
            grad_output_ptr, h0_ptr, reset_mask_ptr, reset_state_ptr, output_ptr, workspace_ptr,
            t_next, base, length, first_row, g, units, lane, in_rows, inside, B, G, backwards,
            CELL, H,
        )  # fmt: skip
        arrivals += programs
        wait(counter_ptr, arrivals)

        at = row * (N * H)
        stride = G * N * H
        zeros = tl.zeros((BLOCK_H, BLOCK_B), tl.float32)
        # APART, a sum for each gate: one over all would be a chain of products three times as long.
        # Where tiles are large a second sum has no registers.
        ds = zeros
        if CELL == "reset_before":
            e = _term(
                zeros, v_n, grad_gates_ptr, at + 2 * H, stride, weight_n, units, lane, in_rows,
                H, BLOCK_K, RESIDENT, PRECISION,
            )  # fmt: skip
            ar = (e * (p * scale) + r0) * r * (1.0 - r)
            tile = lane[None, :] * stride + units[:, None]
            store_gate(grad_gates_ptr, at, tile, 0, ar, inside, H)
            arrive(counter_ptr)
            arrivals += programs
            wait(counter_ptr, arrivals)
            ds = e * r
        ds = _term(
            ds, v_z, grad_gates_ptr, at + (N - 2) * H, stride, weight_z, units, lane, in_rows,
            H, BLOCK_K, RESIDENT, PRECISION,
        )  # fmt: skip
        if CELL != "no_reset":
            part = _term(
                zeros if APART else ds, v_r, grad_gates_ptr, at, stride, weight_r, units, lane,
                in_rows, H, BLOCK_K, RESIDENT, PRECISION,
            )  # fmt: skip
            ds = ds + part if APART else part
        if CELL == "reset_after":
            part = _term(
                zeros if APART else ds, v_n, grad_q_ptr, row * H, G * H, weight_n, units, lane,
                in_rows, H, BLOCK_K, RESIDENT, PRECISION,
            )  # fmt: skip
            ds = ds + part if APART else part
        elif CELL == "no_reset":
            part = _term(
                zeros if APART else ds, v_n, grad_gates_ptr, at + H, stride, weight_n, units,
                lane, in_rows, H, BLOCK_K, RESIDENT, PRECISION,
            )  # fmt: skip
            ds = ds + part if APART else part
        dp, start = pass_back(
            kept, ds, scale, reset_mask_ptr, t, length, first_row, lane, in_rows, B, backwards
        )
        if grad_start_ptr is not None:
            d_start += start
        if grad_scale_ptr is not None:
            d_scale += ds * p
        q, r, z, n, p, dy = next_q, next_r, next_z, next_n, next_p, next_dy
    tl.store(grad_state_ptr + state_at, dp, mask=inside)
    if grad_start_ptr is not None:
        tl.store(grad_start_ptr + state_at, d_start, mask=inside)
    if grad_scale_ptr is not None:
        tl.store(grad_scale_ptr + state_at, d_scale, mask=inside)


def launch_backward_grid(chunk: Chunk, config: Config) -> None:
    """Run the scan steps of a chunk, from the last to the first."""
    turned_weight = turned(chunk.problem.weight_hh)
    for launch in grid_launches(chunk.problem, config):
        backward_grid[launch.grid](
            **chunk.arguments(),
            turned_ptr=turned_weight,
            counters_ptr=launch.counters,
            first_group=launch.first_group,
            reverse_bits=launch.reverse_bits,
            first_tile=launch.first_tile,
            launch_cooperative_grid=True,
            **config.arguments("BLOCK_H", "BLOCK_B", "BLOCK_K", "RESIDENT"),
        )
