# SPDX-License-Identifier: Apache-2.0
"""Tiles of the layer-normalised kernels, compiled for every device that they are offered to.

None of them has run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from importlib import import_module

import torch

from .problem import Problem, call_on
from .tables import (
    AMPERE,
    AMPERE_ONLY,
    AMPERE_TO_B200,
    BACKWARD,
    BLACKWELL,
    FORWARD,
    HOPPER,
    HOPPER_ONLY,
    RTX_50,
    TURING,
    TURING_ONLY,
    Row,
    config_among,
    cta,
    offered_of,
    unfit,
)
from .tiling import Config, Device, Sizes, device_of, sizes_of

ROWS = (
    Row("norm", "16", 32, 64, cta(8, 32, 4), TURING_ONLY),
    Row("norm", "16", 64, 64, cta(8, 64, 4), TURING, FORWARD),
    Row("norm", "16", 64, 64, cta(8, 64, 4), TURING_ONLY, BACKWARD),
    Row("norm", "16", 64, 64, cta(8, 64, 4, 2), AMPERE_ONLY, BACKWARD),
    Row("norm", "16", 64, 64, cta(8, 64, 4, 3), HOPPER, BACKWARD),
    Row("norm", "16", 128, 163, cta(8, 128, 4), AMPERE, FORWARD),
    Row("norm", "16", 128, 163, cta(8, 128, 8, 2), AMPERE, BACKWARD),
    Row("norm", "tf32", 64, 99, cta(8, 64, 4), AMPERE, FORWARD),
    Row("norm", "tf32", 64, 99, cta(8, 64, 4, 2), AMPERE_TO_B200, BACKWARD),
    Row("norm", "tf32", 64, 99, cta(8, 64, 4), RTX_50, BACKWARD),
    Row("norm", "tf32", 128, 227, cta(8, 128, 8), HOPPER_ONLY, FORWARD, plain=True),
    Row("norm", "tf32", 128, 227, cta(8, 128, 8), HOPPER_ONLY, BACKWARD),
    Row("norm", "tf32x3", 32, 64, cta(8, 32, 4), AMPERE_ONLY, FORWARD),
    Row("norm", "tf32x3", 32, 64, cta(8, 32, 4, 3), AMPERE_ONLY, BACKWARD),
    Row("norm", "tf32x3", 32, 64, cta(8, 32, 4), BLACKWELL, FORWARD),
    Row("norm", "tf32x3", 32, 64, cta(8, 32, 4, 2), BLACKWELL, BACKWARD),
    Row("norm", "tf32x3", 64, 163, cta(8, 64, 8), AMPERE),
    Row("norm", "ieee", 32, 64, cta(8, 32, 4), TURING_ONLY),
    Row("norm", "ieee", 64, 64, cta(8, 64, 4), TURING_ONLY),
)
"""As `tables.ROWS`; compiled by Triton 3.6 to 3.9. What none holds for takes the reference."""


@cache
def launcher(direction: str) -> Callable[..., None]:
    """Imported on first use, as triton is with it."""
    module = import_module(f".norm_{direction}", __package__)
    launch: Callable[..., None] = getattr(module, f"launch_{direction}_norm")
    return launch


@cache
def offered(device: Device, direction: str) -> tuple[Row, ...]:
    """As `tables.offered`."""
    return offered_of(ROWS, device, direction)


@lru_cache(4096)
def config(device: Device, sizes: Sizes, direction: str) -> Config | None:
    """The tiles for a call, or None where the kernel does not fit."""
    return config_among(offered(device, direction), device, sizes)


def take(problem: Problem, direction: str) -> Config:
    """The tiles for a call.

    Raises:
        RuntimeError: the kernel does not fit this call on this device.
    """
    device, sizes = device_of(problem.h0), sizes_of(problem)
    found = config(device, sizes, direction)
    if found is None:
        raise RuntimeError(f"layer-normalised GRU: {unfit(device, sizes)}")
    return found


def why_not(device: torch.device, dtype: torch.dtype, H: int, plain: bool) -> str | None:
    """Why there is no kernel for a call, forward or backward; None if there is.

    Args:
        device: Where.
        dtype: Of the input.
        H: Hidden size.
        plain: As in `Sizes`.
    """
    one_row = (2, 1, 1, int(H))  # a size that is traced has no hash
    found, sizes = call_on(device, dtype, one_row, "reset_after", plain)
    configs = [config(found, sizes, way) for way in ("forward", "backward")]
    return unfit(found, sizes) if None in configs else None
