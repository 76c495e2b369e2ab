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
from gru_fast.kernels.tiling import Config
from norm_cases import norm_arguments
from triton_support import compiled, resources_generate
from triton_support.compiled import DEVICES, Resources
from triton_support.resources_generate import GeneratePoint, dtype_of

SNAPSHOT = Path(__file__).parent / f"resources-triton-{triton.__version__}.json"
VARIANTS = (
    ("reset_after", "everything", (90, 80, 100, 75, 86, 120)),
    ("reset_before", "everything", (90,)),
    ("reset_after", "plain", (90,)),
    ("reset_after", "everything", (89,)),
)
"""Cells and optional inputs that rows are compiled for, and where: what takes most comes first."""

MOST_H = 1024
"""The H that rows without a limit are compiled for."""


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
    yield from _scans()
    yield from resources_generate.points()


def _scans() -> Iterator[Point]:
    """Every row where it may be taken, and the tiles of `step`."""
    for cell, features, archs in VARIANTS:
        for arch in archs:
            device = DEVICES[arch]
            for direction in ("forward", "backward"):
                norm = norm_tables.offered(device, direction) if cell == "reset_after" else ()
                for row in (*tables.offered(device, direction), *norm):
                    if features == "plain" or not row.plain:
                        yield Point(
                            arch, row.kernel, row.numbers, cell, features, direction,
                            min(row.H, MOST_H), row.config,
                        )  # fmt: skip
            for numbers in ("16", "tf32", "tf32x3") if arch >= 80 else ("16", "ieee"):
                sizes = tables.Sizes(2, 4, 1, 256, cell, dtype_of(numbers, arch), numbers)
                for direction in ("forward", "backward"):
                    config = tables.config("step", device, sizes, direction)
                    yield Point(arch, "step", numbers, cell, features, direction, 256, config)


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
    for point in _scans():
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
