# SPDX-License-Identifier: Apache-2.0
"""`step`, backward: per time step one launch, two for reset_before; gate gradients only.

The launch of a step first multiplies the gradients of the step visited after it by W_hh, which
completes the gradient of the state between the two, and then computes its own; one launch more
carries the first step's gradient into h0. `kept` and `extra` hold, between launches and for their
own tile only, the parts of that gradient that need no product.
"""

import torch
import triton
import triton.language as tl

from .launch import Launches
from .problem import Chunk
from .tile import (
    is_backwards,
    load_gate,
    load_scale,
    row_lengths,
    row_starts,
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
def _product(
    acc,
    rows_ptr,  # (chunk, B, G, K*H), gradients of a chunk
    row,
    stride_row,
    weight_ptr,  # (H, H), one gate
    units,
    lane,
    in_rows,
    H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc (units, rows) + weight^T @ gradients of one gate: a term of equation (12)."""
    for k0 in range(0, H, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        in_weight = (units[:, None] < H) & (k[None, :] < H)
        at = weight_ptr + row_starts(k[None, :], H) + units[:, None]
        w = tl.load(at, mask=in_weight, other=0.0)
        mask = (k[:, None] < H) & in_rows[None, :]
        d = tl.load(rows_ptr + row + lane[None, :] * stride_row + k[:, None], mask=mask, other=0.0)
        acc = tl.dot(w, d, acc=acc, input_precision=PRECISION)
    return acc


@triton.jit(
    do_not_specialize=[
        "step", "step_begin", "step_end", "T", "B", "G", "first_group", "reverse_bits",
    ]
)  # fmt: skip
def backward_step(
    grad_output_ptr,  # (T, B, G*H) or None
    grad_workspace_ptr,  # (T, B, G, S*H) or None
    h0_ptr,  # (G, B, H)
    weight_ptr,  # (G, N*H, H)
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
    kept_ptr,  # (G, B, H) float32
    extra_ptr,  # (G, B, H) float32, or None but for reset_before: e * r
    step,
    step_begin,
    step_end,
    T,
    B,
    G,
    first_group,
    reverse_bits,
    PRODUCT: tl.constexpr,  # receive from the step visited after this one
    PART: tl.constexpr,  # "gates", "reset" (reset_before: Ar), or "none" for the last launch
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
    state_at = (g * B + first_row) * H + lane[None, :] * H + units[:, None]
    base = chunk_begin(step_begin, step_end, T, backwards)
    scale = load_scale(h_scale_ptr, first_row, g, units, lane, inside, G, H)
    weight_at = weight_ptr + g * (N * H * H)
    zeros = tl.zeros((BLOCK_H, BLOCK_B), tl.float32)

    if PRODUCT:
        t_after = time_of(step + 1, T, backwards)
        row = ((t_after - base) * B + first_row) * G + g
        ds = zeros
        for gate in tl.static_range(N - 1):
            ds = _product(
                ds, grad_gates_ptr, row * (N * H) + gate * H, G * N * H,
                weight_at + gate * H * H, units, lane, in_rows, H, BLOCK_K, PRECISION,
            )  # fmt: skip
        if CELL == "reset_after":
            ds = _product(
                ds, grad_q_ptr, row * H, G * H,
                weight_at + 2 * H * H, units, lane, in_rows, H, BLOCK_K, PRECISION,
            )  # fmt: skip
        elif CELL == "no_reset":
            ds = _product(
                ds, grad_gates_ptr, row * (2 * H) + H, G * 2 * H,
                weight_at + H * H, units, lane, in_rows, H, BLOCK_K, PRECISION,
            )  # fmt: skip
        else:
            ds += tl.load(extra_ptr + state_at, mask=inside, other=0.0)
        kept = tl.load(kept_ptr + state_at, mask=inside, other=0.0)
        dp, start = pass_back(
            kept, ds, scale, reset_mask_ptr, t_after, length, first_row, lane, in_rows, B,
            backwards,
        )  # fmt: skip
        if grad_start_ptr is not None:
            start += tl.load(grad_start_ptr + state_at, mask=inside, other=0.0)
            tl.store(grad_start_ptr + state_at, start, mask=inside)
        if grad_scale_ptr is not None:
            p = previous_state(
                h0_ptr, output_ptr, reset_mask_ptr, reset_state_ptr, t_after, length, first_row,
                g, units, lane, in_rows, inside, B, G, backwards, H,
            )  # fmt: skip
            p = p.to(tl.float32)
            ds = ds * p + tl.load(grad_scale_ptr + state_at, mask=inside, other=0.0)
            tl.store(grad_scale_ptr + state_at, ds, mask=inside)
    elif PART == "gates":
        dp = tl.load(grad_state_ptr + state_at, mask=inside, other=0.0)

    if PART == "none":
        tl.store(grad_state_ptr + state_at, dp, mask=inside)
    else:
        t = time_of(step, T, backwards)
        live = inside
        if lengths_ptr is not None:
            live = inside & (t < length)[None, :]
        row = ((t - base) * B + first_row) * G + g
        q, r, z, n = load_gates(workspace_ptr, row, units, lane, live, G, CELL, H)
        q0, r0, z0, n0 = load_gate_gradients(grad_workspace_ptr, row, units, lane, live, G, CELL, H)
        p = previous_state(
            h0_ptr, output_ptr, reset_mask_ptr, reset_state_ptr, t, length, first_row, g, units,
            lane, in_rows, inside, B, G, backwards, H,
        )  # fmt: skip
        p, q, r = p.to(tl.float32), q.to(tl.float32), r.to(tl.float32)
        z, n = z.to(tl.float32), n.to(tl.float32)
        if PART == "gates":
            dh = dp
            if grad_output_ptr is not None:
                at = ((t * B + first_row) * G + g) * H
                tile = lane[None, :] * (G * H) + units[:, None]
                dh += load_gate(grad_output_ptr, at, tile, 0, live, H)
            kept = dh * z
            if lengths_ptr is not None:
                kept = tl.where(live, kept, dp)
                dh = tl.where(live, dh, 0.0)
            ar, az, an, dq = gate_gradients(dh, p, q, r, z, n, q0, r0, z0, n0, CELL)
            store_gradients(
                grad_gates_ptr, grad_q_ptr, row, units, lane, inside, G, ar, az, an, dq, CELL, H
            )
            tl.store(kept_ptr + state_at, kept, mask=inside)
        else:
            # Equations (10) and (11).
            e = _product(
                zeros, grad_gates_ptr, row * (3 * H) + 2 * H, G * 3 * H,
                weight_at + 2 * H * H, units, lane, in_rows, H, BLOCK_K, PRECISION,
            )  # fmt: skip
            ar = (e * (p * scale) + r0) * r * (1.0 - r)
            tile = lane[None, :] * (G * 3 * H) + units[:, None]
            store_gate(grad_gates_ptr, row * (3 * H), tile, 0, ar, inside, H)
            tl.store(extra_ptr + state_at, e * r, mask=inside)


def launch_backward_step(chunk: Chunk, config: Config) -> None:
    """Run the scan steps of a chunk, from the last to the first."""
    problem, grad_state = chunk.problem, chunk.grad_state
    kept = torch.empty_like(grad_state)
    before = problem.cell == "reset_before"
    extra = torch.empty_like(grad_state) if before else None
    begin, end = chunk.steps
    plan = []
    for step in range(end - 1, begin - 1, -1):
        plan.append((step, step + 1 < end, "gates"))
        if before:
            plan.append((step, False, "reset"))
    plan.append((begin - 1, True, "none"))
    arguments = chunk.arguments() | {
        "weight_ptr": problem.weight_hh,
        "kept_ptr": kept,
        "extra_ptr": extra,
        **config.arguments("BLOCK_H", "BLOCK_B", "BLOCK_K"),
    }
    for first_group, groups, reverse_bits in problem.launches():
        grid = (
            cdiv(problem.B, config.BLOCK_B),
            cdiv(problem.H, config.BLOCK_H),
            groups,
        )
        part_of = {"first_group": first_group, "reverse_bits": reverse_bits}
        launch = Launches(backward_step, grid, arguments | part_of, "step")
        for step, product, part in plan:
            launch(step, PRODUCT=product, PART=part)
