# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks claims`: the README's figures, measured again on this machine.

Every ratio in the README comes from a committed run. Each is rerun here with the same sizes, peers
and threads, for a shorter time, suite by suite in turn, until the time is used up. A claim is kept
if yours is at least the claimed ratio less 15% and the noise of your measurement.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch

from benchmarks import ROOT, figures, figures_cpu, machine, timing
from benchmarks.cases import SUITES, Case
from benchmarks.compare import spread
from benchmarks.features import all_rows
from benchmarks.markdown import beside
from benchmarks.problem import Problem
from benchmarks.providers import Provider, all_providers
from benchmarks.records import Record, Results, read
from benchmarks.report import threads
from benchmarks.runner import Setting, run_problem
from benchmarks.sample.suite import run_case as sample_case

README = ROOT / "README.md"
EFFORT = timing.Effort(block_s=0.01, budget_s=0.25, least=3, most=7)
TOLERANCE = 0.15
GATE_STEPS = 4
SAMPLED = 100
"""Tokens of a sampling call without --full, where the committed run draws up to 2000."""
PACKS = "gru_fast.generate"
"""Packs the weights in every call, so that fewer tokens are no fair trial."""


@dataclass(frozen=True)
class Claim:
    """One ratio of the README.

    Attributes:
        ours: the committed record.
        peer: the provider that its time is compared with.
        ratio: the peer's time over ours.
    """

    ours: Record
    peer: str
    ratio: float

    @property
    def name(self) -> str:
        r = self.ours
        what = r.feature or r.suite
        return f"{what} {Case(**r.case)} {r.dtype}, {threads(r)}: {self.peer} / {r.provider}"


Group = list[Claim]
"""Claims that one measurement answers."""


def committed(page: str) -> list[tuple[str, Results, list[str]]]:
    """The page's blocks: name of the file, its contents, and the parts that are shown."""
    return [
        (match[2], read(figures.RESULTS / match[2]), match[3].split())
        for match in figures.BLOCK.finditer(page)
    ]


def claims_of(results: Results, parts: Sequence[str]) -> Iterator[Claim]:
    """Every ratio that these parts of the page show and a CPU can repeat."""
    pairs: list[tuple[str, dict[str, str]]] = []
    if "train" in parts:
        pairs += [(suite, {"gru_fast.cpu": "nn.GRU"}) for suite in figures_cpu.LAYERS]
    if "infer" in parts:
        pairs += [("infer", {"gru_fast.cpu": "onnxruntime"})]
    if "step" in parts:
        pairs += [("step", figures_cpu.STEP_PEERS)]
    for suite, peers in pairs:
        for r, ratio in beside(results, suite, peers):
            same = r.ratio_to_torch is not None and r.baseline == peers[r.provider]
            yield Claim(r, peers[r.provider], r.ratio_to_torch if same else ratio)  # type: ignore[arg-type]
    for r in results.records:
        ours = r.provider.startswith("gru_fast.") and r.ratio_to_torch is not None
        ours = ours and r.provider != r.baseline
        if ours and r.suite in ("sample", "features", "lm") and r.suite in parts:
            assert r.baseline is not None and r.ratio_to_torch is not None
            yield Claim(r, r.baseline, r.ratio_to_torch)


def groups_of(claims: Sequence[Claim]) -> list[list[Group]]:
    """For each suite the claims by measurement."""
    found: dict[str, dict[tuple[Any, ...], Group]] = {}
    for claim in claims:
        r = claim.ours
        key = (r.suite, r.feature, str(r.case), r.threads, "" if r.suite == "sample" else r.dtype)
        found.setdefault(r.suite, {}).setdefault(key, []).append(claim)
    return [list(groups.values()) for groups in found.values()]


def in_turn(suites: list[list[Group]]) -> list[Group]:
    """The first measurement of each suite, then the second of each, and so on."""
    return [g for groups in zip_longest(*suites) for g in groups if g is not None]


def again(group: Group, effort: timing.Effort, full: bool) -> list[Record]:
    """Measure what the group's claims are about; empty where that is not possible here."""
    r = group[0].ours
    wanted = {claim.peer for claim in group} | {claim.ours.provider for claim in group}
    case = Case(**r.case)
    if r.suite == "sample":
        if not full and case.T > SAMPLED:
            case = replace(case, T=SAMPLED)
            wanted -= {PACKS}
        return sample_case(case, r.threads, effort, None, wanted)
    providers: Sequence[Provider]
    if r.feature is not None:
        row = next((row for row in all_rows() if row.name == r.feature), None)
        if row is None:
            return []
        problem, providers = row.at(case), row.providers
    else:
        problem, providers = Problem(case, r.suite, r.dtype, "cpu"), all_providers("cpu")
    chosen = [p for p in providers if p.name in wanted]
    gate_steps = GATE_STEPS if r.suite in SUITES else None
    setting = Setting(r.threads, effort, footprint=False, gate_steps=gate_steps)
    return run_problem(problem, chosen, setting)[0]


