# SPDX-License-Identifier: Apache-2.0
"""Sizes at the edges: more than 2**31 elements, a single unit, a single feature, 10,000 steps."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import gru_fast
from gru_fast import ops
from helpers import assert_parity

# In a process whose large tensors lie in folded memory. Rows of length 0 but for the first and the
# last, which fall on different places in it; what they get must be what two rows alone get.
LARGE = """
import torch
from gru_fast import ops

T, B, I, H = 600, 2**16 + 3, 64, 64
assert T * B * H > 2**31
generator = torch.Generator().manual_seed(0)
lengths = torch.zeros(B, dtype=torch.int64)
lengths[0], lengths[-1] = T, T - 7
rows = [0, B - 1]
few = torch.randn(T, 2, I, generator=generator)
x = torch.empty(T, B, I)
x[:, rows] = few
h0, grad_h_n = torch.zeros(1, B, H), torch.zeros(1, B, H)
h0[:, rows] = torch.randn(1, 2, H, generator=generator)
grad_h_n[:, rows] = torch.randn(1, 2, H, generator=generator)
weights = [torch.randn(1, 3 * H, I, generator=generator) / 8,
           torch.randn(1, 3 * H, H, generator=generator) / 8, None, None]
WANTED = [True] * 4 + [False] * 4


def run(x, h0, lengths, grad_h_n, reverse):
    call = (x, h0, *weights, lengths, None, None, None)
    mode = ("reset_after", [reverse], True)
    output, h_n, workspace = ops.layer(*call, *mode)
    grads = ops.layer_backward(None, grad_h_n, None, *call, output, workspace, *mode, WANTED)
    return output, h_n, *grads[:4]


large = run(x, h0, lengths, grad_h_n, True)
small = run(few, h0[:, rows], lengths[rows], grad_h_n[:, rows], True)
for i in (0, 1, 2, 3):
    assert torch.equal(large[i][:, rows], small[i]), i
for i in (4, 5):
    torch.testing.assert_close(large[i], small[i])
assert small[0].any() and small[2].any()
print(open("/proc/self/status").read().split("RssAnon:")[1].split()[0])  # kB, the folds excluded
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs memfd_create and LD_PRELOAD")
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.skipif(not ops.HAS_CPU_KERNELS, reason="built without CPU kernels")
def test_more_elements_than_32_bits_can_count(tmp_path):
    source = Path(__file__).parent / "cpp" / "folded_memory.cpp"
    library = tmp_path / "folded_memory.so"
    flags = ["-shared", "-fPIC", "-O1", "-std=c++17", "-Wall", "-Werror"]
    subprocess.run(["g++", *flags, str(source), "-o", str(library), "-ldl"], check=True)
    run = subprocess.run(
        [sys.executable, "-c", LARGE],
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert int(run.stdout) < 4 * 2**20, "folded memory was not used"


def results(module, x):
    output, h_n = module(x)
    if not torch.is_grad_enabled():
        return [output, h_n]
    grads = torch.autograd.grad(output.square().mean() + h_n.sum(), list(module.parameters()))
    return [output.detach(), h_n.detach(), *grads]


def compare(I, H, T, draws, std=None, **options):  # noqa: E741
    """Ours beside nn.GRU, and both beside nn.GRU in float64."""
    found = [[], [], []]
    for draw in range(draws):
        torch.manual_seed(draw)
        theirs = nn.GRU(I, H, **options)
        for weight in theirs.parameters() if std else ():
            nn.init.normal_(weight, std=std)
        ours, exact = gru_fast.GRU(I, H, **options), nn.GRU(I, H, **options).double()
        for module in (ours, exact):
            module.load_state_dict(theirs.state_dict())
        x = torch.randn(T, 3, I)
        for values, module in zip(found, (ours, theirs, exact), strict=True):
            values.append(results(module, x.double() if module is exact else x))
    names = ["output", "h_n", *dict(theirs.named_parameters())]
    for i, name in enumerate(names[: len(found[0][0])]):
        assert_parity(name, *([values[i] for values in kind] for kind in found))
    return found


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("I", "H"), [(1, 1), (1, 7), (7, 1)])
def test_one_unit_and_one_feature(I, H, bidirectional, one_thread):  # noqa: E741
    compare(I, H, 9, draws=12, num_layers=2, bidirectional=bidirectional)


@pytest.mark.usefixtures("one_thread")
def test_ten_thousand_steps():
    """Rounding does not add up: the last steps are as good as nn.GRU's."""
    with torch.no_grad():
        found = compare(5, 8, 10_000, draws=2, std=0.7)  # weights whose states keep moving
    assert_parity("last steps", *([values[0][-50:] for values in kind] for kind in found))


@pytest.mark.usefixtures("one_thread")
def test_gradients_over_a_thousand_steps():
    """Not more of them: the backward pass of nn.GRU on the CPU takes time with their square."""
    compare(5, 8, 1000, draws=2, std=0.7)
