# SPDX-License-Identifier: Apache-2.0
"""What was measured on a GPU: at each size the fastest of our kernels, and how cuDNN compares.

`scripts/propose_gpu_table.py` writes POINTS from what `python -m benchmarks gpu` left.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log2

from .tiling import Device, Sizes

SHORTER = 4
"""A point speaks for calls of at least its number of steps over this: every call costs launches."""

MOST_STEPS = 128
"""No point needs more steps than this."""

MOST_KNOWN = 4096
"""Answers to remember: searching the table costs more than launching a kernel."""


@dataclass(frozen=True)
class Point:
    """One measured size.

    Attributes:
        arch: Compute capability of the device, 90 for 9.0.
        suite: "train", "infer", or "step" for one step of inference.
        kind: As `Sizes.kind`.
        H: Hidden size.
        B: Batch size.
        T: Number of steps.
        kernel: The fastest of ours, a name of `registry.KERNELS`.
        ratio: cuDNN's time over its time.
    """

    arch: int
    suite: str
    kind: str
    H: int
    B: int
    T: int
    kernel: str
    ratio: float


POINTS: tuple[Point, ...] = (
    Point(90, "infer", "bfloat16", 32, 1, 512, "cta", 32.992),
    Point(90, "infer", "bfloat16", 32, 16, 512, "cta", 35.909),
    Point(90, "infer", "bfloat16", 64, 1, 512, "cta", 23.094),
    Point(90, "infer", "bfloat16", 64, 64, 512, "cta", 20.55),
    Point(90, "infer", "bfloat16", 64, 1024, 512, "cta", 20.827),
    Point(90, "infer", "bfloat16", 128, 1, 512, "cta", 20.176),
    Point(90, "infer", "bfloat16", 128, 64, 512, "cta", 18.205),
    Point(90, "infer", "bfloat16", 128, 1024, 512, "cta", 14.53),
    Point(90, "infer", "bfloat16", 128, 16384, 32, "cta", 4.407),
    Point(90, "infer", "bfloat16", 256, 1, 512, "grid", 12.211),
    Point(90, "infer", "bfloat16", 256, 64, 512, "grid", 10.043),
    Point(90, "infer", "bfloat16", 256, 1024, 512, "grid", 4.471),
    Point(90, "infer", "bfloat16", 256, 4096, 24, "grid", 2.3),
    Point(90, "infer", "bfloat16", 512, 1, 512, "grid", 7.782),
    Point(90, "infer", "bfloat16", 512, 64, 512, "grid", 5.444),
    Point(90, "infer", "bfloat16", 512, 1024, 512, "grid", 2.374),
    Point(90, "infer", "bfloat16", 1024, 1, 512, "grid", 3.957),
    Point(90, "infer", "bfloat16", 1024, 64, 512, "grid", 2.161),
    Point(90, "infer", "bfloat16", 1024, 1024, 512, "grid", 1.151),
    Point(90, "infer", "tf32", 64, 1, 512, "cta", 0.521),
    Point(90, "infer", "tf32", 64, 64, 512, "cta", 0.593),
    Point(90, "infer", "tf32", 64, 1024, 512, "cta", 2.309),
    Point(90, "infer", "tf32", 128, 1, 512, "grid", 0.394),
    Point(90, "infer", "tf32", 128, 64, 512, "grid", 0.375),
    Point(90, "infer", "tf32", 128, 1024, 512, "cta", 2.49),
    Point(90, "infer", "tf32", 256, 1, 512, "grid", 6.255),
    Point(90, "infer", "tf32", 256, 64, 512, "grid", 5.416),
    Point(90, "infer", "tf32", 256, 1024, 512, "grid", 2.745),
    Point(90, "infer", "tf32", 512, 1, 512, "grid", 3.09),
    Point(90, "infer", "tf32", 512, 64, 512, "grid", 4.053),
    Point(90, "infer", "tf32", 512, 1024, 512, "grid", 1.593),
    Point(90, "infer", "tf32", 1024, 1, 512, "grid", 0.85),
    Point(90, "infer", "tf32", 1024, 64, 512, "grid", 0.971),
    Point(90, "infer", "tf32", 1024, 1024, 512, "grid", 1.154),
    Point(90, "step", "bfloat16", 64, 1, 1, "step", 1.226),
    Point(90, "step", "bfloat16", 64, 64, 1, "step", 1.147),
    Point(90, "step", "bfloat16", 64, 1024, 1, "step", 1.311),
    Point(90, "step", "bfloat16", 128, 1, 1, "step", 1.123),
    Point(90, "step", "bfloat16", 128, 64, 1, "step", 1.22),
    Point(90, "step", "bfloat16", 128, 1024, 1, "step", 1.223),
    Point(90, "step", "bfloat16", 256, 1, 1, "step", 1.204),
    Point(90, "step", "bfloat16", 256, 64, 1, "step", 1.171),
    Point(90, "step", "bfloat16", 256, 1024, 1, "step", 1.358),
    Point(90, "step", "bfloat16", 512, 1, 1, "step", 1.217),
    Point(90, "step", "bfloat16", 512, 64, 1, "step", 1.201),
    Point(90, "step", "bfloat16", 512, 1024, 1, "step", 1.227),
    Point(90, "step", "bfloat16", 1024, 1, 1, "step", 1.063),
    Point(90, "step", "bfloat16", 1024, 64, 1, "step", 1.215),
    Point(90, "step", "bfloat16", 1024, 1024, 1, "step", 1.26),
    Point(90, "step", "tf32", 64, 1, 1, "step", 0.217),
    Point(90, "step", "tf32", 64, 64, 1, "step", 0.24),
    Point(90, "step", "tf32", 64, 1024, 1, "step", 0.271),
    Point(90, "step", "tf32", 128, 1, 1, "step", 0.225),
    Point(90, "step", "tf32", 128, 64, 1, "step", 0.229),
    Point(90, "step", "tf32", 128, 1024, 1, "step", 0.401),
    Point(90, "step", "tf32", 256, 1, 1, "step", 0.358),
    Point(90, "step", "tf32", 256, 64, 1, "step", 0.358),
    Point(90, "step", "tf32", 256, 1024, 1, "step", 0.437),
    Point(90, "step", "tf32", 512, 1, 1, "step", 0.316),
    Point(90, "step", "tf32", 512, 64, 1, "step", 0.37),
    Point(90, "step", "tf32", 512, 1024, 1, "step", 0.381),
    Point(90, "step", "tf32", 1024, 1, 1, "step", 0.303),
    Point(90, "step", "tf32", 1024, 64, 1, "step", 0.321),
    Point(90, "step", "tf32", 1024, 1024, 1, "step", 0.408),
    Point(90, "train", "bfloat16", 32, 1, 512, "cta", 10.043),
    Point(90, "train", "bfloat16", 64, 1, 512, "cta", 8.606),
    Point(90, "train", "bfloat16", 64, 64, 512, "cta", 9.781),
    Point(90, "train", "bfloat16", 64, 1024, 512, "cta", 10.2),
    Point(90, "train", "bfloat16", 128, 1, 512, "grid", 10.214),
    Point(90, "train", "bfloat16", 128, 64, 512, "cta", 8.573),
    Point(90, "train", "bfloat16", 128, 1024, 512, "grid", 7.052),
    Point(90, "train", "bfloat16", 128, 16384, 32, "cta", 5.875),
    Point(90, "train", "bfloat16", 256, 1, 512, "grid", 9.065),
    Point(90, "train", "bfloat16", 256, 64, 512, "grid", 6.198),
    Point(90, "train", "bfloat16", 256, 1024, 512, "grid", 2.986),
    Point(90, "train", "bfloat16", 256, 4096, 24, "grid", 1.476),
    Point(90, "train", "bfloat16", 512, 1, 512, "grid", 6.08),
    Point(90, "train", "bfloat16", 512, 64, 512, "grid", 4.848),
    Point(90, "train", "bfloat16", 512, 1024, 512, "grid", 2.067),
    Point(90, "train", "bfloat16", 1024, 1, 512, "grid", 3.204),
    Point(90, "train", "bfloat16", 1024, 64, 512, "grid", 2.352),
    Point(90, "train", "bfloat16", 1024, 1024, 512, "grid", 1.072),
    Point(90, "train", "tf32", 64, 1, 512, "cta", 0.538),
    Point(90, "train", "tf32", 64, 64, 512, "cta", 0.764),
    Point(90, "train", "tf32", 64, 1024, 512, "cta", 8.067),
    Point(90, "train", "tf32", 128, 1, 512, "cta", 0.455),
    Point(90, "train", "tf32", 128, 64, 512, "cta", 0.782),
    Point(90, "train", "tf32", 128, 1024, 512, "cta", 5.732),
    Point(90, "train", "tf32", 256, 1, 512, "grid", 4.616),
    Point(90, "train", "tf32", 256, 64, 512, "grid", 3.528),
    Point(90, "train", "tf32", 256, 1024, 512, "grid", 2.663),
    Point(90, "train", "tf32", 512, 1, 512, "grid", 2.728),
    Point(90, "train", "tf32", 512, 64, 512, "grid", 2.361),
    Point(90, "train", "tf32", 512, 1024, 512, "grid", 1.462),
    Point(90, "train", "tf32", 1024, 1, 512, "grid", 0.718),
    Point(90, "train", "tf32", 1024, 64, 512, "grid", 0.996),
    Point(90, "train", "tf32", 1024, 1024, 512, "grid", 0.727),
)


def nearest(device: Device, sizes: Sizes, suite: str) -> Point | None:
    """The measured point that speaks for a call, or None.

    Of the H nearest to the call's, less than a factor of 2 away: the B nearest to its, if less than
    a factor of 2 away too, else of those below and above it the one less favourable to us.
    """
    if sizes.T == 1 and suite == "infer":
        suite = "step"
    steps = min(sizes.T, MOST_STEPS)
    key = (device.arch, suite, sizes.kind, sizes.H, sizes.B, steps)
    known = _answers.of(POINTS)
    if key not in known:
        known[key] = _search(*key)
    return known[key]


class _Answers:
    """What was found in a table, by the question: it is forgotten for another table."""

    def __init__(self) -> None:
        self.points: tuple[Point, ...] = ()
        self.known: dict[tuple[int, str, str, int, int, int], Point | None] = {}

    def of(
        self, points: tuple[Point, ...]
    ) -> dict[tuple[int, str, str, int, int, int], Point | None]:
        if self.points is not points or len(self.known) >= MOST_KNOWN:
            self.points, self.known = points, {}
        return self.known


_answers = _Answers()


def _search(arch: int, suite: str, kind: str, H: int, B: int, T: int) -> Point | None:
    same = [
        p
        for p in POINTS
        if (p.arch, p.suite, p.kind) == (arch, suite, kind) and min(p.T // SHORTER, MOST_STEPS) <= T
    ]
    nearest_H = min((p.H for p in same), key=lambda h: abs(log2(h / H)), default=None)
    if nearest_H is None or abs(log2(nearest_H / H)) >= 1:
        return None
    here = [p for p in same if p.H == nearest_H]
    close = min(here, key=lambda p: abs(log2(p.B / B)))
    if abs(log2(close.B / B)) < 1:
        return close
    below = max((p for p in here if p.B < B), key=lambda p: p.B, default=None)
    above = min((p for p in here if p.B > B), key=lambda p: p.B, default=None)
    if below is None or above is None:
        return None
    return min(below, above, key=lambda p: p.ratio)
