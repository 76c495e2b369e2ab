# SPDX-License-Identifier: Apache-2.0
"""Interleaved rounds of timed blocks, on the CPU by `perf_counter`, on the GPU by events."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch

Call = Callable[[], Any]
Clock = Callable[[Call, int], float]
"""Seconds per call of that many calls in a row."""


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        block_s: least duration of one timed block of calls.
        budget_s: time for all rounds of a case, after which no more begin.
        least: rounds to make whatever they take.
        most: rounds that are enough.
    """

    block_s: float = 0.03
    budget_s: float = 20.0
    least: int = 7
    most: int = 25


QUICK = Effort(block_s=0.004, budget_s=1.5, least=3, most=7)
DRY = Effort(block_s=0.0, budget_s=0.0, least=1, most=1)


@dataclass(frozen=True)
class Summary:
    """Seconds per call over the rounds."""

    median_s: float
    p20_s: float
    p80_s: float
    rounds: int


def summary(samples: Sequence[float]) -> Summary:
    """Median, 20th and 80th percentile, linearly interpolated."""
    low, middle, high = np.percentile(samples, [20, 50, 80])
    return Summary(float(middle), float(low), float(high), len(samples))


def ratio(baseline: Sequence[float], ours: Sequence[float]) -> float:
    """Median over the rounds of baseline / ours: above 1 where ours is faster."""
    return median(theirs / mine for theirs, mine in zip(baseline, ours, strict=True))


def cpu_clock(call: Call, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def cuda_clock(call: Call, calls: int) -> float:
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(calls):
        call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) * 1e-3 / calls


def clock_of(device: str) -> Clock:
    return cuda_clock if device == "cuda" else cpu_clock


def calls_per_block(call: Call, clock: Clock, block_s: float) -> int:
    """So many calls that a block lasts block_s; the calls on the way there are the warm-up."""
    calls = 1
    while True:
        taken = clock(call, calls) * calls
        if taken >= block_s:
            return calls
        calls = max(2 * calls, int(calls * min(100, 1.1 * block_s / max(taken, 1e-9))))


@contextmanager
def _no_collection() -> Iterator[None]:
    """Without Python's cyclic garbage collector, as timeit does it."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _wait(seconds: float | None) -> None:
    if seconds is not None:
        time.sleep(seconds)


def interleave(
    calls: Mapping[str, Call],
    clock: Clock,
    effort: Effort,
    before: Callable[[str], Any] | None = None,
    pauses: Mapping[str, float] | None = None,
) -> dict[str, list[float]]:
    """Seconds per call of every round, for each name.

    A round times one block of each, in an order drawn anew, so that drift of the machine hits all
    alike. One untimed call goes before each block: it brings caches and threads back to this call
    after another provider has run.

    Args:
        calls: by name.
        clock: of their device.
        effort: of the measurement.
        before: goes with the name before each block and its untimed call.
        pauses: seconds to wait after each block of these names, whose threads go on spinning.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle, waits = list(calls), random.Random(0), pauses or {}
    with _no_collection():
        counts = {}
        for name in order:
            if before is not None:
                before(name)
            counts[name] = calls_per_block(calls[name], clock, effort.block_s)
            _wait(waits.get(name))
        start = time.perf_counter()
        for made in range(effort.most):
            if made >= effort.least and time.perf_counter() - start > effort.budget_s:
                break
            shuffle.shuffle(order)
            for name in order:
                if before is not None:
                    before(name)
                calls[name]()
                samples[name].append(clock(calls[name], counts[name]))
                _wait(waits.get(name))
    return samples
