# SPDX-License-Identifier: Apache-2.0
"""Where the choice of a GPU kernel turns, to the last processor and wave; needs no GPU."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from gru_fast.kernels import (
    generate_tables,
    measured,
    problem,
    registry,
    tables,
    tiling,
)
from gru_fast.kernels.generate_tables import Model
from gru_fast.kernels.measured import Point
from gru_fast.kernels.tiling import Device, Sizes

SHARED = 227 * 1024


def sizes(H: int, B: int = 1, numbers: str = "16", plain: bool = True) -> Sizes:
    dtype = torch.float16 if numbers == "16" else torch.float32
    return Sizes(512, B, 1, H, "reset_after", dtype, numbers, plain)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_grid_takes_as_many_processors_as_it_has_tiles(direction):
    """All of its programs have to run at once; 64 units are the most that one has."""
    call = sizes(1024)
    enough = tables.config("grid", Device(90, SHARED, 16), call, direction)
    assert enough is not None and enough.BLOCK_H == 64
    assert tables.config("grid", Device(90, SHARED, 15), call, direction) is None


def test_generate_grid_takes_as_many_processors_as_it_has_tiles():
    model = Model(sizes(1024, numbers="tf32x3"), 1, 65)
    enough = generate_tables.config_of("grid", Device(90, SHARED, 32), model)
    assert enough is not None and enough.BLOCK_H == 32
    assert generate_tables.config_of("grid", Device(90, SHARED, 31), model) is None


def test_grid_fills_a_device_twice_and_not_three_times():
    """On one where nothing is measured."""
    device, seen = Device(100, SHARED, 148), {}
    for B in range(16, 2048, 16):
        call = sizes(1024, B)
        waves = tables.waves(tables.config("grid", device, call, "forward"), device, call)
        seen[waves] = registry.choose(device, call, "forward", "train")[0].name
        assert seen[waves] == ("grid" if waves <= 2 else "step"), (B, waves)
    assert {1, 2, 3} <= set(seen)


def test_a_crowd_that_was_measured_stays(monkeypatch):
    point = Point(90, "train", "float16", 1024, 4096, 512, "grid", 1.2)
    device, call = Device(90, SHARED, 132), sizes(1024, 4096)
    assert registry.choose(device, call, "forward", "train")[0].name == "step"
    monkeypatch.setattr(measured, "POINTS", (point,))
    assert registry.choose(device, call, "forward", "train")[0].name == "grid"


def test_what_explain_names_depends_on_optional_inputs():
    """Which have tiles of half the rows here, and so twice the waves."""
    call = torch.device("cpu"), torch.float16, (512, 2112, 1, 512), "reset_after", "infer"
    assert registry.chosen(*call, True) == ("grid", False)
    assert registry.chosen(*call, False) == ("step", False)


def test_a_named_kernel_needs_tiles_for_the_whole_call(monkeypatch):
    """Both ways, and with the optional inputs; no row of today's tables lacks one of them alone."""
    tiles, call = tiling.Config(8, 64, 64, 4), (torch.float32, (2, 2, 1, 3), "reset_after")
    for lacking in (lambda s, way: way == "backward", lambda s, way: not s.plain):
        monkeypatch.setitem(
            registry.KERNELS,
            "cta",
            registry.Kernel("cta", lambda _, s, way, no=lacking: None if no(s, way) else tiles),
        )
        assert "no compiled tiles" in registry.why_not("cta", torch.device("cpu"), *call, False)


@pytest.mark.parametrize(
    "capability, hip, expected",
    [((7, 5), None, "ieee"), ((8, 0), None, "tf32x3"), ((9, 4), "6.4", "ieee")],
    ids=["before-ampere", "ampere", "amd"],
)
def test_how_products_of_float32_round(capability, hip, expected, monkeypatch):
    found = Device(10 * capability[0] + capability[1], 0, 0)
    monkeypatch.setattr(problem, "device_of", lambda tensor: found)
    monkeypatch.setattr(torch.version, "hip", hip)
    before = torch.backends.cudnn.rnn.fp32_precision
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    try:
        with FakeTensorMode():
            assert problem.dot_precision(torch.empty(1, device="cuda")) == expected
    finally:
        torch.backends.cudnn.rnn.fp32_precision = before


def test_rows_too_far_apart_for_a_tile_are_copied():
    """Offsets within a tile of 256 rows have 32 bits."""
    for stride, copied in ((2**23, False), (2**23 + 1, True)):
        gates_x = torch.empty_strided((1, 2, 1, 3), (1, stride, 3, 1), device="meta")
        h0, weight = torch.empty(1, 2, 1, device="meta"), torch.empty(1, 3, 1, device="meta")
        call = problem.problem_of(
            gates_x, h0, weight, None, None, None, None, None, "reset_after", [False]
        )
        assert call.gates_x.is_contiguous() == copied


def test_waves_count_every_group():
    config = tiling.Config(8, 64, 64, 4)
    device = Device(90, SHARED, 16)
    both = Sizes(512, 9, 2, 256, "reset_after", torch.float16, "tf32")
    # Two tiles of rows, four of units.
    assert tables.waves(config, device, both) == 1
    assert tables.waves(config, replace(device, processors=15), both) == 2
