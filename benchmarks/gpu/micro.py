# SPDX-License-Identifier: Apache-2.0
"""Micro-figures: launches, graph nodes, barriers, copies, products."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks import timing
from benchmarks.cases import DTYPES
from benchmarks.precision import float32_as
from benchmarks.providers_cuda import captured

Figure = dict[str, Any]


def _seconds(call: Callable[[], Any], device: str, effort: timing.Effort) -> timing.Summary:
    samples = timing.interleave({"": call}, timing.clock_of(device), effort)
    return timing.summary(samples[""])


def _figure(name: str, unit: str, found: timing.Summary, per: float, **more: Any) -> Figure:
    """A duration over `per`, or a rate of `per` where the unit ends in /s."""
    rate = unit.endswith("/s")
    values = [per / s if rate else s / per for s in (found.median_s, found.p20_s, found.p80_s)]
    spread = sorted(values[1:])
    figure = {"name": name, "value": values[0], "p20": spread[0], "p80": spread[1], "unit": unit}
    return {**figure, "rounds": found.rounds, **more}


def launches(device: str, effort: timing.Effort, count: int = 200) -> list[Figure]:
    """A kernel of one element: launched by torch, by Triton, and as a node of a CUDA graph."""
    one = torch.zeros(1, device=device, dtype=torch.int32)

    def by_torch() -> None:
        for _ in range(count):
            one.add_(1)

    calls = {"launch_torch": by_torch}
    if find_spec("triton"):
        from benchmarks.gpu.triton_probes import nothing

        def by_triton() -> None:
            for _ in range(count):
                nothing[(1,)](one)

        calls["launch_triton"] = by_triton
    if device == "cuda":
        calls |= {f"graph_node{n.removeprefix('launch')}": captured(c) for n, c in calls.items()}
    return [
        _figure(name, "s", _seconds(call, device, effort), count, count=count)
        for name, call in calls.items()
    ]


def barrier(device: str, effort: timing.Effort, programs: int, rounds: int) -> list[Figure]:
    """A barrier over that many programs, as the grid kernel needs one per step."""
    from benchmarks.gpu.triton_probes import barriers

    counter = torch.zeros(1, device=device, dtype=torch.int32)

    def call() -> None:
        counter.zero_()
        barriers[(programs,)](counter, rounds, programs, num_warps=4, launch_cooperative_grid=True)

    found = _seconds(call, device, effort)
    assert int(counter) == programs * rounds, f"counter {int(counter)}"
    return [_figure("grid_barrier", "s", found, rounds, programs=programs)]


def copies(device: str, effort: timing.Effort, sizes: list[int]) -> list[Figure]:
    """Bytes read and written per second by a copy of that many bytes."""
    found = []
    for size in sizes:
        source = torch.randn(size // 4, device=device)
        target = torch.empty_like(source)
        taken = _seconds(lambda s=source, t=target: t.copy_(s), device, effort)  # type: ignore[misc]
        found.append(_figure("copy", "B/s", taken, 2 * size, bytes=size))
    return found


def product(device: str, effort: timing.Effort, dtype: str, size: int) -> list[Figure]:
    """FLOP/s of a square product of random matrices."""
    a, b = (torch.randn(size, size, device=device).to(DTYPES[dtype]) for _ in range(2))
    with float32_as(dtype):
        taken = _seconds(lambda: a @ b, device, effort)
    return [_figure(f"matmul_{dtype}", "FLOP/s", taken, 2.0 * size**3, size=size)]


def value_of(figures: list[Figure], name: str) -> float | None:
    """The largest figure of that name."""
    return max((f["value"] for f in figures if f["name"] == name), default=None)
