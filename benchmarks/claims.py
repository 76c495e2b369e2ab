# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks claims`: The figures of README and docs/speed.md, measured again here.

Every ratio in these pages comes from a committed run. Each is rerun here with the same sizes, peers
and threads, for a shorter time, the shortest calls first, until the time is used up. A claim is
kept if yours is at least the claimed ratio less 15% and the noise of your measurement, 30% together
at most; what looks broken is measured once more, for longer, and that counts.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import figures, figures_cpu, machine, timing
from benchmarks.cases import SUITES, Case
from benchmarks.compare import spread
from benchmarks.features import all_rows
from benchmarks.markdown import beside
from benchmarks.problem import Problem
from benchmarks.providers import Provider, all_providers
from benchmarks.records import Record, Results, read
from benchmarks.report import threads
from benchmarks.runner import Setting, run_problem
from benchmarks.sample.providers import STEADY
from benchmarks.sample.suite import run_case as sample_case

EFFORT = timing.Effort(block_s=0.01, budget_s=0.25, least=3, most=7)
LONGER = timing.Effort(block_s=0.03, budget_s=1.0, least=5, most=15)
"""For what looks broken."""
TOLERANCE = 0.15
MOST_TOLERANCE = 0.30
"""With the noise of a measurement: however wide its rounds spread, the loss of a third shows."""
GATE_STEPS = 4
STEADY_TOKENS = 200
"""Tokens that a loop of calls draws without --full; the committed run draws up to 2000."""
FIRST_LOOK = 0.8
"""Share of the time, the rest is for what then looks broken."""
NO_TIME = "no time left, --full tries it"


@dataclass(frozen=True)
class Claim:
    """One ratio of a page.

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
    """The page's blocks: name of the file, its contents, and the parts that are shown.

    Without those of a second machine: a claim is tried once.
    """
    return [
        (match[2], read(figures.RESULTS / match[2]), match[3].split())
        for match in figures.BLOCK.finditer(page)
        if "/" not in match[2]
    ]


def claims_of(results: Results, parts: Sequence[str]) -> Iterator[Claim]:
    """Every ratio that these parts of the page show and a CPU can repeat."""
    pairs: list[tuple[str, dict[str, str]]] = []
    if "train" in parts:
        pairs += [(suite, {"gru_fast.cpu": "nn.GRU"}) for suite in figures_cpu.LAYERS]
    if "infer" in parts:
        pairs += [("infer", figures_cpu.INFER_PEERS)]
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


def groups_of(claims: Sequence[Claim]) -> list[Group]:
    """The claims by measurement, those with the shortest calls first."""
    found: dict[tuple[Any, ...], Group] = {}
    for claim in claims:
        r = claim.ours
        key = (r.suite, r.feature, str(r.case), r.threads, "" if r.suite == "sample" else r.dtype)
        found.setdefault(key, []).append(claim)
    return sorted(found.values(), key=one_call_each)


def calls(effort: timing.Effort) -> int:
    """Of a slow one: a trial, one for the block's length, an untimed and a timed one a round."""
    return 2 + 2 * effort.least


def one_call_each(group: Group) -> float:
    """Seconds of one call of everyone who takes part, by the committed run."""
    seconds: dict[tuple[str, str], float] = {}
    for claim in group:
        r = claim.ours
        assert r.median_s is not None
        seconds[r.provider, r.dtype] = r.median_s
        seconds[claim.peer, ""] = r.median_s * claim.ratio
    share = min(1.0, STEADY_TOKENS / group[0].ours.case["T"])
    return sum(s * (share if name in STEADY else 1) for (name, _), s in seconds.items())


