# SPDX-License-Identifier: Apache-2.0
"""Training past the dispatcher: the operators' bits, forward and backward, where nobody looks."""

import threading
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gru_fast
from cases import CELLS
from direct_spy import (
    DTYPES,
    Spy,
    assert_trained_as_by_ops,
    assert_twice_differentiated_as_by_ops,
    leaves_of,
    trained,
    trains,
)
from gru_fast import direct, direct_training
from test_direct import CONTEXTS, surrounded

_C = pytest.importorskip("gru_fast._C", reason="gru_fast was built without its CPU kernels")

I, H = 5, 19  # noqa: E741


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [1, 2, 3, 33])
@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_has_the_bits_of_the_op(
    spy: Spy, backward_spy: Spy, isa: str, cell: str, batch: int, bias: bool, dtype: torch.dtype
) -> None:
    module = gru_fast.GRUCell(I, H, bias, cell=cell, dtype=dtype)
    x = torch.randn(batch, I, dtype=dtype, requires_grad=True)
    h = torch.randn(batch, H, dtype=dtype, requires_grad=True)
    assert_trained_as_by_ops(lambda: module(x, h), leaves_of(module, x, h))
    assert spy.taken == backward_spy.taken == (1 if trains(dtype) else 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 40])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("batch", [1, 3, 33])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_layers_have_the_bits_of_the_op(
    spy: Spy, backward_spy: Spy, isa: str, cell: str, both: bool, batch: int, layers: int,
    steps: int, bias: bool, dtype: torch.dtype,
) -> None:  # fmt: skip
    module = gru_fast.GRU(I, H, layers, bias, bidirectional=both, cell=cell, dtype=dtype)
    x = torch.randn(steps, batch, I, dtype=dtype, requires_grad=True)
    h = torch.randn(layers * (1 + both), batch, H, dtype=dtype, requires_grad=True)
    assert_trained_as_by_ops(lambda: module(x, h), leaves_of(module, x, h))
    assert spy.taken == backward_spy.taken == (layers if trains(dtype) else 0)


@pytest.mark.parametrize("both", [False, True])
def test_units_and_threads_that_are_many(
    spy: Spy, backward_spy: Spy, threads: int, both: bool
) -> None:
    module = gru_fast.GRU(300, 270, 2, bidirectional=both)
    x, h = torch.randn(6, 17, 300, requires_grad=True), torch.randn(2 * (1 + both), 17, 270)
    assert_trained_as_by_ops(lambda: module(x, h), leaves_of(module, x, h))
    assert spy.taken == backward_spy.taken == 2


@pytest.mark.parametrize("wanted", ["input", "hx", "weight_ih", "weight_hh", "bias_ih", "bias_hh"])
def test_one_gradient_that_is_wanted(spy: Spy, backward_spy: Spy, wanted: str) -> None:
    cell, gru = gru_fast.GRUCell(I, H), gru_fast.GRU(I, H)
    both = gru_fast.GRU(I, H, bidirectional=True)
    for module in (cell, gru, both):
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name.startswith(wanted))
    x = torch.randn(3, 2, I, requires_grad=wanted == "input")
    h = torch.randn(1, 2, H, requires_grad=wanted == "hx")
    states = torch.randn(2, 2, H, requires_grad=wanted == "hx")
    assert_trained_as_by_ops(lambda: cell(x[0], h[0]), leaves_of(cell, x, h))
    assert_trained_as_by_ops(lambda: gru(x, h), leaves_of(gru, x, h))
    assert_trained_as_by_ops(lambda: both(x, states), leaves_of(both, x, states))
    assert spy.taken == backward_spy.taken == 3


@pytest.mark.parametrize("frozen", ["_l0", "_l0_reverse", "weight_hh_l0_reverse", "bias_ih_l0"])
@pytest.mark.parametrize("watched", [False, True])
def test_what_one_direction_alone_wants(
    spy: Spy, backward_spy: Spy, frozen: str, watched: bool
) -> None:
    gru = gru_fast.GRU(I, H, bidirectional=True)
    for name, parameter in gru.named_parameters():
        parameter.requires_grad_(not name.endswith(frozen))
    x, h = torch.randn(3, 2, I), torch.randn(2, 2, H, requires_grad=True)
    if watched:  # backward goes by the operator
        with torch.profiler.profile():
            assert_trained_as_by_ops(lambda: gru(x, h), leaves_of(gru, h))
    else:
        assert_trained_as_by_ops(lambda: gru(x, h), leaves_of(gru, h))
    assert spy.taken == backward_spy.taken == (0 if watched else 1)


