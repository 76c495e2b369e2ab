# SPDX-License-Identifier: Apache-2.0
"""What every row of the tables takes on every architecture: the snapshot and its check.

A snapshot is a JSON file per Triton version: {"sm_90 forward_cta 16 reset_after everything
B8 H64 K0 w4": [registers, bytes spilled, bytes of shared memory, warpgroup products]}.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import triton

from cases import Case, layer_inputs
from gru_fast import kernels
from gru_fast.kernels import norm_ops, norm_tables, problem, registry, tables
from gru_fast.kernels.tables import Row
from gru_fast.kernels.tiling import Config, Sizes
from norm_cases import norm_arguments
from triton_support import compiled, resources_generate
from triton_support.compiled import DEVICES, Resources
from triton_support.resources_generate import GeneratePoint, dtype_of

SNAPSHOT = Path(__file__).parent / f"resources-triton-{triton.__version__}.json"
VARIANTS = (
    ("reset_after", "everything", tuple(DEVICES)),
    ("reset_before", "everything", tuple(DEVICES)),
    ("reset_after", "plain", tuple(DEVICES)),
)
"""Cells and optional inputs that rows are compiled for, and where."""

EVERY_PLAIN = (90,)
"""Architectures where every row is compiled for plain calls; elsewhere those for no others are."""

MOST_H = 1024
"""The H that rows without a limit are compiled for."""

NOT_ALIGNED = 300
"""An H that is no multiple of 16, for `reset_after`; where a row's limit is lower, 7 below it."""

EVERY_ODD = (75,)
"""Architectures where every row is compiled for such an H; elsewhere those for no others are."""


@dataclass(frozen=True)
class Point:
    """A row of the tables on one architecture, for one cell and one set of optional inputs."""

    arch: int
    kernel: str
    numbers: str
    cell: str
    features: str
    direction: str
    H: int
    config: Config
    most: int
    """The largest H that the row holds for; `H` is what it is compiled for."""

    def __str__(self) -> str:
        c = self.config
        tiles = f"B{c.BLOCK_B} H{c.BLOCK_H} K{c.BLOCK_K} w{c.num_warps}"
        tiles += "" if c.maxnreg is None else f" r{c.maxnreg}"
        return (
            f"sm_{self.arch} {self.direction}_{self.kernel} {self.numbers} {self.cell} "
            f"{self.features} to {self.H}: {tiles}"
        )


def points() -> Iterator[Point | GeneratePoint]:
    """Every row of the scans and of `generate`."""
    yield from {str(point): point for point in scans()}.values()
    yield from resources_generate.points()


def scans() -> Iterator[Point]:
    """Every row where it may be taken, and the tiles of `step`; a point may come twice."""
    for cell, features, archs in VARIANTS:
        for arch in archs:
            for direction in ("forward", "backward"):
                yield from _rows(arch, cell, features, direction)
                if features != "plain" or arch in EVERY_PLAIN:
                    yield from _steps(arch, cell, features, direction)


def _rows(arch: int, cell: str, features: str, direction: str) -> Iterator[Point]:
    """Those that some call with such inputs takes, at their largest H and at an odd one."""
    device, plain = DEVICES[arch], features == "plain"
    norm = norm_tables.offered(device, direction) if cell == "reset_after" else ()
    rows = (*tables.offered(device, direction), *norm)
    for number, row in enumerate(rows):
        if plain and arch not in EVERY_PLAIN and not row.plain:
            continue
        taken = []
        for H in (min(row.H, MOST_H), min(row.H - 7, NOT_ALIGNED)):
            sizes = Sizes(2, 4, 1, H, cell, dtype_of(row.numbers, arch), row.numbers, plain)
            before = [other for other in rows[:number] if other.holds(sizes)]
            if row.holds(sizes) and not any(_goes_before(other, row) for other in before):
                taken.append(H)
        both = (cell, plain) == ("reset_after", False) and arch in EVERY_ODD
        for H in taken if both else taken[:1]:
            of = (cell, features, direction)
            yield Point(arch, row.kernel, row.numbers, *of, H, row.config, min(row.H, MOST_H))


def _goes_before(earlier: Row, row: Row) -> bool:
    """Whether it is taken in place of the other: it fills the device no more often."""
    tiles, others = earlier.config, row.config
    same = (earlier.kernel, earlier.H) == (row.kernel, row.H)
    return same and tiles.BLOCK_B >= others.BLOCK_B and tiles.BLOCK_H >= others.BLOCK_H


