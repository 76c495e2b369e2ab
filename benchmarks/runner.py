# SPDX-License-Identifier: Apache-2.0
"""One problem, all providers: gate, first call, interleaved rounds, records."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks import memory, probe, timing
from benchmarks.cases import DTYPES, SUITES
from benchmarks.errors import describe_error
from benchmarks.machine import OtherLoad, processors
from benchmarks.parity import judge
from benchmarks.precision import float32_as
from benchmarks.problem import Problem
from benchmarks.providers import Prepared, Provider
from benchmarks.providers_torch import TorchGRU
from benchmarks.records import Record


@dataclass(frozen=True)
class Setting:
    """How a run measures.

    Attributes:
        threads: CPU threads of every provider.
        effort: rounds and their length.
        bound: seconds that a problem takes at best, or None where that is not known.
        dry: whether a CPU stands in for a GPU: no ratio, no bound.
        footprint: whether to take first call and peak memory.
        gate_steps: most time steps of the gate, or None: as many as its reference can keep.
    """

    threads: int
    effort: timing.Effort = field(default_factory=timing.Effort)
    bound: Callable[[Problem], float | None] | None = None
    dry: bool = False
    footprint: bool = True
    gate_steps: int | None = None


@dataclass(frozen=True)
class Found:
    """What a problem gave that has figures of its own in place of records.

    Attributes:
        figures: of the providers that are right.
        failed: records of those that are not, or that raised: an error, no number.
        notes: who does not take the problem, and why.
    """

    figures: list[dict[str, Any]]
    failed: list[Record] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Gate:
    """The parity verdict on each provider for one problem.

    nn.GRU's own results are the yardstick; the reference's in the tested dtype where nn.GRU
    cannot take the problem.
    """

    def __init__(self, problem: Problem, threads: int, most_draws: int | None = None) -> None:
        self.draws, self.threads = problem.for_gate()[:most_draws], threads
        self._theirs: list[dict[str, torch.Tensor]] | None = None

    @property
    def T(self) -> int:
        """Time steps that the gate runs."""
        return self.draws[0].case.T

    def _run(self, provider: Provider) -> list[dict[str, torch.Tensor]]:
        found = []
        for problem in self.draws:
            prepared = provider.prepare(problem, self.threads)
            found.append({n: t.clone() for n, t in prepared.results(prepared.call()).items()})
        return found

    def _yardstick(self) -> list[dict[str, torch.Tensor]]:
        if self._theirs is None:
            first = self.draws[0]
            if first.beside_torch:
                self._theirs = self._run(TorchGRU(first.device))
            else:
                self._theirs = [p.by_reference(DTYPES[p.dtype]) for p in self.draws]
        return self._theirs

    def verdict(self, provider: Provider) -> str | None:
        """None, or what is wrong."""
        truth = [provider.asked(problem.truth) for problem in self.draws]
        return judge(self._run(provider), self._yardstick(), truth, self.draws[0].dtype)


def is_lost(error: Exception) -> bool:
    """Whether every later CUDA call of this process fails too."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        torch.cuda.empty_cache()
        return False
    return isinstance(error, getattr(torch, "AcceleratorError", ())) or "CUDA error" in str(error)


def note_times(record: Record, seconds: Sequence[float], other: float | None) -> None:
    """Fill in what the rounds took; other is the share of the CPU that others used."""
    found = timing.summary(seconds)
    record.median_s, record.p20_s, record.p80_s = found.median_s, found.p20_s, found.p80_s
    record.rounds, record.other_cpu = found.rounds, other


def note_claims(
    record: Record,
    seconds: Sequence[float],
    baseline: str | None,
    theirs: Sequence[float] | None,
    bound: float | None,
) -> None:
    """Fill in the ratio to the baseline's rounds and the share of the bound, where known."""
    if bound is not None and record.median_s is not None:
        record.bound_s, record.share_of_bound = bound, bound / record.median_s
    if theirs is not None:
        record.baseline = baseline
        record.ratio_to_torch = timing.ratio(theirs, seconds)


@dataclass
class Admitted:
    """Who takes a problem, by name.

    Attributes:
        records: of all that take it, with their errors.
        ready: those that passed the gate.
        baseline: the first of these that is one.
        notes: who does not take it, and why.
        pauses: seconds to wait after blocks of those whose threads go on spinning.
    """

    records: dict[str, Record] = field(default_factory=dict)
    ready: dict[str, Prepared] = field(default_factory=dict)
    baseline: str | None = None
    notes: list[str] = field(default_factory=list)
    pauses: dict[str, float] = field(default_factory=dict)

    def working_calls(self) -> dict[str, Callable[[], Any]]:
        """Of those that are ready and do not raise now; the others' errors are recorded."""
        calls = {}
        for name, prepared in self.ready.items():
            try:
                prepared.call()
                calls[name] = prepared.call
            except Exception as error:
                if is_lost(error):
                    raise
                self.records[name].error = describe_error(error)
                self.records[name].cold_s = None
        return calls


