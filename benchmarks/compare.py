# SPDX-License-Identifier: Apache-2.0
"""What changed between two runs beyond noise.

Where both runs have a ratio to the same baseline, that ratio is compared: it was measured in
interleaved rounds, so that it does not depend on how fast the machine happened to be. Else the
times are. The noise of a time is half the distance of its 20th and 80th percentile; a change counts
when it exceeds the noise of all that takes part and 5%.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.cases import Case
from benchmarks.records import Record, Results, read
from benchmarks.report import seconds, threads

LEAST = 0.05
OURS = "gru_fast."
Key = tuple[str, str | None, str, str, str, int, str]


@dataclass(frozen=True)
class Change:
    """One record beside its former self.

    Attributes:
        record: as it is now.
        old: as it was.
        speed: how many times as fast as before; by the ratios where both have one.
        noise: by how much that may differ from 1 without meaning anything.
    """

    record: Record
    old: Record
    speed: float
    noise: float

    @property
    def real(self) -> bool:
        return not 1 / (1 + self.noise) <= self.speed <= 1 + self.noise

    @property
    def regression(self) -> bool:
        return self.real and self.speed < 1 and self.record.provider.startswith(OURS)


def old_run(path: str) -> Results:
    """The file that --compare names."""
    try:
        return read(Path(path))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"expected results of an earlier run: {error}") from error


def key(r: Record) -> Key:
    """What has to be equal for two records to be of the same thing."""
    return (r.suite, r.feature, r.provider, r.device, r.dtype, r.threads, str(Case(**r.case)))


def spread(record: Record | None) -> float:
    """Half the distance of the percentiles, as a share of the median."""
    if record is None or not (record.median_s and record.p20_s and record.p80_s):
        return 0.0
    return (record.p80_s - record.p20_s) / 2 / record.median_s


def changes(old: Results, new: Results) -> tuple[list[Change], list[Record], list[Record]]:
    """Changes of what is in both runs, what is new, and what is gone or lost its figure."""
    before = {key(r): r for r in old.records if r.median_s is not None}
    now = {key(r): r for r in new.records if r.median_s is not None}

    def baseline(records: dict[Key, Record], r: Record) -> Record | None:
        return records.get(key(replace(r, provider=r.baseline or "")))

    found = []
    for place, r in now.items():
        if place not in before:
            continue
        was = before[place]
        noise = spread(r) + spread(was)
        assert r.median_s is not None and was.median_s is not None
        speed = was.median_s / r.median_s
        same = r.baseline is not None and r.baseline == was.baseline != r.provider
        if same and r.ratio_to_torch is not None and was.ratio_to_torch is not None:
            speed = r.ratio_to_torch / was.ratio_to_torch
            noise += spread(baseline(now, r)) + spread(baseline(before, was))
        found.append(Change(r, was, speed, max(LEAST, noise)))
    added = [r for place, r in now.items() if place not in before]
    gone = [r for place, r in before.items() if place not in now]
    return found, added, gone


def compared(old: Results, new: Results) -> tuple[str, int]:
    """The report, and the number of regressions of ours.

    Of what the old run has and the new one has not, only cases that the new one ran count as lost.
    """
    found, added, gone = changes(old, new)
    ran = {(r.suite, r.feature, str(r.case), r.dtype, r.threads) for r in new.records}
    lost = [r for r in gone if (r.suite, r.feature, str(r.case), r.dtype, r.threads) in ran]
    lines = [f"compared with the run of {old.machine.get('time')}, commit {old.machine['commit']}"]
    for name in ("cpu", "isa"):
        a, b = old.machine.get(name), new.machine.get(name)
        if a != b:
            lines.append(f"  another machine: {name} was {a}, is {b}")
    for package in sorted({*old.machine["versions"], *new.machine["versions"]}):
        a, b = (m.machine["versions"].get(package) for m in (old, new))
        if a != b and package != "gru_fast":
            lines.append(f"  {package} was {a}, is {b}")
    lines += _listed("slower", sorted((c for c in found if c.real and c.speed < 1), key=_speed))
    lines += _listed("faster", sorted((c for c in found if c.real and c.speed > 1), key=_speed))
    lines += [f"  lost    {_what(r)}" for r in lost]
    regressions = [c for c in found if c.regression]
    ours_lost = [r for r in lost if r.provider.startswith(OURS)]
    quiet = sum(not c.real for c in found)
    lines.append(
        f"{len(found)} compared, {quiet} unchanged, {len(added)} new, "
        f"{len(regressions) + len(ours_lost)} regressions of ours"
    )
    return "\n".join(lines), len(regressions) + len(ours_lost)


def _speed(change: Change) -> float:
    return change.speed


def _what(r: Record) -> str:
    name = r.feature or r.suite
    return f"{r.provider} {name} {Case(**r.case)} {r.dtype}, {threads(r)}"


def _listed(word: str, found: Iterable[Change]) -> list[str]:
    return [
        f"  {word}  {c.speed:.2f}x (noise {c.noise:.0%})  {_what(c.record)}  "
        f"{seconds(c.old.median_s)} -> {seconds(c.record.median_s)}"
        for c in found
    ]
