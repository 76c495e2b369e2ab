# SPDX-License-Identifier: Apache-2.0
"""examples/recurrent_policy.py: the mazes, and that resets and split episodes are the same."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parents[1] / "examples" / "recurrent_policy.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("recurrent_policy", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["recurrent_policy"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["recurrent_policy"]


def test_mazes(example):
    mazes = example.Mazes(50, 0)
    age, signal = torch.zeros(50, dtype=torch.int64), torch.zeros(50, dtype=torch.int64)
    for _ in range(60):
        seen, first = mazes.observe(), mazes.first
        age = torch.where(first, 0, age + 1)
        assert torch.equal(seen[:, :2].sum(1) == 1, first)
        signal = torch.where(first, seen[:, :2].argmax(1), signal)
        turn = seen[:, 2] == 1
        assert (age[turn] >= 4).all() and (age <= 12).all()
        action = torch.randint(2, (50,))
        right = torch.where(action == signal, 1.0, -1.0)
        assert torch.equal(mazes.act(action), right * turn)
        assert torch.equal(mazes.first, turn)


def test_resets_are_split_episodes(example):
    torch.manual_seed(0)
    policy, mazes = example.Policy(16), example.Mazes(5, 1)
    state = torch.randn(1, 5, 16)
    for _ in range(2):  # the second rollout begins inside episodes
        rollout = example.roll_out(policy, mazes, state, 20)
        state = rollout.h_n
    assert not rollout.first[0].all() and rollout.first.sum() > 5
    found = []
    for way in (example.with_resets, example.split_and_pad):
        loss = example.loss_of(policy, rollout, way)
        found.append((loss.detach(), *torch.autograd.grad(loss, list(policy.parameters()))))
    torch.testing.assert_close(*found)
    # What was seen while acting is what learning sees.
    _, h_n = policy.gru(rollout.seen, rollout.hx, reset_mask=rollout.first)
    assert torch.equal(h_n, rollout.h_n)


def test_returns_stop_at_an_episode(example):
    first = torch.tensor([[True], [False], [True], [False]])
    reward = torch.tensor([[0.0], [1.0], [0.0], [0.0]])
    nothing = torch.zeros(0)
    rollout = example.Rollout(nothing, first, nothing, reward, nothing, nothing)
    found = example.returns(rollout, torch.full((4, 1), 2.0), 0.5)
    assert found.squeeze(1).tolist() == [0.5, 1.0, 0.5, 1.0]
    reward[-1] = -1.0  # where the last episode ends there is no value after it
    found = example.returns(rollout, torch.full((4, 1), 2.0), 0.5)
    assert found.squeeze(1).tolist() == [0.5, 1.0, -0.5, -1.0]


@pytest.mark.slow
def test_learns(example):
    found = example.train(example.with_resets, updates=120)
    assert found.right[0] < 0.65 and min(found.right[-10:]) > 0.9
