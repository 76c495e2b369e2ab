# SPDX-License-Identifier: Apache-2.0
"""The command line of `train`, `infer` and `step`; `gpu` has its own."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import cases, machine, probe, report, timing
from benchmarks.bound import lower_bound
from benchmarks.problem import Problem
from benchmarks.providers import Provider, all_providers, choose
from benchmarks.records import Record, Results
from benchmarks.runner import Setting, run_problem


def parser() -> argparse.ArgumentParser:
    suites = "\n".join(f"  {name:<7}{text}" for name, text in cases.SUITES.items())
    found = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=f"gru_fast beside its peers, in one run.\n\nsuites:\n{suites}\n"
        "  sample tokens drawn one after the other: python -m benchmarks sample --help\n"
        "  gpu    everything a GPU can tell: python -m benchmarks gpu --help\n\n"
        "without a suite: all but sample and gpu, --quick",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("suites", nargs="*", type=_suite, metavar="SUITE")
    found.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    found.add_argument("--dtype", default="float32", help=f"list of {', '.join(cases.DTYPES)}")
    found.add_argument("--threads", help="list, for example 1,2; default: 1 and all")
    found.add_argument(
        "--shapes", help=f"list of {', '.join(cases.PRESETS)} or shapes like H64-B1-T256"
    )
    found.add_argument("--providers", help="list of names or patterns; nn.GRU always takes part")
    found.add_argument("--quick", action="store_true", help="small shapes, under a minute")
    found.add_argument("--json", type=Path, metavar="FILE", help="write the records there")
    return found


def _suite(name: str) -> str:
    if name not in cases.SUITES:
        known = ", ".join([*cases.SUITES, "sample or gpu (as the first argument)"])
        raise argparse.ArgumentTypeError(f"expected one of {known}, got {name!r}")
    return name


def _split(text: str, known: dict[str, object] | None = None) -> list[str]:
    names = text.split(",")
    for name in names:
        if known is not None and name not in known:
            raise ValueError(f"expected a list of {', '.join(known)}, got {name!r}")
    return names


def shapes_of(suite: str, given: str | None, quick: bool) -> list[cases.Case]:
    """The cases of a suite; the step suite is about one step whatever T was given."""
    if given is not None:
        found = cases.parse(given)
    elif suite == "step":
        found = cases.STEPS[::3] if quick else cases.STEPS
    else:
        found = cases.QUICK if quick else cases.TABLE
    if suite == "step":
        found = list(dict.fromkeys(cases.Case(c.I, c.H, c.B, 1) for c in found))
    return found


def problems_of(options: argparse.Namespace) -> list[tuple[int, Problem]]:
    """Every (threads, problem) of a run."""
    every = os.cpu_count() or 1
    threads = sorted({1, every}) if options.device == "cpu" and not options.quick else [1]
    if options.threads:
        threads = [int(n) for n in options.threads.split(",")]
    if min(threads) < 1:
        raise ValueError(f"threads: expected at least 1, got {min(threads)}")
    dtypes = _split(options.dtype, dict(cases.DTYPES))
    return [
        (n, Problem(case, suite, dtype, options.device))
        for suite in options.suites
        for n in threads
        for dtype in dtypes
        for case in shapes_of(suite, options.shapes, options.quick)
    ]


def run(options: argparse.Namespace) -> Results:
    """Measure, print, and write after each case."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda is not available here")
    problems = problems_of(options)
    providers: list[Provider] = choose(all_providers(options.device), options.providers)
    results = Results(machine.describe())
    tqdm.write(machine.line(results.machine))
    peaks: dict[int, probe.Peaks] = {}
    if options.device == "cpu":
        load = machine.OtherLoad()
        try:
            seconds = 0.001 if options.quick else 0.003
            peaks = probe.measure_all(sorted({n for n, _ in problems}), seconds)
        except probe.ProbeError as error:
            results.notes.append(f"no bound: {error}")
            tqdm.write(results.notes[-1])
        results.figures += figures(peaks, load.share())
    effort = timing.QUICK if options.quick else timing.Effort()
    for threads, problem in tqdm(problems, unit="case", file=sys.stderr, disable=None):
        setting = Setting(threads, effort, bound_of(peaks.get(threads), threads))
        records, notes = run_problem(problem, providers, setting)
        results.records += records
        results.notes += [note for note in notes if note not in results.notes]
        tqdm.write("\n" + report.table(records))
        if options.json is not None:
            results.write(options.json)
    return results


def bound_of(peaks: probe.Peaks | None, threads: int) -> Callable[[Problem], float | None] | None:
    """`lower_bound` with all but the problem given."""
    if peaks is None:
        return None
    return lambda problem: lower_bound(problem.case, problem.suite, problem.dtype, threads, peaks)


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


def failures(records: list[Record]) -> list[Record]:
    """The records without a number."""
    return [record for record in records if record.median_s is None]


def main(arguments: list[str]) -> int:
    """Run; 0 if every gate was green and nothing failed, else 1."""
    options = parser().parse_args(arguments)
    if not options.suites:
        options.suites, options.quick = list(cases.SUITES), True
    try:
        results = run(options)
    except ValueError as error:
        print(f"python -m benchmarks: {error}", file=sys.stderr)
        return 2
    broken = failures(results.records)
    for record in broken:
        print(f"no figure: {record.provider} {record.case}: {record.error}", file=sys.stderr)
    return 1 if broken else 0
