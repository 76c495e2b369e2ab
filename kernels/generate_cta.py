# SPDX-License-Identifier: Apache-2.0
"""`generate`, form `cta`: one program per batch tile runs the whole loop with all weights on chip.

Table row -> layers -> logits -> draw -> next token, for as many steps as a launch is asked for, or
until every row of the tile has ended. Programs never meet. States stay in registers, in float32;
only table rows, prompts and what was drawn go through memory.
"""

import triton
import triton.language as tl

from .draw import draw, random_bits
from .generate_inputs import last_drawn, next_input, record, table_gates
from .generate_tables import compiled_as
from .generation import Generation, model_of
from .tile import load_per_unit, load_weight, sigmoid, tanh
from .tiling import Config, cdiv, device_of


@triton.jit
def load_gates(
    weight_ptr,  # (layers, N*H, H)
    layer,
    units,
    CELL: tl.constexpr,
    H: tl.constexpr,
):
    """One layer's tiles r, z, n; z in place of the r that no_reset lacks."""
    N: tl.constexpr = 2 if CELL == "no_reset" else 3
    at = weight_ptr + layer * (N * H * H)
    w_z = load_weight(at + (N - 2) * H * H, units, units, H)
    w_n = load_weight(at + (N - 1) * H * H, units, units, H)
    w_r = w_z
    if CELL != "no_reset":
        w_r = load_weight(at, units, units, H)
    return w_r, w_z, w_n


@triton.jit
def load_biases(
    bias_ih_ptr,  # (L-1, N*H) or None
    bias_hh_ptr,  # (L, N*H) or None
    layer: tl.constexpr,
    units,
    CELL: tl.constexpr,
    H: tl.constexpr,
):
    """One layer's biases of r and of z, both sides in one, and of n on either side."""
    N: tl.constexpr = 2 if CELL == "no_reset" else 3
    b_z = load_per_unit(bias_hh_ptr, layer, N - 2, units, N, H)
    b_n = load_per_unit(bias_hh_ptr, layer, N - 1, units, N, H)
    b_r = b_z
    if CELL != "no_reset":
        b_r = load_per_unit(bias_hh_ptr, layer, 0, units, N, H)
    c_n = 0.0
    if layer > 0:
        c_n = load_per_unit(bias_ih_ptr, layer - 1, N - 1, units, N, H)
        b_z += load_per_unit(bias_ih_ptr, layer - 1, N - 2, units, N, H)
        if CELL != "no_reset":
            b_r += load_per_unit(bias_ih_ptr, layer - 1, 0, units, N, H)
    return b_r, b_z, b_n, c_n


