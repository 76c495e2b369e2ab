# SPDX-License-Identifier: Apache-2.0
"""The tables of what was measured on a CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import product
from statistics import median
from typing import Any

from benchmarks.markdown import (
    beside,
    beside_loop,
    busy,
    count,
    details,
    is_busy,
    pivot,
    sizes,
    times,
)
from benchmarks.records import Record, Results
from benchmarks.report import many_threads, seconds, threads

LAYERS = ("train", "infer")
PREPACKED = "gru_fast.cpu.prepacked"
STEP_PEERS = {"gru_fast.cpu": "nn.GRU", "gru_fast.cpu.cell": "nn.GRUCell", PREPACKED: "nn.GRU"}
INFER_PEERS = {"gru_fast.cpu": "onnxruntime", PREPACKED: "onnxruntime"}
OURS = "gru_fast."
ISA = "gru_fast.cpu."
ISA_ROWS = "isa/"
FAR = 3
"""So many times as far from core to core as at best is called far."""


def with_far(results: Results, corner: str, cells: Iterable[tuple[str, str, str, Record]]) -> str:
    """`pivot` of (row, column, text, record), with a mark where the threads' cores were apart."""
    apart = [r.exchange_s for r in results.records if r.exchange_s is not None]
    limit = FAR * min(apart, default=0.0)

    def is_far(r: Record) -> bool:
        return r.exchange_s is not None and r.exchange_s > limit

    found = [
        (row, column, f"{text}, far" if is_far(r) else text, r) for row, column, text, r in cells
    ]
    table = pivot(corner, (cell[:3] for cell in found))
    if any(is_far(r) for _, _, _, r in found):
        table += (
            "\n\nfar: meanwhile the virtual machine's two cores had no third-level cache in common."
        )
    return table


def layers(results: Results) -> str:
    chosen = [r for r in results.records if r.suite in LAYERS and r.provider == "gru_fast.cpu"]
    chosen.sort(key=lambda r: (LAYERS.index(r.suite), r.threads))

    def cell(r: Record) -> str:
        share = "" if r.share_of_bound is None else f" ({r.share_of_bound:.0%})"
        return times(r.ratio_to_torch) + share + busy(r)

    cells = ((sizes(r), f"{r.suite}, {threads(r)}", cell(r), r) for r in chosen)
    return with_far(results, "I = H, B, T", cells)


def ours(record: Record) -> str:
    """What a column calls one of our providers."""
    return "ours, prepacked" if record.provider == PREPACKED else "ours"


def beside_onnx(results: Results) -> str:
    found = beside(results, "infer", INFER_PEERS)
    found.sort(key=lambda pair: (pair[0].provider, pair[0].threads))
    return with_far(
        results,
        "I = H, B, T",
        ((sizes(r), f"{ours(r)}, {threads(r)}", times(v) + busy(r), r) for r, v in found),
    )


def steps(results: Results) -> str:
    return with_far(
        results,
        "I = H, B",
        (
            (
                f"{r.case['H']}, {r.case['B']}",
                f"`{STEP_PEERS[r.provider]}` / {ours(r)}, {threads(r)}",
                f"{times(value)}, {seconds(r.median_s)}{busy(r)}",
                r,
            )
            for r, value in beside(results, "step", STEP_PEERS)
        ),
    )


SAMPLES = "H, B, V, threads"


def _sampler(r: Record) -> tuple[str, str]:
    """Row and column of one of our samplers."""
    row = f"{r.case['H']}, {r.case['B']}, {r.case['V']}, {r.threads}"
    return row, f"{r.provider.removeprefix(OURS)} {r.dtype}"


def samples(results: Results) -> str:
    def cell(r: Record) -> str:
        if r.median_s is None:
            return "-"
        rate = r.case["B"] * r.case["T"] / r.median_s
        return f"{times(r.ratio_to_torch)}, {count(rate)}/s{busy(r)}"

    ours = [r for r in results.records if r.suite == "sample" and r.provider.startswith(OURS)]
    return pivot(SAMPLES, ((*_sampler(r), cell(r)) for r in ours))


def loops(results: Results) -> str:
    """A table for each peer that samples, but for the baseline, which `samples` has."""
    peers = dict.fromkeys(
        r.provider
        for r in results.records
        if r.suite == "sample" and not r.provider.startswith(OURS) and r.provider != r.baseline
    )
    return "\n\n".join(
        pivot(
            f"`{peer}`: {SAMPLES}",
            ((*_sampler(r), times(v) + busy(r)) for r, v in beside_loop(results, peer)),
        )
        for peer in peers
    )


