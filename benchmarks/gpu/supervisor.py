# SPDX-License-Identifier: Apache-2.0
"""Builds, precompiles, and keeps a worker going: a row that hangs or crashes costs only itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.gpu.rows import PEERS
from benchmarks.gpu.worker import RESULTS, RUNNING
from benchmarks.records import Results, read

BUILD_SHARE, WARM_SHARE = 0.4, 0.15
"""Of the budget, at most."""

WHOLE_BUILD = 0.75
"""Of the time to build, for the CPU kernels too; the rest of the package takes some seconds."""

PEERS_TIMES = 5
"""flashrnn compiles with nvcc, torchrl tries out sixteen configurations."""

BUILD = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", "."]


@dataclass(frozen=True)
class Plan:
    """How to run.

    Attributes:
        out: folder of the results and logs.
        budget_s: for everything.
        row_limit_s: for one row, after which its process is killed; for a row of another package,
            which may have to compile, `PEERS_TIMES` as long.
        dry: on the CPU, tiny sizes.
    """

    out: Path
    budget_s: float
    row_limit_s: float
    dry: bool


def build(plan: Plan) -> str:
    """Install the checkout editable, without a network; a line about how it went.

    Where the CPU kernels do not compile the rest is installed: the GPU does not need them.
    """
    start = time.monotonic()
    log, notes = plan.out / "build.log", []
    for skip, share in (("0", WHOLE_BUILD * BUILD_SHARE), ("1", BUILD_SHARE)):
        limit = share * plan.budget_s - (time.monotonic() - start)
        environment = {**os.environ, "GRU_FAST_SKIP_CPU_KERNELS": skip}
        with open(log, "a") as file:
            try:
                done = subprocess.run(
                    BUILD, cwd=ROOT, stdout=file, stderr=file, timeout=limit, env=environment
                )
                verdict = "done" if done.returncode == 0 else f"failed, see {log.name}"
            except subprocess.TimeoutExpired:
                verdict = f"not done after {limit:.0f} s"
        notes.append(f"build{' without CPU kernels' * int(skip)}: {verdict}")
        if verdict == "done":
            break
    return f"{', '.join(notes)}, {time.monotonic() - start:.0f} s"


def _environment(dry: bool) -> dict[str, str]:
    """Triton's interpreter must be chosen before triton is imported."""
    return {**os.environ, **({"TRITON_INTERPRET": "1"} if dry else {})}


def _worker(plan: Plan, until: float, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "benchmarks.gpu.worker", str(plan.out), "--until", str(until)]
    command += ["--dry"] * plan.dry + list(more)
    log = plan.out / ("warm.log" if more else "rows.log")
    with open(log, "ab") as file:
        return subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=_environment(plan.dry)
        )


Start = Callable[[Plan, float], "subprocess.Popen[bytes]"]


def precompile(plan: Plan, processes: int) -> str:
    """Fill Triton's cache with all processors; a line about how it went."""
    start = time.monotonic()
    limit = start + WARM_SHARE * plan.budget_s
    team = [_worker(plan, 0.0, "--warm", str(i), str(processes)) for i in range(processes)]
    while time.monotonic() < limit and any(process.poll() is None for process in team):
        time.sleep(0.2)
    late = [process for process in team if process.poll() is None]
    for process in late:
        process.kill()
        process.wait()
    codes = sorted({process.returncode for process in team} - {0})
    how = f"{len(late)} of {processes} processes not done, exit codes {codes}" if codes else "done"
    return f"precompilation: {how}, {time.monotonic() - start:.0f} s"


def watch(process: subprocess.Popen[bytes], plan: Plan, until: float) -> str | None:
    """Wait for a worker; why it was killed, or None."""
    running, name, since = plan.out / RUNNING, "", time.time()
    while process.poll() is None:
        time.sleep(0.1)
        now = time.time()
        try:
            current = running.read_text()
        except FileNotFoundError:  # between two rows
            current = ""
        if current != name:
            name, since = current, now
        limit = plan.row_limit_s * (PEERS_TIMES if name.startswith(PEERS) else 1)
        if now - since > limit:
            reason = f"no answer within {limit:.0f} s"
        elif now > until + 10:
            reason = "cut off by the budget"
        else:
            continue
        process.kill()
        process.wait()
        return reason
    return None


def drive(plan: Plan, until: float, start: Start = _worker) -> list[str]:
    """Run workers until the rows or the time are used up; notes about what went wrong."""
    running, notes, idle = plan.out / RUNNING, [], 0
    while time.time() < until and idle < 2:
        before = len(read(plan.out / RESULTS).rows)
        process = start(plan, until)
        try:
            killed = watch(process, plan, until)
        finally:
            process.kill()
        results = read(plan.out / RESULTS)
        if running.exists():
            name = running.read_text()
            running.unlink()
            if killed != "cut off by the budget" and name not in results.rows:
                crash = killed or f"the process ended with code {process.returncode}"
                results.rows[name] = f"error: {crash}"
                results.write(plan.out / RESULTS)
        if killed is None and process.returncode == 0:
            break
        idle = idle + 1 if len(results.rows) == before else 0
        if idle == 2:
            notes.append(f"the worker ends at once with code {process.returncode}, see rows.log")
    return notes


def prepare_results(plan: Plan, resume: bool, retry: bool, machine: dict[str, Any]) -> Results:
    """The file to go on with, or a new one.

    Raises:
        ValueError: there is one already and it is not to be resumed.
    """
    path = plan.out / RESULTS
    (plan.out / RUNNING).unlink(missing_ok=True)
    if not path.exists():
        return Results(machine)
    if not resume:
        raise ValueError(f"{path} exists: --resume goes on with it, or choose another --out")
    results = read(path)
    if results.machine["gpu"] != machine["gpu"]:
        raise ValueError(f"{path} is of another machine: {results.machine['gpu']}")
    if results.machine["commit"] != machine["commit"]:
        results.notes.append(f"resumed at commit {machine['commit']}, {machine['time']}")
    if retry:
        results.rows = {n: v for n, v in results.rows.items() if not v.startswith("error")}
        results.records = [record for record in results.records if not record.error]
    return results


def keep_copy(path: Path) -> None:
    """What was there before this run, once more."""
    if path.exists():
        shutil.copy(path, path.with_suffix(".before.json"))
