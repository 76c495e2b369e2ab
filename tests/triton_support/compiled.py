# SPDX-License-Identifier: Apache-2.0
"""Compile what a launch would run, for any GPU and on none; needs no TRITON_INTERPRET."""

import os
import re
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from gru_fast.kernels import tiling

assert os.environ.get("TRITON_INTERPRET", "0") != "1", "unset TRITON_INTERPRET to compile"

# Shared memory that one program can have, in KiB, and multiprocessors, by compute capability.
DEVICES = {
    arch: tiling.Device(arch, kib * 1024, processors)
    for arch, kib, processors in (
        (75, 64, 40), (80, 163, 108), (86, 99, 82), (89, 99, 128), (90, 227, 132),
        (100, 227, 148), (120, 99, 170),
    )
}  # fmt: skip
PTX_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Launch:
    """One launch that was asked for: the kernel, its binary, its arguments, its grid and stream."""

    kernel: str
    compiled: Any
    arguments: dict[str, Any]
    grid: tuple[int, ...]
    stream: int = 0


class _Launcher:
    """What a binary is launched by; runs nothing but the hooks, as Triton's own in C does."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.kernel = source.fn

    def __call__(self, x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
        _, metadata, enter, leave, *values = rest
        arguments = dict(zip(self.kernel.arg_names, values, strict=True))
        active: Any = driver.active
        compiled = active.binaries.get(id(function), function)
        enter(metadata)
        active.launches.append(Launch(self.kernel.__name__, compiled, arguments, (x, y, z), stream))
        leave(metadata)


class _Utils:
    """What a binary asks for when it is loaded."""

    @staticmethod
    def get_device_properties(device: int) -> dict[str, int]:
        return {"max_shared_mem": 2**30}

    @staticmethod
    def load_binary(name: str, kernel: Any, shared: int, device: int) -> tuple[Any, ...]:
        # No module, so that nothing is unloaded; the function is the binary.
        return None, kernel, 0, 0, 2**30


class _Driver:
    """Answers what the launch path asks of a driver; a device id per target, as caches go by it."""

    utils = _Utils
    launcher_cls = _Launcher

    def __init__(self, target: GPUTarget, launches: list[Launch]) -> None:
        self.target = target
        self.launches = launches
        self.binaries: dict[int, Any] = {}

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return int(str(self.target.arch).strip("gfx"))

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def dry_launches(arch: int | str, device: tiling.Device | None = None) -> Iterator[list[Launch]]:
    """Launches in the block compile for the target and run nothing; CPU tensors stand in."""
    launches: list[Launch] = []
    amd = isinstance(arch, str)
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", arch, 32)
    before_driver, before_run = driver._active, JITFunction.run
    before_device = tiling.assumed

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if amd:  # whose compiler has no such option; what AMD devices are offered asks for none
            kwargs.pop("maxnreg", None)
        compiled = before_run(self, *args, grid=grid, warmup=True, **kwargs)
        launches.append(Launch(self.__name__, compiled, kwargs, tuple(grid)))
        active.binaries[id(compiled.kernel)] = compiled
        return compiled

    active = _Driver(target, launches)
    driver.set_active(active)
    JITFunction.run = run
    tiling.assumed = device or DEVICES[90 if amd else arch]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield launches
    finally:
        driver._active = before_driver
        JITFunction.run = before_run
        tiling.assumed = before_device


@contextmanager
def recorded_launches(arch: int) -> Iterator[list[Launch]]:
    """As `dry_launches`, but all of Triton's launch is run up to its C; a binary is bytes."""
    launches: list[Launch] = []
    before = driver._active
    driver.set_active(_Driver(GPUTarget("cuda", arch, 32), launches))
    try:
        yield launches
    finally:
        driver._active = before


@dataclass(frozen=True)
class Resources:
    """What one program of a kernel takes; what does not fit its registers lies on the stack."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    warpgroup_products: int


def resources(launch: Launch) -> Resources:
    """Of the binary that Triton made: it gives the assembler options of its own."""
    said = _said_of(launch, "cuobjdump", "-res-usage")
    found = re.search(r"\bREG:(\d+) STACK:(\d+) ", said)
    assert found is not None, said
    return Resources(
        int(found[1]),
        int(found[2]),
        launch.compiled.metadata.shared,
        len(re.findall(r"\b(?:wgmma\.mma_async|tcgen05\.mma)\.", launch.compiled.asm["ptx"])),
    )


def machine_code(launch: Launch) -> str:
    """The listing of the binary; takes more than a second."""
    return _said_of(launch, "nvdisasm", "-c")


def _said_of(launch: Launch, tool: str, option: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(launch.compiled.asm["cubin"])
        command = [str(PTX_TOOLS / tool), option, str(binary)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
