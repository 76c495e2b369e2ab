# SPDX-License-Identifier: Apache-2.0
"""Copies of samplers and streams, and that they are not pickled."""

import copy
import pickle

import pytest
import torch
from torch import nn

import gru_fast
from gru_fast import GRULanguageModel, Sampler, Stream
from gru_fast.packed import WEIGHTS

CALL = {"max_new_tokens": 12, "num_return_sequences": 3, "seed": 4}


def model():
    torch.manual_seed(0)
    return GRULanguageModel(9, 5, 20)


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy])
def test_a_sampler_and_its_copy_draw_the_same(clone):
    sampler = Sampler(model(), "int8", threads=1)
    twin = clone(sampler)
    assert type(twin) is Sampler and twin is not sampler
    assert torch.equal(twin.generate(**CALL), sampler.generate(**CALL))
    assert (twin.kernel, twin.nbytes) == (sampler.kernel, sampler.nbytes)


def test_a_copy_is_refreshed_by_itself():
    lm = model()
    sampler = Sampler(lm)
    twin, deep = copy.copy(sampler), copy.deepcopy(sampler)
    before = sampler.generate(**CALL)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(torch.randn_like(parameter))
    twin.refresh()
    deep.refresh()  # of its own copy of the model, which did not change
    after = twin.generate(**CALL)
    assert not torch.equal(after, before)
    assert torch.equal(after, lm.generate(**CALL))
    assert torch.equal(sampler.generate(**CALL), before)
    assert torch.equal(deep.generate(**CALL), before)


def test_a_module_that_keeps_a_sampler_can_be_copied():
    class Server(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm = model()
            self.sampler = Sampler(self.lm)

    twin = copy.deepcopy(Server())
    assert twin.sampler._model is twin.lm


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_copied_stream_goes_on_by_itself(clone, weights):
    torch.manual_seed(1)
    frames = torch.randn(6, 5).clamp(-1, 1)
    stream = Stream(gru_fast.GRU(5, 20, 2), weights)
    whole = stream.push(frames)
    stream.reset()
    stream.push(frames[:3])
    stream.step(frames[3])
    twin = clone(stream)
    assert torch.equal(twin.output, stream.output)
    assert twin.output.data_ptr() != stream.output.data_ptr()
    stream.reset()
    assert torch.equal(twin.push(frames[4:]), whole[4:])
    assert torch.equal(stream.push(frames), whole)


def test_pickling_says_what_to_do():
    for given in (Sampler(model()), Stream(model())):
        with pytest.raises(TypeError, match=f"cannot pickle a {type(given).__name__}: pickle its"):
            pickle.dumps(given)
