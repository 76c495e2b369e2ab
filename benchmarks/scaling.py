# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks scaling`: One size varied at a time, and how the time grows with it.

Around H = 128, B = 16, T = 128: T, B, H, then the threads. The slope of log time over log size,
fitted to the larger half of the sizes, is 1 where time is proportional.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks import cases, machine, program, report, timing
from benchmarks.problem import Problem
from benchmarks.providers_gru_fast import Layer
from benchmarks.providers_torch import TorchGRU
from benchmarks.records import Record
from benchmarks.runner import Setting, run_problem

BASE = cases.square(128, 16, 128)
SIZES = {
    "T": (32, 64, 128, 256, 512, 1024, 2048),
    "B": (1, 4, 16, 32, 64, 128, 256),
    "H": (32, 64, 128, 256, 512, 1024),
}
SUITES = ("train", "infer")
EFFORT = timing.Effort(block_s=0.01, budget_s=1.5, least=5, most=15)
GATE_STEPS = 16
OURS, BOUND = "gru_fast.cpu", "bound"


def at(axis: str, size: int, base: cases.Case = BASE) -> cases.Case:
    """The base with one size changed; I is H."""
    return replace(base, **({"H": size, "I": size} if axis == "H" else {axis: size}))


def slope(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Least squares of log seconds over log size, the larger half of the sizes."""
    first = len(sizes) // 2 if len(sizes) > 3 else 0
    found = np.polyfit(np.log(sizes[first:]), np.log(seconds[first:]), 1)
    return float(found[0])


def slopes(records: Sequence[Record], axis: str) -> list[dict[str, Any]]:
    """For each suite and provider whose records differ in that size only, and for the bound."""
    found = []
    groups: dict[tuple[str, str, int], list[tuple[int, float]]] = {}
    for r in records:
        if r.median_s is not None:
            threads = 0 if axis == "threads" else r.threads
            size = r.threads if axis == "threads" else r.case[axis]
            groups.setdefault((r.suite, r.provider, threads), []).append((size, r.median_s))
            if r.provider == OURS and r.bound_s is not None:
                groups.setdefault((r.suite, BOUND, threads), []).append((size, r.bound_s))
    for (suite, provider, threads), points in groups.items():
        if len(points) < 2:
            continue
        sizes, seconds = zip(*sorted(points), strict=True)
        found.append(
            {
                "name": f"slope_{axis}",
                "value": slope(sizes, seconds),
                "unit": "1",
                "suite": suite,
                "provider": provider,
                "threads": threads,
                "sizes": list(sizes),
            }
        )
    return found


def main(suite: str, arguments: list[str]) -> int:
    """Run; 0 if every gate was green and nothing failed, else 1."""
    assert __doc__ is not None
    parser = program.parser(suite, __doc__.split(": ", 1)[1])
    options = parser.parse_args(arguments)
    try:
        threads = program.threads_of(options.threads, options.quick)
    except ValueError as error:
        return program.complain(suite, error)
    run = program.Run(options, [*threads, machine.processors()])
    effort = timing.DRY if options.quick else EFFORT
    base = cases.square(8, 2, 4) if options.quick else BASE
    providers = [TorchGRU("cpu"), Layer("cpu")]

    def measure(case: cases.Case, n: int) -> list[Record]:
        bound = program.bound_of(run.peaks.get(n), n)
        setting = Setting(n, effort, bound, footprint=False, gate_steps=GATE_STEPS)
        found = []
        for mode in SUITES:
            records, _ = run_problem(Problem(case, mode, "float32", "cpu"), providers, setting)
            run.add(records, report.table(records))
            found += records
        return found

    for n in threads:
        for axis, sizes in SIZES.items():
            wanted = sizes[:3] if options.quick else sizes
            records = [r for size in wanted for r in measure(at(axis, size, base), n)]
            _keep(run, slopes(records, axis))
    every = range(1, machine.processors() + 1)
    records = [r for n in every for r in measure(base, n)]
    _keep(run, slopes(records, "threads"))
    return run.finish()


def _keep(run: program.Run, found: list[dict[str, Any]]) -> None:
    run.results.figures += found
    for figure in found:
        count = figure["threads"]
        threads = f", {report.many_threads(count)}" if count else ""
        run.say(
            f"{figure['name']} {figure['suite']} {figure['provider']}{threads}: "
            f"{figure['value']:.2f}"
        )
    run.write()
