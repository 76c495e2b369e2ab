# SPDX-License-Identifier: Apache-2.0
"""`grid`, forward: one cooperative launch for all T steps, hidden units split over programs.

A program owns BLOCK_H units of one batch tile. Its rows of W_hh stay on chip where they fit
(RESIDENT), else they stream from the L2 cache at every step. s, with the next step's reset already
in it, goes from program to program through `operand`, twice by parity of the step: whoever writes
one half has seen every program of the tile arrive after reading it. Output and workspace are
stored between arriving and waiting.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cta_forward import load_gates_x
from .grid import arrive, grid_launches, load_panels, load_rows, wait
from .problem import Problem
from .tile import (
    enter,
    is_backwards,
    load_per_unit,
    load_scale,
    load_weight,
    next_state,
    row_lengths,
    sigmoid,
    store_step,
    tanh,
    time_of,
)
from .tiling import Config


@triton.jit
def _block(
    acc_r,
    acc_z,
    acc_n,
    w_r,
    w_z,
    w_n,
    operand_ptr,
    operand_at,
    k,
    lane,
    in_rows,
    PART: tl.constexpr,
    CELL: tl.constexpr,
    H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Units k's share of the products of one step, or of one PART of it: equations (2) to (5)."""
    s_k = load_rows(operand_ptr, operand_at, H, k, lane, in_rows, H)
    if PART != "candidate":
        acc_z = tl.dot(w_z, s_k, acc=acc_z, input_precision=PRECISION)
        if CELL != "no_reset":
            acc_r = tl.dot(w_r, s_k, acc=acc_r, input_precision=PRECISION)
    if PART != "gates":
        acc_n = tl.dot(w_n, s_k, acc=acc_n, input_precision=PRECISION)
    return acc_r, acc_z, acc_n


