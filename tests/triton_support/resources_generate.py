# SPDX-License-Identifier: Apache-2.0
"""What every row of the tables of `generate` takes: points of the snapshot, as `resources` has."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module

import torch

from gru_fast.kernels import generate_tables, generation, problem
from gru_fast.kernels.generate_tables import GenerateRow, Model
from gru_fast.kernels.tiling import Config, Sizes
from triton_support import compiled
from triton_support.compiled import DEVICES, Resources

VARIANTS = (("reset_after", "filters", (90,)),)
"""Cells, rules and architectures that rows are compiled for: what takes most."""

STEPS = {90: ("16", "tf32")}
"""Numbers that the tiles of `step` are compiled for, by architecture."""

RULES = {"filters": {"temperature": 0.9, "top_k": 5, "top_p": 0.9, "min_p": 0.1}, "plain": {}}

MOST = {"L": 2, "H": 1024, "V": 1000}
"""What rows without a limit are compiled for."""


@dataclass(frozen=True)
class GeneratePoint:
    """A row of the tables on one architecture, for one cell and one set of rules."""

    arch: int
    row: GenerateRow
    cell: str
    rules: str

    @property
    def kernel(self) -> str:
        return f"generate_{self.row.form}"

    @property
    def config(self) -> Config:
        return self.row.config

    def __str__(self) -> str:
        c, row = self.config, self.row
        stages = f" s{c.num_stages}" if c.num_stages > 1 else ""
        tiles = f"B{c.BLOCK_B} H{c.BLOCK_H} K{c.BLOCK_K} w{c.num_warps}{stages}"
        return (
            f"sm_{self.arch} {self.kernel} {row.numbers} {self.cell} {self.rules} "
            f"L{row.L} H{row.H} V{row.V}: {tiles}"
        )


def points() -> Iterator[GeneratePoint]:
    """Every row where it may be taken, and the tiles of `step`."""
    for cell, rules, archs in VARIANTS:
        for arch in archs:
            device = DEVICES[arch]
            for row in generate_tables.ROWS:
                if row.fits(device):
                    sizes = {name: min(getattr(row, name), MOST[name]) for name in MOST}
                    yield GeneratePoint(arch, replace(row, **sizes), cell, rules)
            for numbers in STEPS[arch]:
                sizes = Sizes(1, 4, 1, 256, cell, dtype_of(numbers, arch), numbers)
                config = generate_tables.config_of("step", device, Model(sizes, 2, 1000))
                row = GenerateRow("step", numbers, 2, 256, 1000, 64, config)
                yield GeneratePoint(arch, row, cell, rules)


def sample() -> Iterator[GeneratePoint]:
    """A few of them."""
    wanted = {("cta", "16", 128), ("grid", "16", 512), ("step", "tf32", 256)}
    for point in points():
        key = (point.row.form, point.row.numbers, point.row.H)
        if point.arch == 90 and point.cell == "reset_after" and key in wanted:
            wanted.discard(key)
            yield point


def dtype_of(numbers: str, arch: int) -> torch.dtype:
    if numbers != "16":
        return torch.float32
    return torch.bfloat16 if arch >= 90 else torch.float16


def compile_point(point: GeneratePoint) -> dict[str, Resources]:
    """By the name of the point, and for launches of several binaries a number."""
    row, cell = point.row, point.cell
    like = {"dtype": dtype_of(row.numbers, point.arch)}
    gates = problem.GATES[cell] * row.H
    layer = [torch.zeros(gates, row.H, **like)] * 2 + [torch.zeros(gates, **like)] * 2
    weights = generation.weights_of(
        cell, torch.zeros(row.V + 1, gates, **like), [layer] * row.L,
        torch.zeros(row.V, row.H, **like), torch.zeros(row.V, **like),
    )  # fmt: skip
    weights = replace(weights, precision=row.numbers if row.numbers != "16" else "tf32")
    rules = generation.Rules(**RULES[point.rules])
    prompts, lengths = torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    rows = generation.new_rows(weights, prompts, lengths, 5)
    with compiled.dry_launches(point.arch) as launches:
        call = generation.Generation(weights, rules, rows)
        import_module("gru_fast.kernels.generate")._launcher(row.form)(call, (0, 1), point.config)
    binaries = {id(launch.compiled): launch for launch in launches}
    found = [compiled.resources(launch, point.arch) for launch in binaries.values()]
    return {f"{point} #{i}" if i else str(point): used for i, used in enumerate(found)}
