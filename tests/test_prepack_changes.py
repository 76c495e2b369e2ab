# SPDX-License-Identifier: Apache-2.0
"""`prepacked` while weights change: what is packed again, and what nobody counts."""

from typing import Any

import pytest
import torch
from torch import nn

import gru_fast
from prepack_stepper import H, I, Stepper

pytest.importorskip("gru_fast._C", reason="gru_fast was built without its CPU kernels")


pytestmark = pytest.mark.usefixtures("no_gradients")


CHANGES = {
    "in place": lambda m: m.weight_hh_l0.mul_(2),
    "an element": lambda m: m.weight_ih_l0[3, 2].add_(1),
    "load_state_dict": lambda m: m.load_state_dict(gru_fast.GRU(I, H).state_dict()),
    "a new Parameter": lambda m: setattr(m, "weight_hh_l0", nn.Parameter(m.weight_hh_l0 * 2)),
    "other memory": lambda m: setattr(m.weight_ih_l0, "data", m.weight_ih_l0 * 2),
    "bias": lambda m: m.bias_hh_l0.data.add_(1),
    "reset_parameters": lambda m: m.reset_parameters(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_are_seen(change: Any) -> None:
    step = Stepper()
    with gru_fast.prepacked(step.module):
        before = step()
        for _ in range(2):
            change(step.module)
            after = step()
            assert not torch.equal(after, before) and torch.equal(after, step.expected())
            before = after


@pytest.mark.parametrize("how", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_an_optimisers_step_is_seen(how: dict[str, bool]) -> None:
    step = Stepper()
    optimiser = torch.optim.SGD(step.module.parameters(), 0.1, **how)
    with gru_fast.prepacked(step.module):
        before = step()
        with torch.enable_grad():
            step().square().mean().backward()
        optimiser.step()
        after = step()
    assert not torch.equal(after, before) and torch.equal(after, step())


def test_a_compiled_step_of_a_fused_optimiser_is_seen(fresh_compiler: None) -> None:
    step = Stepper()
    optimiser = torch.optim.SGD(step.module.parameters(), 0.1, fused=True)
    compiled = torch.compile(optimiser.step, backend="aot_eager")
    with gru_fast.prepacked(step.module):
        for _ in range(2):
            before = step()
            with torch.enable_grad():
                step().square().mean().backward()
            compiled()
            after = step()
            assert not torch.equal(after, before) and torch.equal(after, step.expected())


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_is_seen_in_whatever_lies_in_the_memory_that_it_changes(fused: bool) -> None:
    """A learner's weights that an actor uses, and a buffer that holds all weights."""
    step, learner = Stepper(), gru_fast.GRU(I, H)
    weights = list(step.module.parameters())
    buffer = nn.Parameter(torch.cat([weight.flatten() for weight in weights]))
    parts = buffer.data.split([weight.numel() for weight in weights])
    for memory in ([w.data for w in learner.parameters()], parts):
        for weight, place in zip(weights, memory, strict=True):
            weight.data = place.view_as(weight)
        optimiser = torch.optim.SGD([buffer, *learner.parameters()], 0.1, fused=fused)
        with gru_fast.prepacked(step.module):
            before = step()
            for parameter in (buffer, *learner.parameters()):
                parameter.grad = torch.ones_like(parameter)
            optimiser.step()
            after = step()
            assert not torch.equal(after, before) and torch.equal(after, step.expected())


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_inside_counts_as_a_change_of_nothing_else(fused: bool) -> None:
    """The actor, which has no gradient yet, is differentiated after the critic's step."""
    policy, critic = gru_fast.GRU(I, H), nn.Linear(I, 1)
    with torch.inference_mode():
        other = nn.Parameter(torch.zeros(1), requires_grad=False)
    weights = list(policy.parameters())
    versions = [weight._version for weight in weights]
    optimiser = torch.optim.Adam([*weights, *critic.parameters(), other], fused=fused)
    with gru_fast.prepacked(policy), torch.enable_grad():
        x = torch.randn(3, 2, I, requires_grad=True)
        actor_loss = policy(x)[0].sum()
        critic(x).sum().backward()
        optimiser.step()
        actor_loss.backward()
    assert [weight._version for weight in weights] == versions


@pytest.mark.parametrize("change", ["in place", "load_state_dict"])
def test_weights_that_change_places_are_told_apart(change: str) -> None:
    first, second = Stepper(), Stepper()
    both = nn.ModuleList([first.module, second.module])
    for weight in second.module.parameters():
        weight.mul_(1)  # one more change than the first has, until that has changed as well
    with gru_fast.prepacked(both):
        first(), second()
        pairs = list(zip(first.module.parameters(), second.module.parameters(), strict=True))
        for a, b in pairs:
            a.data, b.data = b.data, a.data
        assert all(torch.equal(step(), step.expected()) for step in (first, second))
        CHANGES[change](first.module)
        assert all(torch.equal(step(), step.expected()) for step in (first, second))
        for a, b in pairs:
            a.data, b.data = b.data, a.data
        assert torch.equal(second(), second.expected())


def test_what_nobody_counts_is_used_after_the_block_only() -> None:
    """As documented; and it shows that nothing is packed twice."""
    step = Stepper()
    with gru_fast.prepacked(step.module):
        before = step()
        step.module.weight_hh_l0.data.mul_(2)
        assert torch.equal(step(), before)
    assert torch.equal(step(), step.expected()) and not torch.equal(step(), before)