def facts(results: Results) -> str:
    """The named figures of a file, but for those of the machine."""
    machine = ("fma_", "read_bandwidth")
    found = [f for f in results.figures if not f["name"].startswith(machine)]
    rows = [f"| {f['name']} | {f['value']:.3g} {f['unit']} | {details(f)} |" for f in found]
    return "\n".join(["| figure | | with |", "| --- | --: | --- |", *rows])


def peers(results: Results) -> str:
    """Every other peer's time / ours, sequences and single steps; nn.GRU has tables of its own."""
    found: list[tuple[int, str, str, str]] = []
    others = [r for r in results.records if not r.provider.startswith(OURS)]
    versions = {r.provider: r.version for r in others if r.provider != "nn.GRU"}
    for suite, name in product((*LAYERS, "step"), versions):
        ratios = {
            (str(r.case), r.dtype, r.threads): times(value) + busy(r)
            for r, value in beside(results, suite, {"gru_fast.cpu": name})
        }
        for r in (r for r in others if (r.suite, r.provider) == (suite, name)):
            text = ratios.get((str(r.case), r.dtype, r.threads), "-")
            if r.median_s is None:
                text = "inexact" if r.parity == "wrong" else "failed"
            row = f"{suite} {sizes(r)}, {threads(r)}"
            found.append((r.threads, row, f"`{name}` {versions[name]}", text))
    found.sort(key=lambda cell: cell[0])
    return pivot("I = H, B, T", (cell[1:] for cell in found))


def lost(results: Results) -> str:
    """The rows in which a peer that computes the same is faster, the worst first.

    Beside them what is left of it with weights that are packed beforehand, where that was measured.
    Below: how many rows could not be compared.
    """
    found: list[tuple[float, str, str, str]] = []
    peers = [r for r in results.records if r.parity == "ok" and not r.provider.startswith(OURS)]
    for r in peers:
        same = (r.case, r.threads, r.dtype)
        pairs = beside(results, r.suite, {"gru_fast.cpu": r.provider, PREPACKED: r.provider})
        values = {o.provider: v for o, v in pairs if (o.case, o.threads, o.dtype) == same}
        value = values.get("gru_fast.cpu", 1.0)
        if value < 1:
            row = f"{r.suite} {sizes(r)}, {r.dtype}, {threads(r)}, beside `{r.provider}`"
            found.append((value, row, "peer's time / ours", times(value) + busy(r)))
            if PREPACKED in values:
                found.append((value, row, "/ ours, prepacked", times(values[PREPACKED])))
    for peer in dict.fromkeys(r.provider for r in peers if r.suite == "sample"):
        for r, value in beside_loop(results, peer):
            if value < 1:
                row = f"sample {sizes(r)}, V {r.case['V']}, {threads(r)}: `{r.provider}` {r.dtype}"
                found.append((value, row, f"`{peer}`'s time / ours", times(value) + busy(r)))
    found.sort(key=lambda cell: cell[0])
    table = pivot("I = H, B, T", (cell[1:] for cell in found)) if found else "None."
    return "\n\n".join([table, *_not_compared(results)])


def _not_compared(results: Results) -> list[str]:
    """A sentence about the peers' rows without a figure, if there are any."""
    rows = Counter(
        (r.provider, "inexact" if r.parity == "wrong" else "failed")
        for r in results.records
        if r.error and not r.provider.startswith(OURS)
    )
    if not rows:
        return []
    named = ", ".join(f"`{name}` {n} ({why})" for (name, why), n in rows.items())
    return [f"Rows that are not compared, because the peer has no figure: {named}."]


def isas(results: Results) -> str:
    """Of each instruction set but the best: its share of the best one's speed.

    They come worst first, so that the best is the last, whether or not it has a figure.
    """
    found = [
        r
        for r in results.records
        if (r.feature or "").startswith(ISA_ROWS) and r.provider.startswith(ISA)
    ]
    best = {(r.feature, str(r.case), r.threads): r for r in found}

    def cell(r: Record) -> str:
        if r.ratio_to_torch is None:
            return r.error or "-"
        most = best[r.feature, str(r.case), r.threads]
        if r is most:
            return times(r.ratio_to_torch)
        share = most.ratio_to_torch and f"{r.ratio_to_torch / most.ratio_to_torch:.2f}"
        return f"{share or '-'} ({times(r.ratio_to_torch)})"

    def cells() -> Iterable[tuple[str, str, str]]:
        for r in found:
            row = f"{(r.feature or '').removeprefix(ISA_ROWS)}: {sizes(r)}"
            yield row, f"{r.provider.removeprefix(ISA)}, {threads(r)}", cell(r)

    return pivot("I = H, B, T", cells())


