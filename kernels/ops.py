# SPDX-License-Identifier: Apache-2.0
"""The four ops on Triton kernels: schemas, shapes and semantics as in `gru_fast.reference`.

Forward: the input product, then one of the scans of `registry`. Backward: the scan emits gate
gradients only; every product over all times follows it and is torch's, so nothing is atomic and
runs repeat bit by bit. With `recompute` backward goes through the sequence in chunks and rebuilds
the gates of each, so that no buffer longer than a chunk is alive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import products, rebuild
from .chunks import GateGradients, chunks_of, runs_of, state_sums
from .problem import Chunk, Problem, dot_precision, on_device, problem_of
from .registry import take

Gates = Callable[[int, int], Tensor]


def layer(
    x: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    lengths: Tensor | None,
    reset_mask: Tensor | None,
    reset_state: Tensor | None,
    h_scale: Tensor | None,
    cell: str,
    reverse: Sequence[bool],
    recompute: bool,
    kernel: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer; `kernel` names one of `registry.KERNELS`, None leaves the choice to it."""
    with on_device(x):
        with products.matmul_precision(dot_precision(x), x):
            gates_x = products.project(x, weight_ih, bias_ih)
        problem = problem_of(
            gates_x, h0, weight_hh, bias_hh, lengths, reset_mask, reset_state, h_scale, cell,
            reverse,
        )  # fmt: skip
        return _scan(problem, recompute, kernel)


