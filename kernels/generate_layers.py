# SPDX-License-Identifier: Apache-2.0
"""A layer, the head and the draw for the forms of `generate` that split them over programs.

A program owns BLOCK_H units of one batch tile. States lie in memory twice: in float32, which only
their owner reads, and as operands of products, which all programs of the tile read, in two buffers
by parity of the position. Between one layer and the next there is a barrier: `wait`, where a
counter is given, else the end of a launch.
"""

import triton
import triton.language as tl

from .draw import draw, random_bits
from .generate_inputs import last_drawn, next_input, record, table_gates
from .grid import load_rows, wait
from .grid_forward import gate_products
from .tile import load_per_unit, sigmoid, tanh


@triton.jit
def run_layer(
    layer,
    position,
    token,
    alive,
    table_ptr,  # (V+1, N*H)
    weight_ih_ptr,  # (L-1, N*H, H) or None
    weight_hh_ptr,  # (L, N*H, H)
    bias_ih_ptr,  # (L-1, N*H) or None
    bias_hh_ptr,  # (L, N*H) or None
    state_ptr,  # (L, B, H) float32
    operand_ptr,  # (2, L, B, H)
    gated_ptr,  # (B, H) or None: r * s of reset_before
    update_ptr,  # (B, H) float32 or None: z of reset_before
    panels_ih,  # tiles r, z, n of weight_ih, empty unless RESIDENT
    panels_hh,
    counter_ptr,  # of this batch tile, or None
    arrivals,
    units,
    first_row,
    lane,
    in_rows,
    B,
    FIRST: tl.constexpr,  # whether this is layer 0
    PART: tl.constexpr,  # "all", or of reset_before "gates" and then "candidate"
    CELL: tl.constexpr,
    L: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """This program's units of one layer; waits for those of the others before it needs them."""
    N: tl.constexpr = 2 if CELL == "no_reset" else 3
    inside = (units[:, None] < H) & in_rows[None, :]
    rows_at = first_row * H
    tile = lane[None, :] * H + units[:, None]
    number = first_row * 0 + layer  # int64, whether or not it is known when compiling
    layer_at = number * B * H + rows_at
    states = L * B.to(tl.int64) * H
    before = (position % 2) * states
    after = ((position + 1) % 2) * states
    dtype = operand_ptr.dtype.element_ty

    acc_r = tl.zeros((BLOCK_H, BLOCK_B), tl.float32)
    acc_z = tl.zeros((BLOCK_H, BLOCK_B), tl.float32)
    acc_n = tl.zeros((BLOCK_H, BLOCK_B), tl.float32)
    weight_hh = weight_hh_ptr + number * (N * H * H)
    if PART == "candidate":
        if counter_ptr is not None:
            wait(counter_ptr, arrivals)
        acc_r, acc_z, acc_n = gate_products(
            acc_r, acc_z, acc_n, panels_hh[0], panels_hh[1], panels_hh[2], weight_hh, gated_ptr,
            rows_at, units, lane, in_rows, PART, CELL, H, BLOCK_K, RESIDENT, PRECISION,
        )  # fmt: skip
    else:
        # The state before this position has been there since the position before.
        acc_r, acc_z, acc_n = gate_products(
            acc_r, acc_z, acc_n, panels_hh[0], panels_hh[1], panels_hh[2], weight_hh, operand_ptr,
            before + layer_at, units, lane, in_rows, PART, CELL, H, BLOCK_K, RESIDENT, PRECISION,
        )  # fmt: skip
    b_n = load_per_unit(bias_hh_ptr, number, N - 1, units, N, H)
    if FIRST:
        a_r, a_z, a_n = table_gates(table_ptr, token, units, inside, CELL, H)
        acc_r += a_r
        acc_z += a_z
    else:
        if counter_ptr is not None and PART != "candidate":
            wait(counter_ptr, arrivals)
        a_n = tl.zeros((BLOCK_H, BLOCK_B), tl.float32)
        weight_ih = weight_ih_ptr + (number - 1) * (N * H * H)
        acc_r, acc_z, a_n = gate_products(
            acc_r, acc_z, a_n, panels_ih[0], panels_ih[1], panels_ih[2], weight_ih, operand_ptr,
            after + layer_at - B.to(tl.int64) * H, units, lane, in_rows, PART, CELL, H, BLOCK_K,
            RESIDENT, PRECISION,
        )  # fmt: skip
        acc_z += load_per_unit(bias_ih_ptr, number - 1, N - 2, units, N, H)
        a_n += load_per_unit(bias_ih_ptr, number - 1, N - 1, units, N, H)
        if CELL != "no_reset":
            acc_r += load_per_unit(bias_ih_ptr, number - 1, 0, units, N, H)

    p = tl.load(state_ptr + layer_at + tile, mask=inside, other=0.0)
    if PART == "candidate":
        z = tl.load(update_ptr + rows_at + tile, mask=inside, other=0.0)
        r = z
    else:
        z = sigmoid(acc_z + load_per_unit(bias_hh_ptr, number, N - 2, units, N, H))
        r = z
        if CELL != "no_reset":
            r = sigmoid(acc_r + load_per_unit(bias_hh_ptr, number, 0, units, N, H))
    if PART == "gates":
        tl.store(gated_ptr + rows_at + tile, (r * p).to(dtype), mask=inside)
        tl.store(update_ptr + rows_at + tile, z, mask=inside)
    else:
        q = acc_n + b_n
        if CELL == "reset_after":
            n = tanh(a_n + r * q)
        else:
            n = tanh(a_n + q)
        p = tl.where(alive[None, :], n + z * (p - n), p)
        tl.store(state_ptr + layer_at + tile, p, mask=inside)
        tl.store(operand_ptr + after + layer_at + tile, p.to(dtype), mask=inside)


@triton.jit
def run_head(
    head_ptr,  # (V, H)
    head_bias_ptr,  # (V) or None
    operand_ptr,  # (2, L, B, H)
    logits_ptr,  # (B, V) float32
    position,
    tile,
    programs,
    first_row,
    lane,
    in_rows,
    B,
    V,
    L: tl.constexpr,
    H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Logits of every programs-th tile of BLOCK_T tokens, from `tile` on."""
    top_at = (((position + 1) % 2) * L + L - 1) * B.to(tl.int64) * H + first_row * H
    for number in range(tile, (V + BLOCK_T - 1) // BLOCK_T, programs):
        ids = number * BLOCK_T + tl.arange(0, BLOCK_T)
        acc = tl.zeros((BLOCK_T, BLOCK_B), tl.float32)
        for k0 in range(0, H, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            x = load_rows(operand_ptr, top_at, H, k, lane, in_rows, H)
            at = head_ptr + ids.to(tl.int64)[:, None] * H + k[None, :]
            w = tl.load(at, mask=(ids[:, None] < V) & (k[None, :] < H), other=0.0)
            acc = tl.dot(w, x, acc=acc, input_precision=PRECISION)
        if head_bias_ptr is not None:
            acc += tl.load(head_bias_ptr + ids, mask=ids < V, other=0.0).to(tl.float32)[:, None]
        at = logits_ptr + (first_row + lane)[None, :] * V + ids[:, None]
        tl.store(at, acc, mask=(ids[:, None] < V) & in_rows[None, :])


@triton.jit
def run_draw(
    prompts_ptr,  # (B, P) int64
    lengths_ptr,  # (B) int64
    status_ptr,  # (B) int32
    tokens_ptr,  # (B, S) int64
    log_probs_ptr,  # (B, S) float32
    logits_ptr,  # (B, V) float32
    first_row,
    lane,
    in_rows,
    position,
    P,
    S,
    V,
    eos,
    seed_low,
    seed_high,
    temperature,
    top_k,
    top_p,
    min_p,
    id_bits,
    BLOCK_V: tl.constexpr,
    WHOLE: tl.constexpr,  # whether BLOCK_V covers V: then the logits are read once
    SAMPLE: tl.constexpr,
    SHAPED: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
):
    """Draw the next token of some rows."""
    row = first_row + lane
    length = tl.load(lengths_ptr + row, mask=in_rows, other=0).to(tl.int32)
    status = tl.load(status_ptr + row, mask=in_rows, other=1)
    drawn = last_drawn(tokens_ptr, row, position, length, in_rows, S)
    _, unknown = next_input(prompts_ptr, row, position, length, drawn, status == 0, P, V)
    status = tl.where((status == 0) & unknown, 3, status)
    drawing = (status == 0) & (position >= length)
    if tl.max(drawing.to(tl.int32), 0) > 0:
        source_ptr = logits_ptr + first_row * V
        tile = tl.zeros((BLOCK_V, lane.shape[0]), tl.float32)
        if WHOLE:
            ids = tl.arange(0, BLOCK_V)
            at = source_ptr + lane[None, :].to(tl.int64) * V + ids[:, None]
            mask = (ids < V)[:, None] & in_rows[None, :]
            tile = tl.load(at, mask=mask, other=-float("inf"), cache_modifier=".cg")
        bits = random_bits(seed_low, seed_high, position, row.to(tl.int32))
        chosen, log_prob, good = draw(
            tile, None if WHOLE else source_ptr, lane, in_rows, V, bits, temperature, top_k, top_p,
            min_p, id_bits, BLOCK_V, SAMPLE, SHAPED, TOP_K, TOP_P,
        )  # fmt: skip
        status = record(
            tokens_ptr, log_probs_ptr, row, position, length, status, drawing, chosen, log_prob,
            good, S, eos,
        )  # fmt: skip
    tl.store(status_ptr + row, status, mask=in_rows)
