# SPDX-License-Identifier: Apache-2.0
"""Tile sizes that were compiled for every device they are offered to, within its memory.

tests/triton_support/known_spills.py lists the few that spill, by the version of Triton.
A row holds up to some H and for the devices that have its shared memory and an architecture in its
range: by limits, not by name. `scripts/gpu_resources.py` compiles all of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache, lru_cache

from . import tiling
from .tiling import Config, Device, Sizes

ANY = 10**9
TURING, TURING_ONLY = (75, ANY), (75, 79)
AMPERE, AMPERE_ONLY, AMPERE_TO_HOPPER = (80, ANY), (80, 89), (80, 99)
AMPERE_TO_B200, TURING_TO_B200 = (80, 119), (75, 119)
HOPPER, HOPPER_ONLY, BLACKWELL = (90, ANY), (90, 99), (100, ANY)
A100, RTX_30_40, B200, RTX_50 = (80, 85), (86, 89), (100, 119), (120, ANY)


@dataclass(frozen=True)
class Row:
    """One shape of tiles.

    Attributes:
        kernel: A name of `registry.KERNELS`.
        numbers: As `Sizes.numbers`.
        H: The largest hidden size that it holds for.
        shared_kib: Shared memory that the device has at least.
        config: The tiles.
        arch: Compute capabilities, lowest and highest.
        directions: "forward", "backward" or both.
        plain: Only for calls without lengths, resets and h_scale: others need more registers.
    """

    kernel: str
    numbers: str
    H: int
    shared_kib: int
    config: Config
    arch: tuple[int, int]
    directions: tuple[str, ...] = ("forward", "backward")
    plain: bool = False

    def holds(self, sizes: Sizes) -> bool:
        """Whether the row holds for a call on a device that it fits.

        `grid` with weights on chip has no registers left for addresses that are not aligned, and
        where it loads ahead, only copies of 16 bytes go past the L1 cache.
        """
        simple = not self.config.RESIDENT and self.config.num_stages == 1
        aligned = sizes.H % 16 == 0 or self.kernel != "grid" or simple
        return (
            aligned
            and (sizes.plain or not self.plain)
            and self.numbers == sizes.numbers
            and sizes.H <= self.H
        )


@cache
def offered(device: Device, direction: str) -> tuple[Row, ...]:
    """The rows for a device: of those for one kernel, numbers and H the ones with most memory."""
    return offered_of(ROWS, device, direction)


def offered_of(rows: tuple[Row, ...], device: Device, direction: str) -> tuple[Row, ...]:
    """`offered`, of any table."""
    fitting = [
        row
        for row in rows
        if direction in row.directions
        and row.shared_kib * 1024 <= device.shared_bytes
        and row.arch[0] <= device.arch <= row.arch[1]
    ]
    most: dict[tuple[str, str, int], int] = {}
    for row in fitting:
        key = (row.kernel, row.numbers, row.H)
        most[key] = max(row.shared_kib, most.get(key, 0))
    return tuple(
        _for_this_triton(row)
        for row in fitting
        if row.shared_kib == most[row.kernel, row.numbers, row.H]
    )


def _for_this_triton(row: Row) -> Row:
    """Triton 3.8 holds weights that fill a Hopper's shared memory in registers as well.

    Of four warps 40 to 256 bytes spilled, of eight with narrow panels at most 16.
    """
    full = row.kernel == "grid" and row.config.RESIDENT and row.shared_kib > 163
    four = row.config.BLOCK_H == 64 and row.config.num_warps == 4
    if not (full and four) or tiling.triton_version() != (3, 8):
        return row
    return replace(row, config=replace(row.config, num_warps=8, BLOCK_K=64))


def waves(config: Config, device: Device, sizes: Sizes) -> int:
    """How often a kernel has to fill the device with programs."""
    units = -(-sizes.H // config.BLOCK_H)
    programs = -(-sizes.B // config.BLOCK_B) * sizes.G * units
    return -(-programs // device.processors)


def unfit(device: Device, sizes: Sizes) -> str:
    """A sentence for a call that no row of a kernel holds for."""
    return f"no compiled tiles for H={sizes.H} in {sizes.numbers} on {device}"


def config_among(rows: Iterable[Row], device: Device, sizes: Sizes) -> Config | None:
    """Of the rows that hold for the smallest H, the tiles of the first with the fewest waves."""
    fitting = [row for row in rows if row.holds(sizes)]
    nearest = min((row.H for row in fitting), default=0)
    configs = [row.config for row in fitting if row.H == nearest]
    return min(configs, key=lambda c: waves(c, device, sizes), default=None)


@lru_cache(4096)
def config(kernel: str, device: Device, sizes: Sizes, direction: str) -> Config | None:
    """The tiles for a call, or None where the kernel does not fit."""
    if kernel == "step":
        return _step(device, sizes, direction)
    rows = (
        row
        for row in offered(device, direction)
        if row.kernel == kernel and -(-sizes.H // row.config.BLOCK_H) <= device.processors
    )
    return config_among(rows, device, sizes)


def _step(device: Device, sizes: Sizes, direction: str) -> Config:
    """Tiles of `step`: they fit 64 KiB whatever the sizes are."""
    if device.arch < AMPERE[0]:
        return Config(16, 32, 16, 4)
    if sizes.numbers != "16":
        return Config(16, 32, 32, 4, 3)
    # With three stages backward spills 8 bytes there.
    stages = 2 if direction == "backward" and device.arch >= HOPPER[0] else 3
    return Config(16, 32, 64, 4, stages)


def cta(
    BLOCK_B: int, BLOCK_H: int, num_warps: int, num_stages: int = 1, maxnreg: int | None = None
) -> Config:
    """Tiles of a kernel with all units in one program."""
    return Config(BLOCK_B, BLOCK_H, 0, num_warps, num_stages, maxnreg=maxnreg)


def _resident(BLOCK_B: int, BLOCK_H: int, BLOCK_K: int, num_warps: int) -> Config:
    return Config(BLOCK_B, BLOCK_H, BLOCK_K, num_warps)


def _streamed(
    BLOCK_B: int, BLOCK_H: int, BLOCK_K: int, num_warps: int, num_stages: int = 1,
    maxnreg: int | None = None,
) -> Config:  # fmt: skip
    return Config(BLOCK_B, BLOCK_H, BLOCK_K, num_warps, num_stages, RESIDENT=False, maxnreg=maxnreg)


FORWARD, BACKWARD = ("forward",), ("backward",)


def _large(numbers: str, H: int, shared_kib: int) -> list[Row]:
    """Streamed rows for many rows of the batch, and those that hold where they would spill."""

    def row(config: Config, directions: tuple[str, ...], plain: bool = False) -> Row:
        return Row("grid", numbers, H, shared_kib, config, HOPPER_ONLY, directions, plain)

    if numbers == "16":
        stages = 3 if H <= 512 else 4
        return [
            row(_streamed(64, 64, 64, 8, 3), FORWARD, plain=True),
            row(_streamed(64, 64, 64, 8, stages), BACKWARD, plain=True),
            row(_streamed(32, 64, 64, 8, 4), (*FORWARD, *BACKWARD)),
        ]
    return [
        row(_streamed(64, 64, 32, 8, 3), FORWARD, plain=True),
        row(_streamed(32, 64, 32, 8, 3), BACKWARD),
    ]


ROWS = (
    Row("cta", "16", 32, 64, cta(8, 32, 4), TURING),
    Row("cta", "16", 32, 64, cta(16, 32, 4), TURING),
    Row("cta", "16", 64, 64, cta(8, 64, 4, maxnreg=168), RTX_30_40, FORWARD),
    Row("cta", "16", 64, 64, cta(8, 64, 4), TURING, FORWARD),
    Row("cta", "16", 64, 64, cta(8, 64, 4), TURING_TO_B200, BACKWARD),
    Row("cta", "16", 64, 64, cta(8, 64, 4, maxnreg=255), RTX_50, BACKWARD),
    Row("cta", "16", 64, 64, cta(16, 64, 4), AMPERE),
    Row("cta", "16", 128, 163, cta(8, 128, 4), HOPPER_ONLY, plain=True),
    Row("cta", "16", 128, 163, cta(8, 128, 8), AMPERE_TO_HOPPER),
    Row("cta", "16", 128, 163, cta(16, 128, 8), AMPERE),
    Row("cta", "tf32", 32, 64, cta(8, 32, 4), AMPERE, FORWARD),
    Row("cta", "tf32", 32, 64, cta(8, 32, 4, 3), AMPERE, BACKWARD),
    Row("cta", "tf32", 32, 64, cta(16, 32, 4), AMPERE),
    Row("cta", "tf32", 64, 99, cta(8, 64, 4), AMPERE, FORWARD),
    Row("cta", "tf32", 64, 99, cta(8, 64, 4, 3), AMPERE_TO_HOPPER, BACKWARD),
    Row("cta", "tf32", 64, 99, cta(8, 64, 4, 2), BLACKWELL, BACKWARD),
    Row("cta", "tf32", 64, 99, cta(16, 64, 8), AMPERE),
    Row("cta", "tf32", 128, 227, cta(8, 128, 8), AMPERE_TO_HOPPER),
    Row("cta", "tf32", 128, 227, cta(16, 128, 8), AMPERE_TO_HOPPER),
    Row("cta", "tf32x3", 32, 64, cta(8, 32, 4), AMPERE, FORWARD),
    Row("cta", "tf32x3", 32, 64, cta(8, 32, 4), AMPERE_TO_B200, BACKWARD),
    Row("cta", "tf32x3", 32, 64, cta(8, 32, 4, maxnreg=255), RTX_50, BACKWARD),
    Row("cta", "tf32x3", 64, 163, cta(8, 64, 8), AMPERE),
    Row("cta", "ieee", 32, 64, cta(8, 32, 4), TURING_ONLY),
    Row("cta", "ieee", 32, 64, cta(16, 32, 4), TURING_ONLY),
    Row("cta", "ieee", 64, 64, cta(8, 64, 8), TURING_ONLY),
    Row("grid", "16", 256, 163, _resident(8, 64, 128, 4), HOPPER),
    Row("grid", "16", 256, 163, _streamed(32, 64, 64, 8, 4), HOPPER_ONLY, FORWARD),
    Row("grid", "16", 256, 163, _streamed(32, 64, 64, 8, 4), HOPPER_ONLY, BACKWARD, plain=True),
    Row("grid", "16", 256, 163, _streamed(32, 64, 64, 8, 3), HOPPER_ONLY, BACKWARD),
    Row("grid", "16", 256, 163, _resident(8, 64, 128, 8), AMPERE_ONLY),
    Row("grid", "16", 256, 99, _resident(8, 32, 64, 4), RTX_50, BACKWARD),
    Row("grid", "16", 256, 99, _resident(8, 32, 128, 4), AMPERE),
    Row("grid", "16", 512, 227, _resident(8, 64, 128, 4), HOPPER_ONLY),
    *_large("16", 512, 227),
    Row("grid", "16", 512, 163, _resident(8, 32, 128, 8), AMPERE),
    Row("grid", "16", 512, 99, _resident(8, 16, 64, 4), RTX_50, BACKWARD),
    Row("grid", "16", 512, 99, _resident(8, 16, 128, 4), AMPERE),
    Row("grid", "16", 1024, 227, _resident(8, 32, 128, 8), HOPPER, FORWARD, plain=True),
    Row("grid", "16", 1024, 227, _resident(8, 32, 128, 8), HOPPER, BACKWARD),
    Row("grid", "16", 1024, 227, _resident(32, 16, 128, 4), HOPPER_ONLY, FORWARD, plain=True),
    Row("grid", "16", 1024, 227, _resident(32, 16, 128, 8), HOPPER_ONLY),
    *_large("16", 1024, 227),
    *_large("16", ANY, 163),
    Row("grid", "16", ANY, 163, _streamed(16, 64, 64, 8), HOPPER_ONLY),
    Row("grid", "16", ANY, 64, _streamed(16, 64, 64, 8), AMPERE),
    Row("grid", "16", ANY, 64, _streamed(16, 32, 32, 4, maxnreg=255), TURING_ONLY),
    Row("grid", "tf32", 256, 227, _resident(8, 64, 64, 4), HOPPER_ONLY),
    Row("grid", "tf32", 256, 227, _streamed(32, 64, 32, 8, 3), HOPPER_ONLY, plain=True),
    Row("grid", "tf32", 256, 163, _resident(8, 32, 64, 8), AMPERE),
    Row("grid", "tf32", 256, 99, _resident(8, 16, 64, 4), AMPERE_ONLY),
    Row("grid", "tf32", 256, 99, _resident(8, 16, 64, 4), BLACKWELL, FORWARD),
    Row("grid", "tf32", 512, 227, _resident(8, 32, 64, 8), HOPPER_ONLY, FORWARD, plain=True),
    Row("grid", "tf32", 512, 227, _resident(8, 32, 64, 8), HOPPER_ONLY, BACKWARD),
    *_large("tf32", 512, 227),
    *_large("tf32", ANY, 163),
    Row("grid", "tf32", ANY, 163, _streamed(16, 64, 32, 8), HOPPER_ONLY),
    Row("grid", "tf32", ANY, 64, _streamed(16, 64, 32, 8), AMPERE),
    Row("grid", "tf32x3", ANY, 64, _streamed(16, 32, 32, 8), AMPERE),
    Row("grid", "ieee", ANY, 64, _streamed(16, 16, 16, 4), TURING_ONLY),
)
"""For one kernel, numbers and H the row to prefer first; what none holds for goes elsewhere."""
