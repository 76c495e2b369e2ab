# SPDX-License-Identifier: Apache-2.0
"""What is not a plain call goes to the ops: the same results, the same errors, nothing read."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import gru_fast
from direct_spy import Spy, assert_as_by_ops
from gru_fast import direct, functional

pytest.importorskip("gru_fast._C", reason="gru_fast was built without its CPU kernels")

I, H = 5, 19  # noqa: E741


class Tracked(Tensor):
    """A subclass, which may have operations of its own."""


def negated(tensor: Tensor) -> Tensor:
    """The same values in a view that negates its memory."""
    return torch._neg_view(-tensor)


def negated_by_conjugation(tensor: Tensor) -> Tensor:
    """As `negated`, with the strides of a plain tensor, from public operations."""
    assert tensor.numel() == 1
    return torch.complex(tensor, -tensor).reshape(1).conj().imag.unsqueeze(-1)


# What becomes of hx (2, H), or of the state of the GRU without its first dimension.
STATES: dict[str, Callable[[Tensor], Any]] = {
    "transposed": lambda h: h.t().contiguous().t(),
    "every other": lambda h: h.repeat_interleave(2, 1)[:, ::2],
    "negated": negated,
    "subclass": lambda h: h.as_subclass(Tracked),
    "float64": Tensor.double,
    "bfloat16": Tensor.bfloat16,
    "int": Tensor.int,
    "complex": lambda h: torch.complex(h, h),
    "meta": lambda h: h.to("meta"),
    "sparse": Tensor.to_sparse,
    "mkldnn": Tensor.to_mkldnn,
    "zero tensor": lambda h: torch._efficientzerotensor(h.shape),
    "0-d": lambda h: h[0, 0],
    "1-d": lambda h: h[0],
    "narrow": lambda h: h[:, 1:].contiguous(),
    "wide": lambda h: h.repeat(1, 2),
    "one row": lambda h: h[:1],
    "three rows": lambda h: h[:1].repeat(3, 1),
    "no rows": lambda h: h[:0],
    "more dimensions": lambda h: h[None, None],
    "list": Tensor.tolist,
    "array": Tensor.numpy,
}


@pytest.mark.parametrize("name", STATES)
@torch.no_grad()
def test_a_state_that_is_not_plain_goes_to_the_ops(spy: Spy, name: str) -> None:
    gru, cell = gru_fast.GRU(I, H), gru_fast.GRUCell(I, H)
    x, h = torch.randn(1, 2, I), STATES[name](torch.randn(2, H))
    stacked = h[None] if isinstance(h, Tensor) and h.layout is torch.strided else h
    assert_as_by_ops(lambda: cell(x[0], h))
    assert_as_by_ops(lambda: gru(x, stacked))
    gru.batch_first = True
    assert_as_by_ops(lambda: gru(x.transpose(0, 1), h))
    assert spy.taken == 0


# What becomes of input (1, 2, I).
INPUTS: dict[str, Callable[[Tensor], Any]] = {
    "every other": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "expanded": lambda x: x[:, :, :1].expand(1, 2, I),
    "negated": negated,
    "subclass": lambda x: x.as_subclass(Tracked),
    "float64": Tensor.double,
    "meta": lambda x: x.to("meta"),
    "narrow": lambda x: x[:, :, 1:].contiguous(),
    "wide": lambda x: x.repeat(1, 1, 2),
    "no rows": lambda x: x[:, :0],
    "no steps": lambda x: x[:0],
    "unbatched": lambda x: x[0],
    "more dimensions": lambda x: x[None],
    "0-d": lambda x: x[0, 0, 0],
    "1-d": lambda x: x[0, 0],
    "list": Tensor.tolist,
}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("batch_first", [False, True])
@torch.no_grad()
def test_an_input_that_is_not_plain_goes_to_the_ops(spy: Spy, name: str, batch_first: bool) -> None:
    gru, cell = gru_fast.GRU(I, H, batch_first=batch_first), gru_fast.GRUCell(I, H)
    given = INPUTS[name](torch.randn(1, 2, I))
    h = torch.randn(1, 2, H)
    if batch_first and isinstance(given, Tensor) and given.dim() == 3:
        given = given.transpose(0, 1)
    assert_as_by_ops(lambda: gru(given, h))
    if name not in ("no steps", "unbatched"):
        if isinstance(given, Tensor) and given.dim() > 1:
            given = given.squeeze(1 if batch_first else 0)
        assert_as_by_ops(lambda: cell(given, h[0]))
    assert spy.taken == 0


@torch.no_grad()
def test_a_negated_number_is_not_read_as_it_lies(spy: Spy) -> None:
    cell = gru_fast.GRUCell(1, 1)
    x, h = torch.tensor([[1.5]]), torch.tensor([[0.5]])
    assert_as_by_ops(lambda: cell(negated_by_conjugation(x), h))
    assert_as_by_ops(lambda: cell(x, negated_by_conjugation(h)))
    assert spy.taken == 0


@pytest.mark.parametrize("name", ["weight_ih", "weight_hh", "bias_ih", "bias_hh"])
@pytest.mark.parametrize(
    "change",
    [
        lambda w: setattr(w, "data", w.data[:-1].clone()),
        lambda w: setattr(w, "data", torch.cat((w.data, w.data[:1]))),
        lambda w: setattr(w, "data", w.data[None].clone()),
        lambda w: setattr(w, "data", w.data.double()),
        lambda w: setattr(w, "data", w.data.repeat_interleave(2, 0)[::2]),
        lambda w: setattr(w, "data", negated(w.data)),
        lambda w: w.untyped_storage().resize_(0),
        lambda w: setattr(w, "data", w.data.new_empty(0)),
    ],
    ids=["shorter", "longer", "dimension", "float64", "strided", "negated", "freed", "emptied"],
)
def test_weights_that_were_changed_in_place_are_seen(
    spy: Spy, name: str, change: Callable[[Tensor], Any]
) -> None:
    cell, gru = gru_fast.GRUCell(I, H), gru_fast.GRU(I, H)
    x, h = torch.randn(1, 2, I), torch.randn(1, 2, H)
    with torch.no_grad():
        change(getattr(cell, name))
        change(getattr(gru, f"{name}_l0"))
        assert_as_by_ops(lambda: cell(x[0], h[0]))
        assert_as_by_ops(lambda: gru(x, h))
    assert spy.taken == 0


@torch.no_grad()
def test_weights_that_were_replaced_are_used(spy: Spy) -> None:
    cell = gru_fast.GRUCell(I, H)
    x, h = torch.randn(2, I), torch.randn(2, H)
    before = cell(x, h)
    cell.weight_hh.data = torch.randn(3 * H, H)
    cell.bias_ih = nn.Parameter(torch.randn(3 * H))
    cell.bias_hh = None
    assert_as_by_ops(lambda: cell(x, h))
    assert not torch.equal(cell(x, h), before)
    parametrizations.weight_norm(cell, "weight_ih")
    assert_as_by_ops(lambda: cell(x, h))
    assert spy.taken == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"bias": False},
        {"num_layers": 1},
        {"num_layers": 4},
        {"bidirectional": True},
        {"cell": "no_reset"},
        {"cell": "gru"},
        {"cell": None},
        {"backend": "reference"},
        {"backend": "triton"},
        {"backend": "nothing"},
        {"lengths": torch.tensor([1, 0], dtype=torch.int32)},
        {"lengths": torch.tensor([1, 2])},
        {"lengths": torch.tensor([1, -1])},
        {"lengths": torch.tensor([1, 0, 1])},
        {"lengths": torch.tensor([1.0, 0.0])},
        {"lengths": [1, 0]},
        {"lengths": torch.tensor([1, 9, 0, 9])[::2]},
        {"reset_mask": torch.tensor([[True, False]]), "reset_state": torch.ones(2, 2, H)},
        {"h_scale": torch.full((2, 2, H), 0.5)},
        {"params": []},
    ],
    ids=str,
)
@torch.no_grad()
def test_other_options_go_to_the_ops(spy: Spy, changes: dict[str, Any]) -> None:
    module = gru_fast.GRU(I, H, 2)
    arguments: dict[str, Any] = {
        "input": torch.randn(1, 2, I),
        "hx": torch.randn(2, 2, H),
        "params": module._flat_weights,
        "num_layers": 2,
    }

    def call() -> Any:
        torch.manual_seed(0)
        return functional.gru(**(arguments | changes))

    assert_as_by_ops(call)
    assert spy.taken == 0


@pytest.mark.parametrize(
    "option", [{"backend": "reference"}, {"backend": "nothing"}, {"cell": "gru"}]
)
@torch.no_grad()
def test_other_options_of_a_cell_go_to_the_ops(spy: Spy, option: dict[str, str]) -> None:
    weights = gru_fast.GRUCell(I, H)._own_weights()
    x, h = torch.randn(2, I), torch.randn(2, H)
    assert_as_by_ops(lambda: functional.gru_cell(x, h, *weights, **option))
    assert spy.taken == 0


@torch.no_grad()
def test_a_batch_without_rows_goes_to_the_ops(spy: Spy) -> None:
    cell, gru = gru_fast.GRUCell(I, H), gru_fast.GRU(I, H)
    x, h = torch.randn(1, 2, I)[:, :0], torch.randn(1, 2, H)[:, :0]
    assert_as_by_ops(lambda: cell(x[0], h[0]))
    assert_as_by_ops(lambda: gru(x, h))
    assert spy.taken == 0


@pytest.mark.parametrize("missing", range(4))
@torch.no_grad()
def test_a_missing_weight_goes_to_the_ops(spy: Spy, missing: int) -> None:
    params: list[Any] = gru_fast.GRU(I, H)._flat_weights
    params[missing] = None
    x, h = torch.randn(1, 2, I), torch.randn(1, 2, H)
    assert_as_by_ops(lambda: functional.gru(x, h, params))
    assert spy.taken == 0


def test_the_native_function_checks_what_it_is_given() -> None:
    weights = gru_fast.GRUCell(I, H)._own_weights()
    x, h = torch.zeros(2, I), torch.zeros(2, H)
    two, states = gru_fast.GRU(I, H, 2)._flat_weights, torch.zeros(2, 2, H)
    nine = gru_fast.GRU(I, H, 9, bias=False)._flat_weights
    both, pair = gru_fast.GRU(I, H, bidirectional=True)._flat_weights, torch.zeros(2, 2, H)
    rest = (None, None, None, 1, "reset_after", False)
    last = (False, False, *rest)
    way = (True, False, *rest)  # both directions
    run = direct.native
    assert run(x, h, weights, None, True, *last).shape == (2, H)
    assert [t.shape for t in run(x[None], h[None], tuple(weights), 1, True, *last)] == [
        (1, 2, H)
    ] * 2
    assert run(x[None], states, two, 2, True, *last)[1].shape == (2, 2, H)
    results = run(x[None], pair, both, 1, True, *way)
    assert [t.shape for t in results] == [(1, 2, 2 * H), (2, 2, H)]
    for bad in (
        (x, h, weights, None, False, *last),
        (x, h, weights, None, True, False, False, *rest[:4], 3, False),
        (x, h, weights, None, True, False, False, *rest[:4], "gru", False),
        (x, h, weights, None, True, False, False, None, None, torch.ones(1, 2) > 0, *rest[3:]),
        (x[None], h[None], weights, 1, True, False, False, None, None, torch.ones(1, 2), *rest[3:]),
        (x, h, dict(enumerate(weights)), None, True, *last),
        (x, h, weights[:3], None, True, *last),
        (x, h, [], None, True, *last),
        (x, h, weights * 1000, None, True, *last),
        (x, None, weights, None, True, *last[:-1], True),
        (x, None, [], None, True, *last),
        (x, h[:1], weights, None, True, *last),
        (x[0], h[:1], weights, None, True, *last),
        (x[None], h[None], weights, None, True, *last),
        (x[0], h[0], weights, 1, True, *last),
        (x[None], h[None], weights, 0, True, *last),
        (x[None], h[None], weights, -1, True, *last),
        (x[None], h[None], weights, 2, True, *last),
        (x[None], h[None], weights, 9, True, *last),
        (x[None], torch.zeros(9, 2, H), nine, 9, False, *last),
        (x[None], h[:, None], weights, 1, True, *last),
        (x[None], states, two, 2, True, *last[:-1], True),
        (x[None], h[None], two, 1, True, *last),
        (x[None], h[None], two, 2, True, *last),
        (x[None], None, [], 1, True, *last),
        (x[None], None, [weights[0], None], 1, False, *last),
        (x[None], None, [weights[0], weights[2]], 1, False, *last),
        (x[None], states, [*two, None], 2, True, *last),
        (x[None, None], h[None, None], weights, 1, True, *last),
        (x[None], h[None], both, 1, True, *way),
        (x[None], pair, both, 1, True, *last),
        (x[None], pair, both[:7], 1, True, *way),
        (x[None], pair, [*both[:6], None, None], 1, True, *way[:-1], True),
        (x[None], pair, weights, 1, True, *way),
        (x[None], pair, two, 1, True, *way),
    ):
        assert run(*bad) is None
    with pytest.raises(TypeError, match="expected 13 arguments, got 1"):
        run(x)
    with pytest.raises(TypeError):
        run(x[None], h[None], weights, "one", True, *last)
