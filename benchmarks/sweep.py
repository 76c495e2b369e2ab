# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks sweep`: nn.GRU beside ours over a grid of sizes, for the heat map.

H from 8 to 1024 with odd values, B from 1 to 256, T of 1, 50 and 1000, float32 and bfloat16,
training and inference, 1 thread and all. The gate of a cell runs 8 steps.
"""

from __future__ import annotations

import time
from itertools import product

from benchmarks import cases, program, report, timing
from benchmarks.problem import Problem
from benchmarks.providers_gru_fast import Layer
from benchmarks.providers_torch import TorchGRU
from benchmarks.records import Record
from benchmarks.runner import Setting, run_problem

EFFORT = timing.Effort(block_s=0.002, budget_s=0.1, least=3, most=7)
GATE_STEPS = 8
BUDGET = 600.0
QUICK = [cases.square(H, B, T) for H, B, T in product((8, 13), (1, 3), (1, 9))]


def main(suite: str, arguments: list[str]) -> int:
    """Run; 0 if every gate was green and nothing failed, else 1."""
    assert __doc__ is not None
    parser = program.parser(suite, __doc__.split(": ", 1)[1])
    parser.add_argument("--dtype", default="float32,bfloat16", help="list; default: %(default)s")
    parser.add_argument("--suites", default="train,infer", help="list; default: %(default)s")
    parser.add_argument(
        "--budget", type=float, default=BUDGET, help="seconds after which no cell begins"
    )
    options = parser.parse_args(arguments)
    until = time.monotonic() + options.budget
    try:
        threads = program.threads_of(options.threads, options.quick)
        dtypes = program.some_of("dtype", options.dtype, cases.DTYPES)
        suites = program.some_of("suites", options.suites, cases.SUITES)
    except ValueError as error:
        return program.complain(suite, error)
    run = program.Run(options, probing=False)
    effort = timing.DRY if options.quick else EFFORT
    grid = QUICK if options.quick else cases.SWEEP
    providers = [TorchGRU("cpu"), Layer("cpu")]
    left = 0
    for dtype, n, mode in product(dtypes, threads, suites):
        setting = Setting(n, effort, footprint=False, gate_steps=GATE_STEPS)
        for case in grid:
            if time.monotonic() > until:
                left += 1
                continue
            records, notes = run_problem(Problem(case, mode, dtype, "cpu"), providers, setting)
            for note in notes:
                run.note(note)
            run.add(
                records,
                line(f"{mode} {case} {dtype}, {report.many_threads(n)}", records),
                write=False,
            )
        run.write()
    if left:
        run.note(f"budget of {options.budget:g} s used up: {left} cells not measured")
    return run.finish()


def line(name: str, records: list[Record]) -> str:
    """A cell in a line of the terminal."""
    ratios = [r.ratio_to_torch for r in records if r.provider.startswith("gru_fast")]
    shown = [f"{ratio:.2f}x" if ratio is not None else "-" for ratio in ratios]
    return f"{name:<50}{' '.join(shown):>8}"
