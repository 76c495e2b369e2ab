# SPDX-License-Identifier: Apache-2.0
"""Tile sizes of `generate`, compiled for every device they are offered to, and which form to take.

As in `tables`, a row holds up to some sizes and for devices with its shared memory and
architecture; `scripts/gpu_resources.py` compiles all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from . import tables, tiling
from .problem import GATES
from .tables import (
    A100,
    AMPERE,
    AMPERE_ONLY,
    ANY,
    B200,
    BLACKWELL,
    HOPPER,
    HOPPER_ONLY,
    RTX_30_40,
    RTX_50,
    TURING_ONLY,
)
from .tiling import Config, Device, Sizes, whole

FORMS = ("cta", "grid", "step")
"""Every form of `generate`: the whole loop in one program, over several programs, in launches."""


@dataclass(frozen=True)
class Model:
    """What the choice of a form and its tiles depends on.

    Attributes:
        sizes: Of one step of one layer.
        L: Layers.
        V: Vocabulary size.
    """

    sizes: Sizes
    L: int
    V: int


@dataclass(frozen=True)
class GenerateRow:
    """One shape of tiles.

    Attributes:
        form: A name of `FORMS`.
        numbers: As `Sizes.numbers`.
        L: Layers at most.
        H: Hidden size at most.
        V: Vocabulary size at most.
        shared_kib: Shared memory that the device has at least.
        config: The tiles.
        arch: Compute capabilities, lowest and highest.
        since: The Triton that compiles it without spills, where 3.6 does not.
        unless: The Triton that spills hundreds of bytes of it.
        only: The one Triton that takes it.
        cells: Those that compile without spills.
        least_H: Hidden size at least. `grid` has a program for every BLOCK_H units, and each draws
            for its share of the tile's rows: few programs would hold the logits of many rows.
    """

    form: str
    numbers: str
    L: int
    H: int
    V: int
    shared_kib: int
    config: Config
    arch: tuple[int, int] = AMPERE
    since: tuple[int, int] = (3, 6)
    unless: tuple[int, int] | None = None
    only: tuple[int, int] | None = None
    cells: tuple[str, ...] = tuple(GATES)
    least_H: int = 1

    def fits(self, device: Device) -> bool:
        """Whether the device, and Triton, have what the row needs."""
        enough = self.shared_kib * 1024 <= device.shared_bytes
        known = self.arch[0] <= device.arch <= self.arch[1]
        triton = tiling.triton_version()
        compiles = triton >= self.since and triton != self.unless and self.only in (None, triton)
        return enough and known and compiles

    def holds(self, model: Model) -> bool:
        """Whether the model is within the row's sizes, padded as `weights_of` does."""
        H = whole(model.sizes.H)
        within = model.L <= self.L and self.least_H <= H <= self.H and model.V <= self.V
        same = model.sizes.numbers == self.numbers and model.sizes.cell in self.cells
        return within and same


def unfit(device: Device, model: Model) -> str:
    """A sentence for a model that no row of a form holds for."""
    layers = f"{model.L} layer{'s' if model.L > 1 else ''}"
    triton = "Triton {}.{}".format(*tiling.triton_version())
    return (
        f"no compiled tiles for {layers} {model.sizes.cell} of H={model.sizes.H} and V={model.V} "
        f"in {model.sizes.numbers} on {device} with {triton}"
    )


@lru_cache(4096)
def config_of(form: str, device: Device, model: Model) -> Config | None:
    """The tiles of a form, or None where it does not fit."""
    if form == "step":
        return _step(device, model.sizes)
    row = row_of(form, device, model)
    return None if row is None else row.config


