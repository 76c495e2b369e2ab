# SPDX-License-Identifier: Apache-2.0
"""The tables of what was measured on a GPU."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.markdown import pivot, sizes, times
from benchmarks.records import Record, Results
from benchmarks.report import seconds

LAYERS = ("train", "infer")


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
    tf32 = {
        (r.suite, str(r.case)): r.median_s
        for r in results.records
        if (r.provider, r.dtype) == ("cudnn", "tf32")
    }

    def cells(records: list[Record]) -> Iterable[tuple[str, str, str]]:
        for r in records:
            resets = f", {r.case['resets']:.0%} resets" if r.case["resets"] else ""
            row = sizes(r) + resets
            yield row, f"{r.suite}, {r.dtype}", _per_step(r)
            theirs = tf32.get((r.suite, str(r.case)))
            if r.dtype != "tf32" and theirs is not None and r.median_s is not None:
                column = f"cuDNN's {r.suite}, tf32 / ours, {r.dtype}"
                yield row, column, times(theirs / r.median_s)

    return "\n\n".join(pivot("I = H, B, T", cells(part)) for part in (usual, others))


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