def again(group: Group, effort: timing.Effort, full: bool) -> list[Record]:
    """Measure what the group's claims are about; empty where that is not possible here."""
    r = group[0].ours
    wanted = {claim.peer for claim in group} | {claim.ours.provider for claim in group}
    case = Case(**r.case)
    if r.suite == "sample":
        return sample_case(case, r.threads, effort, None, wanted, None if full else STEADY_TOKENS)
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
        claim: of a page.
        yours: the ratio here; None where there is none.
        tolerance: the share of the claim by which it may be smaller.
        error: why ours has no figure.
        why_not: why the claim could not be tried.
        other_cpu: share of the CPU time that others had meanwhile.
    """

    claim: Claim
    yours: float | None = None
    tolerance: float = 0.0
    error: str | None = None
    why_not: str | None = None
    other_cpu: float | None = None

    @property
    def least(self) -> float:
        """The ratio with which the claim is kept."""
        return self.claim.ratio * (1 - self.tolerance)

    @property
    def broken(self) -> bool:
        less = self.yours is not None and self.yours < self.least
        return less or self.error is not None

    @property
    def word(self) -> str:
        if self.why_not is not None:
            return f"not run: {self.why_not}"
        if not self.broken:
            return "kept"
        busy = self.other_cpu is not None and self.other_cpu > machine.BUSY
        why = self.error or (f"while others took {self.other_cpu:.0%} of the CPU" if busy else "")
        return f"BROKEN {why}".rstrip()


def judge(claim: Claim, records: Sequence[Record]) -> Verdict:
    """The claim beside the new measurement."""
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
    tolerance = min(MOST_TOLERANCE, TOLERANCE + spread(ours) + spread(theirs))
    return Verdict(claim, yours, tolerance, other_cpu=ours.other_cpu)


def verdicts(
    claims: Sequence[Claim],
    efforts: Sequence[timing.Effort],
    budget: float,
    full: bool,
    say: Callable[[str], None],
) -> list[Verdict]:
    """Each claim, measured until the budget of seconds is used up.

    With the first of the efforts; what then looks broken with the next, when all else is done, for
    which a part of the budget is kept.
    """
    start = time.monotonic()

    def look(group: Group, effort: timing.Effort, until: float) -> list[Verdict]:
        if group[0].ours.threads > machine.processors():
            return [Verdict(c, why_not="too few processors") for c in group]
        if calls(effort) * one_call_each(group) > until - time.monotonic():
            return [Verdict(c, why_not=NO_TIME) for c in group]
        records = again(group, effort, full)
        new = [judge(claim, records) for claim in group]
        for v in new:
            say(line(v))
        return new

    groups = groups_of(claims)
    share = FIRST_LOOK if len(efforts) > 1 else 1.0
    found = [look(group, efforts[0], start + share * budget) for group in groups]
    for effort in efforts[1:]:
        broken = [i for i, seen in enumerate(found) if any(v.broken for v in seen)]
        if broken:
            say("\nonce more, for longer, what looks broken:")
        for i in broken:
            new = look(groups[i], effort, start + budget)
            if all(v.why_not != NO_TIME for v in new):
                found[i] = new
    return [v for seen in found for v in seen]


def line(v: Verdict) -> str:
    """A claim of the printed table."""
    measured = v.yours is not None
    least, yours = (f"{x:.2f}x" if measured else "-" for x in (v.least, v.yours))
    return f"{v.claim.name:<88}{v.claim.ratio:>8.2f}x{least:>9}{yours:>9}  {v.word}"


def summary(found: Sequence[Verdict]) -> str:
    """How many were tried and kept, and why the others were not tried."""
    reasons = Counter(v.why_not for v in found if v.why_not is not None)
    tried, broken = len(found) - reasons.total(), sum(v.broken for v in found)
    lines = [
        f"{tried} of {len(found)} claims tried: {tried - broken} kept, {broken} broken",
        *(f"{many} not run: {reason}" for reason, many in reasons.items()),
    ]
    return "\n".join(lines)


def main(suite: str, arguments: list[str]) -> int:
    """Rerun; 0 if no claim is broken, else 1."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks claims", description=__doc__.split(": ", 1)[1]
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=75.0,
        help="seconds; what would end later is not begun (default: %(default)g)",
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
    pages = "".join(page.read_text("utf-8") for page in figures.CLAIMS)
    for name, results, parts in committed(pages):
        there = results.machine
        if there["gpu"] is not None:
            print(f"{name}: claimed on {there['gpu']['name']}; not run: see the suite `gpu`")
            continue
        if (there["cpu"], there["isa"], there["cpus"]) != (here["cpu"], here["isa"], here["cpus"]):
            print(f"{name}: claimed on another machine, {machine.line(there)}")
        claims += claims_of(results, parts)
    print(f"\n{'claim':<88}{'claimed':>9}{'least':>9}{'yours':>9}")
    efforts = [timing.DRY] if options.quick else [EFFORT, LONGER]
    budget = math.inf if options.full else options.budget
    load = machine.OtherLoad()
    found = verdicts(claims, efforts, budget, options.full, print)
    other = load.share()
    torch.set_num_threads(before)
    print("\n" + summary(found))
    tried = any(v.why_not is None for v in found)
    if tried and other is not None and other > machine.BUSY:
        print(f"others took {other:.0%} of the CPU time meanwhile: not a fair trial")
    return 1 if any(v.broken for v in found) else 0
