# SPDX-License-Identifier: Apache-2.0
"""convert() and revert(): the same objects, another class, and back."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import gru_fast
from gru_fast import convert, revert


class Tagger(nn.Module):
    """Nested containers, one module under two names, an LSTM that must stay."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleList([nn.GRU(5, 6, batch_first=True), nn.LSTM(6, 6)])
        self.inner = nn.Sequential(nn.Linear(6, 6), nn.ModuleDict({"rnn": nn.GRU(6, 6, 2)}))
        self.cell = nn.GRUCell(6, 6)
        self.again = self.encoder[0]
        self.unregistered = [self.cell]

    def forward(self, x):
        h, _ = self.encoder[0](x)
        h, _ = self.again(h[..., :5])
        h, _ = self.inner[1]["rnn"](self.inner[0](h))
        return self.unregistered[0](h[:, -1])


def test_every_gru_is_swapped_and_the_model_computes_the_same():
    torch.manual_seed(0)
    model = Tagger()
    x = torch.randn(3, 7, 5)
    expected = model(x)
    before = dict(model.named_parameters())
    state = {k: v.clone() for k, v in model.state_dict().items()}

    report = convert(model)

    assert report.model is model
    assert report.converted == ("encoder.0", "again", "inner.1.rnn", "cell")
    assert report.skipped == {}
    assert type(model.encoder[0]) is gru_fast.GRU
    assert type(model.encoder[1]) is nn.LSTM
    assert type(model.inner[1]["rnn"]) is gru_fast.GRU
    assert type(model.cell) is gru_fast.GRUCell
    assert model.again is model.encoder[0]
    assert model.unregistered[0] is model.cell
    assert all(p is before[n] for n, p in model.named_parameters())
    torch.testing.assert_close(model(x), expected)

    report = revert(model)

    assert report.converted == ("encoder.0", "again", "inner.1.rnn", "cell")
    assert type(model.encoder[0]) is nn.GRU
    assert type(model.cell) is nn.GRUCell
    assert all(p is before[n] for n, p in model.named_parameters())
    assert torch.equal(model(x), expected)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_round_trip_leaves_no_trace():
    model = nn.GRU(3, 4, 2, bidirectional=True)
    before = set(model.__dict__)
    convert(model)
    assert not {"_flat_weights", "_flat_weight_refs"} & set(model.__dict__), "old weights are kept"
    revert(model)
    assert set(model.__dict__) == before
    assert all(a is b for a, b in zip(model._flat_weights, model.parameters(), strict=True))
    model.weight_ih_l0 = nn.Parameter(torch.zeros(12, 3))
    assert model._flat_weights[0] is model.weight_ih_l0
    pickle.loads(pickle.dumps(model))
    copy.deepcopy(model)


@pytest.mark.parametrize("torch_class", [nn.GRU, nn.GRUCell])
def test_the_model_itself_can_be_the_gru(torch_class):
    rnn = torch_class(3, 4)
    report = convert(rnn)
    assert report.model is rnn
    assert report.converted == ("",)
    assert "(the model itself)" in str(report)
    assert type(rnn) is getattr(gru_fast, torch_class.__name__)
    pickle.loads(pickle.dumps(rnn))
    assert type(copy.deepcopy(rnn)) is type(rnn)
    assert type(revert(rnn).model) is torch_class


def test_optimiser_hooks_flags_and_tying_survive():
    torch.manual_seed(0)
    model = nn.ModuleList([nn.GRU(4, 4, 2), nn.GRU(4, 4, 2)])
    model[1].weight_hh_l0 = model[0].weight_hh_l0
    model[0].bias_ih_l0.requires_grad_(False)
    model[1].eval()
    model[0].note = "kept"
    calls = []
    model[0].register_forward_pre_hook(lambda m, args: calls.append("pre"))
    model[0].register_forward_hook(lambda m, args, out: calls.append("post"))
    model[0].register_full_backward_hook(lambda m, gi, go: calls.append("backward"))
    handle = model[0].register_forward_hook(lambda m, args, out: calls.append("removed"))
    twin = copy.deepcopy(model)
    optimisers = [torch.optim.Adam(m.parameters(), lr=0.1) for m in (model, twin)]

    convert(model)
    handle.remove()
    x = torch.randn(5, 2, 4, requires_grad=True)
    for m, optimiser in zip((model, twin), optimisers, strict=True):
        for _ in range(3):
            optimiser.zero_grad()
            m[1](m[0](x)[0])[0].square().sum().backward()
            optimiser.step()

    assert model[0].note == "kept"
    assert calls[:3] == ["pre", "post", "backward"]
    assert model[1].weight_hh_l0 is model[0].weight_hh_l0
    assert not model[0].bias_ih_l0.requires_grad
    assert model[0].training and not model[1].training
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def _old_weight_norm(rnn):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(rnn, "weight_hh_l0")