def row_of(form: str, device: Device, model: Model) -> GenerateRow | None:
    """The row of a form, or None.

    Weights on chip before weights that are streamed; of the rows that hold for the smallest model,
    the first with the fewest waves.
    """
    fitting = [
        row
        for row in ROWS
        if row.form == form
        and row.fits(device)
        and row.holds(model)
        and -(-model.sizes.H // row.config.BLOCK_H) <= device.processors
    ]

    def order(row: GenerateRow) -> tuple[bool, int, int, int]:
        return not row.config.RESIDENT, row.H, row.L, row.V

    first = min(map(order, fitting), default=None)
    rows = [row for row in fitting if order(row) == first]
    return min(rows, key=lambda r: tables.waves(r.config, device, model.sizes), default=None)


def _step(device: Device, sizes: Sizes) -> Config:
    """Those of the scan of that name, but for one that spills 8 bytes under Triton 3.6."""
    found = tables.config("step", device, sizes, "forward")
    assert found is not None
    old = tiling.triton_version() < NOT_OLD
    if old and sizes.numbers == "tf32x3" and device.arch >= BLACKWELL[0]:
        return replace(found, num_stages=2)
    return found


def _rarely_anew(device: Device) -> bool:
    """Whether little needs to be computed anew: before Hopper, under Triton 3.6 everywhere."""
    return device.arch < HOPPER[0] or tiling.triton_version() < (3, 7)


def computed_anew(form: str, device: Device, model: Model, config: Config) -> str:
    """What a loop computes at each position, where the compiler would compute it once.

    It would then stand in registers through the loop, and spilled 8 to 88 bytes. "addresses": LLVM
    takes nothing out of the loop. "tiles": nor does Triton, for which there are few registers in
    tiles of 16 rows and where TF32 weights are streamed. "nothing": where that makes spills or ends
    none; before Hopper and under Triton 3.6 it ends some where logits are read in parts.
    """
    grid = form == "grid"
    streamed = model.sizes.numbers == "tf32" and not config.RESIDENT
    if _rarely_anew(device):
        before = tiling.triton_version() < (3, 8)
        other_cell = before and streamed and model.sizes.cell != "reset_after"
        return "addresses" if grid and (model.V > IN_ONE_TILE or other_cell) else "nothing"
    if not grid:
        needed = config.BLOCK_B > 8 or (device.arch >= RTX_50[0] and model.L > 1)
        return "addresses" if needed else "nothing"
    gated = model.sizes.cell == "reset_before" and device.arch >= BLACKWELL[0]
    few = streamed and not gated
    return "tiles" if config.BLOCK_B > 8 or few else "addresses"


def compiled_as(form: str, device: Device, model: Model, config: Config) -> dict[str, Any]:
    """`ANEW`, and where the assembler stops by itself at 80 or 128 registers and spills, 255."""
    anew = computed_anew(form, device, model, config)
    without_reset = model.sizes.cell == "no_reset" and device.arch >= RTX_50[0]
    few_layers = form == "grid" and not config.RESIDENT and model.L <= 2
    in_parts = anew == "addresses" and model.V > IN_ONE_TILE
    stops = in_parts if _rarely_anew(device) else without_reset and few_layers
    return {"ANEW": anew} | ({"maxnreg": 255} if stops else {})


def choose(device: Device, model: Model) -> str:
    """The first form that fits."""
    return next(form for form in FORMS if config_of(form, device, model) is not None)


def _cta(
    numbers: str, L: int, H: int, V: int, shared_kib: int, BLOCK_B: int, num_warps: int,
    arch: tuple[int, int], **rest: Any,
) -> GenerateRow:  # fmt: skip
    config = Config(BLOCK_B, H, 0, num_warps)
    return GenerateRow("cta", numbers, L, H, V, shared_kib, config, arch, **rest)


def _resident(
    numbers: str, H: int, shared_kib: int, BLOCK_H: int, BLOCK_K: int, num_warps: int,
    arch: tuple[int, int], **rest: Any,
) -> GenerateRow:  # fmt: skip
    """`grid` with one layer's weights on chip."""
    config, rest = Config(8, BLOCK_H, BLOCK_K, num_warps), {"least_H": 128} | rest
    return GenerateRow("grid", numbers, 1, H, ANY, shared_kib, config, arch, **rest)


def _streamed(
    numbers: str, BLOCK_B: int, BLOCK_H: int, BLOCK_K: int, num_warps: int, least_H: int,
    arch: tuple[int, int], *, L: int = ANY, H: int = ANY, V: int = ANY, **rest: Any,
) -> GenerateRow:  # fmt: skip
    """`grid` with weights from the L2 cache, in 64 KiB."""
    config = Config(BLOCK_B, BLOCK_H, BLOCK_K, num_warps, RESIDENT=False)
    return GenerateRow("grid", numbers, L, H, V, 64, config, arch, least_H=least_H, **rest)


NOT_OLD, OLDEST = (3, 9), (3, 6)
IN_ONE_TILE = 1024
NOT_BEFORE = ("reset_after", "no_reset")

ROWS = (
    _cta("16", 1, 32, 128, 64, 8, 8, TURING_ONLY),
    _cta("16", 1, 64, 128, 64, 8, 8, AMPERE_ONLY),
    _cta("16", 1, 64, 128, 64, 16, 8, AMPERE_ONLY),
    _cta("16", 1, 64, 128, 64, 8, 4, HOPPER_ONLY),
    _cta("16", 1, 64, 128, 64, 8, 8, B200),
    _cta("16", 1, 64, 128, 64, 16, 8, B200, since=NOT_OLD),
    _cta("16", 1, 64, 128, 64, 8, 8, RTX_50),
    _cta("16", 1, 64, 128, 64, 16, 8, RTX_50),
    _cta("16", 1, 64, 256, 64, 8, 8, AMPERE_ONLY),
    _cta("16", 1, 64, 256, 64, 8, 8, RTX_50),
    _cta("16", 2, 64, 64, 99, 8, 8, A100),
    _cta("16", 2, 64, 128, 99, 8, 8, RTX_30_40),
    _cta("16", 2, 64, 128, 99, 8, 8, HOPPER_ONLY),
    _cta("16", 2, 64, 128, 99, 8, 8, B200),
    _cta("16", 2, 64, 128, 99, 8, 8, RTX_50, cells=NOT_BEFORE),
    _cta("16", 3, 64, 128, 163, 8, 8, HOPPER_ONLY),
    _cta("16", 1, 128, 128, 163, 8, 8, A100),
    _cta("16", 1, 128, 128, 64, 8, 8, RTX_30_40, since=NOT_OLD),
    _cta("16", 1, 128, 128, 163, 8, 8, HOPPER_ONLY),
    _cta("16", 1, 128, 128, 163, 16, 8, HOPPER_ONLY),
    _cta("16", 1, 128, 64, 163, 8, 8, B200, cells=("reset_after", "reset_before")),
    _cta("16", 1, 128, 128, 64, 8, 8, RTX_50, since=NOT_OLD),
    _cta("16", 1, 128, 256, 227, 8, 8, HOPPER_ONLY),
    _cta("tf32", 1, 64, 128, 99, 8, 8, AMPERE),
    _cta("tf32x3", 1, 32, 128, 64, 8, 8, B200),
    _cta("tf32x3", 1, 64, 64, 99, 8, 8, B200, since=NOT_OLD),
    _cta("tf32x3", 1, 64, 128, 99, 8, 8, A100, unless=(3, 8)),
    _cta("tf32x3", 1, 64, 128, 99, 8, 8, RTX_30_40, since=NOT_OLD),
    _cta("tf32x3", 1, 64, 128, 99, 8, 8, HOPPER_ONLY, since=NOT_OLD),
    _cta("tf32x3", 1, 64, 128, 99, 8, 8, RTX_50, since=NOT_OLD),
    _cta("ieee", 1, 32, 128, 64, 8, 8, TURING_ONLY),
    _resident("16", 512, 163, 32, 128, 8, A100),
    _resident("16", 512, 163, 32, 128, 8, HOPPER),
    _resident("16", 512, 99, 16, 128, 4, RTX_30_40),
    _resident("16", 512, 99, 16, 128, 4, RTX_50, since=NOT_OLD),
    _resident("tf32", 256, 163, 32, 64, 8, A100),
    _resident("tf32", 256, 163, 32, 64, 8, HOPPER, since=NOT_OLD),
    _resident("tf32", 256, 99, 16, 64, 4, RTX_30_40),
    _resident("tf32", 256, 99, 16, 64, 4, RTX_50),
    _resident("tf32", 512, 227, 32, 64, 8, HOPPER, since=NOT_OLD),
    _streamed("16", 8, 32, 32, 8, 128, TURING_ONLY, V=IN_ONE_TILE),
    _streamed("16", 8, 32, 32, 8, 128, TURING_ONLY, since=NOT_OLD),
    _streamed("16", 8, 32, 64, 8, 64, AMPERE, H=128, V=256, since=NOT_OLD),
    _streamed("16", 8, 32, 64, 8, 128, AMPERE_ONLY, V=IN_ONE_TILE, since=NOT_OLD),
    _streamed("16", 8, 32, 64, 8, 128, HOPPER, since=NOT_OLD),
    _streamed("16", 16, 32, 64, 8, 256, A100, V=IN_ONE_TILE, since=NOT_OLD),
    _streamed("16", 16, 32, 64, 8, 512, HOPPER_ONLY, since=NOT_OLD, cells=NOT_BEFORE),
    _streamed("tf32", 8, 32, 32, 8, 64, AMPERE, H=64, V=256, since=NOT_OLD),
    _streamed("tf32", 8, 32, 32, 8, 128, AMPERE_ONLY, since=NOT_OLD),
    _streamed(
        "tf32", 8, 32, 32, 8, 128, HOPPER_ONLY, V=IN_ONE_TILE, since=NOT_OLD, cells=NOT_BEFORE
    ),
    _streamed("tf32", 8, 32, 16, 8, 128, HOPPER_ONLY, since=NOT_OLD, cells=("reset_before",)),
    _streamed("tf32", 8, 32, 32, 8, 256, B200, since=NOT_OLD),
    _streamed("tf32", 8, 32, 32, 8, 128, RTX_50, since=NOT_OLD),
    _streamed(
        "tf32", 16, 32, 32, 8, 256, HOPPER_ONLY, V=IN_ONE_TILE, since=NOT_OLD, cells=NOT_BEFORE
    ),
    _streamed("tf32", 16, 32, 32, 8, 256, HOPPER_ONLY, since=NOT_OLD, cells=NOT_BEFORE),
    _streamed("tf32", 16, 32, 32, 8, 256, B200, since=NOT_OLD, cells=NOT_BEFORE),
    _streamed("tf32", 8, 32, 32, 8, 256, AMPERE_ONLY),
    _streamed("tf32x3", 8, 32, 16, 8, 256, AMPERE),
    _streamed("ieee", 8, 16, 16, 4, 128, TURING_ONLY),
    # At most 16 bytes are spilled, which should cost far less than `step`'s launches.
    _resident("tf32", 256, 163, 32, 64, 8, HOPPER_ONLY, only=OLDEST, least_H=144),
    _resident("tf32", 512, 227, 32, 64, 8, HOPPER_ONLY, only=OLDEST, least_H=144),
    _streamed("16", 8, 32, 64, 8, 64, HOPPER_ONLY, L=2, H=64, V=256, only=OLDEST, cells=NOT_BEFORE),
    _streamed("16", 8, 32, 64, 8, 128, HOPPER_ONLY, only=OLDEST),
    _streamed("16", 16, 32, 64, 8, 512, HOPPER_ONLY, only=OLDEST, cells=NOT_BEFORE),
    _streamed("tf32", 8, 32, 32, 8, 64, HOPPER_ONLY, H=64, V=256, only=OLDEST),
    _streamed("tf32", 8, 32, 32, 8, 128, HOPPER_ONLY, V=IN_ONE_TILE, only=OLDEST, cells=NOT_BEFORE),
    _streamed("tf32", 8, 32, 16, 8, 128, HOPPER_ONLY, only=OLDEST, cells=("reset_before",)),
)
"""For one form and one largest model the row to prefer first. What none holds for takes `step`."""
