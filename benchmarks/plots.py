# SPDX-License-Identifier: Apache-2.0
"""The plots of docs/results.md, as PNG: each keeps the digest of the results that it shows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.records import Record, Results, read
from benchmarks.report import many_threads

OURS, THEIRS = "gru_fast.cpu", "nn.GRU"
DIGEST = "Source"
"""The key of the PNG's text that holds the digest."""


@dataclass(frozen=True)
class Plot:
    """One picture.

    Attributes:
        file: its name.
        title: in a few words.
        source: the file in benchmarks/results/ that it is made from.
        draw: makes a matplotlib figure.
    """

    file: str
    title: str
    source: str
    draw: Callable[[Results], Any]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def draw_all(results: Path, out: Path) -> Iterator[Path]:
    """Every plot whose results are there."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    out.mkdir(parents=True, exist_ok=True)
    for plot in PLOTS:
        source = results / plot.source
        if source.exists():
            figure = plot.draw(read(source))
            metadata = {DIGEST: digest(source), "Software": None}
            figure.savefig(out / plot.file, dpi=80, metadata=metadata)
            pyplot.close(figure)
            yield out / plot.file


def heat_map(suite: str) -> Callable[[Results], Any]:
    """nn.GRU's time / ours over H and B: a panel for each T, dtype and number of threads."""

    def draw(results: Results) -> Any:
        import numpy as np
        from matplotlib import pyplot
        from matplotlib.colors import LogNorm

        ours = [r for r in results.records if r.suite == suite and r.provider == OURS]
        rows = list(dict.fromkeys((r.dtype, r.threads) for r in ours))
        steps, hidden, batches = (sorted({r.case[k] for r in ours}) for k in "THB")
        figure, axes = pyplot.subplots(
            len(rows),
            len(steps),
            squeeze=False,
            layout="constrained",
            figsize=(1.5 + 3.2 * len(steps), 1 + 2.6 * len(rows)),
        )
        image = None
        for (row, (dtype, threads)), (column, T) in _product(rows, steps):
            grid = np.full((len(hidden), len(batches)), np.nan)
            for r in ours:
                if (r.dtype, r.threads, r.case["T"]) == (dtype, threads, T) and r.ratio_to_torch:
                    place = hidden.index(r.case["H"]), batches.index(r.case["B"])
                    grid[place] = r.ratio_to_torch
            axis = axes[row, column]
            image = axis.imshow(grid, norm=LogNorm(1 / 16, 16), cmap="RdBu", origin="lower")
            for (i, j), value in np.ndenumerate(grid):
                if not np.isnan(value):
                    colour = "white" if not 1 / 6 < value < 6 else "black"
                    shown = f"{value:.0f}" if value >= 10 else f"{value:.2g}"
                    axis.text(j, i, shown, ha="center", va="center", fontsize=7, color=colour)
            axis.set_xticks(range(len(batches)), [str(B) for B in batches])
            axis.set_yticks(range(len(hidden)), [str(H) for H in hidden])
            axis.set_title(f"T = {T}, {dtype}, {many_threads(threads)}", fontsize=8)
            axis.set_xlabel("B")
            axis.set_ylabel("I = H")
        if image is not None:
            figure.colorbar(image, ax=axes, label="nn.GRU's time / ours; blue: we are faster")
        figure.suptitle({"train": "Training", "infer": "Inference"}[suite])
        return figure

    return draw


def _product(rows: list[Any], columns: list[Any]) -> Iterator[tuple[Any, Any]]:
    for row in enumerate(rows):
        for column in enumerate(columns):
            yield row, column


def shares(results: Results) -> Any:
    """Bars of the share of the physical bound that we and nn.GRU reach."""
    from matplotlib import pyplot

    found = [r for r in results.records if r.share_of_bound and r.provider in (OURS, THEIRS)]
    panels = list(dict.fromkeys((r.suite, r.threads) for r in found))
    figure, axes = pyplot.subplots(
        len(panels), 1, squeeze=False, layout="constrained", figsize=(9, 2.4 * len(panels))
    )
    for axis, (suite, threads) in zip(axes[:, 0], panels, strict=True):
        here = [r for r in found if (r.suite, r.threads) == (suite, threads)]
        names = list(dict.fromkeys(_sizes(r) for r in here))
        for shift, provider in ((-0.2, THEIRS), (0.2, OURS)):
            bars = {
                _sizes(r): 100 * (r.share_of_bound or 0) for r in here if r.provider == provider
            }
            places = [k + shift for k in range(len(names))]
            axis.bar(places, [bars.get(name, 0) for name in names], 0.4, label=provider)
        axis.set_xticks(range(len(names)), names, fontsize=7)
        axis.set_ylim(0, 105)
        axis.set_ylabel("% of the bound")
        axis.set_title(f"{suite}, {many_threads(threads)}", fontsize=9)
    axes[0, 0].legend(fontsize=8)
    axes[-1, 0].set_xlabel("I = H, B, T")
    return figure


