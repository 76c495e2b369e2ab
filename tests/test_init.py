# SPDX-License-Identifier: Apache-2.0
"""Initial values of each gate on its own."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import gru_fast
from cases import CELLS
from gru_fast.init import chrono_, orthogonal_, per_gate_

MODULES = {
    **{
        cell: lambda cell=cell: gru_fast.GRU(5, 8, 2, bidirectional=True, cell=cell)
        for cell in CELLS
    },
    **{f"step-{cell}": lambda cell=cell: gru_fast.GRUCell(5, 8, cell=cell) for cell in CELLS},
    "torch": lambda: nn.GRU(5, 8, 2),
    "torch-step": lambda: nn.GRUCell(5, 8),
}


def gates(module):
    return 2 if getattr(module, "cell", "") == "no_reset" else 3


def named(module, kind):
    return {n: p for n, p in module.named_parameters() if n.startswith(kind)}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", MODULES)
def test_each_gate_is_orthogonal(name):
    module = MODULES[name]()
    others = {n: p.clone() for n, p in module.named_parameters() if "weight_hh" not in n}
    state = torch.get_rng_state()
    assert orthogonal_(module, gain=1.5, generator=seeded(3)) is module
    assert torch.equal(torch.get_rng_state(), state)
    blocks = [b for w in named(module, "weight_hh").values() for b in w.chunk(gates(module))]
    for block in blocks:
        assert block.shape == (8, 8)
        torch.testing.assert_close(block @ block.T, 1.5**2 * torch.eye(8), rtol=0, atol=1e-5)
    for i, block in enumerate(blocks):
        assert all(not torch.allclose(block, other) for other in blocks[:i])
    assert all(torch.equal(others[n], p) for n, p in module.named_parameters() if n in others)
    assert all(p.requires_grad and p.is_leaf for p in module.parameters())

    again = orthogonal_(MODULES[name](), gain=1.5, generator=seeded(3))
    for n, p in named(module, "weight_hh").items():
        assert torch.equal(p, again.get_parameter(n))


def test_torchs_own_function_on_the_whole_weight_is_something_else():
    weight = nn.init.orthogonal_(gru_fast.GRU(5, 8).weight_hh_l0)
    block = weight[:8].detach()
    assert (block @ block.T - torch.eye(8)).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    module = orthogonal_(gru_fast.GRU(5, 8, dtype=dtype))
    for block in module.weight_hh_l0.detach().chunk(3):
        error = (block @ block.T).double() - torch.eye(8)
        assert error.abs().max() < 4 * torch.finfo(dtype).eps
    chrono_(module, 100)
    assert module.bias_ih_l0.dtype == dtype


def test_any_function_of_torch_for_each_gate():
    module = gru_fast.GRU(300, 4, cell="no_reset")
    assert per_gate_(module, "weight_ih", nn.init.xavier_uniform_, generator=seeded(0)) is module
    bound = (6 / (300 + 4)) ** 0.5  # (6 / (300 + 8)) ** 0.5 for the whole weight
    assert 0.99 * bound < float(module.weight_ih_l0.detach().abs().max()) <= bound
    per_gate_(module, "bias_hh", nn.init.constant_, val=2.0)
    assert module.bias_hh_l0.eq(2).all()


@pytest.mark.parametrize("name", MODULES)
def test_chrono_sets_the_time_over_which_a_unit_forgets(name):
    module = MODULES[name]()
    before = {n: p.clone() for n, p in module.named_parameters()}
    assert chrono_(module, t_max=50, t_min=10, generator=seeded(1)) is module
    z = slice(0, 8) if gates(module) == 2 else slice(8, 16)
    T = []
    for n, p in module.named_parameters():
        if n.startswith("weight"):
            assert torch.equal(p, before[n])
        else:
            rest = torch.ones(len(p), dtype=torch.bool)
            rest[z] = False
            assert torch.equal(p[rest], before[n][rest])
            if n.startswith("bias_ih"):
                total = p + module.get_parameter(n.replace("_ih", "_hh"))
                T.append(1 / (1 - total[z].sigmoid()))
    T = torch.cat(T)
    assert 10 - 1e-3 <= T.min() and T.max() <= 50 + 1e-3
    assert T.std() > 5

    # And the module does forget at that rate: no input, no weights, so n = 0 and h = z * h_prev.
    with torch.no_grad():
        for n, p in module.named_parameters():
            if n.startswith("weight"):
                p.zero_()
            else:
                p[[i for i in range(len(p)) if not z.start <= i < z.stop]] = 0
    if isinstance(module, nn.RNNCellBase):
        h = module(torch.zeros(1, 5), torch.ones(1, 8))
    else:
        layers = 2 * (1 + module.bidirectional)
        h = module(torch.zeros(1, 1, 5), torch.ones(layers, 1, 8))[1]
    torch.testing.assert_close(h.flatten(), 1 - 1 / T, rtol=1e-5, atol=0)


def test_chrono_draws_uniformly_and_from_the_generator():
    big = chrono_(gru_fast.GRU(1, 1000), 100, generator=seeded(0))
    T = 1 + big.bias_ih_l0[1000:2000].detach().exp()
    assert 2 <= T.min() < 3 and 99 < T.max() <= 100.001
    assert abs(float(T.mean()) - 51) < 3
    again = chrono_(gru_fast.GRU(1, 1000), np.float32(100), generator=seeded(0))
    assert torch.equal(again.bias_ih_l0[1000:2000], big.bias_ih_l0[1000:2000])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: orthogonal_(nn.LSTM(2, 2)), TypeError, "got: LSTM"),
        (lambda: orthogonal_(nn.LSTMCell(2, 2)), TypeError, "got: LSTMCell"),
        (lambda: orthogonal_(gru_fast.GRU(2, 2), float("nan")), ValueError, "gain: .* got nan"),
        (lambda: orthogonal_(gru_fast.GRU(2, 2), "1"), TypeError, "real number"),
        (lambda: chrono_(nn.Linear(2, 2), 5), TypeError, "got: Linear"),
        (lambda: chrono_(gru_fast.GRU(2, 2, bias=False), 5), ValueError, "got bias=False"),
        (lambda: chrono_(gru_fast.GRUCell(2, 2, bias=False), 5), ValueError, "got bias=False"),
        (lambda: chrono_(gru_fast.GRU(2, 2), 1.5), ValueError, "got 2.0, 1.5"),
        (lambda: chrono_(gru_fast.GRU(2, 2), 5, 1), ValueError, "got 1, 5"),
        (lambda: chrono_(gru_fast.GRU(2, 2), float("inf")), ValueError, "got 2.0, inf"),
        (lambda: chrono_(gru_fast.GRU(2, 2), "9"), ValueError, "got 2.0, '9'"),
        (lambda: per_gate_(gru_fast.GRU(2, 2), "weight", nn.init.ones_), ValueError, "'weight'"),
        (
            lambda: orthogonal_(parametrizations.weight_norm(gru_fast.GRU(2, 2), "weight_hh_l0")),
            AttributeError,
            "weight_hh_l0",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_nothing_is_changed_where_there_are_no_biases():
    module = gru_fast.GRU(2, 2, bias=False)
    before = module.weight_ih_l0.clone()
    with pytest.raises(ValueError, match="biases"):
        per_gate_(module, "bias_ih", nn.init.ones_)
    assert torch.equal(module.weight_ih_l0, before)
