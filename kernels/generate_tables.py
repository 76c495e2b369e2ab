# SPDX-License-Identifier: Apache-2.0
"""Tile sizes of `generate`, compiled for every device they are offered to, and which form to take.

As in `tables`, a row holds up to some sizes and for devices with its shared memory and
architecture; `scripts/gpu_resources.py` compiles all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.metadata import version

from . import tables
from .tables import AMPERE, ANY, HOPPER_ONLY
from .tiling import Config, Device, Sizes

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


@cache
def triton_version() -> tuple[int, int]:
    """Major and minor version of the Triton that is installed, without importing it."""
    major, minor, *_ = version("triton").split(".")
    return int(major), int(minor)


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

    def fits(self, device: Device) -> bool:
        """Whether the device, and Triton, have what the row needs."""
        enough = self.shared_kib * 1024 <= device.shared_bytes
        known = self.arch[0] <= device.arch <= self.arch[1]
        return enough and known and self.since <= triton_version()

    def holds(self, model: Model) -> bool:
        """Whether the model is within the row's sizes.

        Only copies of 16 bytes go past the L1 cache where `grid` loads ahead, and weights on chip
        leave no registers for other addresses: as `tables.Row.holds`.
        """
        simple = not self.config.RESIDENT and self.config.num_stages == 1
        if self.form == "grid" and model.sizes.H % 16 and not simple:
            return False
        within = model.L <= self.L and model.sizes.H <= self.H and model.V <= self.V
        return within and model.sizes.numbers == self.numbers


def unfit(device: Device, model: Model) -> str:
    """A sentence for a model that no row of a form holds for."""
    return (
        f"no tiles for {model.L} layers of H={model.sizes.H} and V={model.V} in "
        f"{model.sizes.numbers} fit a device with {device.shared_bytes // 1024} KiB of shared "
        f"memory and {device.processors} processors"
    )


@lru_cache(4096)
def config_of(form: str, device: Device, model: Model) -> Config | None:
    """The tiles of a form, or None where it does not fit.

    Of the rows that hold for the smallest model, the first with the fewest waves.
    """
    if form == "step":
        return tables.config("step", device, model.sizes, "forward")
    fitting = [
        row
        for row in ROWS
        if row.form == form
        and row.fits(device)
        and row.holds(model)
        and -(-model.sizes.H // row.config.BLOCK_H) <= device.processors
    ]
    nearest = min(((row.H, row.L, row.V) for row in fitting), default=None)
    configs = [row.config for row in fitting if (row.H, row.L, row.V) == nearest]
    return min(configs, key=lambda c: tables.waves(c, device, model.sizes), default=None)


def choose(device: Device, model: Model) -> str:
    """The first form that fits."""
    return next(form for form in FORMS if config_of(form, device, model) is not None)


def _cta(
    numbers: str, L: int, H: int, V: int, shared_kib: int, BLOCK_B: int, num_warps: int,
    arch: tuple[int, int] = AMPERE, since: tuple[int, int] = (3, 6),
) -> GenerateRow:  # fmt: skip
    config = Config(BLOCK_B, H, 0, num_warps)
    return GenerateRow("cta", numbers, L, H, V, shared_kib, config, arch, since)


def _grid(
    numbers: str, L: int, H: int, shared_kib: int, config: Config,
    arch: tuple[int, int] = AMPERE, since: tuple[int, int] = (3, 6),
) -> GenerateRow:  # fmt: skip
    return GenerateRow("grid", numbers, L, H, ANY, shared_kib, config, arch, since)


def _resident(BLOCK_B: int, BLOCK_H: int, BLOCK_K: int, num_warps: int) -> Config:
    return Config(BLOCK_B, BLOCK_H, BLOCK_K, num_warps)


def _streamed(
    BLOCK_B: int, BLOCK_H: int, BLOCK_K: int, num_warps: int, num_stages: int = 1
) -> Config:
    return Config(BLOCK_B, BLOCK_H, BLOCK_K, num_warps, num_stages, RESIDENT=False)


NOT_OLD = (3, 9)

ROWS = (
    _cta("16", 1, 64, 128, 64, 8, 4, HOPPER_ONLY),
    _cta("16", 2, 64, 128, 99, 8, 8, HOPPER_ONLY),
    _cta("16", 1, 128, 128, 163, 8, 8, HOPPER_ONLY),
    _cta("16", 1, 128, 128, 163, 16, 8, HOPPER_ONLY),
    _cta("16", 1, 128, 256, 227, 8, 8, HOPPER_ONLY),
    _cta("tf32", 1, 64, 128, 99, 8, 8, HOPPER_ONLY),
    _cta("tf32x3", 1, 64, 128, 99, 8, 8, HOPPER_ONLY, NOT_OLD),
    _grid("16", 1, 512, 163, _resident(8, 32, 128, 8), HOPPER_ONLY),
    _grid("16", ANY, ANY, 64, _streamed(16, 32, 64, 8), HOPPER_ONLY, NOT_OLD),
    _grid("tf32", ANY, ANY, 64, _streamed(16, 32, 32, 8), HOPPER_ONLY, NOT_OLD),
)
"""For one form and one largest model the row to prefer first. What none holds for takes `step`."""
