# SPDX-License-Identifier: Apache-2.0
"""The draws of a loop that has the logits of one step at a time: natively as by the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from gru_fast import GRULanguageModel, drawing, ops, sampling

pytestmark = pytest.mark.skipif(not ops.HAS_CPU_KERNELS, reason="no compiled kernels")

OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"top_k": 4},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"temperature": 2.0, "top_k": 9, "top_p": 0.9, "min_p": 0.05},
    {"do_sample": False},
]
ALL = {"do_sample": True, "temperature": 1.0, "top_k": None, "top_p": None, "min_p": None}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of each native draw."""
    from gru_fast import _C

    made: list[int] = []
    draw = _C.draw

    def counted(logits: Any, *args: Any, **options: Any) -> Any:
        made.append(len(logits))
        return draw(logits, *args, **options)

    monkeypatch.setattr(_C, "draw", counted)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_native_draws_are_the_references(
    options: dict[str, Any], dtype: torch.dtype, calls: list[int]
) -> None:
    first = torch.tensor([0, 3, 2**33, 17, 1])
    rules = {**ALL, **options}
    one, other = drawing.natively(first, -5, **rules), drawing.by_reference(first, -5, **rules)
    for t in (*range(70), 1000, 3):
        logits = torch.randn(5, 21, dtype=dtype) * 2
        tokens, log_probs = one(t, logits)
        expected, of_expected = other(t, logits)
        assert torch.equal(tokens, expected)
        assert log_probs.dtype == of_expected.dtype
        torch.testing.assert_close(log_probs, of_expected, rtol=0, atol=2e-6)
    assert calls == [5] * 72


def test_logits_of_any_strides_keep_their_rows() -> None:
    first = torch.zeros(6, dtype=torch.int64)
    one, other = drawing.natively(first, 1, **ALL), drawing.by_reference(first, 1, **ALL)
    logits = torch.randn(11, 6).T
    assert torch.equal(one(0, logits)[0], other(0, logits)[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("rules", [ALL, {**ALL, "do_sample": False}, {**ALL, "temperature": 0.5}])
def test_logits_that_allow_no_draw_raise_the_references_error(
    rules: dict[str, Any], bad: float
) -> None:
    first = torch.zeros(3, dtype=torch.int64)
    logits = torch.randn(3, 5)
    logits[1, 2] = bad
    messages = []
    for way in (drawing.natively, drawing.by_reference):
        with pytest.raises(ValueError, match=r"^logits.*expected no NaN") as raised:
            way(first, 1, **rules)(0, logits)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


def with_hook(model: GRULanguageModel) -> GRULanguageModel:
    model.gru.register_forward_hook(lambda module, args, result: (result[0] * 1.5, result[1]))
    return model


def double(model: GRULanguageModel) -> GRULanguageModel:
    return model.double()


def with_another_head(model: GRULanguageModel) -> GRULanguageModel:
    head: Any = nn.Sequential(model.head)
    head.weight = model.head.weight
    model.head = head
    return model


@pytest.mark.parametrize("change", [with_hook, double, with_another_head])
def test_models_on_the_cpu_that_the_native_loop_cannot_take_draw_natively(
    change: Any, calls: list[int]
) -> None:
    model = change(GRULanguageModel(9, None, 16))
    assert sampling.choose_loop(model) is sampling.mixed_loop
    prompts = [[1, 2, 3], [4], []]
    options: dict[str, Any] = {"max_new_tokens": 40, "eos_token_id": 0, "seed": 7}
    drawn = model.generate(prompts, return_dict_in_generate=True, **options)
    expected = sampling.generate(
        model, prompts, return_dict_in_generate=True, loop=sampling.generate_loop, **options
    )
    assert torch.equal(drawn.sequences, expected.sequences)
    torch.testing.assert_close(drawn.log_probs, expected.log_probs, rtol=0, atol=2e-6)
    assert torch.equal(drawn.hidden, expected.hidden)
    assert calls and set(calls) == {3}


def test_the_reference_backend_draws_by_the_reference(calls: list[int]) -> None:
    model = with_hook(GRULanguageModel(9, None, 16, backend="reference"))
    assert sampling.choose_loop(model) is sampling.generate_loop
    model.generate(max_new_tokens=5, seed=0)
    assert not calls
