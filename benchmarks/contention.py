# SPDX-License-Identifier: Apache-2.0
"""The layer while other processes keep every core busy, beside nn.GRU.

Neighbours are processes that compute without end, one per core, pinned to none. Each of ours and
nn.GRU runs with one thread and with all, alone and between neighbours, in turn; times are in units
of its own one-thread time alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch

from benchmarks import timing
from benchmarks.cases import Case, square
from benchmarks.machine import OtherLoad
from benchmarks.problem import Problem
from benchmarks.providers import Provider
from benchmarks.providers_gru_fast import Layer
from benchmarks.providers_torch import TorchGRU
from benchmarks.runner import Gate

Figure = dict[str, Any]
SHAPES = [square(64, 1, 256), square(256, 1, 256), square(64, 32, 256), square(256, 32, 128)]
QUICK = [Case(5, 8, 3, 9)]
EFFORT = timing.Effort(block_s=0.1, budget_s=4.0, least=3, most=7)

# Ends with its parent: the pipe closes then, however the parent died.
NEIGHBOUR = """
import os, select
busy = False
while True:
    if select.select([0], [], [], 0 if busy else None)[0]:
        order = os.read(0, 1)
        if not order:
            break
        busy = order == b"1"
        os.write(1, order)
    for _ in range(10_000):
        pass
"""


class Neighbours:
    """Processes that keep a core busy each while told so."""

    def __init__(self, count: int) -> None:
        pipe = subprocess.PIPE
        command = [sys.executable, "-S", "-E", "-c", NEIGHBOUR]
        self.processes = [
            subprocess.Popen(command, stdin=pipe, stdout=pipe, bufsize=0) for _ in range(count)
        ]
        self.busy = False

    def set(self, busy: bool) -> None:
        """Returns once all do so."""
        if busy == self.busy:
            return
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(b"1" if busy else b"0")
        for process in self.processes:
            assert process.stdout is not None
            if not process.stdout.read(1):
                raise RuntimeError(f"a neighbour ended with exit code {process.wait()}")
        self.busy = busy

    def close(self) -> None:
        """End them."""
        for process in self.processes:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.close()
            process.wait()
            process.stdout.close()


@contextmanager
def neighbours(count: int) -> Iterator[Neighbours]:
    """Idle until told otherwise; ended at the end."""
    found = Neighbours(count)
    try:
        yield found
    finally:
        found.close()


def measure(
    problem: Problem, threads: int, others: Neighbours, effort: timing.Effort
) -> list[Figure]:
    """Each provider with one thread and with `threads`.

    Raises:
        RuntimeError: a provider's results are wrong.
    """
    others.set(False)
    torch.set_num_threads(threads)
    gate = Gate(problem, threads)
    providers: list[Provider] = [Layer("cpu"), TorchGRU("cpu")]
    calls: dict[str, Callable[[], Any]] = {}
    states: dict[str, tuple[int, bool]] = {}
    numbers = sorted({1, threads})
    for provider in providers:
        wrong = gate.verdict(provider)
        if wrong is not None:
            raise RuntimeError(f"{provider.name} on {problem.suite} {problem.case}: {wrong}")
        call = provider.prepare(problem, threads).call
        for n, busy in product(numbers, (False, True)):
            calls[_key(provider, n, busy)] = call
            states[_key(provider, n, busy)] = n, busy

    def switch(key: str) -> None:
        n, busy = states[key]
        torch.set_num_threads(n)
        others.set(busy)

    samples = timing.interleave(calls, timing.cpu_clock, effort, switch)
    found = []
    for provider in providers:
        alone = samples[_key(provider, 1, False)]
        for n in numbers:
            own = samples[_key(provider, n, False)]
            switch(_key(provider, n, False))
            used, other = cpus_used(calls[_key(provider, n, False)], effort.block_s)
            found.append({
                "name": "contention",
                "value": timing.ratio(samples[_key(provider, n, True)], alone),
                "unit": "x one thread alone", "suite": problem.suite, "case": str(problem.case),
                "provider": provider.name, "threads": n, "neighbours": len(others.processes),
                "alone": timing.ratio(own, alone), "alone_ms": timing.summary(own).median_s * 1e3,
                "cpus_used": used, "rounds": len(own), "other_cpu": other,
            })  # fmt: skip
    return found


def _key(provider: Provider, threads: int, busy: bool) -> str:
    return f"{provider.name}, {threads}, {'busy' if busy else 'alone'}"


def cpus_used(call: Callable[[], Any], seconds: float) -> tuple[float, float | None]:
    """CPU time over time, of this process: how many threads the calls kept busy.

    Returns:
        It, and the share of the machine's CPU time that others took meanwhile.
    """
    call()
    # What ran before may have left threads that still wait actively.
    time.sleep(0.05)
    load = OtherLoad()
    cpu, start = time.process_time(), time.perf_counter()
    while (taken := time.perf_counter() - start) < seconds:
        call()
    return (time.process_time() - cpu) / taken, load.share()


def cpus() -> int:
    """That this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def figures(quick: bool, threads: int) -> Iterator[list[Figure]]:
    """Problem by problem.

    Args:
        quick: sizes and times that only show that it works.
        threads: besides one; torch's own default, where nothing was set.
    """
    before = torch.get_num_threads()
    effort = timing.Effort(block_s=0.002, budget_s=0.0, least=2) if quick else EFFORT
    try:
        with neighbours(cpus()) as others:
            for case in QUICK if quick else SHAPES:
                for suite in ("train", "infer"):
                    yield measure(Problem(case, suite, "float32", "cpu"), threads, others, effort)
    finally:
        torch.set_num_threads(before)
