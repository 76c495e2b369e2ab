# SPDX-License-Identifier: Apache-2.0
"""The tables of the README, made from committed results: `python -m benchmarks figures`.

A block between `<!-- figures: NAME SUITE ... -->` and `<!-- end of figures -->` is replaced by the
tables of these suites in `benchmarks/results/NAME`. Nothing is typed by hand; rows that we lose
are in bold, and none is left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from benchmarks import ROOT, machine
from benchmarks.records import Record, Results, read
from benchmarks.report import seconds

README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- figures: (\S+) ([a-z ]+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)

LAYERS = ("train", "infer")


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


def pivot(
    records: list[Record],
    corner: str,
    row: Callable[[Record], str],
    column: Callable[[Record], str],
    cell: Callable[[Record], str],
) -> str:
    """Records as a table, rows and columns in the order in which they come."""
    header: dict[str, None] = {}
    rows: dict[str, dict[str, str]] = {}
    for record in records:
        header[column(record)] = None
        rows.setdefault(row(record), {})[column(record)] = cell(record)
    return markdown([corner, *header], rows)


def ratio(record: Record) -> str:
    """How many times faster than the baseline, bold where it is slower."""
    return "-" if record.ratio_to_torch is None else times(record.ratio_to_torch)


def ratio_and_share(record: Record) -> str:
    """The ratio, and how much of the physical limit is reached."""
    share = "" if record.share_of_bound is None else f" ({record.share_of_bound:.0%})"
    return ratio(record) + share


def threads(record: Record) -> str:
    return f"{record.threads} thread{'s' if record.threads > 1 else ''}"


def layers(results: Results) -> str:
    chosen = [r for r in results.records if r.suite in LAYERS and r.provider == "gru_fast.cpu"]
    chosen.sort(key=lambda r: (LAYERS.index(r.suite), r.threads))
    return pivot(
        chosen, "I = H, B, T", sizes, lambda r: f"{r.suite}, {threads(r)}", ratio_and_share
    )


def beside(results: Results, suite: str, ours: str, peer: str) -> dict[int, float]:
    """The peer's median over ours, by the position of our record."""
    medians = {
        (str(r.case), r.threads): r.median_s
        for r in results.records
        if r.suite == suite and r.provider == peer and r.median_s is not None
    }
    return {
        i: medians[str(r.case), r.threads] / r.median_s
        for i, r in enumerate(results.records)
        if r.suite == suite
        and r.provider == ours
        and r.median_s is not None
        and (str(r.case), r.threads) in medians
    }


def times(value: float) -> str:
    """A ratio, bold where we are slower."""
    text = f"{value:.3g}x" if value >= 10 else f"{value:.2f}x"
    return text if value >= 1 else f"**{text}**"


def beside_onnx(results: Results) -> str:
    ratios = beside(results, "infer", "gru_fast.cpu", "onnxruntime")
    cells = [(results.records[i], value) for i, value in ratios.items()]
    cells.sort(key=lambda cell: cell[0].threads)
    values = {id(record): times(value) for record, value in cells}
    return pivot(
        [record for record, _ in cells],
        "I = H, B, T",
        sizes,
        lambda r: f"infer, {threads(r)}",
        lambda r: values[id(r)],
    )


def steps(results: Results) -> str:
    values: dict[int, str] = {}
    names = {"gru_fast.cpu": "nn.GRU", "gru_fast.cpu.cell": "nn.GRUCell"}
    for ours, peer in names.items():
        values |= {i: times(v) for i, v in beside(results, "step", ours, peer).items()}
    chosen = {id(results.records[i]): text for i, text in values.items()}
    return pivot(
        [r for r in results.records if id(r) in chosen],
        "I = H, B",
        lambda r: f"{r.case['H']}, {r.case['B']}",
        lambda r: f"`{names[r.provider]}` / ours, {threads(r)}",
        lambda r: f"{chosen[id(r)]}, {seconds(r.median_s)}",
    )


def count(value: float) -> str:
    """Three digits and a thousand's or a million's letter."""
    return f"{value / 1e6:.2f}M" if value >= 0.9995e6 else f"{value / 1e3:.3g}k"


def samples(results: Results) -> str:
    chosen = [
        r for r in results.records if r.suite == "sample" and r.provider.startswith("gru_fast.")
    ]

    def cell(record: Record) -> str:
        if record.median_s is None:
            return "-"
        rate = record.case["B"] * record.case["T"] / record.median_s
        return f"{ratio(record)}, {count(rate)}/s"

    return pivot(
        chosen,
        "H, B, V, threads",
        lambda r: f"{r.case['H']}, {r.case['B']}, {r.case['V']}, {r.threads}",
        lambda r: f"{r.provider.removeprefix('gru_fast.')} {r.dtype}",
        cell,
    )


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


def main() -> int:
    """Rewrite the README's figures."""
    README.write_text(with_figures(README.read_text("utf-8")), "utf-8")
    return 0
