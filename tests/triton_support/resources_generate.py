# SPDX-License-Identifier: Apache-2.0
"""What every row of the tables of `generate` takes: points of the snapshot, as `resources` has."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module

import torch

from gru_fast.kernels import generate_tables, generation, problem
from gru_fast.kernels.generate_tables import ANY, GenerateRow, Model
from gru_fast.kernels.tiling import Config, Sizes
from triton_support import compiled
from triton_support.compiled import DEVICES, Resources

RULES = {"filters": {"temperature": 0.9, "top_k": 5, "top_p": 0.9, "min_p": 0.1}, "plain": {}}

MOST = {"L": 2, "H": 1024, "V": 1000}
"""What rows without a limit are compiled for."""

MOST_LAYERS = 4
"""Layers that they are compiled for where a program draws for most rows, at their least H."""

IN_PARTS = 50_000
"""A vocabulary whose logits are read in parts, for rows without a limit of V, for `reset_after`."""

FILTERS = "filters"
"""The rules that take most."""


@dataclass(frozen=True)
class GeneratePoint:
    """A row of the tables on one architecture, for one cell and one set of rules.

    `row` has the sizes to compile in place of the limits, which `of` has.
    """

    arch: int
    row: GenerateRow
    cell: str
    rules: str
    of: GenerateRow

    @property
    def kernel(self) -> str:
        return f"generate_{self.row.form}"

    @property
    def config(self) -> Config:
        return self.row.config

    def __str__(self) -> str:
        c, row = self.config, self.row
        stages = f" s{c.num_stages}" if c.num_stages > 1 else ""
        most = "" if c.maxnreg is None else f" r{c.maxnreg}"
        tiles = f"B{c.BLOCK_B} H{c.BLOCK_H} K{c.BLOCK_K} w{c.num_warps}{stages}{most}"
        return (
            f"sm_{self.arch} {self.kernel} {row.numbers} {self.cell} {self.rules} "
            f"L{row.L} H{row.H} V{row.V}: {tiles}"
        )


def points() -> Iterator[GeneratePoint]:
    """Every row where it may be taken, and the tiles of `step`."""
    seen = set()
    for cell in problem.GATES:
        for arch in DEVICES:
            for row, of in (*_rows(arch, cell), *_steps(arch, cell)):
                point = GeneratePoint(arch, row, cell, FILTERS, of)
                if str(point) not in seen:
                    seen.add(str(point))
                    yield point


def _fitting(arch: int, cell: str) -> Iterator[GenerateRow]:
    for row in generate_tables.ROWS:
        if row.fits(DEVICES[arch]) and cell in row.cells:
            yield row


def _rows(arch: int, cell: str) -> Iterator[tuple[GenerateRow, GenerateRow]]:
    """Rows with the sizes to compile in place of their limits, and as they are."""
    for row in _fitting(arch, cell):
        most = {name: min(getattr(row, name), MOST[name]) for name in MOST}
        if row.L != ANY:
            most["L"] = row.L
        ends = [most]
        if row.least_H > 1:
            ends.append(most | {"L": min(row.L, MOST_LAYERS), "H": row.least_H})
        if cell == "reset_after" and row.V > IN_PARTS:
            ends += [end | {"V": IN_PARTS} for end in ends]
        for sizes in ends:
            yield replace(row, **sizes), row


def _steps(arch: int, cell: str) -> Iterator[tuple[GenerateRow, GenerateRow]]:
    for numbers in ("16", "tf32", "tf32x3") if arch >= 80 else ("16", "ieee"):
        sizes = Sizes(1, 4, 1, 256, cell, dtype_of(numbers, arch), numbers)
        config = generate_tables.config_of("step", DEVICES[arch], Model(sizes, 2, 1000))
        of = GenerateRow("step", numbers, ANY, ANY, ANY, 64, config)
        yield replace(of, L=2, H=256, V=MOST["V"]), of
        if cell == "reset_after" and numbers == "16":  # the draw is the same for all numbers
            yield replace(of, L=2, H=256, V=IN_PARTS), of


def sample() -> Iterator[GeneratePoint]:
    """A few of them, of each form and for each kind of architecture."""
    wanted = {
        (90, "cta", "16", 128), (90, "grid", "16", 512), (90, "step", "tf32", 256),
        (75, "cta", "ieee", 32), (80, "cta", "16", 128), (86, "grid", "tf32", 256),
        (100, "cta", "tf32", 64), (120, "grid", "tf32x3", 1024),
    }  # fmt: skip
    for point in points():
        key = (point.arch, point.row.form, point.row.numbers, point.row.H)
        if point.cell == "reset_after" and key in wanted:
            wanted.discard(key)
            yield point
    assert not wanted, wanted


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
    found = [compiled.resources(launch) for launch in binaries.values()]
    return {f"{point} #{i}" if i else str(point): used for i, used in enumerate(found)}
