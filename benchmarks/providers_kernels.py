# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels one by one, through the operators as users call them.

`gru_fast.kernels` chooses a kernel by itself unless its functions are given one's name. So that no
choice hides a kernel, the operators are served here by those functions with the name filled in.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from benchmarks.cases import DTYPES
from benchmarks.precision import float32_as
from benchmarks.problem import Problem
from benchmarks.providers import Prepared, Provider
from benchmarks.providers_gru_fast import Layer
from gru_fast import direct, ops

OPERATORS = ("layer", "scan", "layer_backward", "scan_backward")


def kernel_names() -> tuple[list[str], str | None]:
    """Names of the kernels, or none and the reason."""
    if find_spec("triton") is None:
        return [], "triton is not installed"
    try:
        registry = importlib.import_module("gru_fast.kernels.registry")
    except ImportError as error:
        return [], f"gru_fast.kernels.registry cannot be imported: {error}"
    return list(registry.KERNELS), None


@contextmanager
def served_by(functions: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """Serve operators of `gru_fast` on CPU tensors by these functions instead."""
    library = torch.library.Library("gru_fast", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*only once for all operators", UserWarning)
            for name, function in functions.items():
                library.impl(name, function, "CPU", allow_override=True)
        # Most calls would not come to the operators.
        with direct.turned_off():
            yield
    finally:
        library._destroy()


class _Selection:
    """The kernel that serves the operators; None leaves the choice to `gru_fast.kernels`.

    A plain attribute: autograd calls the backward operators from threads of its own.
    """

    kernel: str | None = None

    def serve(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments, kernel=self.kernel)


_selection = _Selection()


def _functions() -> dict[str, Callable[..., Any]]:
    kernels: ModuleType = importlib.import_module("gru_fast.kernels")
    return {name: partial(_selection.serve, getattr(kernels, name)) for name in OPERATORS}


class Kernel(Layer):
    """`gru_fast.GRU` held to one kernel; on the CPU Triton has to interpret it."""

    def __init__(self, kernel: str, recompute: bool = False) -> None:
        super().__init__("auto", recompute)
        self.kernel = kernel
        self.name = f"gru_fast.triton.{kernel}" + ".recompute" * recompute

    def why_not(self, problem: Problem) -> str | None:
        kernels: ModuleType = importlib.import_module("gru_fast.kernels")
        case = problem.case
        if self.recompute and not problem.training:
            return "inference saves nothing"
        device, dtype = torch.device(problem.device), DTYPES[problem.dtype]
        sizes = (case.T, case.B, 1, case.H)
        with float32_as(problem.dtype):
            reason: str | None = kernels.why_not(
                self.kernel, device, dtype, sizes, "reset_after", not case.resets
            )
        return reason

    def prepare(self, problem: Problem, threads: int) -> Prepared:
        # On a GPU "auto" may take cuDNN; on a CPU no name but "auto" reaches the operators.
        backend = "auto" if problem.device == "cpu" else "triton"
        plain = Layer(backend, self.recompute).prepare(problem, threads)

        def call() -> Any:
            _selection.kernel = self.kernel
            try:
                return plain.call()
            finally:
                _selection.kernel = None

        def interpreted() -> Any:
            with served_by(_functions()):
                return call()

        if problem.device == "cpu":
            return Prepared(interpreted, plain.results)
        ops.cuda_functions.update(_functions())
        return Prepared(call, plain.results)


def providers() -> list[Provider]:
    return [Kernel(name) for name in kernel_names()[0]]
