# SPDX-License-Identifier: Apache-2.0
"""The layer-normalised GRU on a GPU: `pytest -m gpu tests/test_layer_norm_gpu.py`."""

import pytest
import torch
from torch import Tensor

from cases import Case
from gru_fast import LayerNormGRU, explain, reference_norm
from helpers import assert_parity
from norm_cases import RESULTS, cast, norm_arguments, outcome
from repository_tools import load

if not torch.cuda.is_available():
    pytest.skip("there is no GPU here", allow_module_level=True)

pytest.importorskip("triton")

from gru_fast import kernels  # where triton is, a package without them is an error

pytestmark = pytest.mark.gpu

float32_as = load("benchmarks.precision").float32_as
NUMBERS = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
ROUNDING = {"tf32": 2.0**-10, "float32": 2.0**-21}


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("H", [20, 32, 64])
@pytest.mark.parametrize("features, recompute", [("plain", False), ("everything", True)])
def test_parity(features, recompute, H, numbers):
    found: list[list[list[Tensor]]] = [[], [], []]
    dtype = NUMBERS[numbers]
    case = Case("reset_after", features, (False, True), T=9, B=37, H=H)
    for draw in range(2):
        arguments = norm_arguments(case, dtype, draw=draw)
        arguments = [a.cuda() if isinstance(a, Tensor) else a for a in arguments]
        if kernels.norm_why_not(torch.device("cuda"), dtype, H, features == "plain") is not None:
            pytest.skip("no tiles of this size fit this GPU")
        with float32_as(numbers):
            found[0].append(outcome(kernels, arguments, recompute))
            found[1].append(outcome(reference_norm, arguments, recompute))
        found[2].append(outcome(reference_norm, cast(arguments, torch.float64), recompute))
    for k, name in enumerate(RESULTS):
        values = ([draw[k] for draw in side] for side in found)
        assert_parity(name, *values, rounding=ROUNDING.get(numbers))


@pytest.mark.parametrize("H", [64, 300])
def test_module(H):
    """The kernel where a tile fits, the reference where none does; the same numbers as the CPU."""
    rnn = LayerNormGRU(12, H, 2, bidirectional=True)
    x = torch.randn(7, 3, 12)
    expected, _ = rnn(x)
    rnn.cuda()
    with float32_as("float32"):
        output, _ = rnn(x.cuda())
        output.sum().backward()
    torch.testing.assert_close(output.cpu(), expected, rtol=0, atol=1e-4)
    told = explain(rnn, x.cuda())
    assert told.backend == ("triton" if H == 64 else "reference")