@pytest.mark.parametrize("used", [(0,), (1,)], ids=["output", "h_n"])
def test_one_result_that_is_used(spy: Spy, backward_spy: Spy, used: tuple[int, ...]) -> None:
    module = gru_fast.GRU(I, H)
    x, h = torch.randn(3, 2, I, requires_grad=True), torch.randn(1, 2, H, requires_grad=True)
    assert_trained_as_by_ops(lambda: module(x, h), leaves_of(module, x, h), used)
    assert backward_spy.taken == 1


def test_frozen_modules_and_plain_inputs_have_no_graph(spy: Spy) -> None:
    cell, gru = gru_fast.GRUCell(I, H), gru_fast.GRU(I, H)
    for module in (cell, gru):
        module.requires_grad_(False)
    assert not cell(torch.randn(2, I), torch.randn(2, H)).requires_grad
    assert not gru(torch.randn(1, 2, I), torch.randn(1, 2, H))[0].requires_grad


@pytest.mark.parametrize(
    "loss",
    [
        lambda output: output.sum(),
        lambda output: output[-1].square().sum(),
        lambda output: output.transpose(0, 1).reshape(-1).square().sum(),
    ],
    ids=["sum", "last step", "transposed"],
)
@pytest.mark.parametrize("batch_first", [False, True])
def test_gradients_that_lie_in_another_order(
    spy: Spy, backward_spy: Spy, loss: Callable[[Tensor], Tensor], batch_first: bool
) -> None:
    module = gru_fast.GRU(I, H, batch_first=batch_first, bidirectional=True)
    x = torch.randn(3, 2, I, requires_grad=True)
    h = torch.randn(2, x.shape[0 if batch_first else 1], H, requires_grad=True)
    leaves = leaves_of(module, x, h)
    given = torch.autograd.grad(loss(module(x, h)[0]), leaves)
    with direct.turned_off():
        expected = torch.autograd.grad(loss(module(x, h)[0]), leaves)
    assert spy.taken == backward_spy.taken == 1 and all(map(torch.equal, given, expected))


@pytest.mark.parametrize("strided", ["input", "hx"])
def test_a_checkpoint_whose_tensors_are_kept_in_another_order(
    backward_spy: Spy, strided: str
) -> None:
    def stored(wanted: str, size: int) -> Tensor:
        wide = torch.randn(3 if wanted == "input" else 1, 2, 2 * size, requires_grad=True)
        return wide[..., ::2] if wanted == strided else wide[..., :size].clone()

    module, x, h = gru_fast.GRU(I, H), stored("input", I), stored("hx", H)
    expected = torch.autograd.grad(module(x, h)[0].square().sum(), (x, h))
    assert backward_spy.taken == 1
    contiguous = torch.contiguous_format
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.detach().clone(memory_format=contiguous), lambda t: t
    ):
        again = checkpoint(lambda x, h: module(x, h)[0].square(), x, h, use_reentrant=False)
    assert all(map(torch.equal, expected, torch.autograd.grad(again.sum(), (x, h))))


@pytest.mark.parametrize("layers", [1, 2])
def test_states_that_lie_in_another_order(spy: Spy, backward_spy: Spy, layers: int) -> None:
    """A learned one, which is expanded; every other unit of a tensor, also of a cell."""
    module, cell = gru_fast.GRU(I, H, layers, learn_h0=True), gru_fast.GRUCell(I, H)
    x, h = torch.randn(3, 4, I, requires_grad=True), torch.randn(4, 2 * H, requires_grad=True)
    assert_trained_as_by_ops(lambda: module(x), leaves_of(module, x))
    assert spy.taken == backward_spy.taken == layers
    for call, leaves in (
        (lambda: cell(x[0], h[:, ::2]), leaves_of(cell, x, h)),
        (lambda: module(x, h[:, ::2].expand(layers, 4, H)), leaves_of(module, x, h)),
    ):
        assert_trained_as_by_ops(call, leaves)
    assert spy.taken == backward_spy.taken == 2 * layers + 1


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, 1:3],
        lambda x: x[1::2],
        lambda x: x.transpose(0, 1),
        lambda x: x[:1].expand(4, -1, -1),
        lambda x: torch.cat((x, x), 2)[:, :, 1 : 1 + I],
    ],
    ids=["steps", "rows", "transposed", "one row", "columns"],
)
@pytest.mark.parametrize("batch_first", [False, True])
def test_rows_of_an_input_may_lie_as_they_like(
    spy: Spy, backward_spy: Spy, view: Callable[[Tensor], Tensor], batch_first: bool
) -> None:
    gru, cell = gru_fast.GRU(I, H, batch_first=batch_first), gru_fast.GRUCell(I, H)
    x = torch.randn(4, 5, I, requires_grad=True)
    B = view(x).shape[0 if batch_first else 1]
    assert_trained_as_by_ops(lambda: gru(view(x), torch.ones(1, B, H)), leaves_of(gru, x), (1,))
    rows = len(view(x))
    assert_trained_as_by_ops(lambda: cell(view(x)[:, 0], torch.ones(rows, H)), leaves_of(cell, x))
    assert spy.taken == backward_spy.taken == 2


