# SPDX-License-Identifier: Apache-2.0
"""Calls with a reset_mask past the dispatcher: the bits of the operator, wherever the mask lies."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import gru_fast
from cases import CELLS
from direct_spy import (
    DTYPES,
    Spy,
    assert_as_by_ops,
    assert_inferred_as_by_ops,
    assert_trained_as_by_ops,
    assert_twice_differentiated_as_by_ops,
    leaves_of,
    profiled,
    trains,
)

pytest.importorskip("gru_fast._C", reason="gru_fast was built without its CPU kernels")

I, H = 5, 19  # noqa: E741
SIZES = {"one": (1, 1), "a step": (1, 3), "a row": (7, 1), "many": (8, 33)}
MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda m: m,
    "columns": lambda m: m.t().contiguous().t(),
    "every other": lambda m: m.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2],
    "of bytes": lambda m: (m.to(torch.uint8) * 2).view(torch.bool),
    "one row": lambda m: m[:, :1].expand_as(m),
}


def drawn(T: int, B: int, kind: str = "plain") -> Tensor:
    return MASKS[kind](torch.rand(T, B) < 0.3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("cell", CELLS)
@torch.no_grad()
def test_inference(
    spy: Spy, isa: str, cell: str, both: bool, size: str, layers: int, dtype: torch.dtype
) -> None:
    T, B = SIZES[size]
    h = torch.randn(layers * (1 + both), B, H, dtype=dtype)
    lengths = torch.arange(B) * 5 % (T + 1)
    for batch_first in (False, True):
        shape = (B, T) if batch_first else (T, B)
        x, mask = torch.randn(*shape, I, dtype=dtype), drawn(*shape)
        options: dict[str, Any] = {"bidirectional": both, "cell": cell, "dtype": dtype}
        module = gru_fast.GRU(I, H, layers, batch_first=batch_first, **options)
        assert_inferred_as_by_ops(
            module,
            partial(module, x, h, reset_mask=mask),
            partial(module, x, reset_mask=mask),
            partial(module, x, h, reset_mask=mask, lengths=lengths),
        )
    assert spy.taken == 12


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_training(
    spy: Spy, backward_spy: Spy, isa: str, cell: str, both: bool, size: str, layers: int,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    T, B = SIZES[size]
    module = gru_fast.GRU(I, H, layers, bidirectional=both, cell=cell, dtype=dtype)
    x = torch.randn(T, B, I, dtype=dtype, requires_grad=True)
    h = torch.randn(layers * (1 + both), B, H, dtype=dtype, requires_grad=True)
    mask, lengths, leaves = drawn(T, B), torch.arange(B) * 5 % (T + 1), leaves_of(module, x, h)
    assert_trained_as_by_ops(lambda: module(x, h, reset_mask=mask), leaves)
    assert_trained_as_by_ops(lambda: module(x, h, reset_mask=mask, lengths=lengths), leaves)
    assert spy.taken == backward_spy.taken == (2 * layers if trains(dtype) else 0)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_mask_may_lie_as_it_likes(spy: Spy, kind: str, batch_first: bool) -> None:
    module = gru_fast.GRU(I, H, 2, batch_first=batch_first)
    x, mask = torch.randn(6, 4, I, requires_grad=True), drawn(6, 4, kind)
    assert_trained_as_by_ops(lambda: module(x, reset_mask=mask), leaves_of(module, x))
    with torch.no_grad():
        assert_as_by_ops(lambda: module(x, reset_mask=mask))
        assert_as_by_ops(lambda: module(x[0], reset_mask=mask[0]))
    assert spy.taken == 4


def test_many_units_and_threads(spy: Spy, threads: int) -> None:
    module = gru_fast.GRU(I, 270, 2, bidirectional=True)
    x, mask = torch.randn(9, 10, I, requires_grad=True), drawn(9, 10)
    assert_trained_as_by_ops(lambda: module(x, reset_mask=mask), leaves_of(module, x))
    with torch.no_grad():
        assert_as_by_ops(lambda: module(x, reset_mask=mask))
    assert spy.taken == 3


def test_layers_with_dropout_between_them(spy: Spy) -> None:
    module, x, mask = gru_fast.GRU(I, H, 3, dropout=0.5), torch.randn(6, 4, I), drawn(6, 4)

    def call() -> Any:
        torch.manual_seed(1)
        return module(x, reset_mask=mask)

    assert_trained_as_by_ops(call, leaves_of(module))
    with torch.no_grad():
        assert_as_by_ops(call)
    assert spy.taken == 6


# What becomes of a mask (6, 4) for an input (6, 4, I), and the error that is raised.
REFUSED: dict[str, tuple[Callable[[Tensor], Any], type[Exception]]] = {
    "float": (Tensor.float, RuntimeError),
    "bytes": (Tensor.byte, RuntimeError),
    "one row": (lambda m: m[:, :1], RuntimeError),
    "turned": (Tensor.t, RuntimeError),
    "1-d": (lambda m: m[:, 0], RuntimeError),
    "3-d": (lambda m: m[None], RuntimeError),
    "0-d": (lambda m: m[0, 0], RuntimeError),
    "meta": (lambda m: m.to("meta"), RuntimeError),
    "list": (Tensor.tolist, TypeError),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("grad", [False, True])
def test_a_mask_that_is_no_mask_is_refused_as_by_the_ops(spy: Spy, name: str, grad: bool) -> None:
    module, x = gru_fast.GRU(I, H), torch.randn(6, 4, I)
    change, error = REFUSED[name]
    mask = change(drawn(6, 4))
    with torch.set_grad_enabled(grad):
        with pytest.raises(error, match="reset_mask"):
            module(x, reset_mask=mask)
        assert_as_by_ops(lambda: module(x, reset_mask=mask))
    assert spy.taken == 0


def test_with_reset_states_or_packed_rows_the_ops_take_it(spy: Spy) -> None:
    module, x, mask = gru_fast.GRU(I, H), torch.randn(6, 4, I), drawn(6, 4)
    state = torch.randn(1, 4, H)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor([6, 3, 2, 1]))
    learned = gru_fast.GRU(I, H, learn_h0=True)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            module(x, reset_mask=mask, reset_state=state)
            module(packed, reset_mask=mask)
            learned(x, reset_mask=mask)
            with pytest.raises(RuntimeError, match="reset_state"):
                module(x, reset_state=state)
    assert spy.taken == 0


def test_a_mask_that_was_changed_before_backward_is_refused(spy: Spy) -> None:
    module, mask = gru_fast.GRU(I, H), drawn(4, 2)
    output, _ = module(torch.randn(4, 2, I), reset_mask=mask)
    mask.logical_not_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
    assert spy.taken == 1


def test_under_a_profiler_and_twice_differentiated(spy: Spy) -> None:
    module, x = gru_fast.GRU(I, H), torch.randn(4, 3, I, requires_grad=True)
    mask, leaves = drawn(4, 3), leaves_of(module, x)

    assert_twice_differentiated_as_by_ops(spy, lambda: module(x, reset_mask=mask)[0], leaves)
    assert spy.taken == 1
    assert_trained_as_by_ops(lambda: profiled(lambda: module(x, reset_mask=mask)), leaves)
    assert spy.taken == 1
