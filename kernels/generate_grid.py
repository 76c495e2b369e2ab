# SPDX-License-Identifier: Apache-2.0
"""`generate`, form `grid`: one cooperative launch for all positions, units split over programs.

The programs of a batch tile meet after each layer, twice for reset_before, after the head, whose
tokens are split over them, and after the draw, whose rows are. Rows of W_hh and W_ih stay on chip
where they fit (RESIDENT), else they stream from the L2 cache.

One buffer of logits, one of r * s and two of states are enough: who writes one has, since its last
use, waited for an arrival that every program makes after reading it.
"""

import triton
import triton.language as tl

from .generate_inputs import last_drawn, next_input
from .generate_layers import run_draw, run_head, run_layer
from .generate_tables import compiled_as
from .generation import LOGITS_OF_WARP, Generation, exchange_of, model_of
from .grid import arrive, load_panels, new_counters, wait
from .tile import anew, anew_in_a_row
from .tiling import Config, cdiv, device_of


@triton.jit
def load_gate_panels(
    weight_ptr,  # (layers, N*H, H)
    layer,
    units,
    CELL: tl.constexpr,
    H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    """Of one layer the panels r, z, n; z in place of the r that no_reset lacks."""
    N: tl.constexpr = 2 if CELL == "no_reset" else 3
    at = weight_ptr + layer * (N * H * H)
    z = load_panels(at + (N - 2) * H * H, units, H, BLOCK_K, RESIDENT)
    n = load_panels(at + (N - 1) * H * H, units, H, BLOCK_K, RESIDENT)
    r = z
    if CELL != "no_reset":
        r = load_panels(at, units, H, BLOCK_K, RESIDENT)
    return r, z, n


@triton.jit(
    do_not_specialize=[
        "step_begin", "step_end", "first_tile", "B", "P", "S", "V", "eos", "seed_low", "seed_high",
        "top_k", "top_p", "id_bits",
    ]
)  # fmt: skip
def generate_grid(
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
    status_ptr,  # (B) int32
    tokens_ptr,  # (B, S) int64
    log_probs_ptr,  # (B, S) float32
    operand_ptr,  # (2, L, B, H)
    gated_ptr,  # (B, H) or None
    update_ptr,  # (B, H) float32 or None
    logits_ptr,  # (B, V) float32
    counters_ptr,  # (batch tiles) of this launch, int32, 0
    step_begin,
    step_end,
    first_tile,
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
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    WHOLE: tl.constexpr,
    DRAW_B: tl.constexpr,
    RESIDENT: tl.constexpr,
    ANEW: tl.constexpr,  # as `generate_tables.computed_anew` says
    SAMPLE: tl.constexpr,
    SHAPED: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    PRECISION: tl.constexpr,
):
    programs = tl.num_programs(1)
    counter_ptr = counters_ptr + tl.program_id(0)
    tile = first_tile + tl.program_id(0)
    lanes = tl.arange(0, BLOCK_B)
    begin = tile.to(tl.int64) * BLOCK_B
    rows = begin + lanes
    in_tile = rows < B
    own_units = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    # Of the rows of the tile those that this program draws for.
    own_lanes = tl.program_id(1) * DRAW_B + tl.arange(0, DRAW_B)
    in_own = (own_lanes < BLOCK_B) & (begin + own_lanes < B)
    panels_hh = ()
    panels_ih = ()
    for layer in tl.static_range(L):
        panels_hh += (
            load_gate_panels(weight_hh_ptr, layer, own_units, CELL, H, BLOCK_K, RESIDENT),
        )
        if layer > 0:
            panels_ih += (
                load_gate_panels(weight_ih_ptr, layer - 1, own_units, CELL, H, BLOCK_K, RESIDENT),
            )
        else:
            # Stands for the panels of the layer that is entered through the table.
            panels_ih += (panels_hh[0],)

    length = tl.load(lengths_ptr + rows, mask=in_tile, other=0).to(tl.int32)
    status = tl.load(status_ptr + rows, mask=in_tile, other=1)
    shortest = tl.min(tl.where(in_tile, length, 2147483647), 0)
    # Every program finds the same: a store would be seen by some of them too early.
    refused = lanes * 0
    arrivals = step_begin * 0
    going = tl.sum((status == 0).to(tl.int32), 0)
    for position in tl.range(step_begin, step_end, disable_licm=ANEW != "nothing"):
        # A loop that ended early would be `while`: weights would be kept in registers through it.
        if going > 0:
            if ANEW == "tiles":
                batch, first_row = anew(B), anew(tile).to(tl.int64) * BLOCK_B
                lane, units = anew_in_a_row(lanes), anew_in_a_row(own_units)
                mine = anew_in_a_row(own_lanes)
                row = first_row + lane
                in_rows = row < batch
                in_mine = (mine < BLOCK_B) & (first_row + mine < batch)
            else:
                batch, first_row, row, in_rows, in_mine = B, begin, rows, in_tile, in_own
                lane, units, mine = lanes, own_units, own_lanes
            alive = (status == 0) & (refused == 0)
            drawn = last_drawn(tokens_ptr, row, position, length, in_rows, S)
            token, unknown = next_input(prompts_ptr, row, position, length, drawn, alive, P, V)
            refused = tl.where(alive & unknown, 3, refused)
            alive = (status == 0) & (refused == 0)
            for layer in tl.static_range(L):
                if CELL == "reset_before":
                    run_layer(
                        layer, position, token, alive, table_ptr, weight_ih_ptr, weight_hh_ptr,
                        bias_ih_ptr, bias_hh_ptr, state_ptr, operand_ptr, gated_ptr, update_ptr,
                        panels_ih[layer], panels_hh[layer], counter_ptr, arrivals, units, first_row,
                        lane, in_rows, batch, layer == 0, "gates", CELL, L, H, BLOCK_H, BLOCK_B,
                        BLOCK_K, RESIDENT, PRECISION,
                    )  # fmt: skip
                    arrive(counter_ptr)
                    arrivals += programs
                run_layer(
                    layer, position, token, alive, table_ptr, weight_ih_ptr, weight_hh_ptr,
                    bias_ih_ptr, bias_hh_ptr, state_ptr, operand_ptr, gated_ptr, update_ptr,
                    panels_ih[layer], panels_hh[layer], counter_ptr, arrivals, units, first_row,
                    lane, in_rows, batch, layer == 0,
                    "candidate" if CELL == "reset_before" else "all", CELL, L, H, BLOCK_H, BLOCK_B,
                    BLOCK_K, RESIDENT, PRECISION,
                )  # fmt: skip
                arrive(counter_ptr)
                arrivals += programs
            wait(counter_ptr, arrivals)
            if position >= shortest:
                run_head(
                    head_ptr, head_bias_ptr, operand_ptr, logits_ptr, position, tl.program_id(1),
                    programs, first_row, lane, in_rows, batch, V, L, H, BLOCK_T, BLOCK_B, BLOCK_K,
                    PRECISION,
                )  # fmt: skip
                arrive(counter_ptr)
                arrivals += programs
                wait(counter_ptr, arrivals)
                run_draw(
                    prompts_ptr, lengths_ptr, status_ptr, tokens_ptr, log_probs_ptr, logits_ptr,
                    first_row, mine, in_mine, position, P, S, V, eos, seed_low, seed_high,
                    temperature, top_k, top_p, min_p, id_bits, BLOCK_V, WHOLE, SAMPLE, SHAPED,
                    TOP_K, TOP_P,
                )  # fmt: skip
                arrive(counter_ptr)
                arrivals += programs
                wait(counter_ptr, arrivals)
                status = tl.load(status_ptr + row, mask=in_rows, other=1, cache_modifier=".cg")
            going = tl.sum(((status == 0) & (refused == 0)).to(tl.int32), 0)
    status = tl.where(refused > 0, refused, status)
    tl.store(status_ptr + rows, status, mask=in_tile & (lanes * 0 + tl.program_id(1) == 0))


def launch_generate_grid(call: Generation, steps: tuple[int, int], config: Config) -> None:
    """Run positions steps[0] ... steps[1] - 1 of every row that is alive; each launch fits."""
    B, H, device = call.rows.B, call.weights.H, device_of(call.rows.state)
    model = model_of(call.weights, B)
    unit_tiles, batch_tiles = cdiv(H, config.BLOCK_H), cdiv(B, config.BLOCK_B)
    DRAW_B = triton.next_power_of_2(cdiv(config.BLOCK_B, unit_tiles))
    known = (
        call.split_arguments(DRAW_B, LOGITS_OF_WARP * config.num_warps)
        | exchange_of(call, steps[0]).arguments()
        | config.arguments("BLOCK_H", "BLOCK_B", "BLOCK_K", "RESIDENT")
        | compiled_as("grid", device, model, config)
    )
    most = max(1, device.processors // unit_tiles)
    for first_tile in range(0, batch_tiles, most):
        tiles = min(most, batch_tiles - first_tile)
        generate_grid[(tiles, unit_tiles)](
            **known,
            counters_ptr=new_counters(tiles, call.rows.state),
            step_begin=steps[0],
            step_end=steps[1],
            first_tile=first_tile,
            DRAW_B=DRAW_B,
            launch_cooperative_grid=True,
        )
