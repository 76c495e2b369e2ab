# SPDX-License-Identifier: Apache-2.0
"""Calls with lengths past the dispatcher: the bits of the operator, and nothing read of padding."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import gru_fast
from cases import CELLS
from direct_spy import (
    DTYPES,
    Spy,
    assert_as_by_ops,
    assert_trained_as_by_ops,
    assert_twice_differentiated_as_by_ops,
    leaves_of,
    trains,
)

pytest.importorskip("gru_fast._C", reason="gru_fast was built without its CPU kernels")

I, H = 5, 19  # noqa: E741
LENGTHS = {
    "none": [0, 0],
    "one": [4],
    "full": [6, 6, 6],
    "ragged": [7, 2, 0, 1, 3],
    "many": [k * 7 % 40 for k in range(33)],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("cell", CELLS)
@torch.no_grad()
def test_inference(
    spy: Spy, isa: str, cell: str, both: bool, name: str, layers: int, dtype: torch.dtype
) -> None:
    lengths = torch.tensor(LENGTHS[name])
    T, B = max(1, int(lengths.max())), len(lengths)
    h = torch.randn(layers * (1 + both), B, H, dtype=dtype)
    for batch_first in (False, True):
        x = torch.randn(*((B, T, I) if batch_first else (T, B, I)), dtype=dtype)
        options = {"bidirectional": both, "cell": cell, "dtype": dtype}
        module = gru_fast.GRU(I, H, layers, batch_first=batch_first, **options)
        assert_as_by_ops(lambda module=module, x=x: module(x, h, lengths=lengths))
        assert_as_by_ops(lambda module=module, x=x: module(x, lengths=lengths))
        with gru_fast.prepacked(module):
            assert_as_by_ops(lambda module=module, x=x: module(x, h, lengths=lengths))
    assert spy.taken == 6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_training(
    spy: Spy, backward_spy: Spy, isa: str, cell: str, both: bool, name: str, layers: int,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    lengths = torch.tensor(LENGTHS[name])
    T, B = max(1, int(lengths.max())), len(lengths)
    module = gru_fast.GRU(I, H, layers, bidirectional=both, cell=cell, dtype=dtype)
    x = torch.randn(T, B, I, dtype=dtype, requires_grad=True)
    h = torch.randn(layers * (1 + both), B, H, dtype=dtype, requires_grad=True)
    assert_trained_as_by_ops(lambda: module(x, h, lengths=lengths), leaves_of(module, x, h))
    assert spy.taken == backward_spy.taken == (layers if trains(dtype) else 0)


@pytest.mark.parametrize("both", [False, True])
def test_many_units_and_threads(spy: Spy, threads: int, both: bool) -> None:
    module = gru_fast.GRU(I, 270, 2, bidirectional=both)
    x = torch.randn(9, 10, I, requires_grad=True)
    lengths = torch.tensor([9, 5, 0, 8, 2, 1, 9, 9, 9, 3])
    assert_trained_as_by_ops(lambda: module(x, lengths=lengths), leaves_of(module, x))
    with torch.no_grad():
        assert_as_by_ops(lambda: module(x, lengths=lengths))
        assert_as_by_ops(lambda: module(x[:, 0], lengths=lengths[1:2]))
    assert spy.taken == 4


@pytest.mark.parametrize("grad", [False, True])
def test_nothing_is_read_of_padding(spy: Spy, poisoned_memory: None, grad: bool) -> None:
    module = gru_fast.GRU(I, H, 2, bidirectional=True)
    lengths, x = torch.tensor([7, 2, 0, 1, 3]), torch.randn(7, 5, I)
    x[torch.arange(7)[:, None] >= lengths] = torch.nan
    x.requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        output, h_n = module(x, lengths=lengths)
    results = [output, h_n]
    if grad:
        results += torch.autograd.grad(output.sum() + h_n.sum(), leaves_of(module, x))
        assert spy.taken == 2
    assert not any(t.isnan().any() for t in results)
    assert not output[torch.arange(7)[:, None] >= lengths].any()


def test_second_derivatives(spy: Spy) -> None:
    module, x = gru_fast.GRU(I, H), torch.randn(4, 3, I, requires_grad=True)
    lengths, leaves = torch.tensor([4, 0, 2]), leaves_of(module, x)

    assert_twice_differentiated_as_by_ops(spy, lambda: module(x, lengths=lengths)[0], leaves)
    assert spy.taken == 1


@pytest.mark.parametrize(
    "change", [lambda n: n.fill_(1), lambda n: n.add_(1)], ids=["shorter", "too long"]
)
def test_lengths_that_were_changed_before_backward_are_refused(
    spy: Spy, change: Callable[[Tensor], Tensor]
) -> None:
    module, lengths = gru_fast.GRU(I, H), torch.tensor([4, 3])
    output, _ = module(torch.randn(4, 2, I), lengths=lengths)
    change(lengths)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
    assert spy.taken == 1
