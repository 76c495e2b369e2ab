# SPDX-License-Identifier: Apache-2.0
"""The command line of `train`, `infer` and `step`; `gpu` has its own."""

from __future__ import annotations

import argparse
import sys

import torch
from tqdm import tqdm

from benchmarks import cases, program, report
from benchmarks.problem import Problem
from benchmarks.providers import Provider, all_providers, choose
from benchmarks.runner import Setting, run_problem

OTHERS = {
    "sample": "tokens drawn one after the other",
    "lm": "a training step of a language model",
    "features": "what users do beyond a plain layer",
    "layers": "directions, cells, step by step, padding, instruction sets, busy neighbours",
    "sweep": "nn.GRU beside ours over a grid of sizes",
    "scaling": "one size varied at a time, with fitted slopes",
    "import": "import, first call, wheel",
    "gpu": "everything a GPU can tell",
    "all": "every committed result of a CPU, file by file",
    "claims": "the ratios of README and docs/speed.md, measured again here",
    "report": "tables and plots from committed results",
}
"""What has a command line of its own."""


def parser() -> argparse.ArgumentParser:
    suites = "\n".join(f"  {name:<10}{text}" for name, text in (cases.SUITES | OTHERS).items())
    found = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=f"gru_fast beside its peers, in one run.\n\n{suites}\n\n"
        "train, infer and step can be given together and take the options below; the others stand\n"
        "alone and have --help. Without a suite: train, infer and step, --quick.\n\n"
        f"{report.LEGEND}",
        epilog="docs/benchmarks.md tells how each is measured.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument(
        "suites", nargs="*", type=_suite, metavar="SUITE", help=", ".join(cases.SUITES)
    )
    found.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s"
    )
    found.add_argument(
        "--dtype",
        default="float32",
        help=f"list of {', '.join(cases.DTYPES)} (tf32 on cuda only); default: %(default)s",
    )
    found.add_argument("--threads", help="list, for example 1,2; default: 1 and all")
    found.add_argument(
        "--shapes",
        help=f"list of {', '.join(cases.PRESETS)} or shapes like H64-B1-T256; default: table "
        "(the README's), quick with --quick, steps for step",
    )
    found.add_argument("--providers", help="list of names or patterns; nn.GRU always takes part")
    program.add_common(found)
    return found


def _suite(name: str) -> str:
    if name not in cases.SUITES:
        known = f"{', '.join(cases.SUITES)}, or alone one of {', '.join(OTHERS)}"
        raise argparse.ArgumentTypeError(f"expected {known}; got {name!r}")
    return name


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
    threads = [1]
    if options.device == "cpu" or options.threads:
        threads = program.threads_of(options.threads, options.quick)
    dtypes = program.some_of("dtype", options.dtype, cases.DTYPES)
    if options.device == "cpu" and "tf32" in dtypes:
        raise ValueError("dtype: tf32 needs --device cuda, a CPU would compute in float32")
    return [
        (n, Problem(case, suite, dtype, options.device))
        for suite in options.suites
        for n in threads
        for dtype in dtypes
        for case in shapes_of(suite, options.shapes, options.quick)
    ]


def measure(options: argparse.Namespace) -> int:
    """Measure, print, and write after each case; the exit code."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda is not available here")
    problems = problems_of(options)
    providers: list[Provider] = [
        provider
        for provider in choose(all_providers(options.device), options.providers)
        # The baseline for resets is of no use, and no news, where there are none.
        if not provider.is_baseline or any(provider.why_not(p) is None for _, p in problems)
    ]
    run = program.Run(options, [n for n, _ in problems], probing=options.device == "cpu")
    run.say(f"\n{report.LEGEND}")
    for threads, problem in tqdm(problems, unit="case", file=sys.stderr, disable=None):
        setting = Setting(threads, run.effort, program.bound_of(run.peaks.get(threads), threads))
        records, notes = run_problem(problem, providers, setting)
        run.add(records, report.table(records))
        asked = options.providers is not None
        for note in notes:
            run.note(note) if asked else run.keep(note)
    return run.finish()


def main(arguments: list[str]) -> int:
    """Run; 0 if every gate was green and nothing failed, else 1."""
    options = parser().parse_args(arguments)
    if not options.suites:
        options.suites, options.quick = list(cases.SUITES), True
    try:
        return measure(options)
    except ValueError as error:
        return program.complain("", error)