@triton.jit
def gate_products(
    acc_r,
    acc_z,
    acc_n,
    panels_r,
    panels_z,
    panels_n,
    weight_ptr,  # (N*H, H), one group
    operand_ptr,
    operand_at,
    units,
    lane,
    in_rows,
    PART: tl.constexpr,
    CELL: tl.constexpr,
    H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    N: tl.constexpr = 2 if CELL == "no_reset" else 3
    if RESIDENT:
        for block in tl.static_range((H + BLOCK_K - 1) // BLOCK_K):
            k = block * BLOCK_K + tl.arange(0, BLOCK_K)
            acc_r, acc_z, acc_n = _block(
                acc_r, acc_z, acc_n, panels_r[block], panels_z[block], panels_n[block],
                operand_ptr, operand_at, k, lane, in_rows, PART, CELL, H, PRECISION,
            )  # fmt: skip
    else:
        for k0 in range(0, H, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            # What a PART does not use is never loaded.
            w_r = load_weight(weight_ptr, units, k, H)
            w_z = load_weight(weight_ptr + (N - 2) * H * H, units, k, H)
            w_n = load_weight(weight_ptr + (N - 1) * H * H, units, k, H)
            acc_r, acc_z, acc_n = _block(
                acc_r, acc_z, acc_n, w_r, w_z, w_n,
                operand_ptr, operand_at, k, lane, in_rows, PART, CELL, H, PRECISION,
            )  # fmt: skip
    return acc_r, acc_z, acc_n


@triton.jit(do_not_specialize=["T", "B", "G", "first_group", "reverse_bits", "first_tile"])
def forward_grid(
    gates_x_ptr,  # (T, B, G, N*H)
    stride_gates_t,
    stride_gates_b,
    stride_gates_g,
    h0_ptr,  # (G, B, H)
    weight_ptr,  # (G, N*H, H)
    bias_ptr,  # (G, N*H) or None
    lengths_ptr,  # (B) or None
    reset_mask_ptr,  # (T, B) or None
    reset_state_ptr,  # (G, B, H) or None
    h_scale_ptr,  # (B, G*H) or None
    output_ptr,  # (T, B, G*H)
    h_n_ptr,  # (G, B, H)
    workspace_ptr,  # (T, B, G, S*H) or None
    operand_ptr,  # (2, G, B, H)
    gated_ptr,  # (G, B, H) or None: r * s of reset_before
    counters_ptr,  # (groups, batch tiles) of this launch, int32, 0
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
    FIRST_PART: tl.constexpr = "gates" if CELL == "reset_before" else "all"
    MEETINGS: tl.constexpr = 2 if CELL == "reset_before" else 1
    # Large tiles of float32 have no registers for the gates of two steps.
    AHEAD: tl.constexpr = RESIDENT or weight_ptr.dtype.element_ty != tl.float32
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
    state_at = (g * B + first_row) * H
    state_tile = lane[None, :] * H + units[:, None]
    states = B.to(tl.int64) * G * H
    gates_at = first_row * stride_gates_b + g * stride_gates_g
    gates_tile = lane[None, :] * stride_gates_b + units[:, None]
    dtype = weight_ptr.dtype.element_ty

    weight_at = weight_ptr + g * (N * H * H)
    panels_z = load_panels(weight_at + (N - 2) * H * H, units, H, BLOCK_K, RESIDENT)
    panels_n = load_panels(weight_at + (N - 1) * H * H, units, H, BLOCK_K, RESIDENT)
    panels_r = panels_z
    if CELL != "no_reset":
        panels_r = load_panels(weight_at, units, H, BLOCK_K, RESIDENT)
    b_z = load_per_unit(bias_ptr, g, N - 2, units, N, H)
    b_n = load_per_unit(bias_ptr, g, N - 1, units, N, H)
    if CELL != "no_reset":
        b_r = load_per_unit(bias_ptr, g, 0, units, N, H)
    scale = load_scale(h_scale_ptr, first_row, g, units, lane, inside, G, H)

    t = time_of(0, T, backwards)
    p = tl.load(h0_ptr + state_at + state_tile, mask=inside, other=0.0).to(tl.float32)
    p = enter(
        p, t, length, reset_mask_ptr, reset_state_ptr, state_at, state_tile, first_row, lane,
        in_rows, inside, B, backwards,
    )  # fmt: skip
    s = p * scale
    tl.store(operand_ptr + state_at + state_tile, s.to(dtype), mask=inside)
    arrive(counter_ptr)
    if AHEAD:
        live = inside & (t < length)[None, :]
        a_r, a_z, a_n = load_gates_x(
            gates_x_ptr, gates_at + t * stride_gates_t, gates_tile, live, CELL, H
        )
    for step_ in range(T):
        step = step_ + T * 0
        t = time_of(step, T, backwards)
        t_next = time_of(step + 1, T, backwards)
        if AHEAD:
            here = lane * 0 + t_next
            live = inside & (here >= 0)[None, :] & (here < length)[None, :]
            next_r, next_z, next_n = load_gates_x(
                gates_x_ptr, gates_at + t_next * stride_gates_t, gates_tile, live, CELL, H
            )
        else:
            live = inside & (lane * 0 + t < length)[None, :]
            a_r, a_z, a_n = load_gates_x(
                gates_x_ptr, gates_at + t * stride_gates_t, gates_tile, live, CELL, H
            )
        acc_z = a_z.to(tl.float32) + b_z
        acc_r = acc_z
        if CELL != "no_reset":
            acc_r = a_r.to(tl.float32) + b_r
        a_n = a_n.to(tl.float32)
        acc_n = tl.zeros((BLOCK_H, BLOCK_B), tl.float32)
        operand_at = (step % 2) * states + state_at

        wait(counter_ptr, (step * MEETINGS + 1) * programs)
        acc_r, acc_z, acc_n = gate_products(
            acc_r, acc_z, acc_n, panels_r, panels_z, panels_n, weight_at, operand_ptr, operand_at,
            units, lane, in_rows, FIRST_PART, CELL, H, BLOCK_K, RESIDENT, PRECISION,
        )  # fmt: skip
        z = sigmoid(acc_z)
        r = z
        if CELL != "no_reset":
            r = sigmoid(acc_r)
        if CELL == "reset_before":
            tl.store(gated_ptr + state_at + state_tile, (r * s).to(dtype), mask=inside)
            arrive(counter_ptr)
            wait(counter_ptr, (step * MEETINGS + 2) * programs)
            acc_r, acc_z, acc_n = gate_products(
                acc_r, acc_z, acc_n, panels_r, panels_z, panels_n, weight_at, gated_ptr, state_at,
                units, lane, in_rows, "candidate", CELL, H, BLOCK_K, RESIDENT, PRECISION,
            )  # fmt: skip
        q = acc_n + b_n
        if CELL == "reset_after":
            n = tanh(a_n + r * q)
        else:
            n = tanh(a_n + q)

        state = next_state(p, z, n, t, length, lengths_ptr is not None)
        p = enter(
            state, t_next, length, reset_mask_ptr, reset_state_ptr, state_at, state_tile,
            first_row, lane, in_rows, inside, B, backwards,
        )  # fmt: skip
        s = p * scale
        next_at = ((step + 1) % 2) * states + state_at
        tl.store(operand_ptr + next_at + state_tile, s.to(dtype), mask=inside)
        arrive(counter_ptr)
        store_step(
            output_ptr, workspace_ptr, state, q, r, z, n, t, length, first_row, g, units, lane,
            inside, B, G, CELL, H, lengths_ptr is not None, True,
        )  # fmt: skip
        if AHEAD:
            a_r, a_z, a_n = next_r, next_z, next_n
    tl.store(h_n_ptr + state_at + state_tile, p.to(h_n_ptr.dtype.element_ty), mask=inside)


def launch_forward_grid(
    problem: Problem, output: Tensor, h_n: Tensor, workspace: Tensor | None, config: Config
) -> None:
    """Run all T steps; output, h_n and, unless it is None, workspace are written."""
    h0 = problem.h0
    operand = h0.new_empty(2, *h0.shape)
    gated = torch.empty_like(h0) if problem.cell == "reset_before" else None
    for launch in grid_launches(problem, config):
        forward_grid[launch.grid](
            **problem.forward_arguments(),
            output_ptr=output,
            h_n_ptr=h_n,
            workspace_ptr=workspace,
            operand_ptr=operand,
            gated_ptr=gated,
            counters_ptr=launch.counters,
            first_group=launch.first_group,
            reverse_bits=launch.reverse_bits,
            first_tile=launch.first_tile,
            PRECISION=problem.precision,
            launch_cooperative_grid=True,
            **config.arguments("BLOCK_H", "BLOCK_B", "BLOCK_K", "RESIDENT"),
        )
