# SPDX-License-Identifier: Apache-2.0
"""`memory_estimate` beside what calls take, and the table of docs/memory.md beside it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gru_fast
from gru_fast import ops
from torch_threads import torch_threads

ROOT = Path(__file__).parents[1]

# T, B, H, options of the module, mode.
MEASURED = [
    (256, 32, 256, {}, "infer"),
    (64, 32, 256, {"num_layers": 2, "bidirectional": True}, "infer"),
    (128, 64, 256, {}, "train"),
    (128, 64, 256, {"recompute": True}, "train"),
    (400, 16, 128, {"num_layers": 3, "cell": "reset_before"}, "train"),
    (64, 32, 256, {"bidirectional": True, "cell": "no_reset"}, "train"),
    (4, 8, 512, {"num_layers": 2, "bidirectional": True}, "train"),
    (4, 8, 512, {"num_layers": 2, "bidirectional": True, "recompute": True}, "train"),
    (4, 8, 512, {"num_layers": 3, "bidirectional": True}, "infer"),
    (256, 64, 128, {"num_layers": 2, "dropout": 0.5}, "train"),
    (1, 1, 2048, {}, "infer"),
    (100, 1, 1024, {}, "infer"),
    (1, 64, 1024, {"num_layers": 2}, "train"),
    (4, 8, 1024, {"num_layers": 2}, "train"),
    (200, 1, 1024, {"num_layers": 2}, "train"),
]

# A child for each call, so that none finds memory that another has left.
SCRIPT = """
import json, os, sys
import torch
import gru_fast
from benchmarks.memory import cpu_footprint

def call(module, x, mode):
    if mode == "infer":
        with torch.no_grad():
            return module(x)
    output, _ = module(x)
    output.backward(torch.ones_like(output))
    return output

torch.set_num_threads(1)
for T, B, H, options, mode in json.loads(sys.argv[1]):
    if os.fork() == 0:
        torch.mm(torch.ones(512, 512), torch.ones(512, 512))
        for both in (False, True):
            call(gru_fast.GRU(64, 64, 2, bidirectional=both), torch.ones(64, 32, 64), mode)
        module, x = gru_fast.GRU(H, H, **options), torch.randn(T, B, H)
        print(cpu_footprint(lambda: call(module, x, mode))["peak_bytes"], flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


# What is freed is given back at once, and no page is larger than what lies in it.
EXACT = {"MALLOC_MMAP_THRESHOLD_": "131072", "GRU_FAST_HUGE_PAGES": "0"}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux' /proc")
@pytest.mark.skipif(not ops.HAS_CPU_KERNELS, reason="built without CPU kernels")
def test_measured_peaks():
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(MEASURED)],
        cwd=ROOT,
        env=os.environ | EXACT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    measured = [int(line) for line in run.stdout.split()]
    for (T, B, H, options, mode), found in zip(MEASURED, measured, strict=True):
        module = gru_fast.GRU(H, H, **options)
        with torch_threads(1):  # as the child has
            estimate = gru_fast.memory_estimate(module, T, B, training=mode == "train").peak
        assert abs(found - estimate) <= 0.05 * estimate + 2**20, (T, B, H, options, mode)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("cell", ["reset_after", "reset_before", "no_reset"])
def test_what_is_saved(cell, recompute):
    module = gru_fast.GRU(16, 16, 2, cell=cell, recompute=recompute, dtype=torch.float64)
    held = {}

    def note(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(40, 3, 16, dtype=torch.float64)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        module(x)
    for given in (x, *module.parameters()):
        held.pop(given.untyped_storage().data_ptr())
    states = 2 * 2 * 3 * 16 * 8
    estimate = gru_fast.memory_estimate(module, 40, 3)
    assert sum(held.values()) <= estimate.saved <= sum(held.values()) + states
    assert estimate.peak > estimate.saved


def table():
    """Rows of docs/memory.md: sizes, then MB of inference, training, recompute, tbptt of 64."""
    for H, B, T in (
        (64, 32, 1000),
        (128, 32, 1000),
        (256, 32, 1000),
        (512, 64, 500),
        (1024, 64, 500),
    ):
        gru = gru_fast.GRU(H, H, device="meta")
        calls = ((T, {"training": False}), (T, {}), (T, {"recompute": True}), (64, {}))
        peaks = [gru_fast.memory_estimate(gru, steps, B, **call).peak for steps, call in calls]
        yield " | ".join([f"{H}, {B}, {T}", *(f"{peak / 1e6:.0f}" for peak in peaks)])


def test_the_table_is_the_estimates():
    page = (ROOT / "docs" / "memory.md").read_text()
    assert re.findall(r"^\| (\d+, \d+, \d+ .*) \|$", page, re.MULTILINE) == list(table())


@pytest.mark.parametrize(
    ("module", "T", "error", "message"),
    [
        (torch.nn.GRU(2, 2), 1, TypeError, "module should be a gru_fast.GRU, got: GRU"),
        (gru_fast.GRU(2, 2), 1.5, TypeError, "T should be of type int, got: float"),
        (gru_fast.GRU(2, 2), -1, ValueError, "T, B: expected at least 0, got -1, 3"),
        (
            gru_fast.GRU(2, 2).half(),
            1,
            ValueError,
            r"expected float32 or float64, got torch.float16",
        ),
        (gru_fast.GRU(2, 2, num_heads=2), 1, ValueError, "expected num_heads=1, got 2"),
    ],
)
def test_bad_arguments(module, T, error, message):
    with pytest.raises(error, match=message):
        gru_fast.memory_estimate(module, T, 3)


def test_nothing_to_do():
    assert gru_fast.memory_estimate(gru_fast.GRU(2, 3), 0, 0).saved == 0
