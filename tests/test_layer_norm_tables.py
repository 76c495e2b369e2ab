# SPDX-License-Identifier: Apache-2.0
"""Which sizes the layer-normalised Triton kernels have tiles for, on which device."""

from itertools import product

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from gpu_devices import DEVICES, KIB, sizes
from gru_fast import kernels
from gru_fast.kernels import norm_tables, problem
from gru_fast.kernels.tiling import Device

NORM_MOST = {
    75: {"16": 64, "ieee": 64},
    80: {"16": 128, "tf32": 64, "tf32x3": 64},
    86: {"16": 64, "tf32": 64, "tf32x3": 32},
    89: {"16": 64, "tf32": 64, "tf32x3": 32},
    90: {"16": 128, "tf32": 64, "tf32x3": 64},
    100: {"16": 128, "tf32": 64, "tf32x3": 64},
    120: {"16": 64, "tf32": 64, "tf32x3": 32},
}
"""The largest H that the layer-normalised kernels have tiles for; what is above takes torch."""


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: f"sm_{d.arch}")
@pytest.mark.parametrize("plain", [False, True])
def test_largest(device, plain):
    for numbers in ("16", "tf32", "tf32x3", "ieee"):
        most = NORM_MOST[device.arch].get(numbers, 0)
        if plain and (device.arch, numbers) == (90, "tf32"):
            most = 128
        for H in (1, 31, 32, 33, 64, 65, 128, 129, 500):
            call = sizes(H=H, numbers=numbers, plain=plain)
            found = [norm_tables.config(device, call, way) for way in ("forward", "backward")]
            assert (None not in found) == (most >= H), (numbers, H)
            if None not in found:
                assert all(config.BLOCK_H >= H for config in found)


def test_by_memory():
    for arch, kib, numbers, H, fits in (
        (80, 163, "16", 128, True), (80, 99, "16", 128, False), (80, 99, "16", 64, True),
        (100, 99, "tf32x3", 64, False), (90, 48, "16", 64, False),
    ):  # fmt: skip
        found = norm_tables.config(
            Device(arch, kib * KIB, 108), sizes(H=H, numbers=numbers), "forward"
        )
        assert (found is not None) == fits


def test_said(monkeypatch):
    """What `explain` quotes, and what the operator goes by; asked without a tensor."""
    monkeypatch.setattr(problem, "device_of", lambda tensor: DEVICES[2])
    monkeypatch.setattr(problem, "dot_precision", lambda tensor: "tf32")
    where = torch.device("cuda")
    assert kernels.norm_why_not(where, torch.bfloat16, 64, False) is None
    assert kernels.norm_why_not(where, torch.bfloat16, 128, True) == (
        "no compiled tiles for H=128 in 16 on sm_86 (99 KiB of shared memory, 82 processors)"
    )


def test_asked_while_sizes_are_traced():
    def asked(x):
        assert kernels.norm_why_not(x.device, x.dtype, x.shape[1], True) is None
        return x.clone()

    make_fx(asked, tracing_mode="symbolic")(torch.empty(5, 16))


def test_every_row_is_reached():
    reached = set()
    for device, numbers, H, plain in product(
        DEVICES, ("16", "tf32", "tf32x3", "ieee"), (32, 64, 128), (False, True)
    ):
        call = sizes(H=H, numbers=numbers, plain=plain)
        for way in ("forward", "backward"):
            config = norm_tables.config(device, call, way)
            reached |= {
                row
                for row in norm_tables.offered(device, way)
                if row.holds(call) and row.config is config
            }
    assert reached == set(norm_tables.ROWS)