def scan(
    gates_x: Tensor,
    h0: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    lengths: Tensor | None,
    reset_mask: Tensor | None,
    reset_state: Tensor | None,
    h_scale: Tensor | None,
    cell: str,
    reverse: Sequence[bool],
    recompute: bool,
    kernel: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence over projected inputs; `kernel` as in `layer`."""
    with on_device(gates_x):
        problem = problem_of(
            gates_x, h0, weight_hh, bias_hh, lengths, reset_mask, reset_state, h_scale, cell,
            reverse,
        )  # fmt: skip
        return _scan(problem, recompute, kernel)


def _scan(problem: Problem, recompute: bool, kernel: str | None) -> tuple[Tensor, Tensor, Tensor]:
    gates_x, h0 = problem.gates_x, problem.h0
    T, B, G, H = problem.T, problem.B, problem.G, problem.H
    output = gates_x.new_empty(T, B, G * H)
    workspace = gates_x.new_empty(0) if recompute else rebuild.new_workspace(problem, T)
    if T == 0 or B == 0:
        return output, h0.clone(memory_format=torch.contiguous_format), workspace
    h_n = torch.empty_like(h0)
    chosen, config = take(kernel, problem, "forward", "infer" if recompute else "train")
    chosen.launch_forward(problem, output, h_n, None if recompute else workspace, config)
    return output, h_n, workspace


def scan_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_workspace: Tensor | None,
    gates_x: Tensor,
    h0: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    lengths: Tensor | None,
    reset_mask: Tensor | None,
    reset_state: Tensor | None,
    h_scale: Tensor | None,
    output: Tensor,
    workspace: Tensor,
    cell: str,
    reverse: Sequence[bool],
    recompute: bool,
    output_mask: Sequence[bool],
    kernel: str | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of `scan`: of gates_x, h0, weight_hh, bias_hh, reset_state, h_scale."""
    problem = problem_of(
        gates_x, h0, weight_hh, bias_hh, lengths, reset_mask, reset_state, h_scale, cell, reverse
    )
    grad_gates = GateGradients(problem, output_mask[0])
    with on_device(gates_x), products.matmul_precision(problem.precision, gates_x):
        rest = _backward(
            problem, grad_output, grad_h_n, grad_workspace, output, workspace,
            (lambda begin, end: problem.gates_x) if recompute else None,
            lambda rows, _, steps: grad_gates.add(rows, steps), False, output_mask[1:], kernel,
        )  # fmt: skip
    return (grad_gates.value, *rest)


def layer_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_workspace: Tensor | None,
    x: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    lengths: Tensor | None,
    reset_mask: Tensor | None,
    reset_state: Tensor | None,
    h_scale: Tensor | None,
    output: Tensor,
    workspace: Tensor,
    cell: str,
    reverse: Sequence[bool],
    recompute: bool,
    output_mask: Sequence[bool],
    kernel: str | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of `layer`: of x, h0, weight_ih, weight_hh, the biases, reset_state, h_scale."""
    need_x, need_h0, need_ih, need_hh, need_b_ih, need_b_hh, need_start, need_scale = output_mask
    T, B = x.shape[:2]
    problem = problem_of(
        x.new_empty(weight_ih.shape[1]).expand(T, B, *weight_ih.shape[:2]), h0, weight_hh, bias_hh,
        lengths, reset_mask, reset_state, h_scale, cell, reverse,
    )  # fmt: skip
    shared = x.dim() == 3
    padded = products.without_padding(x, lengths) if need_ih else x
    weight, bias = products.Total(), products.Total()
    added = recompute and shared and len(products.direction_runs(problem.reverse)) > 1
    grad_x: Tensor | None = None
    if need_x and (recompute or T == 0 or B == 0):
        grad_x = (x.new_zeros if added else x.new_empty)(x.shape)

    def gates(begin: int, end: int) -> Tensor:
        parts = [
            products.project(
                x[times] if shared else x[times, :, groups],
                weight_ih[groups],
                None if bias_ih is None else bias_ih[groups],
            )
            for groups, times in runs_of(problem, (begin, end))
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def on_chunk(rows: Tensor, sums: Tensor | None, steps: tuple[int, int]) -> None:
        nonlocal grad_x
        if need_b_ih and bias_ih is not None:
            assert sums is not None
            bias.add(sums)
        weights = []
        for groups, times in runs_of(problem, steps):
            part = rows[:, :, groups]
            if need_x:
                value = products.input_gradient(part, weight_ih[groups], shared)
                if not recompute:  # one chunk, all groups at once
                    grad_x = value.contiguous()
                elif not shared:
                    grad_x[times, :, groups] = value
                elif added:
                    grad_x[times] += value
                else:
                    grad_x[times] = value
            if need_ih:
                inputs = padded[times] if shared else padded[times, :, groups]
                weights.append(products.weight_gradient(part, inputs))
        if need_ih:
            weight.add(weights[0] if len(weights) == 1 else torch.cat(weights))

    with on_device(x), products.matmul_precision(problem.precision, x):
        grad_h0, grad_hh, grad_b_hh, grad_start, grad_scale = _backward(
            problem, grad_output, grad_h_n, grad_workspace, output, workspace,
            gates if recompute else None, on_chunk, need_b_ih and bias_ih is not None,
            (need_h0, need_hh, need_b_hh, need_start, need_scale), kernel,
        )  # fmt: skip
    grad_ih = weight.gradient(weight_ih if need_ih else None, x)
    grad_b_ih = bias.gradient(bias_ih if need_b_ih else None, x)
    if grad_x is None:
        grad_x = x.new_empty(0)
    return grad_x, grad_h0, grad_ih, grad_hh, grad_b_ih, grad_b_hh, grad_start, grad_scale


def _backward(
    problem: Problem,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_workspace: Tensor | None,
    output: Tensor,
    workspace: Tensor,
    gates: Gates | None,
    on_chunk: Callable[[Tensor, Tensor | None, tuple[int, int]], None],
    need_sums: bool,
    output_mask: Sequence[bool],
    kernel: str | None,
) -> tuple[Tensor, ...]:
    """Gradients of h0, weight_hh, bias_hh, reset_state, h_scale.

    on_chunk gets the rows A and, with need_sums, their sums over the chunk. gates gives gates_x of
    a chunk, or of the whole sequence; None: the workspace was saved.
    """
    T, B, G, H, h0 = problem.T, problem.B, problem.G, problem.H, problem.h0
    need_h0, need_w, need_b, need_start, need_scale = output_mask
    need_b = need_b and problem.bias_hh is not None
    grad_state, grad_start, grad_scale = state_sums(problem, grad_h_n, need_start, need_scale)
    weight, bias = products.Total(), products.Total()
    if T > 0 and B > 0:
        chosen, config = take(kernel, problem, "backward", "train")
        output = output.contiguous()
        grad_output = None if grad_output is None else grad_output.contiguous()
        grad_workspace = None if grad_workspace is None else grad_workspace.contiguous()
        for steps in chunks_of(problem, gates is not None):
            entering = gated = None
            if gates is None:
                slots = workspace.contiguous()
            else:
                slots, entering, gated = _rebuild(problem, gates(*steps), output, steps)
            count = steps[1] - steps[0]
            rows = h0.new_empty(count, B, G, problem.weight_hh.shape[1])
            grad_q = h0.new_empty(count, B, G, H) if problem.cell == "reset_after" else None
            chunk = Chunk(
                problem, grad_output, grad_workspace, output, slots, steps, rows, grad_q,
                grad_state, grad_start, grad_scale,
            )  # fmt: skip
            chosen.launch_backward(chunk, config)
            sums = rows.sum((0, 1)) if need_sums or need_b else None
            on_chunk(rows, sums, steps)
            gate_rows = rows.shape[3] - H
            candidate = rows[..., gate_rows:] if grad_q is None else grad_q
            if need_b:
                assert sums is not None
                if grad_q is not None:
                    sums = torch.cat((sums[:, :gate_rows], grad_q.sum((0, 1))), 1)
                elif need_sums:
                    sums = sums.clone()  # results share no memory
                bias.add(sums)
            if need_w:
                if entering is None:
                    source = slots if problem.cell == "reset_before" else None
                    entering, gated = rebuild.launch_entering_states(problem, output, source, steps)
                operand = entering if gated is None else gated
                weight.add(
                    products.weight_gradients(
                        (rows[..., :gate_rows], entering), (candidate, operand)
                    )
                )
    state = grad_state if need_h0 else None
    grad_h0, *rest = products.state_gradients(h0, state, grad_start, grad_scale)
    return (
        grad_h0,
        weight.gradient(problem.weight_hh if need_w else None, h0),
        bias.gradient(problem.bias_hh if need_b else None, h0),
        *rest,
    )


def _rebuild(
    problem: Problem, gates_x: Tensor, output: Tensor, steps: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The workspace of a chunk, the states that entered it, and for reset_before r * s."""
    slots = rebuild.new_workspace(problem, steps[1] - steps[0])
    entering, gated = rebuild.launch_entering_states(problem, output, None, steps)
    weight = problem.weight_hh
    if problem.cell != "reset_before":
        gates_h = products.recurrent(entering, weight)
        rebuild.launch_rebuild_gates(problem, gates_x, gates_h, slots, steps, "all")
        return slots, entering, None
    rows = weight.shape[1] - problem.H
    gates_h = products.recurrent(entering, weight[:, :rows])
    rebuild.launch_rebuild_gates(problem, gates_x, gates_h, slots, steps, "gates")
    gated = slots[..., : problem.H] * entering
    gates_h = products.recurrent(gated, weight[:, rows:])
    rebuild.launch_rebuild_gates(problem, gates_x, gates_h, slots, steps, "candidate")
    return slots, entering, gated
