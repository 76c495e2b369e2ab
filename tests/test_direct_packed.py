# SPDX-License-Identifier: Apache-2.0
"""Packed sequences past the dispatcher: without padding, with the bits of what is padded."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import gru_fast
from cases import CELLS
from direct_spy import (
    DTYPES,
    Spy,
    assert_as_by_ops,
    assert_trained_as_by_ops,
    assert_twice_differentiated_as_by_ops,
    leaves_of,
    trained,
    trains,
)
from test_direct import CONTEXTS

_C = pytest.importorskip("gru_fast._C", reason="gru_fast was built without its CPU kernels")

I, H = 5, 19  # noqa: E741
LENGTHS = {
    "one": [4],
    "one step": [1, 1, 1],
    "ragged": [7, 2, 7, 1, 3],
    "many": [1 + k * 7 % 40 for k in range(33)],
}


def packed(lengths: list[int], dtype: torch.dtype = torch.float32) -> PackedSequence:
    """Rows in any order, of which none requires a gradient."""
    x = torch.randn(max(lengths), len(lengths), I, dtype=dtype)
    return pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)


def in_order(given: PackedSequence, data: Tensor) -> PackedSequence:
    """The same with other data."""
    return PackedSequence(data, *given[1:])


def rows_of(results: tuple[PackedSequence, Tensor]) -> tuple[Tensor, Tensor]:
    """The results as tensors."""
    return results[0].data, results[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("cell", CELLS)
@torch.no_grad()
def test_inference(
    spy: Spy, isa: str, cell: str, both: bool, name: str, layers: int, dtype: torch.dtype
) -> None:
    given = packed(LENGTHS[name], dtype)
    h = torch.randn(layers * (1 + both), len(LENGTHS[name]), H, dtype=dtype)
    for bias, batch_first in ((True, False), (False, True)):
        options = {"bidirectional": both, "cell": cell, "dtype": dtype}
        module = gru_fast.GRU(I, H, layers, bias, batch_first, **options)
        assert_as_by_ops(lambda module=module: module(given, h))
        assert_as_by_ops(lambda module=module: module(given))
        with gru_fast.prepacked(module):
            assert_as_by_ops(lambda module=module: module(given, h))
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
    given = packed(LENGTHS[name], dtype)
    data = given.data.clone().requires_grad_()
    h = torch.randn(layers * (1 + both), len(LENGTHS[name]), H, dtype=dtype, requires_grad=True)
    for bias in (True, False):
        module = gru_fast.GRU(I, H, layers, bias, bidirectional=both, cell=cell, dtype=dtype)
        leaves = leaves_of(module, data, h)
        assert_trained_as_by_ops(
            lambda module=module: rows_of(module(in_order(given, data), h)), leaves
        )
    assert spy.taken == backward_spy.taken == (2 * layers if trains(dtype) else 0)


@pytest.mark.parametrize("both", [False, True])
def test_many_units_and_threads(spy: Spy, threads: int, both: bool) -> None:
    module = gru_fast.GRU(I, 270, 2, bidirectional=both)
    given = packed([9, 5, 8, 8, 2, 1, 9, 9, 9, 3])
    data = given.data.clone().requires_grad_()
    assert_trained_as_by_ops(
        lambda: rows_of(module(in_order(given, data))), leaves_of(module, data)
    )
    with torch.no_grad():
        assert_as_by_ops(lambda: module(given))
    assert spy.taken == 3


@pytest.mark.parametrize("training", [False, True])
def test_dropout_draws_the_numbers_of_nn_gru(spy: Spy, training: bool) -> None:
    ours, theirs = (make(I, H, 3, dropout=0.4) for make in (gru_fast.GRU, nn.GRU))
    ours.load_state_dict(theirs.state_dict())
    given, results = packed(LENGTHS["ragged"]), []
    with torch.set_grad_enabled(training):
        for module in (ours, theirs):
            torch.manual_seed(0)
            output, h_n = module(given)
            results.append((output.data, h_n))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    assert spy.taken == 3


@pytest.mark.parametrize("training", [False, True])
def test_layers_that_are_not_plain_go_on_padded(spy: Spy, training: bool) -> None:
    """From the first of them on, behind the same dropout."""
    ours, theirs = (make(I, H, 3, dropout=0.4) for make in (gru_fast.GRU, nn.GRU))
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        spread = ours.weight_hh_l1.repeat_interleave(2, 1)[:, ::2]
    ours.weight_hh_l1 = nn.Parameter(spread)
    assert not ours.weight_hh_l1.is_contiguous()
    given, results = packed(LENGTHS["ragged"]), []
    with torch.set_grad_enabled(training), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in (ours, theirs):
            torch.manual_seed(0)
            output, h_n = module(given, torch.ones(3, 5, H))
            results.append((output.data, h_n))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    assert spy.taken == 1


@pytest.mark.parametrize("both", [False, True])
def test_second_derivatives(spy: Spy, both: bool) -> None:
    module, given = gru_fast.GRU(I, H, bidirectional=both), packed(LENGTHS["ragged"])
    data = given.data.clone().requires_grad_()
    leaves = leaves_of(module, data)

    assert_twice_differentiated_as_by_ops(
        spy, lambda: module(in_order(given, data))[0].data, leaves
    )
    assert spy.taken == 1


@pytest.mark.parametrize("name", ["profiler", "dispatch mode"])
@pytest.mark.parametrize("watched", ["forward", "backward"])
def test_a_checkpoint_of_which_one_pass_is_watched(spy: Spy, watched: str, name: str) -> None:
    module, given = gru_fast.GRU(I, H, 2, bidirectional=True), packed(LENGTHS["ragged"])
    data = given.data.clone().requires_grad_()

    def loss() -> Tensor:
        return module(in_order(given, data))[0].data.square().sum()

    leaves = leaves_of(module, data)
    expected = torch.autograd.grad(loss(), leaves)
    assert spy.taken == 2
    if watched == "forward":
        with CONTEXTS[name]():
            result = checkpoint(loss, use_reentrant=False)
        found = torch.autograd.grad(result, leaves)
    else:
        result = checkpoint(loss, use_reentrant=False)
        with CONTEXTS[name]():
            found = torch.autograd.grad(result, leaves)
    assert spy.taken == 4
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", CONTEXTS)
def test_whoever_looks_at_operators_gets_them(spy: Spy, name: str) -> None:
    module, given = gru_fast.GRU(I, H), packed(LENGTHS["ragged"])
    with torch.no_grad():
        expected = module(given)
        with CONTEXTS[name]():
            found = module(given)
    assert spy.taken == 1
    torch.testing.assert_close(found[0].data, expected[0].data)
    torch.testing.assert_close(found[1], expected[1])


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda p, h: (p, h[:, :4]),
        lambda p, h: (p, h[:, :, 1:].contiguous()),
        lambda p, h: (p, h[0]),
        lambda p, h: (p, h.double()),
        lambda p, h: (p, torch.cat((h, h[:, :1]), 1)),
        lambda p, h: (in_order(p, p.data[:, 1:].contiguous()), h),
        lambda p, h: (in_order(p, p.data[None]), h),
        lambda p, h: (in_order(p, p.data.double()), h),
    ],
)
def test_what_does_not_fit_has_the_errors_of_the_ops(
    spy: Spy, change: Callable[..., Any], grad: bool
) -> None:
    module = gru_fast.GRU(I, H)
    given, h = change(packed(LENGTHS["ragged"]), torch.zeros(1, 5, H))
    with torch.set_grad_enabled(grad), pytest.raises((RuntimeError, ValueError)):
        module(given, h)
    with torch.set_grad_enabled(grad):
        assert_as_by_ops(lambda: module(given, h))
    assert spy.taken == 0


def test_parametrized_weights_and_rows_with_gaps(spy: Spy, backward_spy: Spy) -> None:
    module, given = gru_fast.GRU(I, H), packed(LENGTHS["ragged"])
    parametrizations.weight_norm(module, "weight_hh_l0")
    wide = torch.randn(len(given.data), 2 * I, requires_grad=True)
    call: Callable[[], Any] = lambda: rows_of(module(in_order(given, wide[:, ::2])))  # noqa: E731
    assert_trained_as_by_ops(call, leaves_of(module, wide))
    assert spy.taken == backward_spy.taken == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_memory_that_is_not_written_shows(
    spy: Spy, isa: str, poisoned_memory: None, cell: str, both: bool, dtype: torch.dtype
) -> None:
    module = gru_fast.GRU(I, H, 2, bidirectional=both, cell=cell, dtype=dtype)
    given = packed(LENGTHS["many"], dtype)
    data = given.data.clone().requires_grad_()
    results = trained(lambda: rows_of(module(in_order(given, data))), leaves_of(module, data))
    assert not any(t is None or t.isnan().any() for t in results)
    with torch.no_grad():
        assert not module(given)[0].data.isnan().any()
