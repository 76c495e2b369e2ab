# SPDX-License-Identifier: Apache-2.0
"""What the command lines of the suites have in common: options, peaks, writing, the exit code."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from tqdm import tqdm

from benchmarks import compare, machine, probe, timing
from benchmarks.bound import lower_bound
from benchmarks.cases import SUITES, Case
from benchmarks.problem import Problem
from benchmarks.records import Record, Results


def parser(suite: str, description: str) -> argparse.ArgumentParser:
    """With the options that every suite has."""
    found = argparse.ArgumentParser(prog=f"python -m benchmarks {suite}", description=description)
    found.add_argument("--threads", help="list, for example 1,2; default: 1 and all")
    add_common(found)
    return found


def add_common(found: argparse.ArgumentParser) -> None:
    """--quick, --json and --compare."""
    found.add_argument("--quick", action="store_true", help="small sizes, seconds")
    found.add_argument("--json", type=new_file, metavar="FILE", help="write the records there")
    found.add_argument(
        "--compare",
        type=compare.old_run,
        metavar="OLD.json",
        help="tell what changed beyond noise since that run; exit code 1 on a regression of ours",
    )


def new_file(path: str) -> Path:
    """The file that --json names, refused before anything is measured if it cannot be written.

    Writing replaces what is there (`records.write_json`), so that a device or a pipe would be gone,
    and a link that was not followed too.
    """
    found = Path(os.path.realpath(path))
    if os.path.exists(path) and not os.path.isfile(path):
        raise argparse.ArgumentTypeError(f"expected a new file or a regular one, got {path!r}")
    if not (found.parent.is_dir() and os.access(found.parent, os.W_OK)):
        raise argparse.ArgumentTypeError(f"expected a file in a folder to write in, got {path!r}")
    return found


def make_folder(path: Path) -> None:
    """The folder that --out names.

    Raises:
        ValueError: it cannot be made, or not written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out: expected a folder, got '{path}': {error.strerror}") from None
    if not os.access(path, os.W_OK):
        raise ValueError(f"out: expected a folder to write in, got '{path}'")


def threads_of(given: str | None, quick: bool) -> list[int]:
    """The numbers of threads to run with, each once.

    Raises:
        ValueError: not a list of positive numbers, or more than the processors that it may use.
    """
    processors = machine.processors()
    if given is None:
        return [1] if quick else sorted({1, processors})
    numbers = [int(n) if n.isdecimal() else 0 for n in given.split(",")]
    if min(numbers) < 1:
        raise ValueError(f"threads: expected a list of numbers from 1 on, got {given!r}")
    if max(numbers) > processors:
        raise ValueError(f"threads: this process may use {processors} processors, got {given!r}")
    return list(dict.fromkeys(numbers))


def some_of(option: str, given: str, known: Collection[str]) -> list[str]:
    """The names of a comma-separated list, each once.

    Raises:
        ValueError: one that is not known.
    """
    names = list(dict.fromkeys(given.split(",")))
    for name in names:
        if name not in known:
            raise ValueError(f"{option}: expected a list of {', '.join(known)}, got {name!r}")
    return names


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
            found.append({**entry, "bytes_per_thread": size, "order": probe.ORDER})
    return found


def bound_of(peaks: probe.Peaks | None, threads: int) -> Callable[[Problem], float | None] | None:
    """Seconds of a problem at best; None for problems that are no plain layer."""
    if peaks is None:
        return None

    def bound(problem: Problem) -> float | None:
        if problem.suite not in SUITES or not problem.is_plain_layer:
            return None
        return lower_bound(problem.case, problem.suite, problem.dtype, threads, peaks)

    return bound


class Run:
    """One run of a suite: what the machine can do, and what was found, written as it comes.

    Args:
        options: of `parser`.
        threads: for which the peaks are measured.
        probing: whether they are.

    Attributes:
        results: everything so far.
        peaks: of the CPU by threads; empty where they cannot be measured or are not wanted.
        effort: of each measurement.
    """

    def __init__(
        self, options: argparse.Namespace, threads: Sequence[int] = (), *, probing: bool = True
    ) -> None:
        self._start = time.monotonic()
        self._old: Results | None = options.compare
        self.effort = timing.QUICK if options.quick else timing.Effort()
        self.results = Results(machine.describe())
        self.peaks: dict[int, probe.Peaks] = {}
        self._json = options.json
        self.say(machine.line(self.results.machine))
        if not probing:
            return
        load = machine.OtherLoad()
        try:
            self.peaks = probe.measure_all(sorted(set(threads)), 0.001 if options.quick else 0.003)
        except probe.ProbeError as error:
            self.note(f"no bound: {error}")
        self.results.figures += figures(self.peaks, load.share())

    def say(self, text: str) -> None:
        """Print, beside a bar of progress."""
        tqdm.write(text)

    def keep(self, note: str) -> bool:
        """Keep, once; whether it is new."""
        new = note not in self.results.notes
        if new:
            self.results.notes.append(note)
        return new

    def note(self, text: str) -> None:
        """Keep and print, once."""
        if self.keep(text):
            self.say(text)

    def add(self, records: Sequence[Record], text: str, *, write: bool = True) -> None:
        """Keep, print text, write the file."""
        self.results.records += records
        self.say(("\n" if write else "") + text)
        if write:
            self.write()

    def write(self) -> None:
        """The file, if one was asked for."""
        if self._json is not None:
            self.results.write(self._json)

    def finish(self) -> int:
        """Name what has no figure and what changed.

        Returns:
            0 if every gate was green, nothing failed and nothing of ours became slower, else 1.
        """
        self.results.machine["seconds"] = round(time.monotonic() - self._start, 1)
        self.write()
        broken = [record for record in self.results.records if record.median_s is None]
        for record in broken:
            what = record.feature or f"{record.suite} {Case(**record.case)} {record.dtype}"
            print(f"no figure: {record.provider} {what}: {record.error}", file=sys.stderr)
        regressions = 0
        if self._old is not None:
            text, regressions = compare.compared(self._old, self.results)
            self.say("\n" + text)
        return 1 if broken or regressions else 0
