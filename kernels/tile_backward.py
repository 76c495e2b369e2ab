# SPDX-License-Identifier: Apache-2.0
"""Device functions of the backward scans. Equation numbers are those of `gru_fast.reference`.

Backward runs over the scan steps of a chunk, from the last to the first. Tensors of a chunk hold
its times only: from step_begin to step_end for a group scanned forwards, from T - step_end to
T - step_begin for one scanned backwards. With a saved workspace the chunk is the whole sequence.
"""

import triton
import triton.language as tl

from .tile import row_resets, store_gate


@triton.jit
def chunk_begin(step_begin, step_end, T, backwards):
    """The first time in the tensors of a chunk."""
    return step_begin + backwards * (T - step_end - step_begin)


@triton.jit
def previous_state(
    h0_ptr,  # (G, B, H)
    output_ptr,  # (T, B, G*H)
    reset_mask_ptr,  # (T, B) or None
    reset_state_ptr,  # (G, B, H) or None
    t,
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
    H: tl.constexpr,
):
    """p of the step at time t, as stored: an earlier output, h0 or reset_state; 0 if not valid."""
    here = lane * 0 + t
    edge = backwards * (length - 1)
    valid = in_rows & (here < length)
    of_output = valid & (here != edge)
    of_h0 = valid & (here == edge)
    state_at = (g * B + first_row) * H + lane[None, :] * H + units[:, None]
    if reset_mask_ptr is not None:
        reset = row_resets(reset_mask_ptr, t, length, first_row, lane, in_rows, B, backwards)
        of_output = of_output & (reset == 0)
        of_h0 = of_h0 & (reset == 0)
    row = ((t - 1 + 2 * backwards) * B + first_row) * G + g
    output_at = row * H + lane[None, :] * (G * H) + units[:, None]
    p = tl.load(output_ptr + output_at, mask=inside & of_output[None, :], other=0.0)
    p += tl.load(h0_ptr + state_at, mask=inside & of_h0[None, :], other=0.0)
    if reset_state_ptr is not None:
        mask = inside & (reset != 0)[None, :]
        p += tl.load(reset_state_ptr + state_at, mask=mask, other=0.0)
    return p


@triton.jit
def load_gates(
    gates_ptr,  # (chunk, B, G, S*H): workspace or its gradient
    row,
    units,
    lane,
    mask,
    G,
    CELL: tl.constexpr,
    H: tl.constexpr,
):
    """q, r, z, n of one step, as stored; z in place of what a cell lacks."""
    S: tl.constexpr = 4 if CELL == "reset_after" else (3 if CELL == "reset_before" else 2)
    at = gates_ptr + row * (S * H) + lane[None, :] * (G * S * H) + units[:, None]
    z = tl.load(at + (S - 2) * H, mask=mask, other=0.0)
    n = tl.load(at + (S - 1) * H, mask=mask, other=0.0)
    q = z
    r = z
    if CELL != "no_reset":
        r = tl.load(at + (S - 3) * H, mask=mask, other=0.0)
    if CELL == "reset_after":
        q = tl.load(at, mask=mask, other=0.0)
    return q, r, z, n


@triton.jit
def load_gate_gradients(
    grad_workspace_ptr,  # (T, B, G, S*H) or None
    row,
    units,
    lane,
    mask,
    G,
    CELL: tl.constexpr,
    H: tl.constexpr,
):
    """Dq0, Dr0, Dz0, Dn0: 0 in first-order use."""
    if grad_workspace_ptr is None:
        return 0.0, 0.0, 0.0, 0.0
    else:
        q0, r0, z0, n0 = load_gates(grad_workspace_ptr, row, units, lane, mask, G, CELL, H)
        return q0.to(tl.float32), r0.to(tl.float32), z0.to(tl.float32), n0.to(tl.float32)


@triton.jit
def gate_gradients(dh, p, q, r, z, n, q0, r0, z0, n0, CELL: tl.constexpr):
    """Equations (7) to (11) as far as no product is needed: Ar, Az, An, Dq.

    For reset_before Ar is 0 here, and Dq stands for An in the cells without it.
    """
    an = (dh * (1.0 - z) + n0) * (1.0 - n * n)
    az = (dh * (p - n) + z0) * z * (1.0 - z)
    if CELL == "reset_after":
        ar = (an * q + r0) * r * (1.0 - r)
        dq = an * r + q0
    else:
        ar = az * 0.0
        dq = an
    return ar, az, an, dq


@triton.jit
def store_gradients(
    grad_gates_ptr,  # (chunk, B, G, N*H)
    grad_q_ptr,  # (chunk, B, G, H) or None
    row,
    units,
    lane,
    inside,
    G,
    ar,
    az,
    an,
    dq,
    CELL: tl.constexpr,
    H: tl.constexpr,
):
    """The rows A and, for reset_after, Dq of one step; Ar of reset_before follows later."""
    N: tl.constexpr = 2 if CELL == "no_reset" else 3
    at = row * (N * H)
    tile = lane[None, :] * (G * N * H) + units[:, None]
    store_gate(grad_gates_ptr, at, tile, N - 2, az, inside, H)
    store_gate(grad_gates_ptr, at, tile, N - 1, an, inside, H)
    if CELL == "reset_after":
        store_gate(grad_gates_ptr, at, tile, 0, ar, inside, H)
        store_gate(grad_q_ptr, row * H, lane[None, :] * (G * H) + units[:, None], 0, dq, inside, H)


@triton.jit
def pass_back(
    kept,
    ds,
    scale,
    reset_mask_ptr,  # (T, B) or None
    t,
    length,
    first_row,
    lane,
    in_rows,
    B,
    backwards,
):
    """Equations (13) and (14): what the state before the step at t receives, and reset_state.

    kept is Dh * z, or in a row that is not valid what the step was given; ds is 0 there.
    """
    dp = kept + ds * scale
    if reset_mask_ptr is None:
        return dp, dp
    else:
        reset = row_resets(reset_mask_ptr, t, length, first_row, lane, in_rows, B, backwards)
        reset = (reset != 0)[None, :]
        return tl.where(reset, 0.0, dp), tl.where(reset, dp, 0.0)
