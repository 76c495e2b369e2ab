# SPDX-License-Identifier: Apache-2.0
"""Heads past the dispatcher: weights are read where they lie, and the bits are the operator's."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.checkpoint import checkpoint

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
    trained,
    trains,
)
from gru_fast import functional

pytest.importorskip("gru_fast._C", reason="gru_fast was built without its CPU kernels")

I = 5  # noqa: E741
HEADS = {"two": (2, 38), "three": (3, 33), "of one unit": (4, 4), "of tiles": (2, 64)}
SIZES = {"one": (1, 1), "a step": (1, 3), "a row": (7, 1), "many": (8, 33)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cell", CELLS)
@torch.no_grad()
def test_inference(
    spy: Spy, isa: str, cell: str, bias: bool, size: str, heads: str, dtype: torch.dtype
) -> None:
    (T, B), (K, H) = SIZES[size], HEADS[heads]
    h, lengths = torch.randn(2, B, H, dtype=dtype), torch.arange(B) * 5 % (T + 1)
    options: dict[str, Any] = {"bias": bias, "cell": cell, "dtype": dtype, "num_heads": K}
    for batch_first in (False, True):
        shape = (B, T) if batch_first else (T, B)
        x, mask = torch.randn(*shape, I, dtype=dtype), torch.rand(*shape) < 0.3
        module = gru_fast.GRU(I, H, 2, batch_first=batch_first, **options)
        given: dict[str, Any] = {"reset_mask": mask, "lengths": lengths}
        assert_inferred_as_by_ops(
            module,
            partial(module, x, h),
            partial(module, x),
            partial(module, x, h, **given),
        )
    assert spy.taken == 12


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cell", CELLS)
def test_training(
    spy: Spy, backward_spy: Spy, isa: str, cell: str, bias: bool, size: str, heads: str,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    (T, B), (K, H) = SIZES[size], HEADS[heads]
    module = gru_fast.GRU(I, H, 2, bias=bias, cell=cell, dtype=dtype, num_heads=K)
    x = torch.randn(T, B, I, dtype=dtype, requires_grad=True)
    h = torch.randn(2, B, H, dtype=dtype, requires_grad=True)
    mask, lengths, leaves = (
        torch.rand(T, B) < 0.3,
        torch.arange(B) % (T + 1),
        leaves_of(module, x, h),
    )
    assert_trained_as_by_ops(lambda: module(x, h), leaves)
    assert_trained_as_by_ops(lambda: module(x, h, reset_mask=mask, lengths=lengths), leaves)
    assert spy.taken == backward_spy.taken == (4 if trains(dtype) else 0)


@pytest.mark.parametrize("cell", CELLS)
def test_packed_rows(spy: Spy, backward_spy: Spy, cell: str) -> None:
    module = gru_fast.GRU(I, 36, 2, cell=cell, num_heads=3)
    x = torch.randn(7, 4, I, requires_grad=True)
    h = torch.randn(2, 4, 36, requires_grad=True)

    def call() -> tuple[Tensor, Tensor]:
        rows = pack_padded_sequence(x, torch.tensor([3, 7, 1, 7]), enforce_sorted=False)
        output, h_n = module(rows, h)
        assert isinstance(output, PackedSequence)
        return output.data, h_n

    assert_trained_as_by_ops(call, leaves_of(module, x, h))
    with torch.no_grad():
        assert_as_by_ops(call)
    assert spy.taken == 3 and backward_spy.taken == 2


def test_long_rows_with_gradients_in_bfloat16(spy: Spy, threads: int) -> None:
    """More than a chunk: sums of chunks lie as the gradients do."""
    module = gru_fast.GRU(I, 66, num_heads=3, dtype=torch.bfloat16)
    x = torch.randn(90, 9, I, dtype=torch.bfloat16, requires_grad=True)
    assert_trained_as_by_ops(lambda: module(x), leaves_of(module, x))
    assert spy.taken == (1 if trains(torch.bfloat16) else 0)


def test_many_units_and_threads(spy: Spy, threads: int) -> None:
    module = gru_fast.GRU(I, 540, 2, num_heads=2)
    x = torch.randn(9, 10, I, requires_grad=True)
    assert_trained_as_by_ops(lambda: module(x), leaves_of(module, x))
    with torch.no_grad():
        assert_as_by_ops(lambda: module(x))
        assert_as_by_ops(lambda: module(x[:, 0]))
    assert spy.taken == 4


def test_nothing_is_read_beside_a_head(spy: Spy, poisoned_memory: None) -> None:
    module = gru_fast.GRU(I, 33, num_heads=3)
    x = torch.randn(4, 3, I, requires_grad=True)
    output, h_n = module(x)
    results = torch.autograd.grad(output.sum() + h_n.sum(), leaves_of(module, x))
    assert spy.taken == 1
    assert not any(t.isnan().any() for t in (output, h_n, *results))


def test_a_frozen_weight_gets_no_gradient(spy: Spy, backward_spy: Spy) -> None:
    module = gru_fast.GRU(I, 36, num_heads=3)
    module.weight_hh_l0.requires_grad_(False)
    x = torch.randn(4, 3, I, requires_grad=True)
    assert_trained_as_by_ops(lambda: module(x), leaves_of(module, x), used=(1,))
    module(x)[1].sum().backward()
    assert module.weight_hh_l0.grad is None and module.weight_ih_l0.grad is not None
    assert spy.taken == backward_spy.taken == 2


@pytest.mark.parametrize("form", ["plain", "packed"])
def test_where_operators_are_seen_they_compute_the_same(spy: Spy, form: str) -> None:
    """In both passes, or in one of them."""
    module = gru_fast.GRU(I, 36, num_heads=3)
    x = torch.randn(5, 3, I, requires_grad=True)
    h = torch.randn(1, 3, 36, requires_grad=True)
    leaves = leaves_of(module, x, h)

    def call() -> tuple[Tensor, Tensor]:
        if form == "plain":
            return module(x, h)
        output, h_n = module(pack_padded_sequence(x, torch.tensor([5, 4, 1])), h)
        return output.data, h_n

    def backward(results: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad([r.square().sum() for r in results], leaves)

    expected = backward(call())
    assert spy.taken == 1
    for forward in (call, lambda: profiled(call)):
        results = forward()
        for found in (
            backward(forward()),
            profiled(lambda results=results: backward(results)),
        ):
            for a, b in zip(found, expected, strict=True):
                assert torch.equal(a, b)
    assert spy.taken == 3


def test_a_checkpoint_whose_backward_is_profiled() -> None:
    module = gru_fast.GRU(I, 36, num_heads=3)
    x = torch.randn(5, 3, I, requires_grad=True)
    leaves = leaves_of(module, x)
    expected = torch.autograd.grad(module(x)[0].square().sum(), leaves)
    loss = checkpoint(module, x, use_reentrant=False)[0].square().sum()
    found = profiled(lambda: torch.autograd.grad(loss, leaves))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_second_derivatives(spy: Spy) -> None:
    module, x = gru_fast.GRU(I, 12, num_heads=3), torch.randn(4, 3, I, requires_grad=True)
    leaves = leaves_of(module, x)

    assert_twice_differentiated_as_by_ops(spy, lambda: module(x)[0], leaves)
    assert spy.taken == 1


def test_both_directions_and_very_many_heads_go_to_the_ops(spy: Spy) -> None:
    x = torch.randn(3, 2, I, requires_grad=True)
    for options in ({"num_heads": 2, "bidirectional": True}, {"num_heads": 65}):
        module = gru_fast.GRU(I, 130, **options)  # type: ignore[arg-type]
        trained(lambda module=module: module(x), leaves_of(module, x))
        with torch.no_grad():
            module(x)
            with gru_fast.prepacked(module):
                module(x)
    assert spy.taken == 0


def test_a_weight_for_another_number_of_heads_is_refused(spy: Spy) -> None:
    module, x = gru_fast.GRU(I, 36, num_heads=3), torch.randn(3, 2, I)
    for heads in (1, 2, 4, 5):
        module.num_heads = heads
        for grad in (False, True):
            with (
                torch.set_grad_enabled(grad),
                pytest.raises((RuntimeError, ValueError), match=r"heads|hidden|weight_hh"),
            ):
                module(x, torch.zeros(1, 2, 36))
    assert spy.taken == 0


@pytest.mark.parametrize("heads", [0, -1, 7, 2**70, "3"])
def test_what_is_no_number_of_heads_is_refused_as_by_the_ops(spy: Spy, heads: Any) -> None:
    module, x = gru_fast.GRU(I, 36, num_heads=3), torch.randn(3, 2, I)
    with torch.no_grad():
        assert_as_by_ops(
            lambda: functional.gru(x, None, module._flat_weights, num_heads=heads)  # type: ignore
        )
    assert spy.taken == 0
