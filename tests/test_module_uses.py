# SPDX-License-Identifier: Apache-2.0
"""What classes of others do to the inside of nn.GRU, done to ours: the same comes out."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import dropout

import gru_fast

BOTH = (nn.GRU, gru_fast.GRU)


def results_of(function):
    found = []
    for base in BOTH:
        torch.manual_seed(0)
        found.append(function(base))
    return found


def halved(rnn):
    names = rnn._flat_weights_names
    return [w * 0.5 if "hh" in n else w for n, w in zip(names, rnn._flat_weights, strict=True)]


def test_other_weights_for_the_length_of_a_call():
    """Recurrent weights are dropped by assignment to `_flat_weights`, and put back."""

    def run(base):
        class Dropped(base):
            def forward(self, input, hx=None):
                own = self._flat_weights
                pairs = zip(self._flat_weights_names, own, strict=True)
                self._flat_weights = [dropout(w, 0.5) if "hh" in n else w for n, w in pairs]
                result = super().forward(input, hx)
                self._flat_weights = own
                return result

        rnn = Dropped(3, 4, 2)
        output, _ = rnn(torch.randn(5, 2, 3))
        output.square().sum().backward()
        with torch.no_grad():
            again = base.forward(rnn, torch.ones(5, 2, 3))[0]
        return [output, again, *(p.grad for p in rnn.parameters())]

    torch.testing.assert_close(*results_of(run))


def replace(rnn):
    rnn.bias_ih_l0 = nn.Parameter(torch.ones(12))


@pytest.mark.parametrize(
    ("change", "stay"),
    [
        (lambda rnn: None, True),
        (lambda rnn: rnn.load_state_dict(rnn.state_dict()), True),
        (lambda rnn: rnn.float(), False),
        (replace, False),
        (lambda rnn: rnn._init_flat_weights(), False),
    ],
    ids=["nothing", "load", "move", "replace", "init"],
)
def test_other_weights_hold_until_the_module_is_moved_or_has_another(change, stay):
    def run(base):
        rnn, x = base(3, 4), torch.ones(5, 2, 3)
        rnn._flat_weights = halved(rnn)
        change(rnn)
        with torch.no_grad():
            output = rnn(x)[0]
            plain = base(3, 4)
            plain.load_state_dict(rnn.state_dict())
            assert torch.allclose(output, plain(x)[0]) != stay
        return output

    torch.testing.assert_close(*results_of(run))


def test_other_weights_are_copied_and_reverted():
    rnn, x = gru_fast.GRU(3, 4).requires_grad_(False), torch.ones(5, 2, 3)
    plain = rnn(x)[0]
    rnn._flat_weights = halved(rnn)
    other = rnn(x)[0]
    assert not torch.allclose(plain, other)
    for twin in (copy.deepcopy(rnn), pickle.loads(pickle.dumps(rnn))):
        assert torch.equal(twin(x)[0], other)
    zeros = {name: torch.zeros_like(p) for name, p in rnn.named_parameters()}
    assert not torch.func.functional_call(rnn, zeros, (x,))[0].any()
    gru_fast.revert(rnn)
    assert "_given_weights" not in vars(rnn)
    torch.testing.assert_close(rnn(x)[0], plain)


def test_an_h0_of_a_derived_class_is_its_own():
    def run(base):
        class Started(base):
            def __init__(self, *args):
                super().__init__(*args)
                self.h0 = nn.Parameter(torch.zeros(self.num_layers, 1, self.hidden_size))
                self.reset_parameters()

            def forward(self, input):
                return super().forward(input, self.h0.expand(-1, input.shape[1], -1))

        rnn = Started(3, 4, 2)
        assert rnn.h0.any()
        return [rnn(torch.randn(5, 2, 3)), *rnn.state_dict().values()]

    torch.testing.assert_close(*results_of(run))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", ["weight_hh_l1_reverse", "bias_ih_l0"])
def test_a_weight_that_is_none_is_named(name, grad):
    rnn = gru_fast.GRU(3, 4, 2, bidirectional=True)
    setattr(rnn, name, None)
    with torch.set_grad_enabled(grad), pytest.raises(TypeError, match=f"{name} should be a Tensor"):
        rnn(torch.zeros(5, 2, 3))
    delattr(rnn, name)
    with torch.set_grad_enabled(grad), pytest.raises(TypeError, match=f"{name} should be a Tensor"):
        rnn(torch.zeros(5, 2, 3))


def test_torch_would_find_no_weights_that_have_changed():
    for rnn in (gru_fast.GRU(3, 4), gru_fast.convert(nn.GRU(3, 4)).model):
        assert rnn._weights_have_changed() is False


class Counted(nn.Module):
    calls = 0

    def forward(self, weight):
        self.calls += 1
        return weight * 1.0


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    ("module", "options"),
    [
        (gru_fast.GRU, {}),
        (gru_fast.GRU, {"recurrent_dropout": 0.5}),
        (gru_fast.LayerNormGRU, {"recurrent_dropout": 0.5}),
        (gru_fast.GRUCell, {}),
    ],
    ids=str,
)
def test_a_call_evaluates_a_parametrization_once(module, options, grad):
    rnn, counted = module(3, 4, **options), Counted()
    name = "weight_hh" if module is gru_fast.GRUCell else "weight_hh_l0"
    nn.utils.parametrize.register_parametrization(rnn, name, counted)
    counted.calls = 0
    with torch.set_grad_enabled(grad):
        rnn(torch.randn(2, 3))
        assert counted.calls == 1
        gru_fast.explain(rnn, torch.randn(2, 3))
        assert counted.calls == 2


def test_weights_can_be_swapped():
    """torch.nn.GRU refuses: its stored list refers to them."""
    rnn, other = gru_fast.GRU(3, 4), gru_fast.GRU(3, 4)
    x = torch.randn(5, 2, 3)
    expected, weight = other(x)[0], rnn.weight_hh_l0
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        rnn.load_state_dict(other.state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert torch.equal(rnn(x)[0], expected) and rnn.weight_hh_l0 is weight
    torch.utils.swap_tensors(weight, nn.Parameter(torch.zeros_like(weight)))
    assert not rnn.weight_hh_l0.any() and not torch.equal(rnn(x)[0], expected)
