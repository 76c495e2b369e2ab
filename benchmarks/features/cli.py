# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks features` and `lm`: named rows, each with the ways that are compared."""

from __future__ import annotations

from fnmatch import fnmatchcase

from benchmarks import program, report
from benchmarks.features import Row, all_rows
from benchmarks.records import Record
from benchmarks.runner import Setting, run_problem

DESCRIPTIONS = {
    "features": "What users do beyond a plain layer, and what else they write.",
    "lm": "A whole training step of a character language model, in tokens a second.",
}


def choose(suite: str, patterns: str | None) -> list[Row]:
    """The suite's rows whose name starts with or matches one of the patterns; all without any.

    Raises:
        ValueError: a pattern matches none.
    """
    rows = [row for row in all_rows() if (row.problem.suite == "lm") == (suite == "lm")]
    if patterns is None:
        return rows
    wanted = patterns.split(",")
    for pattern in wanted:
        if not any(fnmatchcase(row.name, f"{pattern}*") for row in rows):
            names = "\n  ".join(row.name for row in rows)
            raise ValueError(f"rows: expected the beginning of any of\n  {names}\ngot {pattern!r}")
    return [row for row in rows if any(fnmatchcase(row.name, f"{w}*") for w in wanted)]


def text(row: Row, records: list[Record]) -> str:
    """What the terminal shows of a problem."""
    lines = [row.name, report.table(records)]
    if row.problem.suite == "lm":
        for r in records:
            if r.median_s is not None:
                rate = r.case["B"] * r.case["T"] / r.median_s
                lines.append(f"{r.provider:<28}{rate:>12,.0f} tokens/s")
    return "\n".join(lines)


def main(suite: str, arguments: list[str]) -> int:
    """Run; 0 if every gate was green and nothing failed, else 1."""
    parser = program.parser(suite, DESCRIPTIONS[suite])
    parser.add_argument(
        "--rows", metavar="NAMES", help="list, for example reset_mask,lengths/train"
    )
    options = parser.parse_args(arguments)
    try:
        rows = choose(suite, options.rows)
        threads = program.threads_of(options.threads, options.quick)
    except ValueError as error:
        return program.complain(suite, error)
    run = program.Run(options, threads)
    for n in threads:
        setting = Setting(n, run.effort, program.bound_of(run.peaks.get(n), n))
        for row in rows:
            for problem in row.problems(options.quick):
                records, notes = run_problem(problem, row.providers, setting)
                run.add(records, text(row, records))
                for note in notes:
                    run.note(note)
    return run.finish()
