# SPDX-License-Identifier: Apache-2.0
"""First call and peak memory.

On the CPU both are taken in a process of its own per case, where no other case has left memory
behind: `python -m benchmarks.memory JSON`. Each provider has run on tiny sizes before, so the
libraries are loaded; the first call is the first of these sizes.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import ROOT
from benchmarks.cases import Case
from benchmarks.errors import describe_error
from benchmarks.problem import Problem
from benchmarks.providers import Provider, all_providers

Footprint = dict[str, Any]
"""{"cold_s": seconds, "peak_bytes": bytes or None}"""

ANSWER = "footprint:"
"""Begins the lines of the process that are for us: packages print some of their own."""


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def cpu_footprint(call: Callable[[], Any]) -> Footprint:
    """Of the first call: growth of the resident set at its highest; Linux only, else None."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before: int | None = _status("VmRSS")
    except (OSError, AttributeError):
        before = None
    start = time.perf_counter()
    kept = call()
    seconds = time.perf_counter() - start
    peak = None if before is None else max(0, _status("VmHWM") - before)
    del kept
    return {"cold_s": seconds, "peak_bytes": peak}


def cuda_footprint(call: Callable[[], Any]) -> Footprint:
    """Of the first call, by the caching allocator's count."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    kept = call()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() - before
    del kept
    return {"cold_s": seconds, "peak_bytes": peak}


def in_fresh_process(
    problem: Problem, threads: int, providers: list[str], timeout_s: float = 300
) -> tuple[dict[str, Footprint], list[str]]:
    """`cpu_footprint` of each provider, and why some are missing.

    Those that fail there are, and if the process ends or takes too long, all that come after.
    """
    job = {
        "case": problem.case.as_dict(),
        "suite": problem.suite,
        "feature": problem.feature,
        "dtype": problem.dtype,
        "threads": threads,
        "providers": providers,
    }
    command = [sys.executable, "-m", "benchmarks.memory", json.dumps(job)]
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=timeout_s)
        said, why = run.stdout, run.stderr.decode(errors="replace").strip()[-300:]
        why = f"exit code {run.returncode} {why}"
    except subprocess.TimeoutExpired as error:
        said, why = error.stdout or b"", f"not done after {timeout_s:g} s"
    found, errors = {}, {}
    for line in said.decode(errors="replace").splitlines():
        mark, _, answer = line.partition(" ")
        if mark == ANSWER:
            name, footprint, wrong = json.loads(answer)
            if wrong is None:
                found[name] = footprint
            else:
                errors[name] = wrong
    missing = (name for name in providers if name not in found)
    what = f"{problem.suite} {problem.case}: neither first call nor peak memory"
    return found, [f"{name} on {what}: {errors.get(name, why)}" for name in missing]


def _job(job: dict[str, Any]) -> tuple[Problem, Problem, list[Provider]]:
    """The problem, a tiny one of the same kind, and who may take part."""
    case = Case(**job["case"])
    if job["feature"] is not None:
        from benchmarks.features import find

        row = find(job["feature"])
        return row.at(case), row.at(row.quick), row.providers
    smallest = Case(4, 4, 1, min(case.T, 2), resets=case.resets)
    problem = Problem(case, job["suite"], job["dtype"], "cpu")
    return problem, replace(problem, case=smallest), all_providers("cpu")


def _main(job: dict[str, Any]) -> None:
    torch.set_num_threads(job["threads"])
    problem, tiny, providers = _job(job)
    torch.mm(torch.ones(512, 512), torch.ones(512, 512))
    chosen = {p.name: p for p in providers if p.name in job["providers"]}

    def answer(name: str, footprint: Footprint | None, wrong: str | None) -> None:
        print(f"\n{ANSWER}", json.dumps([name, footprint, wrong]), flush=True)

    for name, provider in list(chosen.items()):
        try:
            provider.prepare(tiny, job["threads"]).call()
        except Exception as error:
            answer(name, None, describe_error(error))
            del chosen[name]
    for name, provider in chosen.items():
        try:
            answer(name, cpu_footprint(provider.prepare(problem, job["threads"]).call), None)
        except Exception as error:
            answer(name, None, describe_error(error))
        time.sleep(provider.spins_s)


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