@triton.jit(
    do_not_specialize=[
        "step_begin", "step_end", "B", "P", "S", "V", "eos", "seed_low", "seed_high", "top_k",
        "top_p", "id_bits",
    ]
)  # fmt: skip
def generate_cta(
    table_ptr,  # (V+1, N*H)
    weight_ih_ptr,  # (L-1, N*H, H) or None
    weight_hh_ptr,  # (L, N*H, H)
    bias_ih_ptr,  # (L-1, N*H) or None
    bias_hh_ptr,  # (L, N*H) or None
    head_ptr,  # (V, H)
    head_bias_ptr,  # (V) or None
    prompts_ptr,  # (B, P) int64
    lengths_ptr,  # (B) int64
    state_ptr,  # (L, B, H) float32
    state_out_ptr,  # the same memory: addresses of the end are not kept through the loop
    status_ptr,  # (B) int32
    tokens_ptr,  # (B, S) int64
    log_probs_ptr,  # (B, S) float32
    step_begin,
    step_end,
    B,
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
    CELL: tl.constexpr,
    L: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,  # a power of two, at least H
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,  # a power of two, at least V
    ANEW: tl.constexpr,  # as `generate_tables.computed_anew` says
    SAMPLE: tl.constexpr,
    SHAPED: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    PRECISION: tl.constexpr,
):
    lane = tl.arange(0, BLOCK_B)
    units = tl.arange(0, BLOCK_H)
    ids = tl.arange(0, BLOCK_V)
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_B
    row = first_row + lane
    in_rows = row < B
    inside = (units[:, None] < H) & in_rows[None, :]
    dtype = weight_hh_ptr.dtype.element_ty

    weights_hh = ()
    weights_ih = ()
    biases = ()
    states = ()
    for layer in tl.static_range(L):
        weights_hh += (load_gates(weight_hh_ptr, layer, units, CELL, H),)
        biases += (load_biases(bias_ih_ptr, bias_hh_ptr, layer, units, CELL, H),)
        if layer > 0:
            weights_ih += (load_gates(weight_ih_ptr, layer - 1, units, CELL, H),)
        at = state_ptr + (layer * B.to(tl.int64) + first_row) * H
        tile = lane[None, :] * H + units[:, None]
        states += (tl.load(at + tile, mask=inside, other=0.0),)
    in_head = (ids[:, None] < V) & (units[None, :] < H)
    head = tl.load(head_ptr + ids[:, None] * H + units[None, :], mask=in_head, other=0.0)
    head_bias = tl.full((BLOCK_V, 1), 0.0, tl.float32)
    if head_bias_ptr is not None:
        head_bias = tl.load(head_bias_ptr + ids, mask=ids < V, other=0.0).to(tl.float32)[:, None]

    length = tl.load(lengths_ptr + row, mask=in_rows, other=0).to(tl.int32)
    status = tl.load(status_ptr + row, mask=in_rows, other=1)
    drawn = last_drawn(tokens_ptr, row, step_begin, length, in_rows, S)
    shortest = tl.min(tl.where(in_rows, length, 2147483647), 0)
    going = tl.sum((status == 0).to(tl.int32), 0)
    for position in tl.range(step_begin, step_end, disable_licm=ANEW != "nothing"):
        # A loop that ended early would be `while`: weights would be kept in registers through it.
        if going > 0:
            alive = status == 0
            token, unknown = next_input(prompts_ptr, row, position, length, drawn, alive, P, V)
            status = tl.where(alive & unknown, 3, status)
            alive = status == 0

            a_r, a_z, a_n = table_gates(table_ptr, token, units, inside, CELL, H)
            after = ()
            x = states[0].to(dtype)
            for layer in tl.static_range(L):
                p = states[layer]
                w_r, w_z, w_n = weights_hh[layer]
                b_r, b_z, b_n, c_n = biases[layer]
                if layer > 0:
                    v_r, v_z, v_n = weights_ih[layer - 1]
                    a_z = tl.dot(v_z, x, input_precision=PRECISION)
                    a_n = tl.dot(v_n, x, input_precision=PRECISION) + c_n
                    if CELL != "no_reset":
                        a_r = tl.dot(v_r, x, input_precision=PRECISION)
                operand = p.to(dtype)
                z = sigmoid(tl.dot(w_z, operand, acc=a_z + b_z, input_precision=PRECISION))
                if CELL != "no_reset":
                    r = sigmoid(tl.dot(w_r, operand, acc=a_r + b_r, input_precision=PRECISION))
                if CELL == "reset_after":
                    q = tl.dot(w_n, operand, input_precision=PRECISION) + b_n
                    n = tanh(a_n + r * q)
                elif CELL == "reset_before":
                    gated = (r * p).to(dtype)
                    n = tanh(tl.dot(w_n, gated, acc=a_n + b_n, input_precision=PRECISION))
                else:
                    n = tanh(tl.dot(w_n, operand, acc=a_n + b_n, input_precision=PRECISION))
                p = tl.where(alive[None, :], n + z * (p - n), p)
                x = p.to(dtype)
                after += (p,)
            states = after

            drawing = alive & (position >= length)
            if position >= shortest:
                logits = tl.dot(head, x, input_precision=PRECISION) + head_bias
                logits = tl.where((ids < V)[:, None], logits, -float("inf"))
                bits = random_bits(seed_low, seed_high, position, row.to(tl.int32))
                chosen, log_prob, good = draw(
                    logits, None, lane, in_rows, V, bits, temperature, top_k, top_p, min_p, id_bits,
                    BLOCK_V, SAMPLE, SHAPED, TOP_K, TOP_P,
                )  # fmt: skip
                status = record(
                    tokens_ptr, log_probs_ptr, row, position, length, status, drawing, chosen,
                    log_prob, good, S, eos,
                )  # fmt: skip
                drawn = tl.where(drawing, chosen, drawn)
            going = tl.sum((status == 0).to(tl.int32), 0)

    for layer in tl.static_range(L):
        at = state_out_ptr + (layer * B.to(tl.int64) + first_row) * H
        tile = lane[None, :] * H + units[:, None]
        tl.store(at + tile, states[layer], mask=inside)
    tl.store(status_ptr + row, status, mask=in_rows)


def launch_generate_cta(call: Generation, steps: tuple[int, int], config: Config) -> None:
    """Run positions steps[0] ... steps[1] - 1 of every row that is alive."""
    device, model = device_of(call.rows.state), model_of(call.weights, call.rows.B)
    generate_cta[(cdiv(call.rows.B, config.BLOCK_B),)](
        **call.arguments(max(16, triton.next_power_of_2(call.weights.V))),
        state_out_ptr=call.rows.state,
        step_begin=steps[0],
        step_end=steps[1],
        **config.arguments("BLOCK_H", "BLOCK_B"),
        **compiled_as("cta", device, model, config),
    )
