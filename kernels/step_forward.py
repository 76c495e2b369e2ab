# SPDX-License-Identifier: Apache-2.0
"""`step`, forward: one launch per time step, two for reset_before; the launch is the barrier.

Takes every shape on every device. Two buffers carry the state from one launch to the next, both
with the next step's reset already in them: `carry`, the float32 p that only its own tile reads,
and `operand`, the s that every tile reads, in the dtype of the product and twice, by parity of the
step.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launches
from .problem import Problem
from .tile import (
    enter,
    is_backwards,
    load_gate,
    load_per_unit,
    load_scale,
    next_state,
    row_lengths,
    row_starts,
    save_gates,
    sigmoid,
    store_step,
    tanh,
    time_of,
)
from .tiling import Config, cdiv


@triton.jit
def _operand(
    operand_ptr,  # (G, B, H)
    h0_ptr,  # (G, B, H)
    lengths_ptr,  # (B) or None
    reset_mask_ptr,  # (T, B) or None
    reset_state_ptr,  # (G, B, H) or None
    h_scale_ptr,  # (B, G*H) or None
    k,
    t,
    first_row,
    g,
    lane,
    T,
    B,
    G,
    backwards,
    FIRST: tl.constexpr,
    H: tl.constexpr,
):
    """Units k of what enters the product, (k, rows): made of h0 in the first step."""
    in_rows = first_row + lane < B
    inside = (k[:, None] < H) & in_rows[None, :]
    state_at = (g * B + first_row) * H
    state_tile = lane[None, :] * H + k[:, None]
    if FIRST:
        h = tl.load(h0_ptr + state_at + state_tile, mask=inside, other=0.0).to(tl.float32)
        length = row_lengths(lengths_ptr, first_row, lane, in_rows, T)
        h = enter(
            h, t, length, reset_mask_ptr, reset_state_ptr, state_at, state_tile, first_row, lane,
            in_rows, inside, B, backwards,
        )  # fmt: skip
        s = h * load_scale(h_scale_ptr, first_row, g, k, lane, inside, G, H)
        return s.to(h0_ptr.dtype.element_ty)
    else:
        return tl.load(operand_ptr + state_at + state_tile, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["step", "T", "B", "G", "first_group", "reverse_bits"])
def forward_step(
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
    carry_ptr,  # (G, B, H) float32
    operand_ptr,  # (2, G, B, H)
    gated_ptr,  # (G, B, H) or None: r * s of reset_before
    update_ptr,  # (G, B, H) float32 or None: z of reset_before
    step,
    T,
    B,
    G,
    first_group,
    reverse_bits,
    FIRST: tl.constexpr,
    PART: tl.constexpr,  # "all", or of reset_before "gates" and then "candidate"
    CELL: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    N: tl.constexpr = 2 if CELL == "no_reset" else 3
    backwards = is_backwards(reverse_bits, tl.program_id(2))
    g = (first_group + tl.program_id(2)).to(tl.int64)
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_B
    lane = tl.arange(0, BLOCK_B)
    units = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    in_rows = first_row + lane < B
    inside = (units[:, None] < H) & in_rows[None, :]
    length = row_lengths(lengths_ptr, first_row, lane, in_rows, T)
    t = time_of(step, T, backwards)
    state_at = (g * B + first_row) * H
    state_tile = lane[None, :] * H + units[:, None]
    states = B.to(tl.int64) * G * H

    live = inside
    if lengths_ptr is not None:
        live = inside & (t < length)[None, :]
    gates_at = t * stride_gates_t + first_row * stride_gates_b + g * stride_gates_g
    gates_tile = lane[None, :] * stride_gates_b + units[:, None]

    # The products, block by block of k: equations (2) to (5).
    source_ptr = operand_ptr + (step % 2) * states
    weight_at = weight_ptr + g * (N * H * H)
    acc_r = tl.zeros((BLOCK_H, BLOCK_B), tl.float32)
    acc_z = tl.zeros((BLOCK_H, BLOCK_B), tl.float32)
    acc_n = tl.zeros((BLOCK_H, BLOCK_B), tl.float32)
    for k0 in range(0, H, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        tile = weight_at + row_starts(units[:, None], H) + k[None, :]
        in_weight = (units[:, None] < H) & (k[None, :] < H)
        if PART == "candidate":
            mask = (k[:, None] < H) & in_rows[None, :]
            s_k = tl.load(
                gated_ptr + state_at + lane[None, :] * H + k[:, None], mask=mask, other=0.0
            )
        else:
            s_k = _operand(
                source_ptr, h0_ptr, lengths_ptr, reset_mask_ptr, reset_state_ptr, h_scale_ptr,
                k, t, first_row, g, lane, T, B, G, backwards, FIRST, H,
            )  # fmt: skip
        if PART != "candidate":
            if CELL != "no_reset":
                w_r = tl.load(tile, mask=in_weight, other=0.0)
                acc_r = tl.dot(w_r, s_k, acc=acc_r, input_precision=PRECISION)
            w_z = tl.load(tile + (N - 2) * H * H, mask=in_weight, other=0.0)
            acc_z = tl.dot(w_z, s_k, acc=acc_z, input_precision=PRECISION)
        if PART != "gates":
            w_n = tl.load(tile + (N - 1) * H * H, mask=in_weight, other=0.0)
            acc_n = tl.dot(w_n, s_k, acc=acc_n, input_precision=PRECISION)

    # p of this tile, in float32.
    scale = load_scale(h_scale_ptr, first_row, g, units, lane, inside, G, H)
    if FIRST:
        p = tl.load(h0_ptr + state_at + state_tile, mask=inside, other=0.0).to(tl.float32)
        p = enter(
            p, t, length, reset_mask_ptr, reset_state_ptr, state_at, state_tile, first_row, lane,
            in_rows, inside, B, backwards,
        )  # fmt: skip
    else:
        p = tl.load(carry_ptr + state_at + state_tile, mask=inside, other=0.0)

    if PART != "candidate":
        a_z = load_gate(gates_x_ptr, gates_at, gates_tile, N - 2, live, H)
        z = sigmoid(a_z + acc_z + load_per_unit(bias_ptr, g, N - 2, units, N, H))
        r = z
        if CELL != "no_reset":
            a_r = load_gate(gates_x_ptr, gates_at, gates_tile, 0, live, H)
            r = sigmoid(a_r + acc_r + load_per_unit(bias_ptr, g, 0, units, N, H))
    if PART == "gates":
        gated = (r * (p * scale)).to(gated_ptr.dtype.element_ty)
        tl.store(gated_ptr + state_at + state_tile, gated, mask=inside)
        tl.store(update_ptr + state_at + state_tile, z, mask=inside)
        row = (t * B + first_row) * G + g
        save_gates(
            workspace_ptr, z, r, z, z, t, length, row, units, lane, inside, G,
            CELL, H, lengths_ptr is not None, True, False,
        )  # fmt: skip
    else:
        a_n = load_gate(gates_x_ptr, gates_at, gates_tile, N - 1, live, H)
        q = acc_n + load_per_unit(bias_ptr, g, N - 1, units, N, H)
        if PART == "candidate":
            z = tl.load(update_ptr + state_at + state_tile, mask=inside, other=0.0)
            r = z
        if CELL == "reset_after":
            n = tanh(a_n + r * q)
        else:
            n = tanh(a_n + q)
        state = next_state(p, z, n, t, length, lengths_ptr is not None)
        store_step(
            output_ptr, workspace_ptr, state, q, r, z, n, t, length, first_row, g, units, lane,
            inside, B, G, CELL, H, lengths_ptr is not None, PART == "all",
        )  # fmt: skip
        if step + 1 == T:
            state_out = state.to(h_n_ptr.dtype.element_ty)
            tl.store(h_n_ptr + state_at + state_tile, state_out, mask=inside)
        else:
            t_next = time_of(step + 1, T, backwards)
            state = enter(
                state, t_next, length, reset_mask_ptr, reset_state_ptr, state_at, state_tile,
                first_row, lane, in_rows, inside, B, backwards,
            )  # fmt: skip
            tl.store(carry_ptr + state_at + state_tile, state, mask=inside)
            s = (state * scale).to(operand_ptr.dtype.element_ty)
            target_ptr = operand_ptr + ((step + 1) % 2) * states
            tl.store(target_ptr + state_at + state_tile, s, mask=inside)


def launch_forward_step(
    problem: Problem, output: Tensor, h_n: Tensor, workspace: Tensor | None, config: Config
) -> None:
    """Run all T steps; output, h_n and, unless it is None, workspace are written."""
    G, B, H = problem.G, problem.B, problem.H
    h0 = problem.h0
    carry = torch.empty_like(h0, dtype=torch.float32)
    operand = h0.new_empty(2, G, B, H)
    gated = update = None
    parts = ("all",)
    if problem.cell == "reset_before":
        gated, update = torch.empty_like(h0), torch.empty_like(h0, dtype=torch.float32)
        parts = ("gates", "candidate")
    arguments = problem.forward_arguments() | {
        "output_ptr": output,
        "h_n_ptr": h_n,
        "workspace_ptr": workspace,
        "carry_ptr": carry,
        "operand_ptr": operand,
        "gated_ptr": gated,
        "update_ptr": update,
        "PRECISION": problem.precision,
        **config.arguments("BLOCK_H", "BLOCK_B", "BLOCK_K"),
    }
    for first_group, groups, reverse_bits in problem.launches():
        grid = (cdiv(B, config.BLOCK_B), cdiv(H, config.BLOCK_H), groups)
        part_of = {"first_group": first_group, "reverse_bits": reverse_bits}
        launch = Launches(forward_step, grid, arguments | part_of, "step")
        for step in range(problem.T):
            for part in parts:
                launch(step, FIRST=step == 0, PART=part)