@dataclass(frozen=True)
class Verdict:
    """A claim and what was measured.

    Attributes:
        claim: of the README.
        yours: the ratio here; None where there is none.
        noise: by how much it may be smaller.
        error: why ours has no figure.
        why_not: why the claim could not be tried.
    """

    claim: Claim
    yours: float | None = None
    noise: float = 0.0
    error: str | None = None
    why_not: str | None = None

    @property
    def broken(self) -> bool:
        less = self.yours is not None and self.yours < self.claim.ratio * (1 - self.noise)
        return less or self.error is not None

    @property
    def word(self) -> str:
        if self.why_not is not None:
            return f"not run: {self.why_not}"
        return "kept" if not self.broken else f"BROKEN {self.error or ''}".rstrip()


def judge(claim: Claim, records: Sequence[Record]) -> Verdict:
    """The claim beside the new measurement."""
    r = claim.ours
    if r.provider == PACKS and records and records[0].case["T"] < r.case["T"]:
        return Verdict(claim, why_not=f"needs all {r.case['T']} tokens: --full")
    found = {(r.provider, r.dtype): r for r in records}
    ours = found.get((claim.ours.provider, claim.ours.dtype))
    theirs = next((r for r in records if r.provider == claim.peer), None)
    if ours is None or theirs is None:
        missing = claim.peer if theirs is None else claim.ours.provider
        return Verdict(claim, why_not=f"{missing} does not run here")
    if ours.median_s is None:
        return Verdict(claim, error=ours.error)
    if theirs.median_s is None:
        return Verdict(claim, why_not=f"{claim.peer}: {theirs.error}")
    yours = theirs.median_s / ours.median_s
    if ours.baseline == claim.peer and ours.ratio_to_torch is not None:
        yours = ours.ratio_to_torch
    return Verdict(claim, yours, min(0.5, TOLERANCE + spread(ours) + spread(theirs)))


def verdicts(
    groups: Sequence[Group],
    effort: timing.Effort,
    budget: float,
    full: bool,
    say: Callable[[str], None],
) -> list[Verdict]:
    """Each claim, measured until the budget of seconds is used up."""
    until = time.monotonic() + budget
    found: list[Verdict] = []
    for group in groups:
        r = group[0].ours
        if r.threads > (os.cpu_count() or 1):
            new = [Verdict(c, why_not="too few processors") for c in group]
        elif time.monotonic() > until:
            new = [Verdict(c, why_not="time is up") for c in group]
        else:
            records = again(group, effort, full)
            new = [judge(claim, records) for claim in group]
            for v in new:
                yours = "-" if v.yours is None else f"{v.yours:.2f}x"
                say(f"{v.claim.name:<88}{v.claim.ratio:>8.2f}x{yours:>9}  {v.word}")
        found += new
    return found


def main(suite: str, arguments: list[str]) -> int:
    """Rerun; 0 if no claim is broken, else 1."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks claims", description=__doc__.split(": ", 1)[1]
    )
    parser.add_argument(
        "--budget", type=float, default=75.0, help="seconds after which nothing new begins"
    )
    parser.add_argument(
        "--full", action="store_true", help="every claim, at full length, however long it takes"
    )
    parser.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    before = torch.get_num_threads()
    here = machine.describe()
    print(machine.line(here))
    claims: list[Claim] = []
    for name, results, parts in committed(README.read_text("utf-8")):
        there = results.machine
        if there["gpu"] is not None:
            print(f"{name}: claimed on {there['gpu']['name']}; not run: see the suite `gpu`")
            continue
        if (there["cpu"], there["isa"], there["cpus"]) != (here["cpu"], here["isa"], here["cpus"]):
            print(f"{name}: claimed on another machine, {machine.line(there)}")
        claims += claims_of(results, parts)
    print(f"\n{'claim':<88}{'claimed':>9}{'yours':>9}")
    groups = in_turn(groups_of(claims))
    effort = timing.DRY if options.quick else EFFORT
    budget = math.inf if options.full else options.budget
    load = machine.OtherLoad()
    found = verdicts(groups, effort, budget, options.full, print)
    other = load.share()
    torch.set_num_threads(before)
    broken = sum(v.broken for v in found)
    kept = sum(v.word == "kept" for v in found)
    print(f"\n{kept} kept, {broken} broken, {len(found) - kept - broken} of {len(found)} not run")
    if other is not None and other > machine.BUSY:
        print(f"others took {other:.0%} of the CPU time meanwhile: not a fair trial")
    return 1 if broken else 0