@pytest.mark.parametrize("cell", CELLS)
def test_second_derivatives(spy: Spy, cell: str) -> None:
    module, gru = gru_fast.GRUCell(I, H, cell=cell), gru_fast.GRU(I, H, cell=cell)
    x, h = torch.randn(3, 2, I, requires_grad=True), torch.randn(1, 2, H, requires_grad=True)

    both = gru_fast.GRU(I, H, cell=cell, bidirectional=True)
    for call, leaves in (
        (lambda: module(x[0], module(x[1], h[0])), leaves_of(module, x, h)),
        (lambda: gru(x, h)[0], leaves_of(gru, x, h)),
        (lambda: both(x)[0], leaves_of(both, x)),
    ):
        assert_twice_differentiated_as_by_ops(spy, call, leaves)


def test_the_gradient_of_a_gradient_of_the_saved_gates(spy: Spy) -> None:
    """Double backward reaches what the forward pass saved: finite differences say so."""
    torch.manual_seed(0)
    cell = gru_fast.GRUCell(3, 4)
    x, h = torch.randn(2, 3), torch.randn(2, 4, requires_grad=True)

    def slope(state: Tensor) -> Tensor:
        return torch.autograd.grad(cell(x, state).square().sum(), state, create_graph=True)[0]

    second = torch.autograd.grad(slope(h)[0, 0], h)[0]
    for k in range(4):
        step = torch.zeros_like(h)
        step[0, k] = 1e-2
        numeric = (slope(h + step) - slope(h - step))[0, 0] / 2e-2
        torch.testing.assert_close(second[0, k], numeric.detach(), atol=2e-4, rtol=2e-3)
    assert spy.taken == 9


def test_a_state_may_be_changed_in_place(spy: Spy, backward_spy: Spy) -> None:
    ours, theirs = gru_fast.GRUCell(I, H), nn.GRUCell(I, H)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 3, I)
    grads = []
    for cell in (ours, theirs):
        h = torch.zeros(3, H)
        total = torch.zeros(())
        for t in range(4):
            h = cell(x[t], h)
            h[t % 3] = 0
            total = total + h.square().sum()
        grads.append(torch.autograd.grad(total, list(cell.parameters())))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    assert spy.taken == backward_spy.taken == 4


def test_a_weight_that_was_changed_before_backward_is_refused(spy: Spy) -> None:
    cell = gru_fast.GRUCell(I, H)
    h = cell(torch.randn(2, I), torch.randn(2, H))
    with torch.no_grad():
        cell.weight_hh.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()
    assert spy.taken == 1


def test_backward_twice_and_after_it_was_freed(spy: Spy) -> None:
    cell = gru_fast.GRUCell(I, H)
    h = cell(torch.randn(2, I), torch.randn(2, H)).square().sum()
    first = torch.autograd.grad(h, list(cell.parameters()), retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(h, list(cell.parameters()))))
    with pytest.raises(RuntimeError, match="second time"):
        h.backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_and_hooks(spy: Spy, use_reentrant: bool) -> None:
    gru = gru_fast.GRU(I, H, 2)
    x = torch.randn(3, 2, I, requires_grad=True)
    leaves = leaves_of(gru, x)
    gru(x)[0].square().sum().backward()
    expected = [t.grad for t in leaves]
    for t in leaves:
        t.grad = None
    seen: list[Tensor] = []
    output, _ = checkpoint(gru, x, use_reentrant=use_reentrant)
    output.register_hook(seen.append)
    output.square().sum().backward()
    assert len(seen) == 1
    for t, grad in zip(leaves, expected, strict=True):
        assert t.grad is not None and grad is not None and torch.equal(t.grad, grad)


