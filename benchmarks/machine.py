# SPDX-License-Identifier: Apache-2.0
"""The machine line, and how much of the CPU others take while we measure."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import gru_fast
from benchmarks import ROOT

PACKAGES = ("torch", "numpy", "onnxruntime", "triton", "gru_fast")
BUSY = 0.05
"""Share of all CPU time taken by others above which a figure comes with a warning."""


def cpu_model() -> str:
    """As the processor names itself, and its family and model, which virtual machines leave it."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    found = fields.get("model name", platform.machine())
    if "cpu family" in fields and "model" in fields:
        found += f" (family {fields['cpu family']}, model {fields['model']})"
    return found


def processors() -> int:
    """How many this process may use; where the system does not say, all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def caches() -> dict[str, str]:
    """Size of each cache level of the first core, with the cores that share it."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size, cpus = (
            (index / name).read_text().strip()
            for name in ("level", "type", "size", "shared_cpu_list")
        )
        if kind != "Instruction":
            found[f"L{level}"] = f"{size} (cpus {cpus})"
    return found


def versions() -> dict[str, str]:
    """Of the packages that take part, where installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    found["torch"], found["gru_fast"] = torch.__version__, gru_fast.__version__
    return found


def git_commit() -> str | None:
    """The commit that is checked out, with "+" if files differ from it; None outside git.

    Results do not count: new ones of the same commit may lie there already.
    """

    def git(*arguments: str) -> str | None:
        try:
            run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        except OSError:
            return None
        return run.stdout.strip() if run.returncode == 0 else None

    commit = git("rev-parse", "--short=12", "HEAD")
    if commit is None:
        return None
    but_results = ("--", ".", ":(exclude)benchmarks/results")
    changed = git("status", "--porcelain", "--untracked-files=no", *but_results)
    return commit + ("+" if changed else "")


def gpu() -> dict[str, Any] | None:
    """The first GPU, or None."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "shared_memory_bytes": getattr(properties, "shared_memory_per_block_optin", None),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def describe() -> dict[str, Any]:
    """The machine line, for the JSON."""
    from gru_fast import ops

    isa = None
    if ops.HAS_CPU_KERNELS:
        from gru_fast import _C

        isa = _C.cpu_isa()
    environment = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "GRU_FAST_CPU_ISA", "OMP_WAIT_POLICY")
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_model(),
        "cpus": processors(),
        "caches": caches(),
        "isa": isa,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "gpu": gpu(),
        "versions": versions(),
        "commit": git_commit(),
        "environment": {name: os.environ[name] for name in environment if name in os.environ},
    }


def line(machine: dict[str, Any]) -> str:
    """The machine in one line of text."""
    parts = [machine["gpu"]["name"]] if machine["gpu"] else []
    parts += [f"{machine['cpu']}, {machine['cpus']} cpus"]
    parts += [f"{level} {size.split()[0]}" for level, size in machine["caches"].items()]
    parts += [f"gru_fast {machine['isa'] or 'without CPU kernels'}"]
    parts += [f"{name} {v}" for name, v in machine["versions"].items()]
    return ", ".join([*parts, f"commit {machine['commit']}"])


def cpu_ticks(pid: int) -> int:
    """CPU time of a process, in units of SC_CLK_TCK."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


class OtherLoad:
    """Share of the machine's CPU time that other processes and the host take, since it was made.

    Linux only; elsewhere `share()` is None.

    Args:
        but: processes that are not counted as others; they outlive this object.
    """

    def __init__(self, but: Iterable[int] = ()) -> None:
        self._but = tuple(but)
        self._start = self._read()

    def _read(self) -> tuple[float, float, float] | None:
        ticks = os.sysconf("SC_CLK_TCK")
        try:
            fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
            ours = sum(cpu_ticks(pid) for pid in self._but) / ticks
        except OSError:
            return None
        user, nice, system, _, _, irq, softirq, steal = map(int, fields)
        busy = (user + nice + system + irq + softirq + steal) / ticks
        own = os.times()
        return busy, ours + own.user + own.system, time.perf_counter()

    def share(self) -> float | None:
        """Between 0 and 1."""
        now = self._read()
        if now is None or self._start is None:
            return None
        busy, own, seconds = (b - a for a, b in zip(self._start, now, strict=True))
        cpus = os.cpu_count() or 1
        return min(1.0, max(0.0, busy - own) / max(seconds * cpus, 1e-9))
