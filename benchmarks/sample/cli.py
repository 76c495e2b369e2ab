# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks sample`: Tokens drawn one after the other, and figures of the samplers."""

from __future__ import annotations

from benchmarks import program
from benchmarks.cases import parse
from benchmarks.sample.facts import FACTS, line
from benchmarks.sample.suite import QUICK, SHAPES, run_case, table


def facts_of(given: str | None, shapes_given: bool) -> list[str]:
    """Names of the figures to take: all, unless shapes or names are given.

    Raises:
        ValueError: A name is unknown.
    """
    if given is None:
        return [] if shapes_given else list(FACTS)
    if given in ("all", "none"):
        return list(FACTS) if given == "all" else []
    return program.some_of("facts", given, FACTS)


def main(suite: str, arguments: list[str]) -> int:
    """Run; 0 if every gate was green and nothing failed, else 1."""
    assert __doc__ is not None
    parser = program.parser(suite, __doc__.split(": ", 1)[1])
    parser.add_argument(
        "--shapes", help="list like H256-B64-T200-V65, or none; default: the README's table"
    )
    parser.add_argument(
        "--facts", help=f"list of {', '.join(FACTS)}, all or none; default: all, without --shapes"
    )
    options = parser.parse_args(arguments)
    try:
        threads = program.threads_of(options.threads, options.quick)
        facts = facts_of(options.facts, options.shapes is not None)
        shapes = QUICK if options.quick else SHAPES
        if options.shapes:
            shapes = [] if options.shapes == "none" else parse(options.shapes)
        if any(case.V < 1 or case.L > 1 for case in shapes):
            raise ValueError("expected shapes with V >= 1 and one layer")
    except ValueError as error:
        return program.complain(suite, error)
    run = program.Run(options, threads, probing=bool(shapes))
    for n in threads:
        for case in shapes:
            records = run_case(case, n, run.effort, run.peaks.get(n))
            run.add(records, table(records))
    for name in facts:
        figures = FACTS[name](options.quick)
        run.results.figures += figures
        run.add([], "\n".join(map(line, figures)))
    return run.finish()
