# SPDX-License-Identifier: Apache-2.0
"""The layer while other processes keep every core busy, beside nn.GRU.

Neighbours are processes that compute without end, one per core, pinned to none. Each of ours and
nn.GRU runs with one thread and with all, alone and between neighbours, in turn; times are in units
of its own one-thread time alone.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch

from benchmarks import timing
from benchmarks.cases import Case, square
from benchmarks.errors import describe_error
from benchmarks.machine import OtherLoad, processors
from benchmarks.problem import Problem
from benchmarks.providers import Provider
from benchmarks.providers_gru_fast import Layer
from benchmarks.providers_torch import TorchGRU
from benchmarks.runner import Found, Setting, admit

CONTENTION = "contention"
Figure = dict[str, Any]
SHAPES = [square(64, 1, 256), square(256, 1, 256), square(64, 32, 256), square(256, 32, 128)]
QUICK = [Case(5, 8, 3, 9)]
EFFORT = timing.Effort(block_s=0.1, budget_s=4.0, least=3, most=7)
PATIENCE_S = 5.0

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


class NeighbourEnded(RuntimeError):
    """A neighbour that died by itself: what is measured now is not what was meant."""


class Neighbours:
    """Processes that keep a core busy each while told so."""

    def __init__(self, count: int) -> None:
        pipe = subprocess.PIPE
        command = [sys.executable, "-S", "-E", "-c", NEIGHBOUR]
        self.processes = [
            # Not of our group: Ctrl-C is for us, and they end with us.
            subprocess.Popen(command, stdin=pipe, stdout=pipe, bufsize=0, start_new_session=True)
            for _ in range(count)
        ]
        self.busy = False

    def set(self, busy: bool) -> None:
        """Returns once all do so.

        Raises:
            NeighbourEnded: one has died.
        """
        if busy == self.busy:
            return
        for process in self.processes:
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(b"1" if busy else b"0")
                alive = process.stdout.read(1)
            except BrokenPipeError:
                alive = b""
            if not alive:
                raise NeighbourEnded(f"a neighbour ended with exit code {process.wait()}")
        self.busy = busy

    def close(self) -> None:
        """End them, by force where they do not by themselves."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self.processes:
            assert process.stdout is not None
            try:
                process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
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
    problem: Problem, providers: Sequence[Provider], others: Neighbours, setting: Setting
) -> Found:
    """Each provider with one thread and with the setting's; the neighbours are idle."""
    torch.set_num_threads(setting.threads)
    admitted = admit(problem, providers, setting)
    working = admitted.working_calls()
    figures: list[Figure] = []
    try:
        figures = _figures(problem, working, others, setting)
    except NeighbourEnded as error:
        for name in working:
            admitted.records[name].error = describe_error(error)
    have = {figure["provider"] for figure in figures}
    failed = [record for name, record in admitted.records.items() if name not in have]
    return Found(figures, failed, admitted.notes)


def _figures(
    problem: Problem,
    working: dict[str, Callable[[], Any]],
    others: Neighbours,
    setting: Setting,
) -> list[Figure]:
    calls: dict[str, Callable[[], Any]] = {}
    states: dict[str, tuple[int, bool]] = {}
    numbers = sorted({1, setting.threads})
    for name, call in working.items():
        for n, busy in product(numbers, (False, True)):
            calls[_key(name, n, busy)] = call
            states[_key(name, n, busy)] = n, busy

    def switch(key: str) -> None:
        n, busy = states[key]
        torch.set_num_threads(n)
        others.set(busy)

    load = OtherLoad(but=[process.pid for process in others.processes])
    samples = timing.interleave(calls, timing.cpu_clock, setting.effort, switch)
    other = load.share()
    figures = []
    for name, call in working.items():
        alone = samples[_key(name, 1, False)]
        for n in numbers:
            own, between = samples[_key(name, n, False)], samples[_key(name, n, True)]
            ratios = timing.summary([b / a for b, a in zip(between, alone, strict=True)])
            switch(_key(name, n, False))
            figures.append({
                "name": CONTENTION,
                "value": ratios.median_s, "p20": ratios.p20_s, "p80": ratios.p80_s,
                "unit": "x one thread alone", "suite": problem.suite, "case": str(problem.case),
                "provider": name, "threads": n, "neighbours": len(others.processes),
                "alone": timing.ratio(own, alone), "alone_ms": timing.summary(own).median_s * 1e3,
                "cpus_used": cpus_used(call, setting.effort.block_s),
                "rounds": len(own), "other_cpu": other,
            })  # fmt: skip
    return figures


def _key(provider: str, threads: int, busy: bool) -> str:
    return f"{provider}, {threads}, {'busy' if busy else 'alone'}"


def cpus_used(call: Callable[[], Any], seconds: float) -> float:
    """CPU time over time, of this process: how many threads the calls kept busy."""
    call()
    # What ran before may have left threads that still wait actively.
    time.sleep(0.05)
    cpu, start = time.process_time(), time.perf_counter()
    while (taken := time.perf_counter() - start) < seconds:
        call()
    return (time.process_time() - cpu) / taken


def run(quick: bool, threads: int) -> Iterator[Found]:
    """Problem by problem.

    Args:
        quick: sizes and times that only show that it works.
        threads: besides one; torch's own default, where nothing was set.
    """
    before = torch.get_num_threads()
    providers: list[Provider] = [Layer("cpu"), TorchGRU("cpu")]
    effort = timing.Effort(block_s=0.002, budget_s=0.0, least=2) if quick else EFFORT
    setting = Setting(threads, effort, footprint=False)
    try:
        for case in QUICK if quick else SHAPES:
            for suite in ("train", "infer"):
                feature = f"{CONTENTION}/{suite}"
                problem = Problem(case, suite, "float32", "cpu", feature=feature)
                # New ones for each problem: one that died costs no other problem's figures.
                with neighbours(processors()) as others:
                    found = measure(problem, providers, others, setting)
                yield found
    finally:
        torch.set_num_threads(before)
