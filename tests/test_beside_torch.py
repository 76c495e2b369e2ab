# SPDX-License-Identifier: Apache-2.0
"""The language model on torch.nn.GRU is the same network, and what is timed is what is printed."""

from itertools import count

import pytest
import torch

from gru_fast import GRULanguageModel, beside_torch
from gru_fast.beside_torch import TorchLanguageModel, compare_sampling, compare_training
from gru_fast.sampling import PADDING

TOKENS = torch.tensor([[3, 1, 2, 0], [5, 0, PADDING, PADDING]])


@pytest.mark.parametrize("embedding", [None, 4])
def test_it_is_the_same_network(embedding):
    model = GRULanguageModel(6, embedding, 8, 2)
    theirs = TorchLanguageModel(model)
    torch.testing.assert_close(theirs.loss(TOKENS), model.loss(TOKENS))
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 2)  # not the same token again and again
        model.head.weight.mul_(1e4)  # the likeliest token is all that is ever drawn
    options = {"max_new_tokens": 12, "num_return_sequences": 2, "seed": 1}
    drawn = TorchLanguageModel(model).generate(eos_token_id=None, **options)
    expected = model.generate(do_sample=False, **options)
    assert torch.equal(drawn, expected) and len(expected[0].unique()) > 1
    ended = TorchLanguageModel(model).generate(eos_token_id=4, **options)
    length = expected[0].tolist().index(4) + 1
    assert torch.equal(ended[:, :length], expected[:, :length])
    assert (ended[:, length:] == PADDING).all()


def test_speeds_are_tokens_over_seconds(monkeypatch):
    """By a clock that counts its readings, a round takes a second."""
    monkeypatch.setattr(beside_torch.time, "perf_counter", count().__next__)
    model = GRULanguageModel(6, None, 8)
    with torch.no_grad():
        model.head.bias[0] = -1e4  # EOS is not drawn
    for line, tokens in (
        (compare_training(model, TOKENS), 6),
        (compare_sampling(model, 3, 4, None), 12),
        (compare_sampling(model, 1, 4, 0), 64),  # 16 calls
        (compare_sampling(model, 32, 4, 0), 128),
    ):
        assert f": {tokens} tokens/s, torch.nn.GRU {tokens}, ratio 1.00 (" in line
