# SPDX-License-Identifier: Apache-2.0
"""The command line of the GPU program."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from benchmarks import program
from benchmarks.gpu import supervisor
from benchmarks.gpu.supervisor import Plan
from benchmarks.providers_kernels import kernel_names

BUDGET = 420
"""Seconds: on a GPU that is at hand for 15 minutes there is time left for the tests."""


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m benchmarks gpu",
        description="Build, precompile, then measure in order of worth until the budget is used. "
        "DIR/gpu.json is rewritten after each row; --resume goes on where it stopped.",
    )
    found.add_argument("--out", type=Path, required=True, metavar="DIR")
    found.add_argument(
        "--budget",
        type=float,
        default=BUDGET,
        help="seconds for everything (%(default)s)",
    )
    found.add_argument("--resume", action="store_true", help="go on with DIR/gpu.json")
    found.add_argument("--retry", action="store_true", help="resume, failed rows once more too")
    found.add_argument(
        "--row-limit",
        type=float,
        default=60,
        help="seconds for one row; five times as many for peers/*",
    )
    found.add_argument("--no-build", action="store_true", help="gru_fast is installed already")
    found.add_argument("--note", action="append", default=[], help=argparse.SUPPRESS)
    found.add_argument(
        "--dry", action="store_true", help="on the CPU, tiny sizes, kernels interpreted"
    )
    return found


def main(arguments: list[str]) -> int:
    """0 if every row was measured; 1 if some failed; 2 for what cannot run at all."""
    options = parser().parse_args(arguments)

    if not options.dry and not torch.cuda.is_available():
        return _complain("there is no GPU here; --dry runs the same program on the CPU")
    start = time.time()
    out = options.out.resolve()
    try:
        program.make_folder(out)
    except ValueError as error:
        return _complain(str(error))
    plan = supervisor.Plan(out, options.budget, options.row_limit, options.dry)
    if not (options.dry or options.no_build):
        note = supervisor.build(plan)
        print(note, flush=True)
        # A new process: this one's import path was made before the installation.
        left = str(options.budget - (time.time() - start))
        command = ["-m", "benchmarks", "gpu", *arguments, "--no-build", "--note", note]
        os.execv(sys.executable, [sys.executable, *command, "--budget", left])
    until = start + options.budget
    _, reason = kernel_names()
    if reason and not options.dry:
        # The time would go to cuDNN's rows alone, of which none is worth it without ours beside it.
        how = f"{reason} ({'; '.join(options.note)})" if options.note else reason
        return _complain(f"no kernels of ours to measure: {how}; install gru_fast first")
    try:
        return _measure(plan, until, options)
    except ValueError as error:
        return _complain(str(error))


def _complain(text: str) -> int:
    print(f"python -m benchmarks gpu: {text}", file=sys.stderr)
    return 2


def _measure(plan: Plan, until: float, options: argparse.Namespace) -> int:
    from benchmarks import machine
    from benchmarks.gpu.rows import all_rows
    from benchmarks.gpu.worker import RESULTS
    from benchmarks.records import read

    line = {**machine.describe(), "dry": options.dry}
    path = plan.out / RESULTS
    supervisor.keep_copy(path)
    resume = options.resume or options.retry
    results = supervisor.prepare_results(plan, resume, options.retry, line)
    names, reason = kernel_names()
    results.notes += options.note + ([f"no kernels of ours: {reason}"] if reason else [])
    results.write(path)
    print(machine.line(line), flush=True)

    def left() -> list[str]:
        return [row.name for row in all_rows(options.dry) if row.name not in results.rows]

    print(f"a line for each row: {plan.out / 'rows.log'}", flush=True)
    notes = []
    if names and left():
        processes = 1 if options.dry else min(16, machine.processors())
        notes.append(supervisor.precompile(plan, processes))
    notes += supervisor.drive(plan, until)
    results = read(path)
    missing = left()
    if missing:
        notes.append(f"budget used up: {len(missing)} rows not measured, from {missing[0]} on")
    results.notes += notes
    results.write(path)
    failed = {name: how for name, how in results.rows.items() if how != "done"}
    for text in [*notes, *(f"{name}: {how}" for name, how in failed.items())]:
        print(text)
    parities = Counter(record.parity for record in results.records)
    print(
        f"{len(results.rows) - len(failed)} rows done, {len(failed)} failed, {len(missing)} left; "
        f"parity {dict(parities)}; {len(results.figures)} figures -> {path}"
    )
    return 1 if failed else 0
