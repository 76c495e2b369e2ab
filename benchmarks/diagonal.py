# SPDX-License-Identifier: Apache-2.0
"""A GRU with diagonal recurrent matrices: what solvers that are parallel in time compute.

Each unit sees its own last state only, and the reset gate stands before the product (Danieli et
al. 2025, "ParaRNN", equation 3.1a): a smaller function than the plain layer, of the same shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

import gru_fast
from benchmarks.cases import DTYPES
from benchmarks.problem import Problem
from benchmarks.providers import Prepared, module_call
from benchmarks.providers_gru_fast import Layer


@dataclass(frozen=True)
class DiagonalProblem(Problem):
    """weight_hh_l0 is (3H, 1), the diagonals one below the other; h0 is zero."""

    cell = "reset_before"

    @property
    def is_plain_layer(self) -> bool:
        return False

    @property
    def beside_torch(self) -> bool:
        return False

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        drawn = dict(super().tensors)
        blocks = drawn["weight_hh_l0"].view(3, self.case.H, self.case.H)
        drawn["weight_hh_l0"] = blocks.diagonal(dim1=1, dim2=2).reshape(-1, 1)
        drawn["h0"] = torch.zeros_like(drawn["h0"])
        return drawn

    def dense(self, weight_hh: Tensor) -> Tensor:
        return weight_hh.view(3, -1).diag_embed().flatten(0, 1)


class Diagonal(Layer):
    """`gru_fast.GRU` with a head for each unit."""

    def __init__(self) -> None:
        super().__init__("auto")
        self.name = "gru_fast.diagonal"

    def why_not(self, problem: Problem) -> str | None:
        if not isinstance(problem, DiagonalProblem):
            return "it takes diagonal recurrent matrices"
        return "it is timed without resets" if problem.case.resets else super().why_not(problem)

    def prepare(self, problem: Problem, threads: int) -> Prepared:
        case, dtype = problem.case, DTYPES[problem.dtype]
        module = gru_fast.GRU(
            case.I,
            case.H,
            cell=problem.cell,
            num_heads=case.H,
            device=problem.device,
            dtype=dtype,
        )
        return module_call(module, problem, module)
