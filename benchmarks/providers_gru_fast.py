# SPDX-License-Identifier: Apache-2.0
"""gru_fast, each backend and each GPU kernel by its name: nothing is left to `auto`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

import gru_fast
from benchmarks.cases import DTYPES
from benchmarks.problem import Problem
from benchmarks.providers import Prepared, Provider, module_call
from benchmarks.providers_torch import CELL_WEIGHTS, CellLoop
from gru_fast import backends


class Layer(Provider):
    """`gru_fast.GRU` with a backend asked for by name."""

    def __init__(self, backend: str, recompute: bool = False) -> None:
        self.backend, self.recompute = backend, recompute
        self.name = f"gru_fast.{backend}"

    def version(self) -> str:
        return gru_fast.__version__

    def why_not(self, problem: Problem) -> str | None:
        reasons = backends.why_not(
            problem.device, DTYPES[problem.dtype], resets=problem.case.resets > 0
        )
        return reasons.get(self.backend)

    def prepare(self, problem: Problem, threads: int) -> Prepared:
        module = gru_fast.GRU(
            problem.case.I,
            problem.case.H,
            backend=self.backend,
            recompute=self.recompute,
            device=problem.device,
            dtype=DTYPES[problem.dtype],
        )
        mask = problem.reset_mask
        if mask is None:
            return module_call(module, problem, module)
        return module_call(lambda x, h0: module(x, h0, reset_mask=mask), problem, module)


class Cell(Layer):
    """`gru_fast.GRUCell`, one step."""

    def __init__(self, backend: str) -> None:
        super().__init__(backend)
        self.name = f"gru_fast.{backend}.cell"

    def why_not(self, problem: Problem) -> str | None:
        if problem.suite != "step" or problem.case.T != 1 or problem.case.resets:
            return "a cell takes one step"
        return super().why_not(problem)

    def prepare(self, problem: Problem, threads: int) -> Prepared:
        cell = gru_fast.GRUCell(
            problem.case.I,
            problem.case.H,
            backend=self.backend,
            device=problem.device,
            dtype=DTYPES[problem.dtype],
        )

        def forward(x: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
            h = cell(x[0], h0[0])
            return h.unsqueeze(0), h.unsqueeze(0)

        return module_call(forward, problem, cell, CELL_WEIGHTS)


class OwnCellLoop(CellLoop):
    """A Python loop over `gru_fast.GRUCell`."""

    def __init__(self) -> None:
        super().__init__(gru_fast.GRUCell, "gru_fast.GRUCell")

    def version(self) -> str:
        return gru_fast.__version__


class Prepacked(Layer):
    """`gru_fast.GRU` inside of `gru_fast.prepacked`, for as long as the call is kept."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.name = "gru_fast.cpu.prepacked"

    def why_not(self, problem: Problem) -> str | None:
        if problem.dtype not in ("float32", "bfloat16"):
            return "weights are packed beforehand in float32 and bfloat16"
        if problem.training or problem.case.resets:
            return "weights are packed beforehand for calls without gradients or resets"
        return super().why_not(problem)

    def prepare(self, problem: Problem, threads: int) -> Prepared:
        module = gru_fast.GRU(
            problem.case.I, problem.case.H, backend=self.backend, dtype=DTYPES[problem.dtype]
        )
        block = gru_fast.prepacked(module)
        block.__enter__()

        def forward(x: Tensor, h0: Tensor, block: Any = block) -> tuple[Tensor, Tensor]:
            return module(x, h0)

        return module_call(forward, problem, module)


def providers(device: str) -> list[Provider]:
    """The layer, the cell and what else there is on every backend that can run on the device."""
    dtype = DTYPES["float32"]
    reasons: Mapping[str, str] = backends.why_not(device, dtype)
    names = [n for n in backends.NAMES if n not in reasons and n not in ("auto", "cudnn")]
    names.sort(key=lambda name: name == "reference")
    found: list[Provider] = []
    for name in names:
        found += [Layer(name)] if name == "reference" else [Layer(name), Cell(name)]
        found += [Prepacked()] if name == "cpu" else []
    return found
