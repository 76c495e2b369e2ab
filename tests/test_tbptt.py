# SPDX-License-Identifier: Apache-2.0
"""The helper for truncated backpropagation through time."""

import gc
import weakref

import pytest
import torch
from torch import nn

import gru_fast

T, B, I, H = 11, 3, 4, 5  # noqa: E741


@pytest.mark.parametrize("steps", [1, 4, 11, 50])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("with_options", [False, True])
def test_outputs_are_those_of_one_call(steps, batch_first, with_options):
    rnn = gru_fast.GRU(I, H, 2, batch_first=batch_first)
    x, hx = torch.randn(T, B, I), torch.randn(2, B, H)
    options = {}
    if with_options:
        mask = torch.rand(T, B) < 0.3
        options = {
            "lengths": torch.tensor([0, 6, 11]),
            "reset_mask": mask.T if batch_first else mask,
            "reset_state": torch.randn(2, B, H),
        }
    x = x.transpose(0, 1) if batch_first else x
    output, h_n = rnn(x, hx, **options)
    chunks = list(gru_fast.tbptt(rnn, x, steps, hx, **options))
    assert torch.equal(torch.cat([c.output for c in chunks], int(batch_first)), output)
    assert torch.equal(chunks[-1].h_n, h_n)
    assert [i for c in chunks for i in range(T)[c.time]] == list(range(T))


def test_outputs_of_layer_norm_are_within_rounding():
    rnn, x = gru_fast.LayerNormGRU(I, H), torch.randn(T, B, I)
    output, h_n = rnn(x)
    chunks = list(gru_fast.tbptt(rnn, x, 4))
    torch.testing.assert_close(torch.cat([c.output for c in chunks]), output, rtol=0, atol=2e-6)
    torch.testing.assert_close(chunks[-1].h_n, h_n, rtol=0, atol=2e-6)


def test_gradients_end_at_a_chunk():
    rnn = gru_fast.GRU(I, H, dtype=torch.float64)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    hx = torch.randn(1, B, H, dtype=torch.float64, requires_grad=True)
    state, expected = hx, []
    for begin in range(0, T, 4):
        output, h_n = rnn(x[begin : begin + 4], state)
        expected.append(
            torch.autograd.grad(output.sum(), [x, hx, *rnn.parameters()], allow_unused=True)
        )
        state = h_n.detach()
    chunks = gru_fast.tbptt(rnn, x, 4, hx)
    for chunk, wanted in zip(chunks, expected, strict=True):
        found = torch.autograd.grad(
            chunk.output.sum(), [x, hx, *rnn.parameters()], allow_unused=True
        )
        for a, b in zip(found, wanted, strict=True):
            assert a is b is None or torch.equal(a, b)
        assert not found[0][: chunk.time.start].any() and found[0][chunk.time].all()
    assert expected[0][1] is not None and expected[1][1] is None


def test_a_chunk_sees_the_weights_of_its_time_and_is_freed():
    rnn = gru_fast.GRU(I, H)
    optimizer = torch.optim.SGD(rnn.parameters(), lr=0.5)
    x = torch.randn(T, B, I)
    graphs = []
    state = None
    for chunk in gru_fast.tbptt(rnn, x, 3):
        assert torch.equal(chunk.output, rnn(x[chunk.time], state)[0])
        gc.collect()
        assert not any(graph() is not None for graph in graphs)
        optimizer.zero_grad()
        chunk.output.square().mean().backward()
        optimizer.step()
        state = chunk.h_n.detach()
        graphs.append(weakref.ref(chunk.output))
        del chunk
    assert len(graphs) == 4


def test_torchs_gru_and_one_sequence():
    rnn = nn.GRU(I, H)
    x = torch.randn(T, I)
    found = torch.cat([chunk.output for chunk in gru_fast.tbptt(rnn, x, 4)])
    torch.testing.assert_close(found, rnn(x)[0])


def test_a_learned_state_begins_and_is_reset_to():
    rnn = gru_fast.GRU(I, H, learn_h0=True)
    nn.init.normal_(rnn.h0)
    x, mask = torch.randn(T, B, I), torch.zeros(T, B, dtype=torch.bool)
    mask[7] = True
    chunks = list(gru_fast.tbptt(rnn, x, 4, reset_mask=mask))
    assert torch.equal(torch.cat([c.output for c in chunks]), rnn(x, reset_mask=mask)[0])
    used = [torch.autograd.grad(c.output.sum(), [rnn.h0], allow_unused=True)[0] for c in chunks]
    assert used[0].any() and used[1].any() and not used[2].any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps: expected at least 1, got 0"),
        ({"steps": 2.0}, TypeError, "steps should be of type int, got: float"),
        ({"steps": True}, TypeError, "steps should be of type int, got: bool"),
        ({"input": [1.0]}, TypeError, "input should be a Tensor, got: list"),
        ({"input": torch.zeros(I)}, ValueError, "input: expected 2 or 3 dimensions, got 1"),
        ({"module": None}, TypeError, "module should be a torch.nn.Module, got: NoneType"),
        ({"hx": (torch.zeros(1, B, H),) * 2}, TypeError, "hx should be a Tensor or .*, got: tuple"),
        ({"lengths": [1] * B}, TypeError, "lengths should be a Tensor or None, got: list"),
        ({"reset_mask": [True] * T}, TypeError, "reset_mask should be a Tensor or None, got: list"),
        ({"reset_state": 0.0}, TypeError, "reset_state should be a Tensor or None, got: float"),
        ({"module": gru_fast.GRU(I, H, bidirectional=True)}, ValueError, "expected one direction"),
        ({"lengths": torch.tensor([T + 1] * B)}, RuntimeError, f"lengths: .*to T = {T}, got"),
        ({"lengths": torch.tensor([-1] * B)}, RuntimeError, "lengths: expected values from 0"),
        ({"reset_mask": torch.zeros(T + 1, B).bool()}, RuntimeError, f"reset_mask: .*T = {T} time"),
    ],
)  # fmt: skip
def test_bad_arguments(change, error, message):
    call = {"module": gru_fast.GRU(I, H), "input": torch.zeros(T, B, I), "steps": 4}
    with pytest.raises(error, match=message):
        gru_fast.tbptt(**{**call, **change})


def test_a_state_of_another_kind_is_named():
    chunks = gru_fast.tbptt(torch.nn.LSTM(I, H), torch.zeros(T, B, I), 4)
    with pytest.raises(TypeError, match="h_n of LSTM is: tuple"):
        next(chunks)


def test_no_time_steps():
    assert list(gru_fast.tbptt(gru_fast.GRU(I, H), torch.zeros(0, B, I), 4)) == []
