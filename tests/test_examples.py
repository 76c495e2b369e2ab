# SPDX-License-Identifier: Apache-2.0
"""The experiments of docs/gates.md: what they compute, and that the page shows what they found."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def gates():
    spec = importlib.util.spec_from_file_location("gates", ROOT / "examples" / "gates.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["gates"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gates"]


def test_one_unit_with_a_reset_gate_adds_up_and_starts_afresh(gates):
    task = gates.sums_task(1)
    assert gates.test_losses(task, gates.paper_network())[0] < 1e-4
    held = gates.hold_reset(gates.paper_network(), 1.0)
    assert gates.test_losses(task, held)[0] > 0.5


def test_segment_sums(gates):
    x, target = gates.segment_sums(torch.Generator().manual_seed(0), 5)
    assert x.shape == (30, 5, 2) and target.shape == (30, 5, 1)
    for b in range(5):
        start = 0
        for t in range(30):
            if x[t, b, 1]:
                start = t
            torch.testing.assert_close(target[t, b, 0], x[start : t + 1, b, 0].sum())
    assert x[0, :, 1].all() and 0.05 < x[1:, :, 1].mean() < 0.3


def test_adding(gates):
    x, target = gates.adding(torch.Generator().manual_seed(0), 50)
    assert x[:15, :, 1].sum(0).eq(1).all() and x[15:, :, 1].sum(0).eq(1).all()
    for b in range(50):
        marked = x[x[:, b, 1] == 1, b, 0]
        assert len(marked) == 2
        torch.testing.assert_close(target[0, b, 0], marked.sum())


def test_sizes_are_equal(gates):
    for cell in gates.CELLS:
        assert gates.Networks(cell, 2, 5, 3, 1).size == gates.size_of(cell, 2, 5, 3)
    for hidden in (2, 16):
        full = gates.size_of("reset_after", 27, hidden, 27)
        simple = gates.size_of("no_reset", 27, gates.equal_hidden(27, hidden, 27), 27)
        assert abs(simple / full - 1) < 0.2


@pytest.mark.parametrize("cell", ["reset_after", "reset_before"])
def test_a_reset_gate_held_at_one_is_no_reset_gate(gates, cell):
    networks = gates.Networks(cell, 2, 5, 3, 4)
    without = gates.Networks("no_reset", 2, 5, 3, 4)
    with torch.no_grad():
        for name in ("weight_ih", "weight_hh", "bias"):
            getattr(without, name).copy_(getattr(networks, name)[:, 5:])
        without.head.copy_(networks.head)
        without.head_bias.copy_(networks.head_bias)
    x = torch.randn(9, 6, 2)
    found = gates.hold_reset(networks, 1.0)(x)[0]
    torch.testing.assert_close(found, without(x)[0])
    assert (networks(x)[0] - found).abs().max() > 1e-3


def test_mean_reset_leaves_a_constant_gate_alone(gates):
    networks = gates.Networks("reset_after", 2, 5, 3, 4)
    x, real = torch.randn(9, 6, 2), torch.arange(9)[:, None] < torch.tensor([9, 1, 4, 4, 8, 2])
    value = torch.rand(4, 5)
    held = gates.hold_reset(networks, value)
    torch.testing.assert_close(gates.mean_reset(held, x, real), value)
    mean = gates.mean_reset(networks, x, real)
    again = gates.mean_reset(networks, x.where(real[..., None], 9.0), real)
    assert torch.equal(mean, again) and (mean - 0.5).abs().max() > 0.01


def test_groups_train_apart(gates):
    task = gates.sums_task(15)
    networks = gates.fit(task, "reset_after", 3, B=8)
    losses = gates.test_losses(task, networks)
    assert len(set(losses)) == gates.SEEDS and all(0 < loss < 3 for loss in losses)


def test_the_page_shows_the_figures_of_the_file(gates, capsys):
    results = json.loads((ROOT / "docs" / "gates.json").read_text())
    assert set(results) == set(gates.PARTS)
    gates.print_tables(results)
    page = (ROOT / "docs" / "gates.md").read_text()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) > 20
    for row in rows:
        assert row in page
