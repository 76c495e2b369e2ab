# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks features`: what users do beyond a plain layer, and what else they write."""

from __future__ import annotations

from fnmatch import fnmatchcase

from benchmarks import program, report
from benchmarks.features import Row, all_rows
from benchmarks.runner import Setting, run_problem


def choose(patterns: str | None) -> list[Row]:
    """The rows whose name starts with or matches one of the patterns; all without any.

    Raises:
        ValueError: a pattern matches none.
    """
    if patterns is None:
        return list(all_rows())
    wanted = patterns.split(",")
    for pattern in wanted:
        if not any(fnmatchcase(row.name, f"{pattern}*") for row in all_rows()):
            names = "\n  ".join(row.name for row in all_rows())
            raise ValueError(f"rows: expected the beginning of any of\n  {names}\ngot {pattern!r}")
    return [row for row in all_rows() if any(fnmatchcase(row.name, f"{w}*") for w in wanted)]


def main(arguments: list[str]) -> int:
    """Run; 0 if every gate was green and nothing failed, else 1."""
    assert __doc__ is not None
    parser = program.parser("features", __doc__.split(": ", 1)[1])
    parser.add_argument(
        "--rows", metavar="NAMES", help="list, for example reset_mask,lengths/train"
    )
    options = parser.parse_args(arguments)
    try:
        rows = choose(options.rows)
        threads = program.threads_of(options.threads, options.quick)
    except ValueError as error:
        return program.complain("features", error)
    run = program.Run(threads, quick=options.quick, json=options.json)
    for n in threads:
        setting = Setting(n, run.effort, program.bound_of(run.peaks.get(n), n))
        for row in rows:
            for problem in row.problems(options.quick):
                records, notes = run_problem(problem, row.providers, setting)
                run.add(records, f"{row.name}\n{report.table(records)}")
                for note in notes:
                    run.note(note)
    return run.finish()
