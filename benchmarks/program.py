# SPDX-License-Identifier: Apache-2.0
"""What the command lines of the suites have in common: options, peaks, writing, the exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from benchmarks import machine, probe, timing
from benchmarks.bound import lower_bound
from benchmarks.cases import SUITES
from benchmarks.problem import Problem
from benchmarks.records import Record, Results


def parser(suite: str, description: str) -> argparse.ArgumentParser:
    """With --threads, --quick and --json."""
    found = argparse.ArgumentParser(prog=f"python -m benchmarks {suite}", description=description)
    found.add_argument("--threads", help="list, for example 1,2; default: 1 and all")
    found.add_argument("--quick", action="store_true", help="small sizes, seconds")
    found.add_argument("--json", type=Path, metavar="FILE", help="write the records there")
    return found


def threads_of(given: str | None, quick: bool) -> list[int]:
    """The numbers of threads to run with.

    Raises:
        ValueError: not a list of positive numbers.
    """
    if given is None:
        return [1] if quick else sorted({1, os.cpu_count() or 1})
    numbers = [int(n) if n.isdecimal() else 0 for n in given.split(",")]
    if min(numbers) < 1:
        raise ValueError(f"threads: expected a list of numbers from 1 on, got {given!r}")
    return numbers


def complain(suite: str, error: ValueError) -> int:
    """Print what is wrong with the arguments; the exit code."""
    print(f"{' '.join(['python -m benchmarks', *suite.split()])}: {error}", file=sys.stderr)
    return 2


def figures(peaks: dict[int, probe.Peaks], other_cpu: float | None) -> list[dict[str, object]]:
    """The peaks as named numbers."""
    found: list[dict[str, object]] = []
    for threads, peak in peaks.items():
        more = {"threads": threads, "other_cpu": other_cpu}
        for dtype, rate in peak.flops.items():
            found.append({"name": f"fma_{dtype}", "value": rate, "unit": "FLOP/s", **more})
        for size, rate in peak.bandwidth.items():
            entry = {"name": "read_bandwidth", "value": rate, "unit": "B/s", **more}
            found.append({**entry, "bytes_per_thread": size})
    return found


def bound_of(peaks: probe.Peaks | None, threads: int) -> Callable[[Problem], float | None] | None:
    """Seconds of a problem at best; None for problems that are no plain layer."""
    if peaks is None:
        return None

    def bound(problem: Problem) -> float | None:
        if problem.suite not in SUITES:
            return None
        return lower_bound(problem.case, problem.suite, problem.dtype, threads, peaks)

    return bound


class Run:
    """One run of a suite: what the machine can do, and what was found, written as it comes.

    Attributes:
        results: everything so far.
        peaks: of the CPU by threads; empty where they cannot be measured or are not wanted.
        effort: of each measurement.
    """

    def __init__(
        self, threads: Sequence[int], *, quick: bool, json: Path | None, probing: bool = True
    ) -> None:
        self.effort = timing.QUICK if quick else timing.Effort()
        self.results = Results(machine.describe())
        self.peaks: dict[int, probe.Peaks] = {}
        self._json = json
        tqdm.write(machine.line(self.results.machine))
        if not probing:
            return
        load = machine.OtherLoad()
        try:
            self.peaks = probe.measure_all(sorted(set(threads)), 0.001 if quick else 0.003)
        except probe.ProbeError as error:
            self.note(f"no bound: {error}")
        self.results.figures += figures(self.peaks, load.share())

    def note(self, text: str) -> None:
        """Keep and print, once."""
        if text not in self.results.notes:
            self.results.notes.append(text)
            tqdm.write(text)

    def add(self, records: Sequence[Record], text: str) -> None:
        """Keep, print text, write the file."""
        self.results.records += records
        tqdm.write("\n" + text)
        self.write()

    def write(self) -> None:
        """The file, if one was asked for."""
        if self._json is not None:
            self.results.write(self._json)

    def finish(self) -> int:
        """Name what has no figure; 0 if every gate was green and nothing failed, else 1."""
        broken = [record for record in self.results.records if record.median_s is None]
        for record in broken:
            what = record.feature or record.case
            print(f"no figure: {record.provider} {what}: {record.error}", file=sys.stderr)
        return 1 if broken else 0
