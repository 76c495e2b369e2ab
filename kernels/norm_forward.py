# SPDX-License-Identifier: Apache-2.0
"""Layer-normalised GRU, forward: as `cta_forward`, with a norm between products and gates.

One program per batch tile and group runs all T steps with W_hh on chip. A tile holds whole rows of
3H products, so mean and variance are two reductions inside the program: the reason why there is no
such kernel for H that does not fit one. Equation numbers are those of `gru_fast.reference_norm`.
"""

import triton
import triton.language as tl
from torch import Tensor

from .cta_forward import load_gates_x
from .norm_problem import NormProblem
from .tile import (
    enter,
    is_backwards,
    load_per_unit,
    load_scale,
    load_weight,
    next_state,
    row_lengths,
    sigmoid,
    store_gate,
    tanh,
    time_of,
)
from .tiling import Config, cdiv


@triton.jit
def centred(u, mean, units, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """u - mean, 0 beyond H."""
    d = u - mean[None, :]
    if H < BLOCK_H:
        d = tl.where((units < H)[:, None], d, 0.0)
    return d


@triton.jit
def save_step(
    output_ptr,  # (T, B, G*H)
    workspace_ptr,  # (T, B, G, 6H) or None
    rstd_ptr,  # (T, B, G) or None
    state,
    v_r,
    v_z,
    v_n,
    r,
    z,
    n,
    rstd,
    t,
    length,
    first_row,
    units,
    lane,
    in_rows,
    inside,
    B,
    G,
    g,
    H: tl.constexpr,
    LENGTHS: tl.constexpr,
):
    """Output, workspace and rstd at time t, 0 where the row is not valid."""
    row = (t * B + first_row) * G + g
    h = state
    if LENGTHS:
        valid = t < length
        h = tl.where(valid[None, :], state, 0.0)
    store_gate(output_ptr, row * H, lane[None, :] * (G * H) + units[:, None], 0, h, inside, H)
    if workspace_ptr is not None:
        if LENGTHS:
            v_r = tl.where(valid[None, :], v_r, 0.0)
            v_z = tl.where(valid[None, :], v_z, 0.0)
            v_n = tl.where(valid[None, :], v_n, 0.0)
            r = tl.where(valid[None, :], r, 0.0)
            z = tl.where(valid[None, :], z, 0.0)
            n = tl.where(valid[None, :], n, 0.0)
            rstd = tl.where(valid, rstd, 0.0)
        at = row * (6 * H)
        tile = lane[None, :] * (G * 6 * H) + units[:, None]
        store_gate(workspace_ptr, at, tile, 0, v_r, inside, H)
        store_gate(workspace_ptr, at, tile, 1, v_z, inside, H)
        store_gate(workspace_ptr, at, tile, 2, v_n, inside, H)
        store_gate(workspace_ptr, at, tile, 3, r, inside, H)
        store_gate(workspace_ptr, at, tile, 4, z, inside, H)
        store_gate(workspace_ptr, at, tile, 5, n, inside, H)
        tl.store(rstd_ptr + row + lane * G, rstd.to(rstd_ptr.dtype.element_ty), mask=in_rows)


@triton.jit(do_not_specialize=["eps", "T", "B", "G", "first_group", "reverse_bits"])
def forward_norm(
    gates_x_ptr,  # (T, B, G, 3H)
    stride_gates_t,
    stride_gates_b,
    stride_gates_g,
    h0_ptr,  # (G, B, H)
    weight_ptr,  # (G, 3H, H)
    gamma_ptr,  # (G, 3H)
    bias_ptr,  # (G, 3H) or None
    lengths_ptr,  # (B) or None
    reset_mask_ptr,  # (T, B) or None
    reset_state_ptr,  # (G, B, H) or None
    h_scale_ptr,  # (B, G*H) or None
    output_ptr,  # (T, B, G*H)
    h_n_ptr,  # (G, B, H)
    workspace_ptr,  # (T, B, G, 6H) or None
    rstd_ptr,  # (T, B, G), or None with workspace
    eps,
    T,
    B,
    G,
    first_group,
    reverse_bits,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,  # a power of two, at least H
    BLOCK_B: tl.constexpr,
    PRECISION: tl.constexpr,
):
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
    share: tl.constexpr = 1.0 / (3 * H)

    weight_at = weight_ptr + g * (3 * H * H)
    w_r = load_weight(weight_at, units, units, H)
    w_z = load_weight(weight_at + H * H, units, units, H)
    w_n = load_weight(weight_at + 2 * H * H, units, units, H)
    gain_r = load_per_unit(gamma_ptr, g, 0, units, 3, H)
    gain_z = load_per_unit(gamma_ptr, g, 1, units, 3, H)
    gain_n = load_per_unit(gamma_ptr, g, 2, units, 3, H)
    b_r = load_per_unit(bias_ptr, g, 0, units, 3, H)
    b_z = load_per_unit(bias_ptr, g, 1, units, 3, H)
    b_n = load_per_unit(bias_ptr, g, 2, units, 3, H)
    scale = load_scale(h_scale_ptr, first_row, g, units, lane, inside, G, H)

    t = time_of(0, T, backwards)
    p = tl.load(h0_ptr + state_at + state_tile, mask=inside, other=0.0).to(tl.float32)
    p = enter(
        p, t, length, reset_mask_ptr, reset_state_ptr, state_at, state_tile, first_row, lane,
        in_rows, inside, B, backwards,
    )  # fmt: skip
    live = inside & (t < length)[None, :]
    a_r, a_z, a_n = load_gates_x(
        gates_x_ptr, gates_at + t * stride_gates_t, gates_tile, live, "reset_after", H
    )
    for step_ in range(T):
        step = step_ + T * 0
        t = time_of(step, T, backwards)
        t_next = time_of(step + 1, T, backwards)
        here = lane * 0 + t_next
        live = inside & (here >= 0)[None, :] & (here < length)[None, :]
        next_r, next_z, next_n = load_gates_x(
            gates_x_ptr, gates_at + t_next * stride_gates_t, gates_tile, live, "reset_after", H
        )

        operand = (p * scale).to(dtype)
        u_r = tl.dot(w_r, operand, input_precision=PRECISION)
        u_z = tl.dot(w_z, operand, input_precision=PRECISION)
        u_n = tl.dot(w_n, operand, input_precision=PRECISION)
        mean = tl.sum(u_r + u_z + u_n, axis=0) * share
        v_r = centred(u_r, mean, units, H, BLOCK_H)
        v_z = centred(u_z, mean, units, H, BLOCK_H)
        v_n = centred(u_n, mean, units, H, BLOCK_H)
        variance = tl.sum(v_r * v_r + v_z * v_z + v_n * v_n, axis=0) * share
        rstd = 1.0 / tl.sqrt(variance + eps)
        v_r *= rstd[None, :]
        v_z *= rstd[None, :]
        v_n *= rstd[None, :]
        r = sigmoid(a_r.to(tl.float32) + (v_r * gain_r + b_r))
        z = sigmoid(a_z.to(tl.float32) + (v_z * gain_z + b_z))
        n = tanh(a_n.to(tl.float32) + r * (v_n * gain_n + b_n))
        p = next_state(p, z, n, t, length, lengths_ptr is not None)
        save_step(
            output_ptr, workspace_ptr, rstd_ptr, p, v_r, v_z, v_n, r, z, n, rstd, t, length,
            first_row, units, lane, in_rows, inside, B, G, g, H, lengths_ptr is not None,
        )  # fmt: skip
        p = enter(
            p, t_next, length, reset_mask_ptr, reset_state_ptr, state_at, state_tile, first_row,
            lane, in_rows, inside, B, backwards,
        )  # fmt: skip
        a_r, a_z, a_n = next_r, next_z, next_n
    tl.store(h_n_ptr + state_at + state_tile, p.to(h_n_ptr.dtype.element_ty), mask=inside)


def launch_forward_norm(
    problem: NormProblem,
    output: Tensor,
    h_n: Tensor,
    workspace: Tensor | None,
    rstd: Tensor | None,
    config: Config,
) -> None:
    """Run all T steps; output, h_n and, unless they are None, workspace and rstd are written."""
    for first_group, groups, reverse_bits in problem.scan.launches():
        forward_norm[(cdiv(problem.scan.B, config.BLOCK_B), groups)](
            **problem.forward_arguments(),
            output_ptr=output,
            h_n_ptr=h_n,
            workspace_ptr=workspace,
            rstd_ptr=rstd,
            first_group=first_group,
            reverse_bits=reverse_bits,
            **config.arguments("BLOCK_H", "BLOCK_B"),
        )