def _sizes(r: Record) -> str:
    return f"{r.case['H']}, {r.case['B']}, {r.case['T']}"


def _group(r: Record) -> str:
    return f"H {r.case['H']}, B {r.case['B']}\n{many_threads(r.threads)}"


def tokens(suite: str) -> Callable[[Results], Any]:
    """Bars of tokens a second, a group of bars for each case."""

    def draw(results: Results) -> Any:
        from matplotlib import pyplot

        found = [r for r in results.records if r.suite == suite and r.median_s]
        cases = list(dict.fromkeys(map(_group, found)))
        names = list(dict.fromkeys(f"{r.provider} {r.dtype}" for r in found))
        figure, axis = pyplot.subplots(layout="constrained", figsize=(2 + 1.1 * len(cases), 4.5))
        width = 0.8 / max(1, len(names))
        for k, name in enumerate(names):
            rates: dict[str, float] = {}
            for r in found:
                if f"{r.provider} {r.dtype}" == name and r.median_s:
                    rates[_group(r)] = r.case["B"] * r.case["T"] / r.median_s
            places = [cases.index(case) - 0.4 + (k + 0.5) * width for case in rates]
            axis.bar(places, list(rates.values()), width, label=name)
        axis.set_yscale("log")
        axis.set_xticks(range(len(cases)), cases, fontsize=7)
        axis.set_ylabel("tokens a second")
        axis.legend(fontsize=7)
        return figure

    return draw


def scaling(results: Results) -> Any:
    """Seconds over each size, and the bound."""
    from matplotlib import pyplot

    axes_of = sorted({f["name"].removeprefix("slope_") for f in results.figures if "suite" in f})
    axes_of = [axis for axis in "TBH" if axis in axes_of]
    suites = list(dict.fromkeys(r.suite for r in results.records))
    figure, panels = pyplot.subplots(
        len(suites),
        len(axes_of),
        squeeze=False,
        layout="constrained",
        figsize=(1 + 3.6 * len(axes_of), 3.2 * len(suites)),
    )
    for (row, suite), (column, axis) in _product(suites, axes_of):
        panel = panels[row, column]
        for figure_ in (f for f in results.figures if f["name"] == f"slope_{axis}"):
            if figure_["suite"] != suite:
                continue
            points = sorted(
                (r.case[axis], r.median_s, r.bound_s)
                for r in results.records
                if (r.suite, r.provider, r.threads)
                == (suite, figure_["provider"], figure_["threads"])
                and r.median_s
                and r.case[axis] in figure_["sizes"]
                and _others(r, axis) == _usual(results, axis)
            )
            many = many_threads(figure_["threads"])
            if not points:
                continue
            label = f"{figure_['provider']}, {many}: {figure_['value']:.2f}"
            (line,) = panel.loglog(*list(zip(*points, strict=True))[:2], marker=".", label=label)
            if figure_["provider"] == OURS and all(p[2] for p in points):
                panel.loglog(
                    [p[0] for p in points], [p[2] for p in points], ":", color=line.get_color()
                )
        panel.set_title(f"{suite} over {axis}; dotted: the bound", fontsize=8)
        panel.set_xlabel(axis)
        panel.set_ylabel("seconds")
        panel.legend(fontsize=6)
    return figure


def _others(r: Record, axis: str) -> tuple[int, ...]:
    return tuple(r.case[letter] for letter in "TBH" if letter != axis)


def _usual(results: Results, axis: str) -> tuple[int, ...]:
    """The sizes at which the others are held: those of most records."""
    seen = [_others(r, axis) for r in results.records]
    return max(set(seen), key=seen.count)


PLOTS = [
    Plot("bound.png", "share of the bound", "cpu-layers.json", shares),
    Plot("sweep-train.png", "training over the grid", "cpu-sweep.json", heat_map("train")),
    Plot("sweep-infer.png", "inference over the grid", "cpu-sweep.json", heat_map("infer")),
    Plot("scaling.png", "time over size", "cpu-scaling.json", scaling),
    Plot("lm.png", "tokens a second in training", "cpu-lm.json", tokens("lm")),
    Plot("sample.png", "tokens a second in sampling", "cpu-sample.json", tokens("sample")),
]