def contention(results: Results) -> str:
    """Times between busy neighbours, and alone, over one thread's alone."""

    def cells() -> Iterable[tuple[str, str, str]]:
        for f in results.figures:
            if f["name"] == "contention":
                many = many_threads(f["threads"])
                text = f"{f['value']:.3g}x (alone {f['alone']:.3g}x, {f['cpus_used']:.1f} cpus)"
                yield f"{f['suite']} {f['case']}", f"`{f['provider']}`, {many}", text

    return pivot("", cells())


def interrupts(results: Results) -> str:
    """From Ctrl-C to KeyboardInterrupt, and how long the calls take that nobody interrupts."""

    def cells() -> Iterable[tuple[str, str, str]]:
        for f in results.figures:
            if f["name"] == "interrupt":
                text = f"{f['value']:.0f} of {f['call_ms']:.0f} ms"
                name = f"`{f['provider']}`, {many_threads(f['threads'])}"
                yield f"{f['suite']} {f['case']}", name, text

    return pivot("", cells())


def features(results: Results) -> str:
    """Of each row every provider: the baseline's time, and how much faster the others are.

    But for the instruction sets, which `isas` shows.
    """

    def cell(r: Record) -> str:
        if r.median_s is None:
            return r.error or "-"
        if r.provider == r.baseline:
            return seconds(r.median_s) + busy(r)
        return f"{times(r.ratio_to_torch)}, {seconds(r.median_s)}{busy(r)}"

    def cells() -> Iterable[tuple[str, str, str]]:
        for r in results.records:
            if r.feature is not None and not r.feature.startswith(ISA_ROWS):
                resets = f", {r.case['resets']:.0%} resets" if r.case["resets"] else ""
                row = f"{r.feature}: {sizes(r)}{resets}: `{r.provider}`"
                yield row, threads(r), cell(r)
                if r.peak_bytes is not None:
                    yield row, f"peak memory, {threads(r)}", f"{r.peak_bytes / 2**20:.1f} MiB"

    return pivot("feature/what: I = H, B, T", cells())


def language_models(results: Results) -> str:
    """Tokens a second of a training step."""

    def cell(r: Record) -> str:
        assert r.median_s is not None
        rate = f"{count(r.case['B'] * r.case['T'] / r.median_s)}/s{busy(r)}"
        return rate if r.provider == r.baseline else f"{times(r.ratio_to_torch)}, {rate}"

    return pivot(
        "V, I, H, B, T",
        (
            (
                ", ".join(str(r.case[letter]) for letter in "VIHBT") + f", {threads(r)}",
                f"`{r.provider}`",
                cell(r),
            )
            for r in results.records
            if r.suite == "lm" and r.median_s is not None
        ),
    )


def slopes(results: Results) -> str:
    """Exponents of the fitted growth."""

    def cells() -> Iterable[tuple[str, str, str]]:
        for f in results.figures:
            if f["name"].startswith("slope_"):
                many = f", {many_threads(f['threads'])}" if f["threads"] else ""
                row = f"{f['name'].removeprefix('slope_')} of {f['sizes'][0]} to {f['sizes'][-1]}"
                yield row + many, f"{f['suite']}, `{f['provider']}`", f"{f['value']:.2f}"

    return pivot("size", cells())


def sweep(results: Results) -> str:
    """Of each part of the grid: how often and by how much we are faster."""
    groups: dict[str, list[Record]] = {}
    for r in results.records:
        if r.provider == "gru_fast.cpu" and r.ratio_to_torch is not None:
            groups.setdefault(f"{r.suite}, {r.dtype}, {threads(r)}", []).append(r)
    any_busy = any(map(is_busy, results.records))

    def cells() -> Iterable[tuple[str, str, str]]:
        for name, found in groups.items():
            ratios = [r.ratio_to_torch for r in found if r.ratio_to_torch is not None]
            yield name, "cells", str(len(ratios))
            yield name, "faster", f"{sum(v >= 1 for v in ratios) / len(ratios):.0%}"
            yield name, "least", times(min(ratios))
            yield name, "median", times(median(ratios))
            yield name, "most", times(max(ratios))
            if any_busy:
                yield name, "busy", str(sum(map(is_busy, found)))

    return pivot("", cells())


def before_the_first_result(results: Results) -> str:
    """Imports, first calls, wheel."""

    def name(figure: dict[str, Any]) -> str:
        provider = figure.get("provider", "")
        what = figure["name"].removesuffix(f"_{provider}").replace("_", " ")
        return f"{what} of `{provider}`" if provider else what

    def value(figure: dict[str, object]) -> str:
        number = figure["value"]
        assert isinstance(number, float)
        return seconds(number) if figure["unit"] == "s" else f"{number / 2**20:.2f} MiB"

    return pivot("what", ((name(f), "", value(f)) for f in results.figures))
