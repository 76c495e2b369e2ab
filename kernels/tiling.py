# SPDX-License-Identifier: Apache-2.0
"""What the choice of a kernel and its tiles depends on, and what a kernel is compiled for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .problem import Problem

AMD = 0
"""Below every compute capability: torch numbers gfx942 as 9.4, between Hopper and Blackwell."""


WHOLE = 16
"""Elements at whose multiples rows begin where 16 bytes can be read, or copied, at once."""


def cdiv(size: int, block: int) -> int:
    """Blocks that hold so much: `triton.cdiv`, which is for kernels, takes 100 times as long."""
    return -(-size // block)


def whole(H: int) -> int:
    """The next multiple of `WHOLE`."""
    return cdiv(H, WHOLE) * WHOLE


@cache
def triton_version() -> tuple[int, int]:
    """Major and minor version of the Triton that is installed, where its name tells: no import."""
    try:
        found = version("triton")
    except PackageNotFoundError:  # triton-windows, triton-rocm, a checkout on the path
        found = import_module("triton").__version__
    major, minor, *_ = found.split(".")
    return int(major), int(minor)


@dataclass(frozen=True)
class Device:
    """What the tables need to know of a GPU.

    Attributes:
        arch: Compute capability, 90 for 9.0; `AMD` for a device of theirs, which no row is for.
        shared_bytes: Shared memory that one program can have.
        processors: Number of multiprocessors.
    """

    arch: int
    shared_bytes: int
    processors: int

    @property
    def name(self) -> str:
        """As `sm_90`."""
        return "an AMD device" if self.arch == AMD else f"sm_{self.arch}"

    def __str__(self) -> str:
        """With what it has."""
        memory = f"{self.shared_bytes // 1024} KiB of shared memory"
        return f"{self.name} ({memory}, {self.processors} processors)"


class Sizes(NamedTuple):
    """What the choice of tiles depends on; plain: no lengths, resets or h_scale."""

    T: int
    B: int
    G: int
    H: int
    cell: str
    dtype: torch.dtype
    precision: str
    plain: bool = True

    @property
    def numbers(self) -> str:
        """What is multiplied: "16" for 16-bit floats, else how float32 is rounded."""
        return "16" if self.dtype.itemsize == 2 else self.precision

    @property
    def kind(self) -> str:
        """As `numbers`, but with the names of the 16-bit dtypes: to cuDNN they are not the same."""
        return str(self.dtype).removeprefix("torch.") if self.numbers == "16" else self.precision


@dataclass(frozen=True)
class Config:
    """Compile-time sizes of one kernel; names as in the kernels.

    Attributes:
        maxnreg: Registers of a thread at most; None lets the assembler choose. For some kernels it
            stops at 80 to 168 and spills, where 255 are there.
    """

    BLOCK_B: int
    BLOCK_H: int
    BLOCK_K: int
    num_warps: int
    num_stages: int = 1
    RESIDENT: bool = True
    maxnreg: int | None = None

    def arguments(self, *blocks: str) -> dict[str, Any]:
        """The named blocks and the launch options, as keywords of a launch."""
        options: dict[str, Any] = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.maxnreg is not None:  # which AMD's compiler has not
            options["maxnreg"] = self.maxnreg
        return {name: getattr(self, name) for name in blocks} | options | {"enable_fp_fusion": True}


assumed = Device(90, 227 * 1024, 132)
"""Stands for the device of CPU tensors, which only Triton's interpreter and dry launches see."""


def device_with(found: Any, hip: str | None = torch.version.hip) -> Device:
    """The device that has such properties.

    Args:
        found: As `torch.cuda.get_device_properties` gives them.
        hip: The HIP that this torch was built for, or None.
    """
    arch = found.major * 10 + found.minor if hip is None else AMD
    shared = getattr(found, "shared_memory_per_block_optin", 48 * 1024)
    return Device(arch, shared, found.multi_processor_count)


@cache
def _cuda_device(index: int) -> Device:
    return device_with(torch.cuda.get_device_properties(index))


def device_of(tensor: Tensor) -> Device:
    """The device that a tensor is on."""
    if not tensor.is_cuda:
        return assumed
    index = tensor.device.index
    return _cuda_device(torch.cuda.current_device() if index is None else index)


def sizes_of(problem: Problem) -> Sizes:
    """The sizes of a call."""
    sizes = (problem.T, problem.B, problem.G, problem.H, problem.cell)
    features = (problem.lengths, problem.reset_mask, problem.h_scale)
    return Sizes(*sizes, problem.h0.dtype, problem.precision, all(f is None for f in features))
