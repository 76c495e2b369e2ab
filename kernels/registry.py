# SPDX-License-Identifier: Apache-2.0
"""The kernels by name, and which of them takes a call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch

from . import tables
from .measured import nearest
from .problem import Chunk, Problem, call_on
from .tiling import Config, Device, Sizes, device_of, sizes_of


@dataclass(frozen=True)
class Kernel:
    """One way to run a scan.

    Attributes:
        name: As `kernel=` takes it.
        config: (device, sizes, direction) to its tiles, or None where it does not fit.
    """

    name: str
    config: Callable[[Device, Sizes, str], Config | None]

    def launch_forward(self, *args: Any) -> None:
        _launcher(self.name, "forward")(*args)

    def launch_backward(self, chunk: Chunk, config: Config) -> None:
        _launcher(self.name, "backward")(chunk, config)


@cache
def _launcher(kernel: str, direction: str) -> Callable[..., None]:
    """Imported on first use, as triton is with it."""
    module = import_module(f".{kernel}_{direction}", __package__)
    launch: Callable[..., None] = getattr(module, f"launch_{direction}_{kernel}")
    return launch


KERNELS = {name: Kernel(name, partial(tables.config, name)) for name in ("cta", "grid", "step")}
"""Every kernel by its name."""


def choose(device: Device, sizes: Sizes, direction: str, suite: str) -> tuple[Kernel, Config]:
    """The kernel to run where none is named, with its tiles.

    The measured one, if the call is near a measured size. Else, in this order: `step` for one step;
    `cta`; `grid`, unless it had to fill the device more than twice; `step`.

    Args:
        device: Where.
        sizes: Of the call.
        direction: "forward" or "backward".
        suite: "train" if gates are saved or gradients computed, else "infer".
    """
    point = nearest(device, sizes, suite)
    names = ("step",) if sizes.T == 1 else ("cta", "grid", "step")
    for name in names if point is None else (point.kernel, *names):
        config = KERNELS[name].config(device, sizes, direction)
        if config is None:
            continue
        measured = point is not None and point.kernel == name
        if name == "grid" and not measured and tables.waves(config, device, sizes) > 2:
            continue
        return KERNELS[name], config
    raise AssertionError("step takes every call")


def why_cudnn(
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int],
    cell: str,
    suite: str,
) -> str | None:
    """Why a call that cuDNN can take should go there; None if a kernel of ours was faster.

    Args:
        device: Where.
        dtype: Of the input.
        sizes: T, B, G, H.
        cell: The kind of cell.
        suite: As in `choose`.
    """
    found, call = call_on(device, dtype, sizes, cell)
    point = nearest(found, call, suite)
    if point is None:
        return f"nothing near this size is measured on {found.name}"
    if point.ratio < 1:
        return f"it was measured faster near this size on {found.name}"
    return None


def chosen(
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int],
    cell: str,
    suite: str,
    plain: bool,
) -> tuple[str, bool]:
    """The name of the forward kernel of a call, and whether that follows from a measurement.

    Args:
        device: As in `why_cudnn`, like the arguments up to `suite`.
        dtype: Of the input.
        sizes: T, B, G, H.
        cell: The kind of cell.
        suite: As in `choose`.
        plain: As in `Sizes`.
    """
    found, call = call_on(device, dtype, sizes, cell, plain)
    kernel, _ = choose(found, call, "forward", suite)
    return kernel.name, nearest(found, call, suite) is not None


def why_not(
    kernel: str,
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int],
    cell: str,
    plain: bool,
) -> str | None:
    """Why a kernel cannot run a call, forward or backward; None if it can.

    Args:
        kernel: A name of `KERNELS`.
        device: As in `chosen`, like the arguments after it.
        dtype: Of the input.
        sizes: T, B, G, H.
        cell: The kind of cell.
        plain: As in `Sizes`.
    """
    found, call = call_on(device, dtype, sizes, cell, plain)
    configs = [KERNELS[kernel].config(found, call, way) for way in ("forward", "backward")]
    return tables.unfit(found, call) if None in configs else None


def take(kernel: str | None, problem: Problem, direction: str, suite: str) -> tuple[Kernel, Config]:
    """The kernel of that name, or the one to choose, with its tiles.

    Args:
        kernel: A name of `KERNELS`, or None.
        problem: The call.
        direction: As in `choose`.
        suite: As in `choose`.

    Raises:
        ValueError: an unknown name.
        RuntimeError: the named kernel does not fit this call on this device.
    """
    device = device_of(problem.h0)
    sizes = sizes_of(problem)
    if kernel is None:
        return choose(device, sizes, direction, suite)
    if kernel not in KERNELS:
        raise ValueError(f"kernel: expected one of {tuple(KERNELS)}, got {kernel!r}")
    config = KERNELS[kernel].config(device, sizes, direction)
    if config is None:
        raise RuntimeError(f"kernel={kernel!r}: {tables.unfit(device, sizes)}")
    return KERNELS[kernel], config
