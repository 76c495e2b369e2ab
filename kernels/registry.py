# SPDX-License-Identifier: Apache-2.0
"""The kernels by name, and which of them takes a call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

from . import tables, tiling
from .problem import Problem
from .tiling import Config, Device, device_of


@dataclass(frozen=True)
class Kernel:
    """One way to run a scan.

    Attributes:
        name: As `kernel=` takes it.
        config: (device, sizes, direction) to its tiles, or None where it does not fit.
    """

    name: str
    config: Callable[[Device, tiling.Sizes, str], Config | None]

    def launch_forward(self, *args: Any) -> None:
        module = import_module(f".{self.name}_forward", __package__)
        getattr(module, f"launch_forward_{self.name}")(*args)

    def launch_backward(self, *args: Any) -> None:
        module = import_module(f".{self.name}_backward", __package__)
        getattr(module, f"launch_backward_{self.name}")(*args)


KERNELS = {name: Kernel(name, partial(tables.config, name)) for name in ("cta", "grid", "step")}
"""Every kernel, the one to prefer where nothing is measured first."""


def take(kernel: str | None, problem: Problem, direction: str) -> tuple[Kernel, Config]:
    """The kernel of that name, or the first that fits, with its tiles.

    Args:
        kernel: A name of `KERNELS`, or None.
        problem: The call.
        direction: "forward" or "backward".

    Raises:
        ValueError: an unknown name.
        RuntimeError: the named kernel does not fit this call on this device.
    """
    device = device_of(problem.h0)
    sizes = tiling.sizes_of(problem)
    if kernel is None:
        for candidate in KERNELS.values():
            config = candidate.config(device, sizes, direction)
            if config is not None:
                return candidate, config
        raise AssertionError("step takes every call")
    if kernel not in KERNELS:
        raise ValueError(f"kernel: expected one of {tuple(KERNELS)}, got {kernel!r}")
    config = KERNELS[kernel].config(device, sizes, direction)
    if config is None:
        raise RuntimeError(
            f"kernel={kernel!r} does not fit {sizes} on a device with "
            f"{device.shared_bytes // 1024} KiB of shared memory"
        )
    return KERNELS[kernel], config
