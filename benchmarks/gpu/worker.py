# SPDX-License-Identifier: Apache-2.0
"""The process that measures: `python -m benchmarks.gpu.worker DIR --until SECONDS [--dry]`.

The file is rewritten after every row. Before a row its name is left in DIR/running, so that the
supervisor knows what hung or crashed. An error that spoils the GPU ends the process with LOST.

With `--warm INDEX COUNT` it compiles that share of the kernels instead, and measures nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.errors import describe_error
from benchmarks.gpu.rows import Row, Session, all_rows
from benchmarks.records import Results, read
from benchmarks.report import row as line
from benchmarks.runner import is_lost

RESULTS, RUNNING = "gpu.json", "running"
LOST = 3


def session_of(dry: bool, results: Results | None = None) -> Session:
    """On the GPU, or on the CPU in a dry run."""
    return Session("cpu" if dry else "cuda", dry, results.figures if results else [])


def measure(out: Path, results: Results, row: Row, session: Session) -> bool:
    """One row, written; whether the GPU is still usable."""
    (out / RUNNING).write_text(row.name)
    start, usable = time.monotonic(), True
    try:
        records, figures, notes = row.measure(session)
        results.records += records
        results.figures += figures
        results.notes += [note for note in notes if note not in results.notes]
        failed = [record.error for record in records if record.error]
        results.rows[row.name] = f"error: {failed[0]}" if failed else "done"
        for record in records:
            print(line(record), record.suite, record.case, record.dtype, flush=True)
        for figure in figures:
            print(figure, flush=True)
    except Exception as error:
        results.rows[row.name] = f"error: {describe_error(error)}"
        usable = not is_lost(error)
    print(f"{time.monotonic() - start:6.1f} s  {row.name}: {results.rows[row.name]}", flush=True)
    results.write(out / RESULTS)
    (out / RUNNING).unlink()
    if session.device == "cuda" and usable:
        torch.cuda.empty_cache()
    return usable


def work(out: Path, until: float, dry: bool) -> int:
    """Every row that is not in the file yet, until then (`time.time()`)."""
    results = read(out / RESULTS)
    session = session_of(dry, results)
    for row in all_rows(dry):
        if row.name in results.rows:
            continue
        if time.time() > until:
            break
        if not measure(out, results, row, session):
            return LOST
    return 0


def warm(index: int, count: int, dry: bool) -> int:
    """Compile each count-th kernel; what fails here fails again, and is recorded, when measured."""
    session = session_of(dry)
    calls: dict[str, list[Callable[[Session], Any]]] = {}
    for row in all_rows(dry):
        for key, call in row.warm.items():
            calls.setdefault(key, []).append(call)
    groups = list(calls.items())
    for key, group in groups[:1] if dry else groups[index::count]:
        for call in group:
            try:
                call(session)
            except Exception as error:
                print(f"{key}: {describe_error(error)}", flush=True)
                if is_lost(error):
                    return LOST
    return 0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.worker")
    parser.add_argument("out", type=Path)
    parser.add_argument("--until", type=float, required=True)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--warm", type=int, nargs=2, metavar=("INDEX", "COUNT"))
    options = parser.parse_args(arguments)
    if options.warm:
        return warm(*options.warm, options.dry)
    return work(options.out, options.until, options.dry)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
