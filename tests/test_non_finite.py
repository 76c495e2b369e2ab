# SPDX-License-Identifier: Apache-2.0
"""Infinite inputs and NaN: they reach what they reach in the reference, and nothing else."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from cases import CELLS, Case, LayerInputs, layer_inputs
from gru_fast import GRU, Stream, ops, packed, reference

_C = pytest.importorskip("gru_fast._C", reason="gru_fast was built without its CPU kernels")

# Where bfloat16 has words that reach a lane further, one register and pairs of them, and without.
SIZES = (1, 17, 32, 63)
BAD = (float("inf"), float("-inf"), float("nan"))


def with_value(inputs: LayerInputs, value: float) -> LayerInputs:
    """The same with one value of the second step of the first row."""
    x = inputs.x.clone()
    x[1, 0, 2] = value
    return replace(inputs, x=x)


def first_row(inputs: LayerInputs) -> LayerInputs:
    return replace(inputs, x=inputs.x[:, :1], h0=inputs.h0[:, :1])


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("value", BAD)
def test_a_bad_input_stays_in_its_row(
    isa: str, cell: str, dtype: torch.dtype, value: float
) -> None:
    for H in SIZES:
        clean = layer_inputs(Case(cell, T=5, B=3, H=H), dtype)
        inputs = with_value(clean, value)
        output, h_n, workspace = ops.layer(*inputs.arguments())
        expected = reference.layer(*inputs.to(torch.float64).arguments())[0]
        assert torch.equal(output.isfinite(), expected.isfinite()), H
        for ours, others in zip((output, h_n), ops.layer(*clean.arguments()), strict=False):
            assert torch.equal(ours[:, 1:], others[:, 1:])
        # One row takes other paths through the kernels than three.
        alone = first_row(inputs)
        for one, all_rows in zip(
            ops.layer(*alone.arguments()), (output, h_n, workspace), strict=True
        ):
            assert same(one, all_rows[:, :1])


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("recompute", (False, True))
def test_a_bad_gradient_stays_in_its_row(
    isa: str, cell: str, dtype: torch.dtype, recompute: bool
) -> None:
    for H in SIZES:
        arguments = layer_inputs(Case(cell, T=5, B=3, H=H), dtype).arguments(recompute=recompute)
        output, _, workspace = ops.layer(*arguments)
        grad = torch.randn(output.shape, dtype=torch.float64).to(dtype)

        def rows_of(grad: Tensor, state: list[object]) -> list[Tensor]:
            mask = [True, True] + [False] * 6
            return ops.layer_backward(grad, None, None, *state, mask)[:2]

        state = [*arguments[:10], output, workspace, *arguments[10:]]
        clean = rows_of(grad, state)
        for value in BAD:
            bad = grad.clone()
            bad[3, 0, H - 1] = value
            for ours, others in zip(rows_of(bad, state), clean, strict=True):
                assert not ours[:, 0].isfinite().all()
                assert torch.equal(ours[:, 1:], others[:, 1:])


def test_every_nan_stays_one_in_narrow_weights(sampler_isa: str) -> None:
    """Also one whose bits are all ones, which rounding would carry beyond the exponent."""
    x = torch.randn(2, 5)
    for bits in (-1, 0x7FFFFFFF, 0x7F800001):
        nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
        gru = GRU(5, 7)
        frames = x.clone()
        frames[0, 2] = nan
        assert Stream(gru, "bfloat16").push(frames).isnan().all()
        with torch.no_grad():
            gru.weight_ih_l0[3, 1] = nan
        assert Stream(gru, "bfloat16").push(x)[0, 3].isnan()
        # Refused in Python; the C interface does not look at weights.
        layer = [w.detach().numpy() for w in gru._flat_weights]
        stack = _C.PackedStack("reset_after", "int8", None, [tuple(layer)], None, None)
        assert np.isnan(_C.Stream(stack).push(x.numpy())[0, 3])


@pytest.mark.parametrize("weights", packed.WEIGHTS)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("value", (BAD[0], BAD[2]))
def test_a_stream_recovers_at_its_reset(
    sampler_isa: str, weights: str, cell: str, value: float
) -> None:
    for H in SIZES:
        gru = GRU(5, H, num_layers=2, cell=cell)
        stream = Stream(gru, weights)
        x = torch.randn(6, 5)
        clean = stream.push(x).clone()
        stream.reset()
        bad = x.clone()
        bad[1, 2] = value
        if weights == "int8":
            with pytest.raises(ValueError, match="finite"):
                stream.push(bad)
        else:
            output = stream.push(bad)
            assert output.isfinite().all() == (not math.isnan(value)), H
        stream.reset()
        assert torch.equal(stream.push(x), clean), H
