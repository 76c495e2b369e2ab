# SPDX-License-Identifier: Apache-2.0
"""One shape, all providers: the gate, the bound, interleaved rounds, the table."""

from __future__ import annotations

from collections.abc import Collection

import torch

from benchmarks import machine, probe, timing
from benchmarks.bound import bandwidth_of
from benchmarks.cases import Case
from benchmarks.errors import describe_error
from benchmarks.providers_onnx import SPINS_S
from benchmarks.records import Record
from benchmarks.report import threads as threads_of
from benchmarks.report import warnings
from benchmarks.runner import note_claims, note_times
from benchmarks.sample.gate import Gate, sharpened
from benchmarks.sample.providers import BASELINE, STEADY, providers
from gru_fast import GRULanguageModel

BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
VOCABULARY = 65
SHAPES = [
    *(Case(H, H, 1, 2000, V=VOCABULARY) for H in (128, 256, 512)),
    *(Case(H, H, 64, 200, V=VOCABULARY) for H in (128, 256, 512)),
    Case(384, 384, 1, 2000, V=256),
]
QUICK = [Case(64, 64, 1, 200, V=VOCABULARY), Case(64, 64, 8, 50, V=VOCABULARY)]


def bound(case: Case, dtype: str, threads: int, peaks: probe.Peaks) -> float | None:
    """Seconds of a call at best: the bytes of W_hh and head, or their products; table rows free."""
    weights = 3 * case.H * case.H + case.V * case.H
    moved = weights * BYTES[dtype]
    rate, peak = bandwidth_of(peaks, moved / threads), peaks.flops.get(dtype)
    if rate is None or (peak is None and case.B > 1):
        return None
    operations = 2 * weights * case.B / peak if peak is not None else 0.0
    return case.T * max(moved / rate, operations)


def run_case(
    case: Case,
    threads: int,
    effort: timing.Effort,
    peaks: probe.Peaks | None,
    only: Collection[str] | None = None,
    steady_tokens: int | None = None,
) -> list[Record]:
    """Gate, then interleaved rounds, of all providers or of those with these names.

    With steady_tokens the providers of `STEADY` draw no more than that, and their time is scaled to
    the tokens of the case.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = sharpened(GRULanguageModel(case.V, case.I, case.H))
    gate = Gate(model, case.B)
    records, calls, scales = {}, {}, {}
    for (name, dtype), (number, prepare) in providers().items():
        if only is not None and name not in only:
            continue
        key = f"{name} {dtype}"
        record = Record("sample", name, number, "cpu", dtype, threads, case.as_dict())
        records[key] = record
        try:
            draw = prepare(model, case.B)
            record.error = gate.verdict(draw, dtype, seeded=name.startswith("gru_fast."))
        except Exception as error:
            record.error = describe_error(error)
            continue
        record.parity = "ok" if record.error is None else "wrong"
        record.parity_T = gate.T
        if record.error is None:
            T = min(case.T, steady_tokens or case.T) if name in STEADY else case.T
            calls[key], scales[key] = lambda draw=draw, T=T: draw(T, False), case.T / T
    load = machine.OtherLoad()
    pauses = {"onnxruntime.loop float32": SPINS_S} if threads > 1 else {}
    measured = timing.interleave(calls, timing.cpu_clock, effort, pauses=pauses)
    samples = {key: [s * scales[key] for s in found] for key, found in measured.items()}
    other, baseline = load.share(), samples.get(f"{BASELINE} float32")
    for key, seconds in samples.items():
        record = records[key]
        note_times(record, seconds, other)
        best = None if peaks is None else bound(case, record.dtype, threads, peaks)
        note_claims(record, seconds, BASELINE, baseline, best)
    return list(records.values())


def table(records: list[Record]) -> str:
    """One line for each provider, with the tokens a second of all sequences together."""
    first = records[0]
    lines = [f"sample {Case(**first.case)} cpu, {threads_of(first)}"]
    lines.append(f"{'provider':<28}{'tokens/s':>12}{'ratio':>9}{'share':>8}  parity")
    for r in records:
        speed, ratio, share = "-", "-", "-"
        if r.median_s is not None:
            speed = f"{r.case['B'] * r.case['T'] / r.median_s:,.0f}"
        if r.ratio_to_torch is not None:
            ratio = f"{r.ratio_to_torch:.2f}x"
        if r.share_of_bound is not None:
            share = f"{r.share_of_bound:.0%}"
        name = f"{r.provider} {r.dtype}"
        lines.append(f"{name:<28}{speed:>12}{ratio:>9}{share:>8}  {r.parity} {r.error or ''}")
    return "\n".join([*lines, *warnings(r.other_cpu for r in records)])