def admit(problem: Problem, providers: Sequence[Provider], setting: Setting) -> Admitted:
    """Ask, judge and prepare each provider; see `run_problem` for errors."""
    found = Admitted()
    shorter = problem
    if setting.gate_steps is not None and setting.gate_steps < problem.case.T:
        shorter = replace(problem, case=replace(problem.case, T=setting.gate_steps))
    gate = Gate(shorter, setting.threads, 1 if setting.dry else None)
    for provider in providers:
        reason = provider.why_not(problem)
        if reason is not None:
            found.notes.append(f"{provider.name} on {problem.suite} {problem.case}: {reason}")
            continue
        record = found.records[provider.name] = _blank(provider, problem, setting)
        try:
            wrong = None
            if provider.judged:
                wrong = gate.verdict(provider)
                record.parity = "ok" if wrong is None else "wrong"
                if gate.T != problem.case.T:
                    record.parity_T = gate.T
            if wrong is None:
                found.ready[provider.name] = provider.prepare(problem, setting.threads)
                if provider.spins_s and setting.threads > 1:
                    found.pauses[provider.name] = provider.spins_s
                if provider.is_baseline and found.baseline is None:
                    found.baseline = provider.name
            else:
                record.error = wrong
        except Exception as error:
            if is_lost(error):
                raise
            record.error = describe_error(error)
    return found


def run_problem(
    problem: Problem, providers: Sequence[Provider], setting: Setting
) -> tuple[list[Record], list[str]]:
    """Measure one problem.

    Returns:
        A record per provider that takes the problem, and notes: who does not and why.

    A provider that raises has its error recorded and the others go on. An error that leaves the
    GPU unusable is raised.
    """
    torch.set_num_threads(setting.threads)
    with float32_as(problem.dtype):
        found = admit(problem, providers, setting)
        _measure(problem, found, setting)
    return list(found.records.values()), found.notes


def _blank(provider: Provider, problem: Problem, setting: Setting) -> Record:
    of_layer = problem.suite in SUITES
    suite = "features" if of_layer and problem.feature is not None else problem.suite
    return Record(
        suite, provider.name, provider.version(), problem.device, problem.dtype,
        setting.threads, problem.case.as_dict(), feature=problem.feature, dry=setting.dry,
    )  # fmt: skip


def _measure(problem: Problem, found: Admitted, setting: Setting) -> None:
    """Fill in the numbers of those that passed the gate."""
    records, baseline = found.records, found.baseline
    found.notes += _footprints(problem, found.ready, records, setting)
    calls = found.working_calls()
    if not calls:
        return
    before = _exchange(problem, setting)
    load = OtherLoad()
    clock = timing.clock_of(problem.device)
    samples = timing.interleave(calls, clock, setting.effort, pauses=found.pauses)
    other = load.share()
    exchange = [s for s in (before, _exchange(problem, setting)) if s is not None]
    bound = setting.bound(problem) if setting.bound and not setting.dry else None
    for name, seconds in samples.items():
        note_times(records[name], seconds, other)
        records[name].exchange_s = max(exchange, default=None)
        if not setting.dry:
            note_claims(records[name], seconds, baseline, samples.get(baseline or ""), bound)


def _exchange(problem: Problem, setting: Setting) -> float | None:
    """How far the cores are from each other now, where that matters and a compiler is there."""
    if setting.threads == 1 or problem.device != "cpu" or processors() == 1:
        return None
    if not setting.dry:
        time.sleep(0.1)  # threads of who was called last may still spin
    try:
        return probe.exchange_s()
    except probe.ProbeError:
        return None


def _footprints(
    problem: Problem,
    ready: dict[str, Prepared],
    records: Mapping[str, Record],
    setting: Setting,
) -> list[str]:
    """Fill in first call and peak memory; notes on who has none, and why."""
    if not setting.footprint or not ready:
        return []
    found, notes = {}, []
    if problem.device == "cpu":
        found, notes = memory.in_fresh_process(problem, setting.threads, list(ready))
    else:
        for name in list(ready):
            try:
                found[name] = memory.cuda_footprint(ready[name].call)
            except Exception as error:
                if is_lost(error):
                    raise
                records[name].error = describe_error(error)
                del ready[name]
    for name, footprint in found.items():
        records[name].cold_s = footprint["cold_s"]
        records[name].peak_bytes = footprint["peak_bytes"]
    return notes
