# SPDX-License-Identifier: Apache-2.0
"""`cta`, forward: one program per batch tile and group runs all T steps with W_hh on chip.

Programs never meet. The state stays in registers, in float32; what a step reads of gates_x is
loaded while the step before it computes. (Left to the compiler's pipeline it was slower.)
"""

import triton
import triton.language as tl
from torch import Tensor

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
from .tiling import Config, cdiv


@triton.jit
def load_gates_x(
    gates_x_ptr,  # (T, B, G, N*H)
    at,
    tile,
    mask,
    CELL: tl.constexpr,
    H: tl.constexpr,
):
    """a_r, a_z, a_n of one step, as stored; a_z in place of the a_r that no_reset lacks."""
    N: tl.constexpr = 2 if CELL == "no_reset" else 3
    a_z = tl.load(gates_x_ptr + at + tile + (N - 2) * H, mask=mask, other=0.0)
    a_n = tl.load(gates_x_ptr + at + tile + (N - 1) * H, mask=mask, other=0.0)
    a_r = a_z
    if CELL != "no_reset":
        a_r = tl.load(gates_x_ptr + at + tile, mask=mask, other=0.0)
    return a_r, a_z, a_n


@triton.jit(do_not_specialize=["T", "B", "G", "first_group", "reverse_bits"])
def forward_cta(
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
    T,
    B,
    G,
    first_group,
    reverse_bits,
    CELL: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,  # a power of two, at least H
    BLOCK_B: tl.constexpr,
    PRECISION: tl.constexpr,
):
    N: tl.constexpr = 2 if CELL == "no_reset" else 3
    backwards = is_backwards(reverse_bits, tl.program_id(1))
    g = (first_group + tl.program_id(1)).to(tl.int64)
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_B
    lane = tl.arange(0, BLOCK_B)
    units = tl.arange(0, BLOCK_H)
    in_rows = first_row + lane < B
    inside = (units[:, None] < H) & in_rows[None, :]
    length = row_lengths(lengths_ptr, first_row, lane, in_rows, T)
    state_at = (g * B + first_row) * H
    state_tile = lane[None, :] * H + units[:, None]
    gates_at = first_row * stride_gates_b + g * stride_gates_g
    gates_tile = lane[None, :] * stride_gates_b + units[:, None]
    dtype = weight_ptr.dtype.element_ty

    weight_at = weight_ptr + g * (N * H * H)
    w_z = load_weight(weight_at + (N - 2) * H * H, units, units, H)
    w_n = load_weight(weight_at + (N - 1) * H * H, units, units, H)
    b_z = load_per_unit(bias_ptr, g, N - 2, units, N, H)
    b_n = load_per_unit(bias_ptr, g, N - 1, units, N, H)
    if CELL != "no_reset":
        w_r = load_weight(weight_at, units, units, H)
        b_r = load_per_unit(bias_ptr, g, 0, units, N, H)
    scale = load_scale(h_scale_ptr, first_row, g, units, lane, inside, G, H)

    t = time_of(0, T, backwards)
    p = tl.load(h0_ptr + state_at + state_tile, mask=inside, other=0.0).to(tl.float32)
    p = enter(
        p, t, length, reset_mask_ptr, reset_state_ptr, state_at, state_tile, first_row, lane,
        in_rows, inside, B, backwards,
    )  # fmt: skip
    live = inside & (t < length)[None, :]
    a_r, a_z, a_n = load_gates_x(
        gates_x_ptr, gates_at + t * stride_gates_t, gates_tile, live, CELL, H
    )
    for step_ in range(T):
        step = step_ + T * 0
        t = time_of(step, T, backwards)
        t_next = time_of(step + 1, T, backwards)
        here = lane * 0 + t_next
        live = inside & (here >= 0)[None, :] & (here < length)[None, :]
        next_r, next_z, next_n = load_gates_x(
            gates_x_ptr, gates_at + t_next * stride_gates_t, gates_tile, live, CELL, H
        )

        s = p * scale
        operand = s.to(dtype)
        z = sigmoid(tl.dot(w_z, operand, acc=a_z.to(tl.float32) + b_z, input_precision=PRECISION))
        r = z
        if CELL != "no_reset":
            a_r = a_r.to(tl.float32) + b_r
            r = sigmoid(tl.dot(w_r, operand, acc=a_r, input_precision=PRECISION))
        a_n = a_n.to(tl.float32)
        q = z
        if CELL == "reset_after":
            q = tl.dot(w_n, operand, input_precision=PRECISION) + b_n
            n = tanh(a_n + r * q)
        elif CELL == "reset_before":
            gated = (r * s).to(dtype)
            n = tanh(tl.dot(w_n, gated, acc=a_n + b_n, input_precision=PRECISION))
        else:
            n = tanh(tl.dot(w_n, operand, acc=a_n + b_n, input_precision=PRECISION))
        p = next_state(p, z, n, t, length, lengths_ptr is not None)
        store_step(
            output_ptr, workspace_ptr, p, q, r, z, n, t, length, first_row, g, units, lane, inside,
            B, G, CELL, H, lengths_ptr is not None, True,
        )  # fmt: skip
        p = enter(
            p, t_next, length, reset_mask_ptr, reset_state_ptr, state_at, state_tile, first_row,
            lane, in_rows, inside, B, backwards,
        )  # fmt: skip
        a_r, a_z, a_n = next_r, next_z, next_n
    tl.store(h_n_ptr + state_at + state_tile, p.to(h_n_ptr.dtype.element_ty), mask=inside)


def launch_forward_cta(
    problem: Problem, output: Tensor, h_n: Tensor, workspace: Tensor | None, config: Config
) -> None:
    """Run all T steps; output, h_n and, unless it is None, workspace are written."""
    for first_group, groups, reverse_bits in problem.launches():
        forward_cta[(cdiv(problem.B, config.BLOCK_B), groups)](
            **problem.forward_arguments(),
            output_ptr=output,
            h_n_ptr=h_n,
            workspace_ptr=workspace,
            first_group=first_group,
            reverse_bits=reverse_bits,
            PRECISION=problem.precision,
            **config.arguments("BLOCK_H", "BLOCK_B"),
        )