def _steps(arch: int, cell: str, features: str, direction: str) -> Iterator[Point]:
    for numbers in ("16", "tf32", "tf32x3") if arch >= 80 else ("16", "ieee"):
        sizes = Sizes(2, 4, 1, 256, cell, dtype_of(numbers, arch), numbers)
        config = tables.config("step", DEVICES[arch], sizes, direction)
        for H in (256, NOT_ALIGNED) if features == "everything" else (256,):
            yield Point(arch, "step", numbers, cell, features, direction, H, config, 256)


def sample() -> Iterator[Point | GeneratePoint]:
    """A few of them, of each kernel and for each kind of architecture."""
    yield from _sample_of_scans()
    yield from resources_generate.sample()


def _sample_of_scans() -> Iterator[Point]:
    wanted = {
        (90, "cta", "16", 128), (90, "grid", "16", 512), (80, "cta", "tf32", 64),
        (75, "cta", "ieee", 64), (100, "grid", "tf32", 256), (120, "step", "16", 256),
        (90, "norm", "16", 64),
    }  # fmt: skip
    for point in scans():
        key = (point.arch, point.kernel, point.numbers, point.H)
        if key in wanted and (point.direction == "backward" or point.arch == 90):
            if point.direction == "backward" or point.config.BLOCK_B == 8:
                yield point
            if point.direction == "backward":
                wanted.discard(key)
    assert not wanted, wanted


def compile_point(point: Point | GeneratePoint) -> dict[str, Resources]:
    """By the name of the point, and for launches of several binaries a number."""
    if isinstance(point, GeneratePoint):
        return resources_generate.compile_point(point)
    launches = _launch_norm(point) if point.kernel == "norm" else _launch(point)
    wanted = f"{point.direction}_{point.kernel}"
    binaries = {id(x.compiled): x for x in launches if x.kernel == wanted}
    found = [compiled.resources(launch) for launch in binaries.values()]
    return {f"{point} #{i}" if i else str(point): used for i, used in enumerate(found)}


def _launch(point: Point) -> list[compiled.Launch]:
    dtype = dtype_of(point.numbers, point.arch)
    inputs = layer_inputs(Case(point.cell, point.features, T=2, B=4, I=4, H=point.H), dtype)
    before = problem.dot_precision, registry.KERNELS[point.kernel]
    problem.dot_precision = lambda tensor: point.numbers if point.numbers != "16" else "tf32"
    registry.KERNELS[point.kernel] = registry.Kernel(point.kernel, lambda *_: point.config)
    mode = (point.cell, [False], False)
    slots = problem.SLOTS[point.cell]
    try:
        with compiled.dry_launches(point.arch) as launches:
            if point.direction == "forward":
                kernels.layer(*inputs.arguments(), kernel=point.kernel)
            else:
                output = inputs.x.new_zeros(2, 4, point.H)
                workspace = inputs.x.new_zeros(2, 4, 1, slots * point.H)
                kernels.layer_backward(
                    output, inputs.h0, None, *inputs.arguments()[:10], output, workspace, *mode,
                    [True] * 8, kernel=point.kernel,
                )  # fmt: skip
    finally:
        problem.dot_precision, registry.KERNELS[point.kernel] = before
    return launches


def _launch_norm(point: Point) -> list[compiled.Launch]:
    dtype = dtype_of(point.numbers, point.arch)
    arguments = norm_arguments(Case("reset_after", point.features, T=2, B=4, H=point.H), dtype)
    before = problem.dot_precision, norm_tables.config
    problem.dot_precision = lambda tensor: point.numbers if point.numbers != "16" else "tf32"
    norm_tables.config = lambda *_: point.config
    try:
        with compiled.dry_launches(point.arch) as launches:
            if point.direction == "forward":
                norm_ops.norm_scan(*arguments)
            else:
                h0 = arguments[1]
                sizes = ((2, 4, point.H), (2, 4, 1, 6 * point.H), (2, 4, 1))
                saved = [h0.new_zeros(size) for size in sizes]
                norm_ops.norm_scan_backward(
                    saved[0], h0, *arguments[:9], *saved, *arguments[9:], [True] * 7
                )
    finally:
        problem.dot_precision, norm_tables.config = before
    return launches


def read() -> dict[str, list[int]]:
    return json.loads(SNAPSHOT.read_text()) if SNAPSHOT.exists() else {}
