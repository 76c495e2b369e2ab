# SPDX-License-Identifier: Apache-2.0
"""A language model under autocast on the CPU: the layers stay in float32, the head is a Linear."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gru_fast import GRULanguageModel

V = 28
MODELS: tuple[dict[str, Any], ...] = (
    {"embedding_size": 8}, {"embedding_size": None}, {"embedding_size": 8, "bias": False},
    {"embedding_size": None, "bias": False}, {"embedding_size": 8, "num_layers": 2},
    {"embedding_size": 16, "tie_weights": True},
)  # fmt: skip
SHAPES = ((2, 5), (8, 20))
"""Fewer ids than words, and more."""


def language_model(**options: Any) -> GRULanguageModel:
    return GRULanguageModel(V, hidden_size=16, **options)


def autocast(dtype: torch.dtype = torch.bfloat16) -> torch.autocast:
    return torch.autocast("cpu", dtype)


def head_in_bfloat16(model: GRULanguageModel, output: Tensor) -> Tensor:
    return torch.nn.functional.linear(
        output.bfloat16(), model.head.weight.bfloat16(), model.head.bias.bfloat16()
    )


@pytest.mark.parametrize("called", [False, True], ids=("read", "called"))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", MODELS, ids=str)
def test_all_but_the_head_is_as_without(
    options: dict[str, Any], shape: tuple[int, int], called: bool
) -> None:
    model, tokens = language_model(**options), torch.randint(V, shape)
    if called:
        model.gru.register_forward_hook(lambda *_: None)
    inputs = model.teacher_forcing(tokens)
    output, h_n = model.run(inputs)
    model.loss(tokens).backward()
    expected = [p.grad for p in model.parameters()]
    table, score = model.token_table(), model.score(tokens)
    model.zero_grad()
    with autocast():
        assert torch.equal(model.token_table(), table)
        found = model.run(inputs)
        logits, state = model(inputs)
        loss = model.loss(tokens)
        scored = model.score(tokens)
    torch.testing.assert_close(found, (output, h_n), rtol=0, atol=0)
    assert torch.equal(state, h_n)
    assert torch.equal(logits, head_in_bfloat16(model, output).transpose(0, 1))
    torch.testing.assert_close(scored, score, rtol=0, atol=0.02)
    loss.backward()
    for grad, parameter in zip(expected, model.parameters(), strict=True):
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32
        torch.testing.assert_close(parameter.grad, grad, rtol=0.05, atol=2e-3)


@pytest.mark.parametrize("called", [False, True], ids=("read", "called"))
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize(
    ("held", "returned"), [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)]
)
def test_a_state_of_another_dtype(
    held: torch.dtype, returned: torch.dtype, num_layers: int, called: bool
) -> None:
    """It is widened, and what comes out has the dtype that `gru_fast.GRU` gives it."""
    model = language_model(embedding_size=8, num_layers=num_layers)
    if called:
        model.gru.register_forward_hook(lambda *_: None)
    tokens, hidden = torch.randint(V, (3, 4)), torch.rand(num_layers, 3, 16).to(held)
    expected = model.run(tokens, hidden.float())
    with autocast():
        found = model.run(tokens, hidden)
        theirs = model.gru(torch.zeros(4, 3, 8), hidden)
    assert [t.dtype for t in found] == [t.dtype for t in theirs] == [returned] * 2
    torch.testing.assert_close(found, tuple(t.to(returned) for t in expected), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="expected the dtype of"):
        model.run(tokens, hidden)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_sampling_and_its_score(backend: str) -> None:
    model = language_model(embedding_size=8, backend=backend)
    call = {"max_new_tokens": 9, "num_return_sequences": 2, "seed": 1}
    with autocast():
        out = model.generate(**call, return_dict_in_generate=True)
        scores = model.score(out.sequences)
    torch.testing.assert_close(scores, out.log_probs, rtol=0, atol=0.02)


def test_compiled_in_one_graph(fresh_compiler: None) -> None:
    model = language_model(embedding_size=8)
    compiled = torch.compile(model.run, fullgraph=True, backend="aot_eager")
    for shape in SHAPES:
        tokens = torch.randint(V, shape)
        with autocast():
            torch.testing.assert_close(compiled(tokens), model.run(tokens))