@pytest.mark.parametrize(
    "reparametrize",
    [
        lambda rnn: parametrizations.weight_norm(rnn, "weight_hh_l0"),
        lambda rnn: parametrizations.orthogonal(rnn, "weight_ih_l1"),
        _old_weight_norm,
    ],
    ids=["weight_norm", "orthogonal", "old_weight_norm"],
)
def test_reparametrized_weights_survive(reparametrize):
    torch.manual_seed(0)
    rnn = reparametrize(nn.GRU(4, 3, 2))
    torch_class = type(rnn)
    same_class = None if torch_class is nn.GRU else copy.deepcopy(rnn)
    x = torch.randn(5, 2, 4)
    parameters = dict(rnn.named_parameters())
    expected, _ = rnn(x)
    expected.sum().backward()
    grads = {n: p.grad.clone() for n, p in parameters.items()}
    rnn.zero_grad()

    assert convert(rnn).converted == ("",)
    assert isinstance(rnn, gru_fast.GRU)
    assert not isinstance(rnn, nn.GRU)
    assert all(p is parameters[n] for n, p in rnn.named_parameters())
    output, _ = rnn(x)
    output.sum().backward()
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close({n: p.grad for n, p in parameters.items()}, grads)
    if same_class is not None:
        assert type(same_class) is torch_class, "a copy outside the converted model changed"
        same_class(x)

    assert revert(rnn).converted == ("",)
    assert isinstance(rnn, nn.GRU)
    torch.testing.assert_close(rnn(x)[0], expected)


def test_parametrization_can_be_removed_after_convert():
    rnn = parametrizations.weight_norm(nn.GRU(4, 3), "weight_hh_l0")
    convert(rnn)
    parametrize.remove_parametrizations(rnn, "weight_hh_l0")
    assert type(rnn) is gru_fast.GRU
    rnn(torch.randn(2, 1, 4))


class Subclass(nn.GRU):
    pass


def _replaced_forward():
    rnn = nn.GRU(3, 4)
    rnn.forward = rnn.forward
    return rnn


def _odd_bias():
    rnn = nn.GRU(3, 4)
    rnn.bias_hh_l0 = None
    return rnn


def _odd_shape():
    cell = nn.GRUCell(3, 4)
    cell.weight_ih = nn.Parameter(torch.zeros(12, 5))
    return cell


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Subclass(3, 4), "Subclass is a subclass"),
        (lambda: nn.GRU(3, 4, 1, True, False, 0.0, False, 2), "proj_size is 2, expected 0"),
        (_replaced_forward, "its forward was replaced on the instance"),
        (_odd_bias, "bias_hh_l0 is None, expected (12,)"),
        (_odd_shape, "weight_ih is (12, 5), expected (12, 3)"),
        (
            lambda: parametrizations.weight_norm(Subclass(3, 4), "weight_ih_l0"),
            "Subclass is a subclass",
        ),
    ],
    ids=["subclass", "proj", "forward", "bias", "shape", "parametrized_subclass"],
)
def test_what_cannot_be_swapped_is_left_with_a_reason(make, reason):
    model = nn.Sequential(make(), nn.GRU(3, 4))
    odd_class = type(model[0])
    report = convert(model)
    assert report.converted == ("1",)
    assert list(report.skipped) == ["0"]
    assert report.skipped["0"].endswith(reason)
    assert type(model[0]) is odd_class
    assert str(report).splitlines()[0] == "converted 1, skipped 1"
    assert reason in str(report)


