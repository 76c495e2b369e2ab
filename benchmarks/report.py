# SPDX-License-Identifier: Apache-2.0
"""What the terminal shows of records."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.cases import Case
from benchmarks.machine import BUSY
from benchmarks.records import Record

COLUMNS = "{:<24}{:>11}{:>19}{:>9}{:>8}{:>11}{:>10}  {}"
HEADER = COLUMNS.format(
    "provider", "median", "p20 .. p80", "ratio", "share", "first", "peak", "parity"
)
LEGEND = """\
ratio: the baseline's time / this one's, above 1 is faster; share: of the least time that the
processor's peaks allow (bound); first: the first call in a fresh process, and peak: the memory
that it adds; parity: the gate before the timing, "none" for what computes another function"""
"""What the columns of a table are."""


def seconds(value: float | None) -> str:
    """With a unit, three digits."""
    if value is None:
        return "-"
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def minutes(value: float) -> str:
    """Seconds as minutes and seconds."""
    whole = round(value)
    return f"{whole // 60} min {whole % 60:02} s"


def row(record: Record) -> str:
    """One line of the table."""
    spread = "-"
    if record.p20_s is not None:
        spread = f"{seconds(record.p20_s)} .. {seconds(record.p80_s)}"
    return COLUMNS.format(
        record.provider,
        seconds(record.median_s),
        spread,
        "-" if record.ratio_to_torch is None else f"{record.ratio_to_torch:.2f}x",
        "-" if record.share_of_bound is None else f"{record.share_of_bound:.0%}",
        seconds(record.cold_s),
        "-" if record.peak_bytes is None else f"{record.peak_bytes / 2**20:.1f}M",
        "WRONG" if record.parity == "wrong" else record.parity,
    ) + (f"  {record.error}" if record.error else "")


def threads(record: Record) -> str:
    """How many, in words."""
    return many_threads(record.threads)


def many_threads(count: int) -> str:
    """In words."""
    return f"{count} thread{'s' if count > 1 else ''}"


def warnings(shares: Iterable[float | None]) -> list[str]:
    """A line if others used the CPU; shares as `other_cpu` of records and figures."""
    other = max((share or 0.0 for share in shares), default=0.0)
    if other <= BUSY:
        return []
    return [f"warning: other processes took {other:.0%} of the CPU time meanwhile"]


def table(records: Iterable[Record]) -> str:
    """All providers of one problem, with a warning if others used the CPU."""
    records = list(records)
    if not records:
        return ""
    first = records[0]
    title = f"{first.suite} {Case(**first.case)} {first.dtype} {first.device}"
    title += f", {threads(first)}"
    if first.bound_s is not None:
        title += f", bound {seconds(first.bound_s)}"
    apart = [r.exchange_s for r in records if r.exchange_s is not None]
    if apart:
        title += f", cores {max(apart) * 1e9:.0f} ns apart"
    return "\n".join([title, HEADER, *map(row, records), *warnings(r.other_cpu for r in records)])
