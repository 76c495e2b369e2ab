# SPDX-License-Identifier: Apache-2.0
"""Fifty steps of training give the losses and weights that torch.nn.GRU gives."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import gru_fast
from helpers import assert_parity

STEPS, B, T, WIDTH, HIDDEN = 50, 6, 9, 5, 7
LENGTHS = torch.tensor([4, 9, 1, 6, 9, 2])


# The sizes are too small for two, on a busy machine by a factor of twenty.
pytestmark = pytest.mark.usefixtures("one_thread")


class Recall(nn.Module):
    """Predicts the input of the step before; the state is carried over in `carry` tasks."""

    def __init__(self, gru, packed, carry):
        super().__init__()
        self.gru = gru
        features = gru.hidden_size * (2 if gru.bidirectional else 1)
        self.head = nn.Linear(features, WIDTH, dtype=gru.weight_hh_l0.dtype)
        self.packed = packed
        self.carry = carry
        self.state = None

    def loss(self, x):
        target = x.roll(1, 0)
        if self.gru.batch_first:
            x = x.transpose(0, 1)
        if self.packed:
            x = pack_padded_sequence(x, LENGTHS, self.gru.batch_first, enforce_sorted=False)
        output, h_n = self.gru(x, self.state)
        self.state = h_n.detach() if self.carry else None
        if self.packed:
            output, _ = pad_packed_sequence(output, self.gru.batch_first, total_length=T)
        if self.gru.batch_first:
            output = output.transpose(0, 1)
        return (self.head(output) - target)[1:].square().mean() + h_n.square().mean()


def fit(model, dtype):
    """Losses and final weights; data and dropout are the same at every call."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    data = torch.randn(2, T, B, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    torch.manual_seed(2)
    losses = []
    for step in range(STEPS):
        optimiser.zero_grad()
        loss = model.loss(data[step % 2])
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return {"losses": torch.tensor(losses, dtype=dtype), "weights": weights}


TASKS = {
    "plain": ({}, False, False),
    "dropout": ({"num_layers": 2, "dropout": 0.4}, False, False),
    "bidirectional": (
        {"num_layers": 3, "dropout": 0.2, "bidirectional": True, "batch_first": True},
        False,
        False,
    ),
    "packed": ({"num_layers": 2, "dropout": 0.3, "batch_first": True}, True, False),
    "packed_bidirectional": (
        {"num_layers": 2, "dropout": 0.3, "bidirectional": True, "bias": False},
        True,
        False,
    ),
    "truncated_bptt": ({"num_layers": 2}, False, True),
}


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
@pytest.mark.parametrize("task", TASKS)
def test_fifty_steps_equal_torchs(task, recompute):
    config, packed, carry = TASKS[task]
    torch.manual_seed(0)
    theirs = Recall(nn.GRU(WIDTH, HIDDEN, **config), packed, carry)
    torch.manual_seed(0)
    ours = Recall(gru_fast.GRU(WIDTH, HIDDEN, recompute=recompute, **config), packed, carry)
    exact, ours64 = copy.deepcopy(theirs).double(), copy.deepcopy(ours).double()

    exact = fit(exact, torch.float64)
    losses = exact["losses"]
    assert losses[-5:].mean() < 0.8 * losses[:5].mean(), "the task is not learnt"
    results = fit(ours, torch.float32), fit(theirs, torch.float32), fit(ours64, torch.float64)
    for name, truth in exact.items():
        ours, theirs, ours64 = (result[name] for result in results)
        assert_parity(name, ours, theirs, truth)
        assert_parity(name, ours64, truth, truth)


def test_a_state_dict_moves_between_the_two_in_mid_training():
    torch.manual_seed(0)
    theirs = Recall(nn.GRU(WIDTH, HIDDEN, 2), False, False).double()
    ours = Recall(gru_fast.GRU(WIDTH, HIDDEN, 2), False, False).double()
    fit(theirs, torch.float64)
    ours.load_state_dict(theirs.state_dict())
    truth = fit(theirs, torch.float64)
    for name, value in fit(ours, torch.float64).items():
        assert_parity(name, value, truth[name], truth[name])


@pytest.mark.parametrize("cell", ["reset_before", "no_reset"])
def test_the_other_cells_learn(cell):
    torch.manual_seed(0)
    gru = gru_fast.GRU(WIDTH, HIDDEN, 2, cell=cell, bidirectional=True)
    losses = fit(Recall(gru, False, False), torch.float32)["losses"]
    assert losses[-5:].mean() < 0.8 * losses[:5].mean()
