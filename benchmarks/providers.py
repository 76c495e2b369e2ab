# SPDX-License-Identifier: Apache-2.0
"""Who is measured: the interface, and the list.

A provider turns a problem into a call without arguments, whose time counts, and says how to read
the named results out of what the call returns, for the parity gate.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from benchmarks.problem import WEIGHTS, Problem

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Prepared:
    """A provider with a problem's tensors in place.

    Attributes:
        call: what is timed.
        results: from what `call` returned to the results by name; "output", "h_n" and, for
            training, "grad_<input>" of every input.
    """

    call: Callable[[], Any]
    results: Callable[[Any], Results]


class Provider(ABC):
    """One way to compute a GRU.

    Attributes:
        name: as in records; stable.
        is_baseline: whether ratios are to this one.
        judged: whether it computes what the problem asks for; what does not is there for scale.
        on_request: whether it takes part only where a pattern names it.
        spins_s: seconds for which its threads, where it has several, go on spinning after a call.
    """

    name: str
    is_baseline: ClassVar[bool] = False
    judged: ClassVar[bool] = True
    on_request: ClassVar[bool] = False
    spins_s: ClassVar[float] = 0.0

    def version(self) -> str:
        """Of the package."""
        return torch.__version__

    @abstractmethod
    def why_not(self, problem: Problem) -> str | None:
        """Why this problem is not for this provider, in words, or None."""

    def asked(self, truth: Results) -> Results:
        """Those of the problem's results that the gate asks of this provider."""
        return truth

    @abstractmethod
    def prepare(self, problem: Problem, threads: int) -> Prepared:
        """Weights and inputs in place; nothing has run."""


def module_call(
    forward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    problem: Problem,
    module: nn.Module,
    names: Iterable[str] = WEIGHTS,
) -> Prepared:
    """A module's forward under no_grad, or with the gradients of x, h0 and the named parameters.

    Args:
        forward: from x and h0 to output and h_n.
        problem: whose weights the module gets.
        module: with parameters in the order of `WEIGHTS`.
        names: of those parameters.
    """
    tensors = problem.tensors
    with torch.no_grad():
        for name, source in zip(names, WEIGHTS, strict=True):
            module.get_parameter(name).copy_(tensors[source])
    x, h0 = (tensors[name].clone().requires_grad_(problem.training) for name in ("x", "h0"))
    if not problem.training:

        def infer() -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                return forward(x, h0)

        return Prepared(infer, lambda out: {"output": out[0], "h_n": out[1]})

    inputs = [x, h0, *(module.get_parameter(name) for name in names)]
    gradients = (tensors["grad_output"], tensors["grad_h_n"])

    def train() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, ...]]:
        out = forward(x, h0)
        return out, torch.autograd.grad(out, inputs, gradients)

    def results(returned: Any) -> Results:
        (output, h_n), grads = returned
        named = zip(("x", "h0", *WEIGHTS), grads, strict=True)
        return {"output": output, "h_n": h_n} | {f"grad_{n}": g for n, g in named}

    return Prepared(train, lambda out: {n: t.detach() for n, t in results(out).items()})


def all_providers(device: str) -> list[Provider]:
    """Every provider that is importable for the device, the baseline first."""
    from benchmarks import (
        providers_cuda,
        providers_cuda_peers,
        providers_gru_fast,
        providers_jax,
        providers_keras,
        providers_kernels,
        providers_onnx,
        providers_openvino,
        providers_torch,
    )

    found = providers_torch.providers(device) + providers_gru_fast.providers(device)
    if device == "cuda":
        found += [*providers_kernels.providers(), *providers_cuda.providers()]
        found += providers_cuda_peers.providers()
    else:
        for peer in (providers_onnx, providers_openvino, providers_jax, providers_keras):
            found += peer.providers()
    names = [provider.name for provider in found]
    assert len(names) == len(set(names)), names
    return found


def choose(providers: list[Provider], patterns: str | None) -> list[Provider]:
    """The baselines, and those whose name matches one of the comma-separated patterns.

    Without patterns all but those that have to be asked for.

    Raises:
        ValueError: a pattern matches none.
    """
    if patterns is None:
        return [p for p in providers if not p.on_request]
    wanted = patterns.split(",")
    for pattern in wanted:
        if not any(fnmatchcase(p.name, pattern) for p in providers):
            names = ", ".join(p.name for p in providers)
            raise ValueError(f"providers: expected patterns of {names}, got {pattern!r}")
    return [p for p in providers if p.is_baseline or any(fnmatchcase(p.name, w) for w in wanted)]
