# SPDX-License-Identifier: Apache-2.0
"""The rows of the GPU program, in order of worth: what a cut-off loses is worth least."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from itertools import product
from typing import Any

import torch

from benchmarks import providers_cuda_peers, providers_pararnn, timing
from benchmarks.bound import gpu_floor
from benchmarks.cases import RL, Case, square
from benchmarks.diagonal import Diagonal, DiagonalProblem
from benchmarks.errors import describe_error
from benchmarks.gpu import micro, samplers
from benchmarks.machine import OtherLoad
from benchmarks.precision import float32_as
from benchmarks.problem import Problem
from benchmarks.providers import Provider
from benchmarks.providers_cuda import CapturedCellLoop
from benchmarks.providers_kernels import Kernel, kernel_names
from benchmarks.providers_torch import SplitAndPad, TorchGRU
from benchmarks.records import Record
from benchmarks.runner import Setting, is_lost, run_problem
from benchmarks.sample.gate import TOKENS

HIDDEN = (32, 64, 100, 128, 160, 192, 256, 512, 1024, 2048)
BATCHES = (1, 16, 64, 256, 1024)
CORE = [(H, B) for H, B in product((64, 128, 256, 512, 1024), (1, 64, 1024))]
SAMPLED, DRAWN = (64, 128, 256, 512), (1, 64, 1024, 8192)
"""Hidden sizes and batches of the samplers."""

DTYPES = ("bfloat16", "tf32", "float16")
EFFORT = timing.Effort(block_s=0.004, budget_s=0.4, least=5, most=15)

PEERS = "peers/"
"""Before the names of rows that other packages take part in, which may have to compile."""

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
        """From the micro-figures measured so far; of plain layers."""
        if not problem.is_plain_layer:
            return None
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
        warm: what it needs compiled, for the parallel precompilation: calls by a key that those
            which compile the same share.
    """

    name: str
    measure: Callable[[Session], Found]
    warm: dict[str, Callable[[Session], Any]] = field(default_factory=dict)


def _micro(name: str, measure: Callable[[str, timing.Effort], list[micro.Figure]]) -> Row:
    def run(session: Session) -> Found:
        found = measure(session.device, session.effort)
        return [], [{**figure, "dry": session.dry} for figure in found], []

    return Row(f"micro/{name}", run)


def _baseline(device: str, case: Case) -> Provider:
    return SplitAndPad(device) if case.resets else TorchGRU(device)


def _row(
    case: Case,
    suite: str,
    dtype: str,
    kernels: Sequence[str] = (),
    graph: bool = False,
    recompute: bool = False,
    peer: Provider | None = None,
) -> Row:
    """cuDNN and ours on one problem, interleaved.

    Args:
        case: the sizes.
        suite: of `benchmarks.cases.SUITES`.
        dtype: of `benchmarks.cases.DTYPES`.
        kernels: ours that take part, where they can take the call.
        graph: whether the loop over nn.GRUCell in a CUDA graph takes part.
        recompute: whether ours take part without saved gates as well.
        peer: another package's kernels. Some compile for long, so that each has rows of its own.
    """
    ours = [Kernel(name, again) for again in (False, True)[: 1 + recompute] for name in kernels]

    def on(session: Session, **changes: Any) -> Problem:
        sizes = {**case.as_dict(), **changes}
        return Problem(Case(**sizes), suite, dtype, session.device)

    def run(session: Session) -> Found:
        providers = [_baseline(session.device, case), *ours]
        providers += [CapturedCellLoop()] if graph else []
        providers += [peer] if peer else []
        records, notes = run_problem(on(session), providers, session.setting())
        return records, [], notes

    def warm(session: Session, kernel: Kernel) -> None:
        short = on(session, T=min(2, case.T))
        with float32_as(dtype):
            if kernel.why_not(short) is None:
                kernel.prepare(short, 1).call()

    return Row(
        f"{f'{PEERS}{peer.name}/' if peer else ''}{suite}/{case}/{dtype}",
        run,
        {f"{k.kernel}/H{case.H}/{dtype}/{k.recompute}": partial(warm, kernel=k) for k in ours},
    )


def _diagonal(case: Case, suite: str) -> Row:
    """Diagonal recurrent matrices: ours, and solvers that are parallel in time, where installed."""

    def run(session: Session) -> Found:
        name = f"diagonal/{suite}"
        problem = DiagonalProblem(case, suite, "float32", session.device, feature=name)
        providers = [Diagonal(), *providers_pararnn.providers()]
        records, notes = run_problem(problem, providers, session.setting())
        return records, [], notes

    return Row(f"{PEERS}diagonal/{suite}/{case}", run)


