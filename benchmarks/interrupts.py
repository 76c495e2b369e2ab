# SPDX-License-Identifier: Apache-2.0
"""From Ctrl-C to KeyboardInterrupt in a long call of a layer, beside nn.GRU.

A kernel that does not look for signals raises when it has come to its end.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx.experimental import symbolic_shapes  # noqa: F401 - else a first backward imports it

from benchmarks import timing
from benchmarks.cases import Case, square
from benchmarks.machine import OtherLoad
from benchmarks.problem import Problem
from benchmarks.providers import Provider
from benchmarks.providers_gru_fast import Layer
from benchmarks.providers_torch import TorchGRU
from benchmarks.runner import Found

INTERRUPT = "interrupt"
Figure = dict[str, Any]
SHAPES = [square(64, 1, 20_000), square(256, 32, 500), square(1024, 1, 1000)]
QUICK = [Case(5, 8, 3, 9)]
MOMENTS = (0.1, 0.3, 0.5, 0.7)
"""Of the time of a call: when the signal comes."""

SOON_S = 0.01
"""But not before the timer has surely been started."""


@contextmanager
def heeded() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also in a process that was started to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def waits(call: Callable[[], Any], delays: Sequence[float]) -> list[float]:
    """Seconds from a signal to KeyboardInterrupt, for signals that come after each of the delays.

    A call that ends before is made again.
    """
    found = []
    for delay in delays:
        sent = []

        def send(sent: list[float] = sent) -> None:
            sent.append(time.perf_counter())
            os.kill(os.getpid(), signal.SIGINT)

        timer = threading.Timer(delay, send)
        with heeded():
            timer.start()
            try:
                while True:
                    call()
            except KeyboardInterrupt:
                found.append(time.perf_counter() - sent[0])
        timer.join()
    return found


def run(quick: bool, threads: int) -> Iterator[Found]:
    """Problem by problem.

    Args:
        quick: sizes that only show that it works.
        threads: besides one.
    """
    before = torch.get_num_threads()
    providers: list[Provider] = [Layer("cpu"), TorchGRU("cpu")]
    try:
        for case in QUICK if quick else SHAPES:
            for suite in ("train", "infer"):
                problem = Problem(case, suite, "float32", "cpu", feature=f"{INTERRUPT}/{suite}")
                numbers = sorted({1, threads})
                yield Found([_figure(problem, p, n) for p in providers for n in numbers])
    finally:
        torch.set_num_threads(before)


def _figure(problem: Problem, provider: Provider, threads: int) -> Figure:
    torch.set_num_threads(threads)
    call = provider.prepare(problem, threads).call
    call()
    start = time.perf_counter()
    call()
    whole = time.perf_counter() - start
    load = OtherLoad()
    found = waits(call, [max(moment * whole, SOON_S) for moment in MOMENTS])
    return {
        "name": INTERRUPT, "value": max(found) * 1e3, "unit": "ms at most",
        "suite": problem.suite, "case": str(problem.case),
        "provider": provider.name, "threads": threads,
        "calls": len(found), "median_ms": timing.summary(found).median_s * 1e3,
        "call_ms": whole * 1e3, "other_cpu": load.share(),
    }  # fmt: skip
