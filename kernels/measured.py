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

    def distance(point: Point) -> float:
        return max(abs(log2(point.H / sizes.H)), abs(log2(point.B / sizes.B)))

    same = [
        point
        for point in POINTS
        if (point.arch, point.suite, point.numbers) == (device.arch, suite, sizes.numbers)
        and distance(point) < 1
    ]
    return min(same, key=distance, default=None)
