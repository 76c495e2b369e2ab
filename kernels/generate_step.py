# SPDX-License-Identifier: Apache-2.0
"""`generate`, form `step`: a few launches a position, which the host queues without waiting.

One launch for each layer, two for reset_before, one for the head and one for the draw. Takes every
model on every device.
"""

import triton
import triton.language as tl

from .generate_inputs import last_drawn, next_input
from .generate_layers import run_draw, run_head, run_layer
from .generation import MOST_DRAWN_FROM, Generation, exchange_of, parameters
from .launch import Launches
from .tiling import AMD, Config, cdiv, device_of


@triton.jit(do_not_specialize=["layer", "position", "B", "P", "S", "V"])
def generate_step_layer(
    table_ptr,  # (V+1, N*H)
    weight_ih_ptr,  # (L-1, N*H, H) or None
    weight_hh_ptr,  # (L, N*H, H)
    bias_ih_ptr,  # (L-1, N*H) or None
    bias_hh_ptr,  # (L, N*H) or None
    prompts_ptr,  # (B, P) int64
    lengths_ptr,  # (B) int64
    state_ptr,  # (L, B, H) float32
    status_ptr,  # (B) int32
    tokens_ptr,  # (B, S) int64
    operand_ptr,  # (2, L, B, H)
    gated_ptr,  # (B, H) or None
    update_ptr,  # (B, H) float32 or None
    layer,
    position,
    B,
    P,
    S,
    V,
    FIRST: tl.constexpr,
    PART: tl.constexpr,
    CELL: tl.constexpr,
    L: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    lane = tl.arange(0, BLOCK_B)
    units = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_B
    row = first_row + lane
    in_rows = row < B
    alive = tl.load(status_ptr + row, mask=in_rows, other=1) == 0
    token = lane * 0
    if FIRST:
        length = tl.load(lengths_ptr + row, mask=in_rows, other=0).to(tl.int32)
        drawn = last_drawn(tokens_ptr, row, position, length, in_rows, S)
        token, _ = next_input(prompts_ptr, row, position, length, drawn, alive, P, V)
    run_layer(
        layer, position, token, alive, table_ptr, weight_ih_ptr, weight_hh_ptr, bias_ih_ptr,
        bias_hh_ptr, state_ptr, operand_ptr, gated_ptr, update_ptr, ((), (), ()), ((), (), ()),
        None, 0, units, first_row, lane, in_rows, B,
        FIRST, PART, CELL, L, H, BLOCK_H, BLOCK_B, BLOCK_K, False, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["position", "B", "V"])
def generate_step_head(
    head_ptr,  # (V, H)
    head_bias_ptr,  # (V) or None
    operand_ptr,  # (2, L, B, H)
    logits_ptr,  # (B, V) float32
    position,
    B,
    V,
    L: tl.constexpr,
    H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    lane = tl.arange(0, BLOCK_B)
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_B
    run_head(
        head_ptr, head_bias_ptr, operand_ptr, logits_ptr, position, tl.program_id(1),
        tl.num_programs(1), first_row, lane, first_row + lane < B, B, V,
        L, H, BLOCK_T, BLOCK_B, BLOCK_K, PRECISION,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "position", "B", "P", "S", "V", "eos", "seed_low", "seed_high", "top_k", "top_p", "id_bits"
    ]
)  # fmt: skip
def generate_step_draw(
    prompts_ptr,  # (B, P) int64
    lengths_ptr,  # (B) int64
    status_ptr,  # (B) int32
    tokens_ptr,  # (B, S) int64
    log_probs_ptr,  # (B, S) float32
    logits_ptr,  # (B, V) float32
    position,
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
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
    WHOLE: tl.constexpr,
    SAMPLE: tl.constexpr,
    SHAPED: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
):
    lane = tl.arange(0, BLOCK_B)
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_B
    run_draw(
        prompts_ptr, lengths_ptr, status_ptr, tokens_ptr, log_probs_ptr, logits_ptr, first_row,
        lane, first_row + lane < B, position, P, S, V, eos, seed_low, seed_high, temperature,
        top_k, top_p, min_p, id_bits, BLOCK_V, WHOLE, SAMPLE, SHAPED, TOP_K, TOP_P,
    )  # fmt: skip


def launch_generate_step(call: Generation, steps: tuple[int, int], config: Config) -> None:
    """Run positions steps[0] ... steps[1] - 1 of every row that is alive."""
    B, L, H, V = call.rows.B, call.weights.L, call.weights.H, call.weights.V
    known = call.split_arguments(1, MOST_DRAWN_FROM) | exchange_of(call, steps[0]).arguments()
    known |= {name: getattr(config, name) for name in ("BLOCK_H", "BLOCK_B", "BLOCK_K")}
    options = config.arguments()
    tiles = cdiv(B, config.BLOCK_B)
    by_units, by_tokens = (
        (tiles, cdiv(H, config.BLOCK_H)),
        (tiles, min(65535, cdiv(V, known["BLOCK_T"]))),
    )
    layers, head, drawing = (
        parameters(kernel, known) | options
        for kernel in (generate_step_layer, generate_step_head, generate_step_draw)
    )
    drawing["BLOCK_B"] = 1
    if not drawing["WHOLE"] and device_of(call.rows.state).arch != AMD:
        drawing["maxnreg"] = 255  # left to itself, the assembler takes 80 on sm_80 and spills
    parts = ("gates", "candidate") if call.weights.cell == "reset_before" else ("all",)
    launch_layer = Launches(generate_step_layer, by_units, layers, "layer", "position")
    launch_head = Launches(generate_step_head, by_tokens, head, "position")
    launch_draw = Launches(generate_step_draw, (B,), drawing, "position")
    for position in range(*steps):
        for layer in range(L):
            for part in parts:
                launch_layer(layer, position, FIRST=layer == 0, PART=part)
        if position >= call.rows.shortest:
            launch_head(position)
        launch_draw(position)
