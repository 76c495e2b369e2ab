# SPDX-License-Identifier: Apache-2.0
"""`isa`: the layer by the kernels of every instruction set that this CPU can run, beside nn.GRU.

What users of an older CPU get, but for that CPU's own caches and clock. nn.GRU keeps the
instructions that torch and its BLAS choose.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from benchmarks.cases import Case, square
from benchmarks.features.row import Row
from benchmarks.problem import Problem
from benchmarks.providers import Prepared
from benchmarks.providers_gru_fast import Layer
from benchmarks.providers_torch import TorchGRU
from gru_fast import ops

P = ParamSpec("P")
R = TypeVar("R")


def instruction_sets() -> list[str]:
    """Those that this CPU can run, worst first."""
    if not ops.HAS_CPU_KERNELS:
        return []
    from gru_fast import _C

    return list(_C.cpu_isas())


def on(name: str, call: Callable[P, R]) -> Callable[P, R]:
    """The call with the kernels of that instruction set."""
    from gru_fast import _C

    @wraps(call)
    def with_it(*args: P.args, **kwargs: P.kwargs) -> R:
        before = _C.cpu_isa()
        _C.set_cpu_isa(name)
        try:
            return call(*args, **kwargs)
        finally:
            _C.set_cpu_isa(before)

    return with_it


class OnInstructionSet(Layer):
    """`gru_fast.GRU` by the kernels of one instruction set."""

    def __init__(self, isa: str) -> None:
        super().__init__("cpu")
        self.isa, self.name = isa, f"gru_fast.cpu.{isa}"

    def prepare(self, problem: Problem, threads: int) -> Prepared:
        prepared = super().prepare(problem, threads)
        return Prepared(on(self.isa, prepared.call), prepared.results)


def _row(suite: str) -> Row:
    return Row(
        Problem(square(64, 1, 256), suite, "float32", "cpu", feature=f"isa/{suite}"),
        [TorchGRU("cpu"), *map(OnInstructionSet, instruction_sets())],
        quick=Case(5, 8, 3, 9),
        more=[square(256, 1, 256), square(64, 32, 256), square(256, 32, 128)],
        command="layers",
    )


ROWS = [_row("train"), _row("infer")]