def test_revert_leaves_cells_that_torch_has_not():
    model = nn.Sequential(
        gru_fast.GRU(3, 4, cell="reset_before"), gru_fast.GRU(3, 4, cell="no_reset")
    )
    report = revert(model)
    assert report.converted == ()
    assert report.skipped["0"] == "torch has no cell='reset_before'"
    assert report.skipped["1"] == "torch has no cell='no_reset'"
    assert type(model[0]) is gru_fast.GRU


@pytest.mark.parametrize(
    ("include", "exclude", "converted"),
    [
        (None, None, {"a", "b.0", "b.1", "c"}),
        ("b.*", None, {"b.0", "b.1"}),
        (["a", "b.1"], None, {"a", "b.1"}),
        (None, "b.*", {"a", "c"}),
        ("b.*", ["*.1"], {"b.0"}),
        (lambda name, m: isinstance(m, nn.GRUCell), None, {"c"}),
        (None, lambda name, m: name == "a", {"b.0", "b.1", "c"}),
        ([], None, set()),
    ],
)
def test_include_and_exclude(include, exclude, converted):
    model = nn.ModuleDict(
        {"a": nn.GRU(2, 2), "b": nn.Sequential(nn.GRU(2, 2), nn.GRU(2, 2)), "c": nn.GRUCell(2, 2)}
    )
    report = convert(model, include=include, exclude=exclude)
    assert set(report.converted) == converted
    assert set(report.skipped) == {"a", "b.0", "b.1", "c"} - converted
    for name, module in model.named_modules():
        if name in report.skipped:
            assert type(module) in (nn.GRU, nn.GRUCell)


def test_a_shared_module_is_selected_by_either_name():
    model = nn.ModuleDict({"a": nn.GRU(2, 2)})
    model["b"] = model["a"]
    assert convert(model, exclude="b").converted == ()
    assert convert(model, include="b").converted == ("a", "b")


def test_nothing_is_half_changed_on_error():
    class Refuses(Exception):
        pass

    def selector(name, module):
        if name == "1":
            raise Refuses
        return True

    model = nn.Sequential(nn.GRU(2, 2), nn.GRU(2, 2))
    with pytest.raises(Refuses):
        convert(model, include=selector)
    assert [type(m) for m in model] == [nn.GRU, nn.GRU]


def test_an_error_while_swapping_is_undone():
    class Grumpy(nn.Module):
        refuse = False

        def forward(self, weight):
            if self.refuse:
                raise ArithmeticError("no weight today")
            return weight

    grumpy = Grumpy()
    model = nn.Sequential(nn.GRU(2, 2), nn.GRU(2, 2), gru_fast.GRU(2, 2))
    parametrize.register_parametrization(model[1], "weight_ih_l0", grumpy)
    convert(model)
    classes = [type(m) for m in model]
    attributes = [dict(m.__dict__) for m in model]

    calls = 0
    original = nn.GRU._init_flat_weights

    def fails_on_the_second(self):
        nonlocal calls
        calls += 1
        grumpy.refuse = calls == 2
        original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.GRU, "_init_flat_weights", fails_on_the_second)
        with pytest.raises(ArithmeticError):
            revert(model)
    assert calls == 2
    assert [type(m) for m in model] == classes
    assert [m.__dict__ for m in model] == attributes


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: convert([nn.GRU(2, 2)]), "model should be a torch.nn.Module, got: list"),
        (lambda: convert(nn.GRU(2, 2), include=3), "include should be .* got: int"),
        (lambda: revert(nn.GRU(2, 2), exclude=["a", 3]), "exclude should be .* got: int"),
        (
            lambda: convert(nn.GRU(2, 2), include=nn.GRU),
            "include should be a name or pattern, several of them, or a function of name and "
            "module, got: the class GRU$",
        ),
        (lambda: revert(nn.GRU(2, 2), exclude=[nn.GRU]), "exclude should be .* the class GRU$"),
        (lambda: convert(nn.GRU(2, 2), include=nn.GRU(2, 2)), "include should be .* got: GRU$"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_a_language_model_keeps_its_layers():
    lm = gru_fast.GRULanguageModel(5, None, 4)
    model = nn.ModuleDict({"lm": lm, "gru": gru_fast.GRU(2, 2)})
    report = revert(model)
    assert report.converted == ("gru",)
    assert report.skipped == {"lm.gru": "the language model that it belongs to needs it"}
    assert revert(lm).skipped.keys() == {"gru"}
    lm.generate(max_new_tokens=1)
