# SPDX-License-Identifier: Apache-2.0
"""The arguments of one scan of the layer-normalised GRU, as its kernels take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .problem import Problem, turned


@dataclass(frozen=True)
class NormProblem:
    """A reset_after scan over normalised input products; bias_hh is that of the norm.

    Attributes:
        scan: Everything but the norm.
        gamma_hh: (G, 3H), contiguous.
        eps: Added to the variance.
    """

    scan: Problem
    gamma_hh: Tensor
    eps: float

    def shared_arguments(self) -> dict[str, Any]:
        """What forward and backward kernel both take, by the name of the parameter."""
        return self._with_norm(self.scan.shared_arguments())

    def forward_arguments(self) -> dict[str, Any]:
        """What the forward kernel takes beside its outputs."""
        return self._with_norm(self.scan.forward_arguments()) | {"eps": self.eps}

    def _with_norm(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the scan and what every kernel here adds; they are for one cell only."""
        del arguments["CELL"]
        return arguments | {"gamma_ptr": self.gamma_hh, "PRECISION": self.scan.precision}


@dataclass(frozen=True)
class NormChunk:
    """What a backward scan reads and writes for the scan steps steps[0] ... steps[1] - 1.

    Attributes:
        problem: Of all T steps.
        grad_output: (T, B, G*H), or None.
        output: (T, B, G*H).
        workspace: (steps, B, G, 6H), of the chunk.
        rstd: (steps, B, G), of the chunk.
        steps: Scan steps, [begin, end).
        grad_gates: (steps, B, G, 3H), written: Ar, Az, An.
        grad_q: (steps, B, G, H), written: Dq.
        grad_u: (steps, B, G, 3H), written: Du.
        grad_state: (G, B, H) float32, the gradient of the state after the chunk; receives that of
            the state before it.
        grad_start: (G, B, H) float32 of reset_state, added to; or None.
        grad_scale: (G, B, H) float32 of h_scale, added to; or None.
    """

    problem: NormProblem
    grad_output: Tensor | None
    output: Tensor
    workspace: Tensor
    rstd: Tensor
    steps: tuple[int, int]
    grad_gates: Tensor
    grad_q: Tensor
    grad_u: Tensor
    grad_state: Tensor
    grad_start: Tensor | None
    grad_scale: Tensor | None

    def arguments(self) -> dict[str, Any]:
        """What the backward kernel takes, by the name of the parameter."""
        return self.problem.shared_arguments() | {
            "turned_ptr": turned(self.problem.scan.weight_hh),
            "bias_ptr": self.problem.scan.bias_hh,
            "grad_output_ptr": self.grad_output,
            "output_ptr": self.output,
            "workspace_ptr": self.workspace,
            "rstd_ptr": self.rstd,
            "grad_gates_ptr": self.grad_gates,
            "grad_q_ptr": self.grad_q,
            "grad_u_ptr": self.grad_u,
            "grad_state_ptr": self.grad_state,
            "grad_start_ptr": self.grad_start,
            "grad_scale_ptr": self.grad_scale,
            "step_begin": self.steps[0],
            "step_end": self.steps[1],
        }