def _sampler(case: Case, dtype: str, compiled: bool = True) -> Row:
    """Ours beside what one writes with PyTorch; compiling that takes longer than all the rest."""

    def run(session: Session) -> Found:
        with float32_as(dtype):
            return sample(session)

    def sample(session: Session) -> Found:
        model = samplers.model_of(case, dtype, session.device)
        names = samplers.names(case, session.device, bool(kernel_names()[0]), compiled)
        records, calls = {}, {}
        for name in names:
            ours = name == samplers.OURS
            records[name] = record = Record(
                "sample", name, torch.__version__, session.device, dtype,
                torch.get_num_threads(), case.as_dict(), dry=session.dry,
            )  # fmt: skip
            try:
                record.error = samplers.wrong(model, case, dtype) if ours else None
                if ours:
                    record.parity = "ok" if record.error is None else "wrong"
                    record.parity_T = TOKENS
                if record.error is None:
                    calls[name] = samplers.sampler(name, model, case)
            except Exception as error:
                if is_lost(error):
                    raise
                record.error = describe_error(error)
        load = OtherLoad()
        samples = timing.interleave(calls, timing.clock_of(session.device), session.effort)
        for name in calls:
            record, found = records[name], timing.summary(samples[name])
            record.median_s, record.p20_s, record.p80_s = found.median_s, found.p20_s, found.p80_s
            record.rounds, record.other_cpu = found.rounds, load.share()
            if not session.dry and samplers.BASELINE in calls:
                record.baseline = samplers.BASELINE
                record.ratio_to_torch = timing.ratio(samples[samplers.BASELINE], samples[name])
        return list(records.values()), [], []

    def warm(session: Session) -> None:
        if kernel_names()[0]:
            with float32_as(dtype):
                draw = samplers.ours(samplers.model_of(case, dtype, session.device), case.B)
                for greedy in (True, False):  # for the gate both, compiled apart
                    draw(1, greedy)

    key = f"generate/H{case.H}/B{case.B}/L{case.L}/V{case.V}/{dtype}"
    return Row(f"sample/{case}/{dtype}", run, {key: warm})


def _both(
    case: Case, dtype: str, kernels: Sequence[str] = (), recompute: bool = False
) -> list[Row]:
    return [
        _row(case, "infer", dtype, kernels),
        _row(case, "train", dtype, kernels, recompute=recompute),
    ]


def dry_rows() -> list[Row]:
    """The same kinds of rows on tiny sizes."""
    small, resets = square(16, 2, 2), square(16, 3, 6, resets=0.3)
    rows = [
        _micro("launches", lambda d, e: micro.launches(d, e, 4)),
        _micro("copy", lambda d, e: micro.copies(d, e, [4096])),
        *(_micro(f"matmul-{t}", _matmul(t, 16)) for t in ("bfloat16", "tf32")),
    ]
    if find_spec("triton"):
        rows.append(_micro("barrier-1", lambda d, e: micro.barrier(d, e, 1, 3)))
    rows += _both(small, "float32", kernel_names()[0])
    rows += _both(resets, "float32")
    rows += [_diagonal(small, suite) for suite in ("infer", "train")]
    return [*rows, _sampler(Case(16, 16, 3, 4, V=9), "float32")]


def _matmul(dtype: str, size: int) -> Callable[[str, timing.Effort], list[micro.Figure]]:
    return lambda device, effort: micro.product(device, effort, dtype, size)


def first_rows(scans: Sequence[str]) -> list[Row]:
    """A few of each kind, two minutes: what a GPU that is at hand for 15 minutes answers surely.

    Args:
        scans: kernels that run whole sequences.
    """
    few = [square(H, 64, 512) for H in (128, 512)]
    rows = [row for case in few for row in _both(case, "bfloat16", scans, recompute=True)]
    for H, B in ((128, 1), (128, 1024), (512, 1), (64, 8192)):
        rows.append(_sampler(Case(H, H, B, 512, V=65), "bfloat16", compiled=False))
    for case, dtype in product(few, ("tf32", "float16")):
        rows += _both(case, dtype, scans)
    for H in (128, 512):
        rows += _both(square(H, 1024, 512), "bfloat16", scans, recompute=True)
    for dtype in ("bfloat16", "tf32"):
        rows.append(_row(square(128, 64, 1), "step", dtype, ["step"], graph=True))
    rows += _both(RL[2], "bfloat16", scans)
    for H in (160, 192):
        rows += _both(square(H, 64, 512), "tf32", scans)
    return rows


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
    scans = [name for name in kernels if name != "step"]
    rows += first_rows(scans)
    for dtype, (H, B) in product(("bfloat16", "tf32"), CORE):
        rows += _both(square(H, B, 512), dtype, scans, recompute=dtype == "bfloat16")
    for case in RL:
        rows += _both(case, "bfloat16", scans)
    for dtype, (H, B) in product(("bfloat16", "tf32"), CORE):
        rows.append(_row(square(H, B, 1), "step", dtype, ["step"], graph=True))
    for H, B in product(SAMPLED, DRAWN):
        rows.append(_sampler(Case(H, H, B, 512, V=65), "bfloat16"))
    rows.append(_sampler(Case(896, 896, 1, 512, V=256), "bfloat16"))
    for dtype, H, B in product(DTYPES, HIDDEN, BATCHES):
        rows += _both(square(H, B, 512), dtype, scans)
    for case in RL:
        rows += _both(case, "tf32", scans)
    for L, V, H, B in product((1, 2), (65, 256), SAMPLED, DRAWN):
        rows.append(_sampler(Case(H, H, B, 512, L, V), "bfloat16"))
    for dtype, H, B in product(("tf32", "float32"), SAMPLED, DRAWN):
        rows.append(_sampler(Case(H, H, B, 512, V=65), dtype))
    for H, B in CORE:
        rows += _both(square(H, B, 512), "float32", scans)
    for H, B in CORE:
        rows.append(_row(square(H, B, 256), "infer", "bfloat16", kernels, graph=True))
    # Where a solver that is parallel in time should win.
    for T, suite in product((4096, 32768, 131072), ("infer", "train")):
        rows.append(_diagonal(square(128, 1, T), suite))
    for peer, case in product(
        providers_cuda_peers.providers(), (square(128, 64, 512), square(512, 64, 512), RL[2])
    ):
        for dtype, suite in product(("tf32", "bfloat16"), ("infer", "train")):
            rows.append(_row(case, suite, dtype, scans, peer=peer))
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row.name, row)
    return list(first.values())


def all_rows(dry: bool) -> list[Row]:
    return dry_rows() if dry else gpu_rows()
