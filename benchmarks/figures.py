# SPDX-License-Identifier: Apache-2.0
"""The tables of README and docs, made from committed results: `python -m benchmarks figures`.

A block between `<!-- figures: NAME SUITE ... -->` and `<!-- end of figures -->` is replaced by the
tables of these suites in `benchmarks/results/NAME`. Nothing is typed by hand; rows that we lose
are in bold, and none is left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks import ROOT, machine, measured
from benchmarks.records import Record, Results, read
from benchmarks.report import seconds, threads

PAGES = (ROOT / "README.md", ROOT / "docs" / "gpu-kernels.md")
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- figures: (\S+) ([a-z ]+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)

LAYERS = ("train", "infer")
STEP_PEERS = {"gru_fast.cpu": "nn.GRU", "gru_fast.cpu.cell": "nn.GRUCell"}


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


def times(value: float | None) -> str:
    """How many times faster, bold where we are slower."""
    if value is None:
        return "-"
    text = f"{value:.3g}x" if value >= 10 else f"{value:.2f}x"
    return text if value >= 1 else f"**{text}**"


def beside(results: Results, suite: str, pairs: dict[str, str]) -> list[tuple[Record, float]]:
    """Our records, and the time of the peer that pairs names for ours over our own."""
    medians = {
        (r.provider, str(r.case), r.threads): r.median_s
        for r in results.records
        if r.suite == suite and r.median_s is not None
    }
    found = []
    for r in results.records:
        if r.suite != suite or r.provider not in pairs or r.median_s is None:
            continue
        theirs = medians.get((pairs[r.provider], str(r.case), r.threads))
        if theirs is not None:
            found.append((r, theirs / r.median_s))
    return found


def layers(results: Results) -> str:
    chosen = [r for r in results.records if r.suite in LAYERS and r.provider == "gru_fast.cpu"]
    chosen.sort(key=lambda r: (LAYERS.index(r.suite), r.threads))

    def cell(r: Record) -> str:
        share = "" if r.share_of_bound is None else f" ({r.share_of_bound:.0%})"
        return times(r.ratio_to_torch) + share

    return pivot("I = H, B, T", ((sizes(r), f"{r.suite}, {threads(r)}", cell(r)) for r in chosen))


def beside_onnx(results: Results) -> str:
    found = beside(results, "infer", {"gru_fast.cpu": "onnxruntime"})
    found.sort(key=lambda pair: pair[0].threads)
    return pivot("I = H, B, T", ((sizes(r), f"infer, {threads(r)}", times(v)) for r, v in found))


def steps(results: Results) -> str:
    return pivot(
        "I = H, B",
        (
            (
                f"{r.case['H']}, {r.case['B']}",
                f"`{STEP_PEERS[r.provider]}` / ours, {threads(r)}",
                f"{times(value)}, {seconds(r.median_s)}",
            )
            for r, value in beside(results, "step", STEP_PEERS)
        ),
    )


def count(value: float) -> str:
    """Three digits and a thousand's or a million's letter."""
    return f"{value / 1e6:.2f}M" if value >= 0.9995e6 else f"{value / 1e3:.3g}k"


def samples(results: Results) -> str:
    def cell(r: Record) -> str:
        if r.median_s is None:
            return "-"
        rate = r.case["B"] * r.case["T"] / r.median_s
        return f"{times(r.ratio_to_torch)}, {count(rate)}/s"

    return pivot(
        "H, B, V, threads",
        (
            (
                f"{r.case['H']}, {r.case['B']}, {r.case['V']}, {r.threads}",
                f"{r.provider.removeprefix('gru_fast.')} {r.dtype}",
                cell(r),
            )
            for r in results.records
            if r.suite == "sample" and r.provider.startswith("gru_fast.")
        ),
    )


def best_kernels(results: Results, suites: Iterable[str]) -> list[Record]:
    """Of our kernels the fastest on each problem, in the order of the file."""
    found: dict[tuple[str, str, str], Record] = {}
    for r in results.records:
        name = r.provider.removeprefix("gru_fast.triton.")
        if name == r.provider or "." in name or r.suite not in suites or r.median_s is None:
            continue
        key = (r.suite, str(r.case), r.dtype)
        if key not in found or r.median_s < found[key].median_s:  # type: ignore[operator]
            found[key] = r
    return list(found.values())


def _per_step(r: Record) -> str:
    kernel = r.provider.rpartition(".")[2]
    return f"{times(r.ratio_to_torch)}, {1e6 * r.median_s / r.case['T']:.3g} us, {kernel}"  # type: ignore[operator]


def gpu(results: Results) -> str:
    """Sequences: those of the common length, then the others."""
    chosen = best_kernels(results, LAYERS)
    chosen.sort(key=lambda r: (r.dtype, LAYERS.index(r.suite)))
    complete = {sizes(r) for r in chosen if r.dtype == "tf32"}
    usual = [r for r in chosen if r.baseline == "cudnn" and sizes(r) in complete]
    usual.sort(key=lambda r: (r.case["H"], r.case["B"], r.dtype, LAYERS.index(r.suite)))
    others = [r for r in chosen if r not in usual]

    def row(r: Record) -> str:
        resets = f", {r.case['resets']:.0%} resets" if r.case["resets"] else ""
        return sizes(r) + resets

    return "\n\n".join(
        pivot("I = H, B, T", ((row(r), f"{r.suite}, {r.dtype}", _per_step(r)) for r in part))
        for part in (usual, others)
    )


def gpu_steps(results: Results) -> str:
    medians = {
        (r.provider, str(r.case), r.dtype): r.median_s for r in results.records if r.suite == "step"
    }

    def cells() -> Iterable[tuple[str, str, str]]:
        for r in best_kernels(results, ["step"]):
            row = f"{r.case['H']}, {r.case['B']}"
            yield (
                row,
                f"`nn.GRU` / ours, {r.dtype}",
                f"{times(r.ratio_to_torch)}, {seconds(r.median_s)}",
            )
            graph = medians.get(("nn.GRUCell.graph", str(r.case), r.dtype))
            yield row, f"`nn.GRUCell` in a graph, {r.dtype}", seconds(graph)

    return pivot("I = H, B", cells())


def gpu_memory(results: Results) -> str:
    """Of training, where ours was measured with `recompute` too."""
    peaks = {
        (r.provider, str(r.case), r.dtype): r.peak_bytes
        for r in results.records
        if r.suite == "train" and r.peak_bytes
    }

    def cells() -> Iterable[tuple[str, str, str]]:
        for r in best_kernels(results, ["train"]):
            place = (str(r.case), r.dtype)
            theirs, again = (
                peaks.get((name, *place)) for name in ("cudnn", f"{r.provider}.recompute")
            )
            if theirs is None or again is None or r.peak_bytes is None:
                continue
            row = f"{sizes(r)}, {r.dtype}"
            yield row, "cuDNN", f"{theirs / 2**20:.0f} MiB"
            yield row, "ours / cuDNN's", f"{r.peak_bytes / theirs:.2f}"
            yield row, "with `recompute=True`", f"{again / theirs:.2f}"

    return pivot("I = H, B, T", cells())


PARTS: dict[str, tuple[str, Callable[[Results], str]]] = {
    "train": (
        "`nn.GRU`'s time / ours, and the share of the physical limit that is reached:",
        layers,
    ),
    "infer": ("ONNX Runtime's time / ours:", beside_onnx),
    "step": (
        "One call of one step under `no_grad`, PyTorch's time / ours, and ours:",
        steps,
    ),
    "gpu": (
        "cuDNN's time / that of the fastest of our kernels, and ours per time step, Python and "
        "launches included:",
        gpu,
    ),
    "gpumemory": (
        "Peak memory of a training step beyond what was there before it:",
        gpu_memory,
    ),
    "gpusteps": (
        "One call of one step under `no_grad`, launched from Python, and beside it a step of "
        "`nn.GRUCell` captured in a CUDA graph:",
        gpu_steps,
    ),
    "sample": ("The time of a loop around `nn.GRU` / ours, and our tokens a second:", samples),
}


def render(results: Results, suites: list[str]) -> str:
    """The tables of the suites, and the machine."""
    blocks = []
    for suite in suites:
        text, part = PARTS[suite]
        blocks.append(f"{text}\n\n{part(results)}")
    return "\n\n".join([*blocks, machine.line(results.machine)])


def with_figures(text: str, folder: Path = RESULTS) -> str:
    """The page with every block of figures made anew."""

    def block(match: re.Match[str]) -> str:
        return f"{match[1]}\n{render(read(folder / match[2]), match[3].split())}\n\n{match[4]}"

    return BLOCK.sub(block, text)


def main(command: str, arguments: list[str]) -> int:
    """Rewrite the figures of every page, and the table that `explain` quotes."""
    measured.PATH.write_text(measured.source(RESULTS), "utf-8")
    for page in PAGES:
        page.write_text(with_figures(page.read_text("utf-8")), "utf-8")
    return 0
