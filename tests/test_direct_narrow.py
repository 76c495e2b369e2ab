# SPDX-License-Identifier: Apache-2.0
"""Numbers of 16 bits past the dispatcher: widened for the call, with the operators' bits.

What all dtypes share (cells, lengths, resets, heads, packed rows) is in the files beside this one.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import gru_fast
from cases import CELLS
from direct_spy import (
    Spy,
    assert_as_by_ops,
    assert_inferred_as_by_ops,
    is_widened,
    leaves_of,
    trained,
)

pytest.importorskip("gru_fast._C", reason="gru_fast was built without its CPU kernels")

I, H = 5, 19  # noqa: E741

pytestmark = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)

FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "steps far apart": lambda x: torch.cat([x, x])[::2],
    "rows far apart": lambda x: x.repeat(1, 2, 1)[:, ::2],
    "one row for all": lambda x: x[:, :1].expand(x.shape),
    "one step for all": lambda x: x[:1].expand(x.shape),
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "columns far apart": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_tensors_with_gaps(
    spy: Spy, isa: str, bias: bool, batch_first: bool, batch: int, form: str, dtype: torch.dtype
) -> None:
    module = gru_fast.GRU(I, H, 2, bias, batch_first, bidirectional=True, dtype=dtype)
    x = torch.randn(*((batch, 6, I) if batch_first else (6, batch, I)), dtype=dtype)
    h = torch.randn(4, batch, H, dtype=dtype)
    given, state = FORMS[form](x), FORMS[form](h)
    calls = (lambda: module(given), lambda: module(given, h), lambda: module(x, state))
    assert_inferred_as_by_ops(module, *calls)
    if form != "columns far apart":  # which the operators take, but for the second layer
        assert spy.taken == 6


@pytest.mark.parametrize("T", [1, 2, 5])
@pytest.mark.parametrize("B", [1, 2, 3, 9])
@pytest.mark.parametrize("size", [(300, 270), (33, 600), (1030, 131)], ids=str)
@pytest.mark.parametrize("cell", CELLS)
@torch.no_grad()
def test_long_rows(
    spy: Spy, threads: int, cell: str, size: tuple[int, int], B: int, T: int, dtype: torch.dtype
) -> None:
    """More than a block of the sum; weights beyond the second level of the cache."""
    inputs, units = size
    module = gru_fast.GRU(inputs, units, cell=cell, dtype=dtype)
    x, h = torch.randn(T, B, inputs, dtype=dtype), torch.randn(1, B, units, dtype=dtype)
    assert_inferred_as_by_ops(module, lambda: module(x, h))
    assert spy.taken == 2


@torch.no_grad()
def test_every_number(spy: Spy, isa: str, dtype: torch.dtype) -> None:
    """They are kept where z = 1, and halved, to the nearest, where z = 1/2 and n = 0."""
    if not is_widened(dtype):
        pytest.skip("its kernels work z out to 8 bits only")
    cell = gru_fast.GRUCell(1, 1, dtype=dtype)
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    h = bits.view(dtype)[:, None]
    h = h[h.isfinite()][:, None].contiguous()
    x = torch.zeros(len(h), 1, dtype=dtype)
    for parameter in cell.parameters():
        parameter.zero_()
    half = cell(x, h)
    cell.bias_hh[1] = 100
    assert torch.equal(cell(x, h), h)
    assert torch.equal(half, (h.float() / 2).to(dtype))
    assert spy.taken == 2 and len(h) == 2**16 - (2**11 if dtype == torch.float16 else 2**8)


@torch.no_grad()
def test_what_is_not_finite(isa: str, dtype: torch.dtype) -> None:
    module = gru_fast.GRU(3, 40, dtype=dtype)
    for value in (torch.inf, -torch.inf, torch.nan):
        x = torch.randn(4, 2, 3, dtype=dtype)
        x[2, 1, 0] = value
        output, h_n = module(x)
        assert output[:2].isfinite().all() and output[:, 0].isfinite().all()
        assert output[2:, 1].isnan().any() == h_n[0, 1].isnan().any() == (value != value)
        module.weight_hh_l0.data[7, 3] = value
        assert not torch.equal(module(x)[0], output)
        module.weight_hh_l0.data[7, 3] = 0


@torch.no_grad()
def test_large_calls_go_to_the_operators(spy: Spy, dtype: torch.dtype) -> None:
    """They take all threads to convert their numbers."""
    module = gru_fast.GRU(64, 64, dtype=dtype)
    for rows, taken in ((2048, 1), (2049, 1 if is_widened(dtype) else 2)):
        x = torch.randn(1, rows, 64, dtype=dtype)
        assert_as_by_ops(lambda x=x: module(x))
        assert spy.taken == taken


def test_gradients_are_the_operators(spy: Spy, isa: str, dtype: torch.dtype) -> None:
    module = gru_fast.GRU(I, H, dtype=dtype)
    x = torch.randn(3, 2, I, dtype=dtype, requires_grad=True)
    results: Any = trained(lambda: module(x), leaves_of(module, x))
    assert all(r.dtype == dtype and r.isfinite().all() for r in results)
    assert spy.taken == (0 if is_widened(dtype) else 1)
