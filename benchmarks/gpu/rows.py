# SPDX-License-Identifier: Apache-2.0
"""The rows of the GPU program, in order of worth: what a cut-off loses is worth least."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from typing import Any

import torch

from benchmarks import timing
from benchmarks.bound import gpu_floor
from benchmarks.cases import RL, Case, square
from benchmarks.gpu import micro, samplers
from benchmarks.machine import OtherLoad
from benchmarks.precision import float32_as
from benchmarks.problem import Problem
from benchmarks.providers import Provider
from benchmarks.providers_cuda import CapturedCellLoop
from benchmarks.providers_kernels import Kernel, kernel_names
from benchmarks.providers_torch import SplitAndPad, TorchGRU
from benchmarks.records import Record
from benchmarks.runner import Setting, run_problem

HIDDEN = (32, 64, 100, 128, 160, 192, 256, 512, 1024, 2048)
BATCHES = (1, 16, 64, 256, 1024)
CORE = [(H, B) for H, B in product((64, 128, 256, 512, 1024), (1, 64, 1024))]
DTYPES = ("bfloat16", "tf32", "float16")
EFFORT = timing.Effort(block_s=0.004, budget_s=0.5, least=5, most=15)

Found = tuple[list[Record], list[micro.Figure], list[str]]
"""Records, figures and notes."""


@dataclass(frozen=True)
class Session:
    """What rows need to know.

    Attributes:
        device: "cuda", or "cpu" in a dry run.
        dry: whether figures mean nothing.
        figures: of earlier rows, for the bound.
    """

    device: str
    dry: bool
    figures: list[micro.Figure]

    @property
    def effort(self) -> timing.Effort:
        return timing.DRY if self.dry else EFFORT

    def setting(self) -> Setting:
        """For `run_problem`."""
        return Setting(
            torch.get_num_threads(),
            self.effort,
            self.floor,
            dry=self.dry,
            footprint=self.device == "cuda",
        )

    def floor(self, problem: Problem) -> float | None:
        """From the micro-figures measured so far."""
        rate = micro.value_of(self.figures, f"matmul_{problem.dtype}")
        copied = micro.value_of(self.figures, "copy")
        if rate is None or copied is None:
            return None
        return gpu_floor(problem.case, problem.suite, problem.dtype, rate, copied)


@dataclass(frozen=True)
class Row:
    """One thing to measure.

    Attributes:
        name: unique, stable over runs: what a resumed run goes by.
        measure: does it.
        warm: compiles what it needs, for the parallel precompilation; None if nothing.
    """

    name: str
    measure: Callable[[Session], Found]
    warm: Callable[[Session], Any] | None = None


def _micro(name: str, measure: Callable[[str, timing.Effort], list[micro.Figure]]) -> Row:
    def run(session: Session) -> Found:
        found = measure(session.device, session.effort)
        return [], [{**figure, "dry": session.dry} for figure in found], []

    return Row(f"micro/{name}", run)


def _gru(provider: str, make: Callable[[str], list[Provider]], problem: tuple[Any, ...]) -> Row:
    """Providers of one problem, interleaved; only the records of the last one are kept."""
    case, suite, dtype = problem

    def on(session: Session, **changes: Any) -> Problem:
        sizes = {**case.as_dict(), **changes}
        return Problem(Case(**sizes), suite, dtype, session.device)

    def run(session: Session) -> Found:
        providers = make(session.device)
        records, notes = run_problem(on(session), providers, session.setting())
        return [r for r in records if r.provider == providers[-1].name], [], notes

    def warm(session: Session) -> None:
        short = on(session, T=min(2, case.T))
        chosen = make(session.device)[-1]
        if chosen.why_not(short) is None:
            with float32_as(dtype):
                chosen.prepare(short, 1).call()

    compiles = provider.startswith("gru_fast")
    return Row(f"{provider}/{suite}/{case}/{dtype}", run, warm if compiles else None)


def _baseline(device: str, case: Case) -> Provider:
    return SplitAndPad(device) if case.resets else TorchGRU(device)


def _cudnn(case: Case, suite: str, dtype: str) -> Row:
    name = "cudnn.split_pad" if case.resets else "cudnn"
    return _gru(name, lambda device: [_baseline(device, case)], (case, suite, dtype))


def _kernel(kernel: str, case: Case, suite: str, dtype: str) -> Row:
    def make(device: str) -> list[Provider]:
        return [_baseline(device, case), Kernel(kernel)]

    return _gru(f"gru_fast.triton.{kernel}", make, (case, suite, dtype))


def _captured(case: Case, suite: str, dtype: str) -> Row:
    def make(device: str) -> list[Provider]:
        return [TorchGRU(device), CapturedCellLoop()]

    return _gru("nn.GRUCell.graph", make, (case, suite, dtype))


def _sampler(case: Case, dtype: str) -> Row:
    def run(session: Session) -> Found:
        with float32_as(dtype):
            return sample(session)

    def sample(session: Session) -> Found:
        names = [n for n in samplers.SAMPLERS if session.device == "cuda" or ".graph" not in n]
        records, calls = {}, {}
        for name in names:
            records[name] = Record(
                "sample", name, torch.__version__, session.device, dtype,
                torch.get_num_threads(), case.as_dict(), dry=session.dry,
            )  # fmt: skip
            calls[name] = samplers.sampler(name, case, dtype, session.device)
        load = OtherLoad()
        samples = timing.interleave(calls, timing.clock_of(session.device), session.effort)
        for name, record in records.items():
            found = timing.summary(samples[name])
            record.median_s, record.p20_s, record.p80_s = found.median_s, found.p20_s, found.p80_s
            record.rounds, record.other_cpu = found.rounds, load.share()
            if not session.dry:
                record.baseline = names[0]
                record.ratio_to_torch = timing.ratio(samples[names[0]], samples[name])
        return list(records.values()), [], []

    return Row(f"sample/{case}/{dtype}", run)


def _both(make: Callable[..., Row], *arguments: Any) -> Iterator[Row]:
    *before, case, dtype = arguments
    for suite in ("infer", "train"):
        yield make(*before, case, suite, dtype)


def dry_rows() -> list[Row]:
    """The same kinds of rows on tiny sizes."""
    small, resets = square(16, 3, 4), square(16, 3, 6, resets=0.3)
    rows = [
        _micro("launches", lambda d, e: micro.launches(d, e, 4)),
        _micro("copy", lambda d, e: micro.copies(d, e, [4096])),
        *(_micro(f"matmul-{t}", _matmul(t, 16)) for t in ("bfloat16", "tf32")),
    ]
    if find_spec("triton"):
        rows.append(_micro("barrier-1", lambda d, e: micro.barrier(d, e, 1, 3)))
    for case in (small, resets):
        rows += _both(_cudnn, case, "float32")
    for kernel in kernel_names()[0]:
        rows += _both(_kernel, kernel, square(16, 2, 2), "float32")
    return [*rows, _sampler(Case(16, 16, 3, 4, V=9), "float32")]


def _matmul(dtype: str, size: int) -> Callable[[str, timing.Effort], list[micro.Figure]]:
    return lambda device, effort: micro.product(device, effort, dtype, size)


def gpu_rows() -> list[Row]:
    """Everything, once, in order of worth."""
    rows = [
        _micro("launches", micro.launches),
        _micro("copy", lambda d, e: micro.copies(d, e, [2**24, 2**30])),
        *(_micro(f"matmul-{t}", _matmul(t, 8192)) for t in (*DTYPES, "float32")),
    ]
    if find_spec("triton"):
        for n in (8, 32, 64, 128):
            rows.append(_micro(f"barrier-{n}", lambda d, e, n=n: micro.barrier(d, e, n, 2000)))  # type: ignore[misc]
    kernels = kernel_names()[0]
    for H, B in CORE:
        rows += _both(_cudnn, square(H, B, 512), "bfloat16")
    for case in RL:
        rows += _both(_cudnn, case, "bfloat16")
    for kernel, (H, B) in product(kernels, CORE):
        rows += _both(_kernel, kernel, square(H, B, 512), "bfloat16")
    for kernel, case in product(kernels, RL):
        rows += _both(_kernel, kernel, case, "bfloat16")
    for H, B in product((64, 128, 512), (1, 64, 1024)):
        rows.append(_sampler(Case(H, H, B, 100, V=65), "float32"))
    for dtype in ("bfloat16", "tf32"):
        for H, B in CORE:
            step = square(H, B, 1)
            rows += [_cudnn(step, "step", dtype), _captured(step, "step", dtype)]
            rows += [_kernel(kernel, step, "step", dtype) for kernel in kernels]
    for dtype, H, B in product(DTYPES, HIDDEN, BATCHES):
        rows += _both(_cudnn, square(H, B, 512), dtype)
    rows += [_captured(square(H, B, 512), "infer", "bfloat16") for H, B in CORE]
    for case in RL:
        rows += _both(_cudnn, case, "tf32")
    for kernel, dtype, H, B in product(kernels, DTYPES, HIDDEN, BATCHES):
        rows += _both(_kernel, kernel, square(H, B, 512), dtype)
    return list({row.name: row for row in rows}.values())


def all_rows(dry: bool) -> list[Row]:
    return dry_rows() if dry else gpu_rows()
