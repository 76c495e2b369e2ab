# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks features`, `lm` and `layers`: named rows, each with what is compared."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch

from benchmarks import contention, interrupts, program, report, timing
from benchmarks.features import Row, all_rows
from benchmarks.markdown import details
from benchmarks.records import Record
from benchmarks.runner import Setting, run_problem

DESCRIPTIONS = {
    "features": "What users do beyond a plain layer, and what else they write.",
    "lm": "A whole training step of a character language model, in tokens a second.",
    "layers": "The layer in its other forms: both directions, the other cells, step by step, "
    "padding, every instruction set, and without a table of providers: between processes that keep "
    "every core busy (contention), and Ctrl-C (interrupt).",
}
LAYERS_EFFORT = timing.Effort(budget_s=2.0, least=5, most=11)
"""Many ways and sizes, each of them short."""

LAYERS_GATE_STEPS = 64

SPECIAL = {contention.CONTENTION: contention.run, interrupts.INTERRUPT: interrupts.run}
"""Rows of `layers` that have figures of their own instead of records."""


def choose(suite: str, patterns: Sequence[str] | None) -> list[Row]:
    """The suite's rows whose name starts with or matches one of the patterns; all for None.

    Raises:
        ValueError: a pattern matches none.
    """
    rows = [row for row in all_rows() if row.command == suite]
    if patterns is None:
        return rows
    for pattern in patterns:
        if not pattern or not any(fnmatchcase(row.name, f"{pattern}*") for row in rows):
            names = "\n  ".join(row.name for row in rows)
            raise ValueError(f"rows: expected the beginning of any of\n  {names}\ngot {pattern!r}")
    return [row for row in rows if any(fnmatchcase(row.name, f"{w}*") for w in patterns)]


def text(row: Row, records: list[Record]) -> str:
    """What the terminal shows of a problem."""
    lines = [row.name, report.table(records)]
    if row.problem.suite == "lm":
        for r in records:
            if r.median_s is not None:
                rate = r.case["B"] * r.case["T"] / r.median_s
                lines.append(f"{r.provider:<28}{rate:>12,.0f} tokens/s")
    return "\n".join(lines)


def figure_line(figure: dict[str, Any]) -> str:
    """One named figure as text."""
    return f"{figure['name']:<12}{figure['value']:>8.2f} {figure['unit']}  {details(figure)}"


def main(suite: str, arguments: list[str]) -> int:
    """Run; 0 if every gate was green and nothing failed, else 1."""
    parser = program.parser(suite, DESCRIPTIONS[suite])
    known = ", ".join(dict.fromkeys(row.name.split("/")[0] for row in choose(suite, None)))
    special = dict(SPECIAL) if suite == "layers" else {}
    known = ", ".join([known, *special])
    parser.add_argument(
        "--rows", metavar="NAMES", help=f"list of {known}, or parts like NAME/train; default: all"
    )
    options = parser.parse_args(arguments)
    default_threads = torch.get_num_threads()
    try:
        wanted = None if options.rows is None else options.rows.split(",")
        if wanted is not None:
            special = {name: run for name, run in special.items() if name in wanted}
            wanted = [name for name in wanted if name not in special]
        rows = choose(suite, wanted)
        threads = program.threads_of(options.threads, options.quick)
    except ValueError as error:
        return program.complain(suite, error)
    run = program.Run(options, threads, probing=bool(rows))
    layers = suite == "layers"
    effort = LAYERS_EFFORT if layers and not options.quick else run.effort
    for n in threads:
        bound = program.bound_of(run.peaks.get(n), n)
        setting = Setting(
            n, effort, bound, footprint=not layers, gate_steps=LAYERS_GATE_STEPS if layers else None
        )
        for row in rows:
            for problem in row.problems(options.quick):
                records, notes = run_problem(problem, row.providers, setting)
                run.add(records, text(row, records))
                for note in notes:
                    run.note(note)
    for measure in special.values():
        for found in measure(options.quick, default_threads):
            run.results.figures += found.figures
            lines = [*map(figure_line, found.figures)]
            lines += [f"{r.provider}: {r.error}" for r in found.failed]
            lines += report.warnings(f["other_cpu"] for f in found.figures)
            run.add(found.failed, "\n".join(lines))
            for note in found.notes:
                run.note(note)
    return run.finish()
