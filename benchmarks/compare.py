# SPDX-License-Identifier: Apache-2.0
"""What changed between two runs beyond noise.

Where both runs have a ratio to the same baseline, that ratio is compared: it was measured in
interleaved rounds, so that it does not depend on how fast the machine happened to be. Else the
times are. The noise of a time is half the distance of its 20th and 80th percentile; a change counts
when it exceeds the noise of all that takes part and 5%. Named figures that are times of several
rounds (busy neighbours, imports) are compared in the same way.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.cases import Case
from benchmarks.records import Record, Results, read
from benchmarks.report import many_threads, seconds, threads

LEAST = 0.05
OURS = "gru_fast"
Key = tuple[str, str | None, str, str, str, int, str]
Figure = dict[str, Any]
FIGURE_KEYS = ("name", "unit", "suite", "case", "provider", "threads", "neighbours")


@dataclass(frozen=True)
class Change:
    """One thing beside its former self.

    Attributes:
        what: it is, in words.
        provider: of it.
        times: then and now, in words.
        speed: how many times as fast as before; by the ratios where both have one.
        noise: by how much that may differ from 1 without meaning anything.
    """

    what: str
    provider: str
    times: str
    speed: float
    noise: float

    @property
    def real(self) -> bool:
        return not 1 / (1 + self.noise) <= self.speed <= 1 + self.noise

    @property
    def regression(self) -> bool:
        return self.real and self.speed < 1 and self.provider.startswith(OURS)


def old_run(path: str) -> Results:
    """The file that --compare names."""
    try:
        return read(Path(path))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise argparse.ArgumentTypeError(
            f"expected what --json wrote in an earlier run, got {path}: {why}"
        ) from error


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
        times = f"{seconds(was.median_s)} -> {seconds(r.median_s)}"
        found.append(Change(_what(r), r.provider, times, speed, max(LEAST, noise)))
    added = [r for place, r in now.items() if place not in before]
    gone = [r for place, r in before.items() if place not in now]
    return found, added, gone


def figure_key(figure: Figure) -> tuple[Any, ...]:
    """What has to be equal for two figures to be of the same thing."""
    return tuple(figure.get(name) for name in FIGURE_KEYS)


def _timed(results: Results) -> dict[tuple[Any, ...], Figure]:
    """The figures that are times of several rounds."""
    return {figure_key(f): f for f in results.figures if "provider" in f and f.get("rounds", 1) > 1}


def _figure_spread(figure: Figure, other: Figure) -> float:
    """As `spread`; that of the other where an older file has no percentiles."""
    known = figure if "p20" in figure else other
    return float((known["p80"] - known["p20"]) / 2 / known["value"]) if "p20" in known else 0.0


def figure_changes(old: Results, new: Results) -> tuple[list[Change], list[Figure], list[Figure]]:
    """As `changes`."""
    before, now = _timed(old), _timed(new)
    found = []
    for place, f in now.items():
        if place in before:
            was = before[place]
            noise = _figure_spread(f, was) + _figure_spread(was, f)
            times = f"{_value(was)} -> {_value(f)}"
            speed = was["value"] / f["value"]
            found.append(Change(_what_figure(f), f["provider"], times, speed, max(LEAST, noise)))
    added = [f for place, f in now.items() if place not in before]
    return found, added, [f for place, f in before.items() if place not in now]


def _value(figure: Figure) -> str:
    if figure["unit"] == "s":
        return seconds(figure["value"])
    return f"{figure['value']:.3g} {figure['unit']}"


def _what_figure(figure: Figure) -> str:
    words = [figure[name] for name in ("provider", "name", "suite", "case") if name in figure]
    many = f", {many_threads(figure['threads'])}" if "threads" in figure else ""
    return " ".join(words) + many


def compared(old: Results, new: Results) -> tuple[str, int]:
    """The report, and the number of regressions of ours.

    Of what the old run has and the new one has not, only cases that the new one ran count as lost.
    """
    found, added, gone = changes(old, new)
    ran = {(r.suite, r.feature, str(r.case), r.dtype, r.threads) for r in new.records}
    lost = [
        (_what(r), r.provider)
        for r in gone
        if (r.suite, r.feature, str(r.case), r.dtype, r.threads) in ran
    ]
    of_figures, added_figures, gone_figures = figure_changes(old, new)
    found += of_figures
    # A row of figures that failed has records in their place.
    rows = {(r.feature, str(Case(**r.case))) for r in new.records}
    rows |= {(f"{f['name']}/{f.get('suite')}", f.get("case")) for f in new.figures}
    lost += [
        (_what_figure(f), f["provider"])
        for f in gone_figures
        if (f"{f['name']}/{f.get('suite')}", f.get("case")) in rows
    ]
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
    lines += [f"  lost    {what}" for what, _ in lost]
    regressions = sum(c.regression for c in found)
    regressions += sum(provider.startswith(OURS) for _, provider in lost)
    quiet = sum(not c.real for c in found)
    lines.append(
        f"{len(found)} compared, {quiet} unchanged, {len(added) + len(added_figures)} new, "
        f"{regressions} regressions of ours"
    )
    return "\n".join(lines), regressions


def _speed(change: Change) -> float:
    return change.speed


def _what(r: Record) -> str:
    name = r.feature or r.suite
    return f"{r.provider} {name} {Case(**r.case)} {r.dtype}, {threads(r)}"


def _listed(word: str, found: Iterable[Change]) -> list[str]:
    return [f"  {word}  {c.speed:.2f}x (noise {c.noise:.0%})  {c.what}  {c.times}" for c in found]
