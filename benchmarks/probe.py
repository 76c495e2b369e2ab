# SPDX-License-Identifier: Apache-2.0
"""Peaks of the CPU, by `native/probe.cpp`, compiled when first needed."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.machine import cpu_model

SOURCE = Path(__file__).parent / "native" / "probe.cpp"
FLAGS = ["-O3", "-march=native", "-std=c++17", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread"]
KINDS = {"float32": 0, "float64": 1, "bfloat16": 2}
KIB = 1024
WORKING_SETS = [k * KIB for k in (16, 24, 48, 96, 192, 384, 768, 1536, 3072, 6144, 12288, 65536)]
"""Bytes per thread at which the read bandwidth is measured."""

_ROUNDS = 4

ORDER = "forwards or to and fro"
"""In which they are read: the better counts. Older files do not say it and read forwards only."""


@dataclass(frozen=True)
class Peaks:
    """What a number of threads can do at best.

    Attributes:
        flops: FLOP/s by dtype, a multiply-add counted as two; a dtype without instructions of its
            own is not there.
        bandwidth: bytes per thread to the B/s that all threads together read them with, in the
            better of two orders: always forwards, and to and fro.
    """

    flops: dict[str, float]
    bandwidth: dict[int, float]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def at_least(self, other: Peaks | None) -> Peaks:
        """These, or others where a busy machine made them the better ones."""
        if other is None:
            return self
        return Peaks(
            {n: max(rate, other.flops.get(n, 0.0)) for n, rate in self.flops.items()},
            {n: max(rate, other.bandwidth.get(n, 0.0)) for n, rate in self.bandwidth.items()},
        )


class ProbeError(RuntimeError):
    """The probe cannot be compiled or loaded here; the message says why."""


def compile_probe(folder: Path) -> Path:
    """The shared library for this processor; compiled once per source, compiler and processor.

    Args:
        folder: where it is, or is written.

    Raises:
        ProbeError: no compiler, or it refuses.
    """
    command = shlex.split(os.environ.get("CXX") or "c++")
    if shutil.which(command[0]) is None:
        raise ProbeError(f"no C++ compiler: {command[0]!r} is not on the PATH")
    version = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
    identity = [SOURCE.read_text(), *FLAGS, *command, version, cpu_model(), platform.machine()]
    digest = hashlib.sha256("\n".join(identity).encode()).hexdigest()[:16]
    library = folder / f"probe-{digest}.so"
    if library.exists():
        return library
    temporary = library.with_suffix(f".{os.getpid()}")
    build = subprocess.run(
        [*command, *FLAGS, str(SOURCE), "-o", str(temporary)], capture_output=True, text=True
    )
    if build.returncode:
        raise ProbeError(f"{shlex.join(command)} cannot compile {SOURCE.name}: {build.stderr}")
    temporary.replace(library)
    return library


@contextmanager
def _build_folder() -> Iterator[Path]:
    """The checkout's, which keeps the library; a temporary one if that cannot be written to."""
    kept = ROOT / "build" / "benchmarks"
    try:
        kept.mkdir(parents=True, exist_ok=True)
    except OSError:
        pass
    if os.access(kept, os.W_OK):
        yield kept
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@functools.cache
def _library() -> ctypes.CDLL:
    with _build_folder() as folder:
        library = ctypes.CDLL(str(compile_probe(folder)))
    library.peak_flops.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_double]
    library.read_bandwidth.argtypes = [ctypes.c_int, ctypes.c_size_t, ctypes.c_double]
    for measurement in (library.peak_flops, library.read_bandwidth, library.exchange_seconds):
        measurement.restype = ctypes.c_double
    return library


def exchange_s() -> float:
    """Seconds that a cache line takes from one core to another, at this moment; takes 3 to 20 ms.

    Between the first two processors that this process may use; without Linux, between any. Cores of
    one third-level cache need 30 to 50 ns, those of different ones or of two sockets more than 100.
    On a virtual machine the host moves them, so that it changes while one measures. With a single
    processor it takes minutes.

    Raises:
        ProbeError: no compiler, or it refuses.
    """
    return float(_library().exchange_seconds())


def measure_all(threads: list[int], seconds: float = 0.003) -> dict[int, Peaks]:
    """Peaks of each number of threads, the best of some rounds; `seconds` as in `measure`.

    The host of a virtual machine may have its processors share a core, for seconds at a time.

    Raises:
        ProbeError: no compiler, or it refuses.
    """
    found: dict[int, Peaks] = {}
    for _ in range(_ROUNDS):
        for n in threads:
            found[n] = measure(n, seconds).at_least(found.get(n))
    fewer = None
    for n in sorted(found):
        found[n] = fewer = found[n].at_least(fewer)
    return found


def measure(threads: int, seconds: float = 0.003) -> Peaks:
    """Peaks of that many threads; about half a second, on a machine with nothing else to do.

    Args:
        threads: how many run at the same time.
        seconds: of one run; the best of ten counts, of the bandwidth five in each order.

    Raises:
        ProbeError: no compiler, or it refuses.
    """
    probe = _library()
    flops = {name: probe.peak_flops(kind, threads, seconds) for name, kind in KINDS.items()}
    rates = {size: probe.read_bandwidth(threads, size, seconds) for size in WORKING_SETS}
    return Peaks(
        {name: rate for name, rate in flops.items() if rate},
        {size: rate for size, rate in rates.items() if rate},
    )
