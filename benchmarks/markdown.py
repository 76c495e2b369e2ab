# SPDX-License-Identifier: Apache-2.0
"""Records as cells and rows of Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.machine import BUSY
from benchmarks.records import Record, Results

BUSY_LEGEND = f"busy: other processes took more than {BUSY:.0%} of the CPU time meanwhile."
"""Below a table with a cell that `busy` marked."""


def sizes(record: Record) -> str:
    """Of a layer, as "H, B, T"."""
    case = record.case
    inputs = "" if case["I"] == case["H"] else f"I {case['I']}, "
    return f"{inputs}{case['H']}, {case['B']}, {case['T']}"


def markdown(header: list[str], rows: dict[str, dict[str, str]]) -> str:
    """A table of rows by name, each a cell by column name."""
    lines = [header, ["---", *["--:"] * (len(header) - 1)]]
    lines += [[name, *(cells.get(c, "-") for c in header[1:])] for name, cells in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def pivot(corner: str, cells: Iterable[tuple[str, str, str]]) -> str:
    """(row, column, text) as a table, rows and columns in the order in which they come."""
    header: dict[str, None] = {}
    rows: dict[str, dict[str, str]] = {}
    for row, column, text in cells:
        header[column] = None
        rows.setdefault(row, {})[column] = text
    return markdown([corner, *header], rows)


def details(figure: dict[str, Any]) -> str:
    """What stands beside the value of a named figure."""
    rest = {k: v for k, v in figure.items() if k not in ("name", "value", "unit", "other_cpu")}
    return ", ".join(
        f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in rest.items()
    )


def times(value: float | None) -> str:
    """How many times faster, bold where we are slower."""
    if value is None:
        return "-"
    text = f"{value:.3g}x" if value >= 10 else f"{value:.2f}x"
    return text if value >= 1 else f"**{text}**"


def is_busy(record: Record) -> bool:
    """Whether others used the CPU while it was measured."""
    return record.other_cpu is not None and record.other_cpu > BUSY


def busy(record: Record) -> str:
    """What a cell ends with in that case."""
    return ", busy" if is_busy(record) else ""


def beside(results: Results, suite: str, pairs: dict[str, str]) -> list[tuple[Record, float]]:
    """Our records, and the time of the peer that pairs names for ours over our own."""
    medians = {
        (r.provider, str(r.case), r.threads, r.dtype): r.median_s
        for r in results.records
        if r.suite == suite and r.median_s is not None
    }
    found = []
    for r in results.records:
        if r.suite != suite or r.provider not in pairs or r.median_s is None:
            continue
        theirs = medians.get((pairs[r.provider], str(r.case), r.threads, r.dtype))
        if theirs is not None:
            found.append((r, theirs / r.median_s))
    return found


def beside_loop(results: Results, peer: str) -> list[tuple[Record, float]]:
    """Our samplers, whatever their weights, and the time of that peer's loop over their own."""
    medians = {
        (str(r.case), r.threads): r.median_s
        for r in results.records
        if (r.suite, r.provider) == ("sample", peer) and r.median_s is not None
    }
    found = []
    for r in results.records:
        theirs = medians.get((str(r.case), r.threads))
        ours = r.suite == "sample" and r.provider.startswith("gru_fast.")
        if ours and r.median_s is not None and theirs is not None:
            of_rounds = r.ratio_to_torch if r.baseline == peer else None
            found.append((r, theirs / r.median_s if of_rounds is None else of_rounds))
    return found


def count(value: float) -> str:
    """Three digits and a thousand's or a million's letter."""
    return f"{value / 1e6:.2f}M" if value >= 0.9995e6 else f"{value / 1e3:.3g}k"
