# SPDX-License-Identifier: Apache-2.0
"""`norm_scan` and its backward on Triton kernels: shapes as in `gru_fast.reference_norm`.

The scans emit gate gradients only; weight, gain and bias follow as products and sums over all
times, by torch: deterministic. With `recompute` backward goes through the sequence in chunks whose
gates torch's operations rebuild.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import norm_tables, products, rebuild
from .chunks import GateGradients, chunks_of, runs_of, state_sums
from .norm_problem import NormChunk, NormProblem
from .problem import on_device, problem_of


def _problem(
    gates_x: Tensor,
    h0: Tensor,
    weight_hh: Tensor,
    gamma_hh: Tensor,
    bias_hh: Tensor | None,
    lengths: Tensor | None,
    reset_mask: Tensor | None,
    reset_state: Tensor | None,
    h_scale: Tensor | None,
    eps: float,
    reverse: Sequence[bool],
) -> NormProblem:
    scan = problem_of(
        gates_x, h0, weight_hh, bias_hh, lengths, reset_mask, reset_state, h_scale, "reset_after",
        reverse,
    )  # fmt: skip
    return NormProblem(scan, gamma_hh.contiguous(), eps)


def norm_scan(
    gates_x: Tensor,
    h0: Tensor,
    weight_hh: Tensor,
    gamma_hh: Tensor,
    bias_hh: Tensor | None,
    lengths: Tensor | None,
    reset_mask: Tensor | None,
    reset_state: Tensor | None,
    h_scale: Tensor | None,
    eps: float,
    reverse: Sequence[bool],
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward scan; raises RuntimeError where `norm_tables.why_not` has a reason."""
    problem = _problem(
        gates_x, h0, weight_hh, gamma_hh, bias_hh, lengths, reset_mask, reset_state, h_scale, eps,
        reverse,
    )  # fmt: skip
    T, B, G, H = problem.scan.T, problem.scan.B, problem.scan.G, problem.scan.H
    output = gates_x.new_empty(T, B, G * H)
    workspace = gates_x.new_empty((0,) if recompute else (T, B, G, 6 * H))
    rstd = gates_x.new_empty((0,) if recompute else (T, B, G))
    if T == 0 or B == 0:
        return output, h0.clone(memory_format=torch.contiguous_format), workspace, rstd
    h_n = torch.empty_like(problem.scan.h0)
    with on_device(gates_x):
        saved = (None, None) if recompute else (workspace, rstd)
        norm_tables.launcher("forward")(
            problem, output, h_n, *saved, norm_tables.take(problem.scan, "forward")
        )
    return output, h_n, workspace, rstd


def norm_scan_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    gates_x: Tensor,
    h0: Tensor,
    weight_hh: Tensor,
    gamma_hh: Tensor,
    bias_hh: Tensor | None,
    lengths: Tensor | None,
    reset_mask: Tensor | None,
    reset_state: Tensor | None,
    h_scale: Tensor | None,
    output: Tensor,
    workspace: Tensor,
    rstd: Tensor,
    eps: float,
    reverse: Sequence[bool],
    recompute: bool,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Gradients of gates_x, h0, weight_hh, gamma_hh, bias_hh, reset_state, h_scale."""
    problem = _problem(
        gates_x, h0, weight_hh, gamma_hh, bias_hh, lengths, reset_mask, reset_state, h_scale, eps,
        reverse,
    )  # fmt: skip
    scan = problem.scan
    T, B, G, H = scan.T, scan.B, scan.G, scan.H
    need_x, need_h0, need_w, need_gain, need_b, need_start, need_scale = output_mask
    need_b = need_b and bias_hh is not None
    output = output.contiguous()
    grad_output = None if grad_output is None else grad_output.contiguous()
    grad_state, grad_start, grad_scale = state_sums(scan, grad_h_n, need_start, need_scale)
    grad_gates = GateGradients(scan, need_x)
    weight, gain, bias = products.Total(), products.Total(), products.Total()
    with on_device(gates_x), products.matmul_precision(scan.precision, gates_x):
        for steps in chunks_of(scan, recompute) if T > 0 and B > 0 else ():
            entering = None
            if recompute:
                slots, inverse, entering = _rebuild(problem, output, steps)
            else:
                slots, inverse = workspace.contiguous(), rstd.contiguous()
            rows, grad_u = (h0.new_empty(steps[1] - steps[0], B, G, 3 * H) for _ in range(2))
            chunk = NormChunk(
                problem, grad_output, output, slots, inverse, steps, rows,
                h0.new_empty(*rows.shape[:3], H), grad_u, grad_state, grad_start, grad_scale,
            )  # fmt: skip
            norm_tables.launcher("backward")(chunk, norm_tables.take(scan, "backward"))
            grad_gates.add(rows, steps)
            for needed, total, factor in (
                (need_gain, gain, slots[..., : 3 * H]),
                (need_b, bias, None),
            ):
                if needed:
                    parts = rows[..., : 2 * H], chunk.grad_q
                    if factor is not None:
                        parts = parts[0] * factor[..., : 2 * H], parts[1] * factor[..., 2 * H :]
                    total.add(torch.cat([part.sum((0, 1)) for part in parts], 1))
            if need_w:
                if entering is None:
                    entering, _ = rebuild.launch_entering_states(scan, output, None, steps)
                weight.add(products.weight_gradients((grad_u, entering)))
    state = grad_state if need_h0 else None
    grad_h0, *rest = products.state_gradients(h0, state, grad_start, grad_scale)
    return (
        grad_gates.value,
        grad_h0,
        weight.gradient(scan.weight_hh if need_w else None, h0),
        gain.gradient(problem.gamma_hh if need_gain else None, h0),
        bias.gradient(scan.bias_hh if need_b else None, h0),
        *rest,
    )


def _rebuild(
    problem: NormProblem, output: Tensor, steps: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Workspace and rstd of a chunk, and the states that entered it: equations (17) to (21)."""
    scan = problem.scan
    H = scan.H
    entering, _ = rebuild.launch_entering_states(scan, output, None, steps)
    u = products.recurrent(entering, scan.weight_hh).float()
    centred = u - u.mean(-1, keepdim=True)
    rstd = torch.rsqrt((centred * centred).mean(-1, keepdim=True) + problem.eps)
    v = centred * rstd
    k = v * problem.gamma_hh.float()
    if scan.bias_hh is not None:
        k = k + scan.bias_hh.float()
    slots = scan.h0.new_empty(*u.shape[:3], 6 * H)
    for groups, times in runs_of(scan, steps):
        a, own = scan.gates_x[times, :, groups].float(), k[:, :, groups]
        r, z = torch.sigmoid(a[..., : 2 * H] + own[..., : 2 * H]).chunk(2, -1)
        n = torch.tanh(a[..., 2 * H :] + r * own[..., 2 * H :])
        slots[:, :, groups] = torch.cat((v[:, :, groups], r, z, n), -1).to(slots.dtype)
    return slots, rstd[..., 0].to(slots.dtype), entering
