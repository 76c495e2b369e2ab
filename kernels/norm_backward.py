# SPDX-License-Identifier: Apache-2.0
"""Layer-normalised GRU, backward: as `cta_backward`, with the norm's backward before the product.

One program per batch tile and group, W_hh^T on chip. It emits the gradients of the gates, of q and
of the products u; weight, gain and bias follow as products and sums over all times. Loads ahead are
the compiler's (STAGES > 1). Equation numbers are those of `gru_fast.reference_norm`.
"""

import triton
import triton.language as tl

from .norm_problem import NormChunk
from .tile import (
    is_backwards,
    load_gate,
    load_per_unit,
    load_scale,
    load_weight,
    row_lengths,
    store_gate,
    time_of,
)
from .tile_backward import chunk_begin, pass_back, previous_state
from .tiling import Config, cdiv


@triton.jit(
    do_not_specialize=["step_begin", "step_end", "T", "B", "G", "first_group", "reverse_bits"]
)
def backward_norm(
    grad_output_ptr,  # (T, B, G*H) or None
    h0_ptr,  # (G, B, H)
    turned_ptr,  # (G, 3, H, H): every gate of W_hh transposed
    gamma_ptr,  # (G, 3H)
    bias_ptr,  # (G, 3H) or None
    lengths_ptr,  # (B) or None
    reset_mask_ptr,  # (T, B) or None
    reset_state_ptr,  # (G, B, H) or None
    h_scale_ptr,  # (B, G*H) or None
    output_ptr,  # (T, B, G*H)
    workspace_ptr,  # (chunk, B, G, 6H)
    rstd_ptr,  # (chunk, B, G)
    grad_gates_ptr,  # (chunk, B, G, 3H)
    grad_q_ptr,  # (chunk, B, G, H)
    grad_u_ptr,  # (chunk, B, G, 3H)
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
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,  # a power of two, at least H
    BLOCK_B: tl.constexpr,
    STAGES: tl.constexpr,
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
    state_at = (g * B + first_row) * H + lane[None, :] * H + units[:, None]
    base = chunk_begin(step_begin, step_end, T, backwards)
    dtype = turned_ptr.dtype.element_ty
    share: tl.constexpr = 1.0 / (3 * H)

    weight_at = turned_ptr + g * (3 * H * H)
    w_r = load_weight(weight_at, units, units, H)
    w_z = load_weight(weight_at + H * H, units, units, H)
    w_n = load_weight(weight_at + 2 * H * H, units, units, H)
    gain_r = load_per_unit(gamma_ptr, g, 0, units, 3, H)
    gain_z = load_per_unit(gamma_ptr, g, 1, units, 3, H)
    gain_n = load_per_unit(gamma_ptr, g, 2, units, 3, H)
    b_n = load_per_unit(bias_ptr, g, 2, units, 3, H)
    scale = load_scale(h_scale_ptr, first_row, g, units, lane, inside, G, H)

    dp = tl.load(grad_state_ptr + state_at, mask=inside, other=0.0)
    if grad_start_ptr is not None:
        d_start = tl.load(grad_start_ptr + state_at, mask=inside, other=0.0)
    if grad_scale_ptr is not None:
        d_scale = tl.load(grad_scale_ptr + state_at, mask=inside, other=0.0)

    for back in tl.range(0, step_end - step_begin, num_stages=STAGES):
        t = time_of(step_end - 1 - back, T, backwards)
        valid = in_rows & (lane * 0 + t < length)
        live = inside & valid[None, :]
        row = ((t - base) * B + first_row) * G + g
        at = row * (6 * H)
        tile = lane[None, :] * (G * 6 * H) + units[:, None]
        v_r = load_gate(workspace_ptr, at, tile, 0, live, H)
        v_z = load_gate(workspace_ptr, at, tile, 1, live, H)
        v_n = load_gate(workspace_ptr, at, tile, 2, live, H)
        r = load_gate(workspace_ptr, at, tile, 3, live, H)
        z = load_gate(workspace_ptr, at, tile, 4, live, H)
        n = load_gate(workspace_ptr, at, tile, 5, live, H)
        rstd = tl.load(rstd_ptr + row + lane * G, mask=valid, other=0.0).to(tl.float32)
        p = previous_state(
            h0_ptr, output_ptr, reset_mask_ptr, reset_state_ptr, t, length, first_row, g, units,
            lane, in_rows, inside, B, G, backwards, H,
        ).to(tl.float32)  # fmt: skip
        dh = dp
        if grad_output_ptr is not None:
            out_at = ((t * B + first_row) * G + g) * H
            out_tile = lane[None, :] * (G * H) + units[:, None]
            dh += load_gate(grad_output_ptr, out_at, out_tile, 0, live, H)
        kept = dh * z
        if lengths_ptr is not None:
            kept = tl.where(live, kept, dp)
            dh = tl.where(live, dh, 0.0)

        an = dh * (1.0 - z) * (1.0 - n * n)
        az = dh * (p - n) * z * (1.0 - z)
        ar = an * (v_n * gain_n + b_n) * r * (1.0 - r)
        dq = an * r
        at = row * (3 * H)
        tile = lane[None, :] * (G * 3 * H) + units[:, None]
        store_gate(grad_gates_ptr, at, tile, 0, ar, inside, H)
        store_gate(grad_gates_ptr, at, tile, 1, az, inside, H)
        store_gate(grad_gates_ptr, at, tile, 2, an, inside, H)
        store_gate(grad_q_ptr, row * H, lane[None, :] * (G * H) + units[:, None], 0, dq, inside, H)

        y_r = ar * gain_r
        y_z = az * gain_z
        y_n = dq * gain_n
        mean = tl.sum(y_r + y_z + y_n, axis=0) * share
        slope = tl.sum(y_r * v_r + y_z * v_z + y_n * v_n, axis=0) * share
        du_r = (y_r - mean[None, :] - v_r * slope[None, :]) * rstd[None, :]
        du_z = (y_z - mean[None, :] - v_z * slope[None, :]) * rstd[None, :]
        du_n = (y_n - mean[None, :] - v_n * slope[None, :]) * rstd[None, :]
        store_gate(grad_u_ptr, at, tile, 0, du_r, inside, H)
        store_gate(grad_u_ptr, at, tile, 1, du_z, inside, H)
        store_gate(grad_u_ptr, at, tile, 2, du_n, inside, H)
        # Units beyond H of du meet columns of W_hh^T that are 0.
        ds = tl.dot(w_r, du_r.to(dtype), input_precision=PRECISION)
        ds = tl.dot(w_z, du_z.to(dtype), acc=ds, input_precision=PRECISION)
        ds = tl.dot(w_n, du_n.to(dtype), acc=ds, input_precision=PRECISION)
        dp, start = pass_back(
            kept, ds, scale, reset_mask_ptr, t, length, first_row, lane, in_rows, B, backwards
        )
        if grad_start_ptr is not None:
            d_start += start
        if grad_scale_ptr is not None:
            d_scale += ds * p
    tl.store(grad_state_ptr + state_at, dp, mask=inside)
    if grad_start_ptr is not None:
        tl.store(grad_start_ptr + state_at, d_start, mask=inside)
    if grad_scale_ptr is not None:
        tl.store(grad_scale_ptr + state_at, d_scale, mask=inside)


def launch_backward_norm(chunk: NormChunk, config: Config) -> None:
    """Run the scan steps of a chunk, from the last to the first."""
    arguments = chunk.arguments()
    for first_group, groups, reverse_bits in chunk.problem.scan.launches():
        backward_norm[(cdiv(chunk.problem.scan.B, config.BLOCK_B), groups)](
            **arguments,
            first_group=first_group,
            reverse_bits=reverse_bits,
            STAGES=config.num_stages,
            **config.arguments("BLOCK_H", "BLOCK_B"),
        )