@pytest.mark.parametrize(
    ("name", "watched"),
    [
        *product(("profiler", "dispatch mode"), ("forward", "backward")),
        ("function mode", "forward"),
    ],
)
@pytest.mark.parametrize("steps", [1, 3])
def test_a_checkpoint_of_which_one_pass_is_watched(
    spy: Spy, steps: int, name: str, watched: str
) -> None:
    """Both have to save the same."""
    gru, cell = gru_fast.GRU(I, H, 2, bidirectional=True), gru_fast.GRUCell(I, H)
    x, h = torch.randn(steps, 2, I, requires_grad=True), torch.randn(2, H)

    def loss() -> Tensor:
        return gru(x)[0].square().sum() + cell(x[0], h).square().sum()

    leaves = leaves_of(gru, x) + leaves_of(cell)
    expected = torch.autograd.grad(loss(), leaves)
    unwatched = spy.taken
    assert unwatched == 3
    with CONTEXTS[name]() if watched == "forward" else nullcontext():
        result = checkpoint(loss, use_reentrant=False)
    with CONTEXTS[name]() if watched == "backward" else nullcontext():
        given = torch.autograd.grad(result, leaves)
    assert spy.taken == unwatched + 3
    for a, b in zip(given, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", CONTEXTS)
def test_whoever_looks_at_operators_gets_them(spy: Spy, backward_spy: Spy, name: str) -> None:
    gru, cell = gru_fast.GRU(I, H), gru_fast.GRUCell(I, H)
    x, h = torch.randn(1, 2, I), torch.randn(1, 2, H)

    def grads() -> tuple[Tensor, ...]:
        loss = gru(x, h)[0].square().sum() + cell(x[0], h[0]).square().sum()
        return torch.autograd.grad(loss, [*gru.parameters(), *cell.parameters()])

    expected = grads()
    assert spy.taken == backward_spy.taken == 2
    with CONTEXTS[name]():
        given = grads()
    # To a mode of functions, backward is one call, within which it sees nothing.
    unseen = 2 if name in ("function mode", "default device") else 0
    assert (spy.taken, backward_spy.taken) == (2, 2 + unseen)
    for a, b in zip(given, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B", [1, 2, 3, 9])
@pytest.mark.parametrize("cell", CELLS)
def test_nothing_is_read_beside_the_tensors(
    spy: Spy, isa: str, poisoned_memory: None, cell: str, B: int, dtype: torch.dtype
) -> None:
    module = gru_fast.GRUCell(I, H, cell=cell, dtype=dtype)
    x, h = torch.randn(B, I, dtype=dtype), torch.randn(B, H, dtype=dtype, requires_grad=True)
    expected = trained(lambda: module(x, h), leaves_of(module, h))
    for parameter in module.parameters():
        parameter.data = surrounded(parameter.data)
    around = surrounded(h.detach()).requires_grad_()
    given = trained(lambda: module(surrounded(x), around), leaves_of(module, around))
    for a, b in zip(given, expected, strict=True):
        assert a is not None and b is not None
        assert torch.equal(a, b) and not b.isnan().any()
    assert spy.taken == (2 if trains(dtype) else 0)


def test_threads_train_beside_each_other() -> None:
    modules = [gru_fast.GRUCell(I, H) for _ in range(4)]
    x, start = torch.randn(3, I), torch.randn(3, H)
    results: dict[int, list[Tensor]] = {}

    def run(k: int) -> None:
        modules[k].zero_grad()
        for _ in range(20):
            h = start
            for _ in range(10):
                h = modules[k](x, h)
            h.square().sum().backward()
        results[k] = [p.grad for p in modules[k].parameters() if p.grad is not None]

    threads = [threading.Thread(target=run, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = {k: [g.clone() for g in grads] for k, grads in results.items()}
    for k in range(4):
        run(k)
        assert all(map(torch.equal, together[k], results[k]))


def test_nothing_is_tried_on_another_device(spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    """An input with the batch first would be copied for nothing."""
    copied: list[Any] = []
    monkeypatch.setattr(direct_training, "_in_order", lambda *given: copied.append(given))
    gru = gru_fast.GRU(I, H, batch_first=True, device="meta")
    gru(torch.empty(3, 2, I, device="meta"))
    gru_fast.GRUCell(I, H, device="meta")(torch.empty(2, 2 * I, device="meta")[:, ::2])
    assert spy.taken == 0 and copied == []
