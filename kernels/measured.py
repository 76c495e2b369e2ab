# SPDX-License-Identifier: Apache-2.0
"""What was measured on a GPU: at each size the fastest of our kernels, and how cuDNN compares.

`scripts/propose_gpu_table.py` writes POINTS from what `python -m benchmarks gpu` left. It is empty:
nothing has been measured yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log2

from .tiling import Device, Sizes

LEAST_T = 16
"""Fewer steps than this, but for one, are another thing than the 512 that were measured."""

MOST_KNOWN = 4096
"""Answers to remember: searching the table costs more than launching a kernel."""


@dataclass(frozen=True)
class Point:
    """One measured size.

    Attributes:
        arch: Compute capability of the device, 90 for 9.0.
        suite: "train", "infer", or "step" for one step of inference.
        numbers: As `Sizes.numbers`.
        H: Hidden size.
        B: Batch size.
        kernel: The fastest of ours, a name of `registry.KERNELS`.
        ratio: cuDNN's time over its time.
    """

    arch: int
    suite: str
    numbers: str
    H: int
    B: int
    kernel: str
    ratio: float


POINTS: tuple[Point, ...] = ()


def nearest(device: Device, sizes: Sizes, suite: str) -> Point | None:
    """The measured size nearest to a call, less than a factor of 2 away in H and in B, or None."""
    if sizes.T == 1 and suite == "infer":
        suite = "step"
    elif sizes.T < LEAST_T:
        return None
    key = (device.arch, suite, sizes.numbers, sizes.H, sizes.B)
    known = _known.get(id(POINTS))
    if known is None or len(known) >= MOST_KNOWN:
        _known.clear()
        known = _known[id(POINTS)] = {}
    if key not in known:
        known[key] = _search(*key)
    return known[key]


_known: dict[int, dict[tuple[int, str, str, int, int], Point | None]] = {}


def _search(arch: int, suite: str, numbers: str, H: int, B: int) -> Point | None:
    def distance(point: Point) -> float:
        return max(abs(log2(point.H / H)), abs(log2(point.B / B)))

    same = [
        point
        for point in POINTS
        if (point.arch, point.suite, point.numbers) == (arch, suite, numbers)
        and distance(point) < 1
    ]
    return min(same, key=distance, default=None)
