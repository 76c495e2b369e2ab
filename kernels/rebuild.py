# SPDX-License-Identifier: Apache-2.0
"""Elementwise kernels over a chunk of times at once: the states that entered it, and its gates.

Every state is known from the output, so what entered a step needs no scan; with `recompute` the
gates follow from one product per chunk and equations (2) to (5). Equation numbers are those of
`gru_fast.reference`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .problem import SLOTS, Problem
from .tile import (
    is_backwards,
    load_gate,
    load_per_unit,
    load_scale,
    row_lengths,
    save_gates,
    sigmoid,
    tanh,
)
from .tile_backward import chunk_begin, previous_state
from .tiling import cdiv

_BLOCK_B, _BLOCK_H = 8, 64


@triton.jit
def _place(step_begin, step_end, T, B, first_group, reverse_bits, tiles, BLOCK_H, BLOCK_B):
    """The tile of a program: time in the chunk, absolute time, group, direction, rows, units."""
    backwards = is_backwards(reverse_bits, tl.program_id(1))
    g = (first_group + tl.program_id(1)).to(tl.int64)
    place = tl.program_id(0) // tiles
    batch_tiles = (B + BLOCK_B - 1) // BLOCK_B
    first_row = (place % batch_tiles).to(tl.int64) * BLOCK_B
    here = (place // batch_tiles).to(tl.int64)
    t = here + chunk_begin(step_begin, step_end, T, backwards)
    units = tl.program_id(0) % tiles * BLOCK_H + tl.arange(0, BLOCK_H)
    return here, t, g, backwards, first_row, units


@triton.jit(
    do_not_specialize=["step_begin", "step_end", "T", "B", "G", "first_group", "reverse_bits"]
)
def entering_states(
    h0_ptr,  # (G, B, H)
    lengths_ptr,  # (B) or None
    reset_mask_ptr,  # (T, B) or None
    reset_state_ptr,  # (G, B, H) or None
    h_scale_ptr,  # (B, G*H) or None
    output_ptr,  # (T, B, G*H)
    workspace_ptr,  # (chunk, B, G, S*H), or None but for reset_before
    entering_ptr,  # (chunk, B, G, H): s
    gated_ptr,  # (chunk, B, G, H), or None but for reset_before: r * s
    step_begin,
    step_end,
    T,
    B,
    G,
    first_group,
    reverse_bits,
    tiles,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    here, t, g, backwards, first_row, units = _place(
        step_begin, step_end, T, B, first_group, reverse_bits, tiles, BLOCK_H, BLOCK_B
    )
    lane = tl.arange(0, BLOCK_B)
    in_rows = first_row + lane < B
    inside = (units[:, None] < H) & in_rows[None, :]
    length = row_lengths(lengths_ptr, first_row, lane, in_rows, T)
    p = previous_state(
        h0_ptr, output_ptr, reset_mask_ptr, reset_state_ptr, t, length, first_row, g, units, lane,
        in_rows, inside, B, G, backwards, H,
    )  # fmt: skip
    s = p.to(tl.float32) * load_scale(h_scale_ptr, first_row, g, units, lane, inside, G, H)
    row = (here * B + first_row) * G + g
    at = row * H + lane[None, :] * (G * H) + units[:, None]
    tl.store(entering_ptr + at, s.to(entering_ptr.dtype.element_ty), mask=inside)
    if gated_ptr is not None:
        tile = lane[None, :] * (G * 3 * H) + units[:, None]
        r = load_gate(workspace_ptr, row * (3 * H), tile, 0, inside, H)
        tl.store(gated_ptr + at, (r * s).to(gated_ptr.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=["step_begin", "step_end", "T", "B", "G", "first_group", "reverse_bits"]
)
def rebuild_gates(
    gates_x_ptr,  # (T or chunk, B, G, N*H)
    stride_gates_t,
    stride_gates_b,
    stride_gates_g,
    gates_h_ptr,  # (chunk, B, G, N*H), of reset_before r and z or n only
    stride_hidden_t,
    stride_hidden_b,
    stride_hidden_g,
    bias_ptr,  # (G, N*H) or None
    lengths_ptr,  # (B) or None
    workspace_ptr,  # (chunk, B, G, S*H)
    step_begin,
    step_end,
    T,
    B,
    G,
    first_group,
    reverse_bits,
    tiles,
    OF_CHUNK: tl.constexpr,  # gates_x holds the chunk, not the whole sequence
    PART: tl.constexpr,  # "all", or of reset_before "gates" and then "candidate"
    CELL: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    N: tl.constexpr = 2 if CELL == "no_reset" else 3
    here, t, g, _, first_row, units = _place(
        step_begin, step_end, T, B, first_group, reverse_bits, tiles, BLOCK_H, BLOCK_B
    )
    lane = tl.arange(0, BLOCK_B)
    in_rows = first_row + lane < B
    inside = (units[:, None] < H) & in_rows[None, :]
    length = row_lengths(lengths_ptr, first_row, lane, in_rows, T)
    live = inside
    if lengths_ptr is not None:
        live = inside & (t < length)[None, :]
    gates_t = here if OF_CHUNK else t
    x_at = gates_t * stride_gates_t + first_row * stride_gates_b + g * stride_gates_g
    x_tile = lane[None, :] * stride_gates_b + units[:, None]
    h_at = here * stride_hidden_t + first_row * stride_hidden_b + g * stride_hidden_g
    h_tile = lane[None, :] * stride_hidden_b + units[:, None]
    if PART != "candidate":
        a_z = load_gate(gates_x_ptr, x_at, x_tile, N - 2, live, H)
        u_z = load_gate(gates_h_ptr, h_at, h_tile, N - 2, live, H)
        z = sigmoid(a_z + (u_z + load_per_unit(bias_ptr, g, N - 2, units, N, H)))
        r = z
        q = z
        n = z
        if CELL != "no_reset":
            a_r = load_gate(gates_x_ptr, x_at, x_tile, 0, live, H)
            u_r = load_gate(gates_h_ptr, h_at, h_tile, 0, live, H)
            r = sigmoid(a_r + (u_r + load_per_unit(bias_ptr, g, 0, units, N, H)))
    if PART != "gates":
        SLOT: tl.constexpr = 0 if PART == "candidate" else N - 1
        a_n = load_gate(gates_x_ptr, x_at, x_tile, N - 1, live, H)
        u_n = load_gate(gates_h_ptr, h_at, h_tile, SLOT, live, H)
        q = u_n + load_per_unit(bias_ptr, g, N - 1, units, N, H)
        if CELL == "reset_after":
            n = tanh(a_n + r * q)
        else:
            n = tanh(a_n + q)
        if PART == "candidate":
            r = n
            z = n
    row = (here * B + first_row) * G + g
    save_gates(
        workspace_ptr, q, r, z, n, t, length, row, units, lane, inside, G,
        CELL, H, lengths_ptr is not None, PART != "candidate", PART != "gates",
    )  # fmt: skip


def _launch(kernel, problem: Problem, steps: tuple[int, int], **arguments) -> None:
    tiles = cdiv(problem.H, _BLOCK_H)
    for first_group, groups, reverse_bits in problem.launches():
        # All but groups on the first axis: the others end at 65535 programs.
        programs = (steps[1] - steps[0]) * cdiv(problem.B, _BLOCK_B) * tiles
        kernel[(programs, groups)](
            **arguments,
            lengths_ptr=problem.lengths,
            step_begin=steps[0],
            step_end=steps[1],
            T=problem.T,
            B=problem.B,
            G=problem.G,
            first_group=first_group,
            reverse_bits=reverse_bits,
            tiles=tiles,
            H=problem.H,
            BLOCK_H=_BLOCK_H,
            BLOCK_B=_BLOCK_B,
            num_warps=4,
            enable_fp_fusion=True,
        )


def _is_shifted(problem: Problem) -> bool:
    """Whether what enters a step is just the output of the step before it."""
    features = (problem.lengths, problem.reset_mask, problem.h_scale)
    return all(f is None for f in features) and len(set(problem.reverse)) == 1


def _shifted(problem: Problem, output: Tensor) -> Tensor:
    """h0 and all outputs but the last of the scan: a copy that costs less than a launch of ours."""
    first = problem.h0.transpose(0, 1).reshape(1, problem.B, problem.G * problem.H)
    parts = [output[1:], first] if problem.reverse[0] else [first, output[:-1]]
    return torch.cat(parts).view(problem.T, problem.B, problem.G, problem.H)


def launch_entering_states(
    problem: Problem, output: Tensor, workspace: Tensor | None, steps: tuple[int, int]
) -> tuple[Tensor, Tensor | None]:
    """s of a chunk, (chunk, B, G, H), and, if a workspace of reset_before is given, r * s."""
    if workspace is None and steps == (0, problem.T) and _is_shifted(problem):
        return _shifted(problem, output), None
    entering = output.new_empty(steps[1] - steps[0], problem.B, problem.G, problem.H)
    gated = None if workspace is None else torch.empty_like(entering)
    shared = problem.shared_arguments()
    names = ("h0_ptr", "reset_mask_ptr", "reset_state_ptr", "h_scale_ptr")
    _launch(
        entering_states,
        problem,
        steps,
        **{name: shared[name] for name in names},
        output_ptr=output,
        workspace_ptr=workspace,
        entering_ptr=entering,
        gated_ptr=gated,
    )
    return entering, gated


def launch_rebuild_gates(
    problem: Problem,
    gates_x: Tensor,
    gates_h: Tensor,
    workspace: Tensor,
    steps: tuple[int, int],
    part: str,
) -> None:
    """Write the slots of a chunk; gates_x holds the chunk, or the whole sequence."""
    arguments = {}
    for name, tensor in (("gates", gates_x), ("hidden", gates_h)):
        for axis, stride in zip("tbg", tensor.stride(), strict=False):
            arguments[f"stride_{name}_{axis}"] = stride
    _launch(
        rebuild_gates,
        problem,
        steps,
        **arguments,
        gates_x_ptr=gates_x,
        gates_h_ptr=gates_h,
        bias_ptr=problem.bias_hh,
        workspace_ptr=workspace,
        OF_CHUNK=gates_x.shape[0] == steps[1] - steps[0],
        PART=part,
        CELL=problem.cell,
    )


def new_workspace(problem: Problem, steps: int) -> Tensor:
    """An uninitialised workspace of so many steps."""
    slots = SLOTS[problem.cell] * problem.H
    return problem.h0.new_empty(steps, problem.B, problem.G, slots)
