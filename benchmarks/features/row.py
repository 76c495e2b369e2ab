# SPDX-License-Identifier: Apache-2.0
"""The form of a row: a problem with a name, and the ways to solve it that are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import DTYPES, Case
from benchmarks.problem import Problem
from benchmarks.providers import Prepared, Provider

Tensors = dict[str, Tensor]
Call = Callable[[], Tensors]
Way = Callable[[Tensors], Call]
"""From the problem's tensors to what is timed: a call that returns the results by name."""


@dataclass(frozen=True)
class Row:
    """One thing that users do.

    Attributes:
        problem: with `feature`, the row's unique name such as "reset_mask/train", without sizes.
        providers: who is compared; the first with `is_baseline` is what the ratios are to.
        quick: sizes at which everything takes milliseconds.
        more: further sizes.
        command: of `python -m benchmarks` that runs it.
    """

    problem: Problem
    providers: Sequence[Provider]
    quick: Case
    more: Sequence[Case] = ()
    command: str = "features"

    def __post_init__(self) -> None:
        if self.problem.feature is None:
            raise ValueError("problem: expected one with feature=, the row's name")
        if not any(p.is_baseline for p in self.providers):
            raise ValueError(f"providers: expected a baseline in {self.name}")

    @property
    def name(self) -> str:
        assert self.problem.feature is not None
        return self.problem.feature

    def at(self, case: Case) -> Problem:
        """The same problem with other sizes."""
        return replace(self.problem, case=case)

    def problems(self, quick: bool) -> list[Problem]:
        """At its own sizes, or at the quick ones."""
        return [
            self.at(case) for case in ([self.quick] if quick else [self.problem.case, *self.more])
        ]


@dataclass(frozen=True, kw_only=True)
class Drawn(Problem):
    """A problem with tensors and a truth of its own, where `Problem`'s one layer does not fit.

    Attributes:
        draw: from sizes and generator to tensors by name; floating ones become `dtype`.
        exact: a way to solve it; run in float64 it is the truth, in the tested dtype the yardstick.
    """

    draw: Callable[[Case, torch.Generator], Tensors]
    exact: Way

    def __post_init__(self) -> None:
        pass

    @property
    def is_plain_layer(self) -> bool:
        return False

    @property
    def beside_torch(self) -> bool:
        return False

    @cached_property
    def tensors(self) -> Tensors:
        drawn = self.draw(self.case, torch.Generator(self.device).manual_seed(self.seed))
        return _cast(drawn, DTYPES[self.dtype])

    def by_reference(self, dtype: torch.dtype) -> Tensors:
        return _detached(self.exact(_cast(self.tensors, dtype))())


class Named(Provider):
    """A way as a provider of `Drawn` problems.

    Args:
        name: what is used, the package first: "nn.GRU.loop", "gru_fast.num_heads".
        way: see `Way`.
        baseline: whether ratios are to this one.
        package: that provides it, for the version.
        results: from what the call returns to the results that are compared; it is not timed.
        part: where the ways of a row compute different things: which of `joined`'s parts this is.
    """

    def __init__(
        self,
        name: str,
        way: Way,
        *,
        baseline: bool = False,
        package: str | None = None,
        results: Callable[[Tensors], Tensors] = lambda found: found,
        part: str | None = None,
    ) -> None:
        self.name, self.way, self.results, self.part = name, way, results, part
        self.is_baseline = baseline  # type: ignore[misc]
        self.package = package or ("gru_fast" if name.startswith("gru_fast") else "torch")

    def version(self) -> str:
        return torch.__version__ if self.package == "torch" else version(self.package)

    def why_not(self, problem: Problem) -> str | None:
        return None

    def prepare(self, problem: Problem, threads: int) -> Prepared:
        return Prepared(self.way(problem.tensors), self._compared)

    def _compared(self, found: Tensors) -> Tensors:
        results = _detached(self.results(found))
        return results if self.part is None else joined({self.part: results})

    def asked(self, truth: Tensors) -> Tensors:
        if self.part is None:
            return truth
        asked = {name: t for name, t in truth.items() if name.startswith(f"{self.part}.")}
        if not asked:
            parts = ", ".join(dict.fromkeys(name.partition(".")[0] for name in truth))
            raise ValueError(f"part: expected one of {parts}, got {self.part!r}")
        return asked


def joined(parts: Mapping[str, Tensors]) -> Tensors:
    """The results of several ways, each named after its part."""
    return {f"{part}.{name}": t for part, found in parts.items() for name, t in found.items()}


def training(forward: Call, leaves: Tensors, gradients: Tensors) -> Call:
    """A call with forward's results and, as "grad_<name>", the gradient of each leaf.

    Args:
        forward: uses the leaves.
        leaves: that require a gradient.
        gradients: of the results named so; the others get none.
    """

    def call() -> Tensors:
        results = forward()
        found = torch.autograd.grad(
            [results[name] for name in gradients], list(leaves.values()), list(gradients.values())
        )
        return results | {f"grad_{n}": g for n, g in zip(leaves, found, strict=True)}

    return call


def inference(forward: Call) -> Call:
    """The call under no_grad."""

    def call() -> Tensors:
        with torch.no_grad():
            return forward()

    return call


def call_of(suite: str, forward: Call, leaves: Tensors, gradients: Tensors) -> Call:
    """`inference` or `training`, as the suite is called."""
    return inference(forward) if suite == "infer" else training(forward, leaves, gradients)


def every_part(ways: Mapping[str, Way]) -> Way:
    """All ways one after the other, their results `joined`."""

    def way(tensors: Tensors) -> Call:
        calls = {part: made(tensors) for part, made in ways.items()}
        return lambda: joined({part: call() for part, call in calls.items()})

    return way


def leaves(tensors: Tensors, names: Sequence[str]) -> Tensors:
    """Copies of the named tensors that require a gradient."""
    return {name: tensors[name].clone().requires_grad_() for name in names}


def load(module: nn.Module, tensors: Tensors) -> Tensors:
    """The module's parameters by name, filled from the tensors of these names."""
    parameters: dict[str, Any] = dict(module.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    return parameters


def _cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}


def _detached(results: Tensors) -> Tensors:
    return {name: t.detach() for name, t in results.items()}
