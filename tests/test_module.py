# SPDX-License-Identifier: Apache-2.0
"""GRU as a module: construction, state, weights that change under it. Numbers: test_forward.py."""

import copy
import inspect
import io
import itertools
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import gru_fast
from gru_fast import cudnn

CELLS = ("reset_after", "reset_before", "no_reset")
CONFIGS = [
    {"num_layers": layers, "bias": bias, "batch_first": batch_first, "bidirectional": bidirectional}
    for layers, bias, batch_first, bidirectional in itertools.product(
        (1, 3), (True, False), (True, False), (True, False)
    )
]


def pair(*args, seed=0, **kwargs):
    """torch.nn.GRU and ours, each built after the same seed."""
    torch.manual_seed(seed)
    theirs = nn.GRU(*args, **kwargs)
    torch.manual_seed(seed)
    return theirs, gru_fast.GRU(*args, **kwargs)


def assert_same_output(theirs, ours, x=None):
    x = torch.randn(4, 2, theirs.input_size) if x is None else x
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: "-".join(map(str, c.values())))
def test_a_seed_gives_the_same_module(config, dtype):
    theirs, ours = pair(3, 5, dtype=dtype, **config)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert a.dtype is dtype
        assert torch.equal(a, b)
    public = {k for k in theirs.__dict__ if not k.startswith("_")} | {
        "_all_weights",
        "_flat_weights_names",
    }
    for name in public:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.mode == "GRU"
    assert repr(ours) == repr(theirs)
    names = [n for n, _ in theirs.named_parameters()]
    assert all(w is getattr(ours, n) for w, n in zip(ours._flat_weights, names, strict=True))
    assert [len(ws) for ws in ours.all_weights] == [len(ws) for ws in theirs.all_weights]
    assert all(
        a is b for a, b in zip(itertools.chain(*ours.all_weights), ours._flat_weights, strict=True)
    )
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())


def test_the_random_generator_is_left_where_torch_leaves_it():
    torch.manual_seed(0)
    nn.GRU(3, 4, 2)
    expected = torch.rand(3)
    torch.manual_seed(0)
    gru_fast.GRU(3, 4, 2)
    assert torch.equal(torch.rand(3), expected)


def test_positional_arguments():
    args = (3, 4, 2, False, True, 0.25, True, 0, "cpu", torch.float64)
    theirs, ours = pair(*args)
    assert repr(ours) == repr(theirs)
    assert ours.weight_hh_l1_reverse.dtype is torch.float64


def test_class_relations():
    rnn = gru_fast.GRU(3, 4)
    assert isinstance(rnn, nn.RNNBase)
    assert not isinstance(rnn, nn.GRU), "torch.compile(fullgraph=True) refuses instances of nn.GRU"


def test_a_base_among_others():
    class Base(nn.Module):
        def __init__(self, *args, note, **kwargs):
            super().__init__(*args, **kwargs)
            self.note = note

    class Noted(Base, gru_fast.GRU):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, note="x", **kwargs)

    rnn = Noted(3, 4, 2, cell="reset_before")
    assert (rnn.note, rnn.num_layers, rnn.cell) == ("x", 2, "reset_before")


def test_reset_parameters_of_a_subclass_sees_the_cell():
    seen = []

    class Mine(gru_fast.GRU):
        def reset_parameters(self):
            seen.append((self.cell, self.weight_hh_l0.shape[0]))
            super().reset_parameters()

    Mine(3, 4, cell="no_reset")
    assert seen[-1] == ("no_reset", 8)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_no_reset_has_two_rows_of_gates(bidirectional):
    torch.manual_seed(3)
    rnn = gru_fast.GRU(3, 5, 2, bidirectional=bidirectional, cell="no_reset", dtype=torch.float64)
    assert rnn.weight_ih_l0.shape == (10, 3)
    assert rnn.weight_ih_l1.shape == (10, 10 if bidirectional else 5)
    assert rnn.weight_hh_l1.shape == (10, 5)
    assert rnn.bias_ih_l0.shape == rnn.bias_hh_l1.shape == (10,)
    for p in rnn.parameters():
        assert p.dtype is torch.float64 and p.requires_grad
        assert 0 < p.abs().max() <= 5**-0.5
    torch.manual_seed(3)
    again = gru_fast.GRU(3, 5, 2, bidirectional=bidirectional, cell="no_reset", dtype=torch.float64)
    assert all(map(torch.equal, rnn.parameters(), again.parameters()))


def test_repr_shows_what_is_not_default():
    assert repr(gru_fast.GRU(3, 4, cell="reset_before", recompute=True)) == (
        "GRU(3, 4, cell='reset_before' (n = tanh(W_in x + b_in + W_hn (r * h) + b_hn)), "
        "recompute=True)"
    )
    assert repr(gru_fast.GRU(3, 4, backend="reference")) == "GRU(3, 4, backend='reference')"
    assert "n = tanh(W_in x + b_in + W_hn h + b_hn)" in repr(gru_fast.GRU(3, 4, cell="no_reset"))


CONSTRUCTOR_ERRORS = [
    ((), {}),
    ((3,), {}),
    ((3, 4, 0), {}),
    ((3, 4, -1), {}),
    ((3, 4, 1.5), {}),
    ((0, 4), {}),
    ((-1, 4), {}),
    ((3, 0), {}),
    ((3.0, 4), {}),
    ((3, "4"), {}),
    ((3, 4), {"num_layers": "2"}),
    ((3, 4), {"bias": 1}),
    ((3, 4), {"bias": None}),
    ((3, 4), {"batch_first": 0}),
    ((3, 4), {"dropout": 2}),
    ((3, 4), {"dropout": -0.1}),
    ((3, 4), {"dropout": True}),
    ((3, 4), {"dropout": "a"}),
    ((3, 4), {"dropout": None}),
    ((3, 4), {"proj_size": 0}),
    ((3, 4), {"proj_size": 2}),
    ((3, 4, 1, True, False, 0.0, False, -1), {}),
    ((3, 4, 1, True, False, 0.0, False, 7), {}),
    ((3, 4, 1, True, False, 0.0, False, "cpu"), {}),
    ((3, 4, 1, True, False, 0.0, False, 0, "cpu", torch.float64, 1), {}),
    ((3, 4), {"dtype": torch.long}),
    ((3, 4), {"dtype": "float"}),
    ((3, 4), {"device": "nowhere"}),
    ((3, 4), {"unknown": 1}),
    ((3, 4), {"input_size": 3}),
]


@pytest.mark.parametrize(("args", "kwargs"), CONSTRUCTOR_ERRORS, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_constructor_errors_are_torchs(args, kwargs, cell):
    with pytest.raises(Exception) as expected:
        nn.GRU(*args, **kwargs)
    with pytest.raises(Exception) as given:
        gru_fast.GRU(*args, cell=cell, **kwargs)
    assert given.type is expected.type


def test_dropout_on_one_layer_warns_as_torch_does():
    with pytest.warns(UserWarning, match="dropout option adds dropout"):
        nn.GRU(3, 4, dropout=0.5)
    with pytest.warns(UserWarning, match="dropout option adds dropout"):
        gru_fast.GRU(3, 4, dropout=0.5)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (
            {"cell": "gru"},
            ValueError,
            "cell: expected one of 'reset_after', 'reset_before', 'no_reset', got 'gru'",
        ),
        ({"cell": None}, ValueError, "cell: expected one of .*, got None"),
        ({"cell": ["reset_after"]}, ValueError, "cell: expected one of"),
        ({"backend": "cuda"}, ValueError, "backend: expected one of 'auto', .*, got 'cuda'"),
        ({"recompute": 1}, TypeError, "recompute should be of type bool, got: int"),
    ],
)
def test_bad_extras(kwargs, error, message):
    with pytest.raises(error, match=message):
        gru_fast.GRU(3, 4, **kwargs)
    with pytest.raises(TypeError):
        gru_fast.GRU(3, 4, 1, True, False, 0.0, False, 0, None, None, *kwargs.values())


def test_a_positional_proj_size_is_refused():
    with pytest.raises(ValueError, match=r"proj_size .*expected 0 for GRU, got 2"):
        gru_fast.GRU(3, 4, 1, True, False, 0.0, False, 2)


@pytest.mark.parametrize("cls", [gru_fast.GRU, gru_fast.GRUCell])
def test_docstrings_exist_and_can_be_appended_to(cls):
    for documented in (cls, cls.__init__, cls.forward):
        assert inspect.getdoc(documented)
        text = documented.__doc__ + "appended"
        assert text
    original = cls.__doc__
    cls.__doc__ += "more"
    cls.__doc__ = original


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("clone", ["deepcopy", "pickle", "torch.save"])
def test_copies(cell, clone):
    torch.manual_seed(0)
    rnn = gru_fast.GRU(3, 4, 2, bidirectional=True, cell=cell, backend="reference", recompute=True)
    rnn(torch.randn(2, 1, 3))
    if clone == "deepcopy":
        twin = copy.deepcopy(rnn)
    elif clone == "pickle":
        twin = pickle.loads(pickle.dumps(rnn))
    else:
        buffer = io.BytesIO()
        torch.save(rnn, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert repr(twin) == repr(rnn)
    x = torch.randn(5, 2, 3)
    for a, b in zip(twin.parameters(), rnn.parameters(), strict=True):
        assert a is not b
        assert torch.equal(a, b)
    assert torch.equal(twin(x)[0], rnn(x)[0])
    with torch.no_grad():
        twin.weight_hh_l0.zero_()
    assert not torch.equal(twin(x)[0], rnn(x)[0])


def test_the_state_of_a_torch_gru_is_a_state():
    torch.manual_seed(0)
    theirs = nn.GRU(3, 4, 2)
    ours = gru_fast.GRU.__new__(gru_fast.GRU)
    ours.__setstate__(copy.deepcopy(theirs.__getstate__()))
    assert_same_output(theirs, ours)
    assert ours.cell == "reset_after"


def test_states_of_old_versions():
    rnn = gru_fast.GRU(3, 4, 2, bias=False, bidirectional=True)
    x = torch.randn(2, 1, 3)
    state = rnn.__getstate__()
    for name in ("proj_size", "_flat_weights_names"):
        del state[name]
    state["_all_weights"] = rnn.all_weights  # lists of Parameters before torch 0.4
    old = gru_fast.GRU.__new__(gru_fast.GRU)
    old.__setstate__(state)
    assert torch.equal(old(x)[0], rnn(x)[0])
    assert old._all_weights == rnn._all_weights


@pytest.mark.parametrize("cell", CELLS)
def test_meta_device_and_to_empty(cell):
    rnn = gru_fast.GRU(3, 4, 2, cell=cell, device="meta")
    assert all(p.is_meta for p in rnn._flat_weights)
    output, h_n = rnn(torch.empty(5, 2, 3, device="meta"))
    assert output.is_meta and output.shape == (5, 2, 4) and h_n.shape == (2, 2, 4)
    rnn = rnn.to_empty(device="cpu")
    torch.manual_seed(0)
    rnn.reset_parameters()
    torch.manual_seed(0)
    direct = gru_fast.GRU(3, 4, 2, cell=cell)
    if cell != "no_reset":
        assert all(map(torch.equal, rnn.parameters(), direct.parameters()))
    rnn.load_state_dict(direct.state_dict(), assign=True)
    x = torch.randn(2, 1, 3)
    assert torch.equal(rnn(x)[0], direct(x)[0])


def _copy_data(rnn):
    rnn.weight_hh_l0.data.copy_(torch.full((12, 4), 0.25))


def _data_add(rnn):
    rnn.weight_ih_l1.data.add_(0.5)


def _set(rnn):
    with torch.no_grad():
        rnn.bias_hh_l0.set_(torch.linspace(-1, 1, 12))


def _set_strided(rnn):
    with torch.no_grad():
        rnn.weight_ih_l0.set_(torch.linspace(-1, 1, 36).reshape(3, 12).T)


def _replace_data(rnn):
    rnn.weight_hh_l1.data = torch.eye(4).repeat(3, 1)


def _new_parameter(rnn):
    rnn.weight_ih_l0 = nn.Parameter(torch.linspace(-1, 1, 36).reshape(12, 3))


def _new_parameter_from_behind(rnn):
    rnn._parameters["weight_ih_l0"] = nn.Parameter(torch.linspace(-1, 1, 36).reshape(12, 3))


def _tie(rnn):
    rnn.weight_hh_l1 = rnn.weight_hh_l0


def _init(rnn):
    nn.init.orthogonal_(rnn.weight_hh_l0, generator=torch.Generator().manual_seed(1))


def _load(rnn):
    rnn.load_state_dict({k: v * 2 for k, v in rnn.state_dict().items()})


def _load_assign(rnn):
    rnn.load_state_dict({k: v * 2 for k, v in rnn.state_dict().items()}, assign=True)


def _step(rnn):
    optimiser = torch.optim.SGD(rnn.parameters(), lr=1.0)
    rnn(torch.linspace(-1, 1, 12).reshape(2, 2, 3))[0].sum().backward()
    optimiser.step()


def _register_none_then_back(rnn):
    weight = rnn.weight_hh_l0.detach() * 2
    del rnn.weight_hh_l0
    rnn.register_parameter("weight_hh_l0", nn.Parameter(weight))


SURGERY = [
    _copy_data,
    _data_add,
    _set,
    _set_strided,
    _replace_data,
    _new_parameter,
    _new_parameter_from_behind,
    _tie,
    _init,
    _load,
    _load_assign,
    _step,
    _register_none_then_back,
]


@pytest.mark.parametrize("surgery", SURGERY, ids=lambda f: f.__name__.strip("_"))
def test_a_changed_weight_is_seen_by_the_next_call(surgery):
    theirs, ours = pair(3, 4, 2)
    x = torch.randn(4, 2, 3)
    before = ours(x)[0]
    surgery(theirs)
    surgery(ours)
    assert_same_output(theirs, ours, x)
    assert not torch.allclose(ours(x)[0], before)
    assert all(
        w is getattr(ours, n)
        for w, n in zip(ours._flat_weights, ours._flat_weights_names, strict=True)
    )


def test_changed_dtype():
    theirs, ours = pair(3, 4, 2)
    assert_same_output(theirs.double(), ours.double(), torch.randn(4, 2, 3, dtype=torch.float64))


def test_functional_call():
    theirs, ours = pair(3, 4, 2)
    x = torch.randn(4, 2, 3)
    before = ours(x)[0]
    swapped = {k: v.detach() * 2 for k, v in theirs.named_parameters()}
    torch.testing.assert_close(
        torch.func.functional_call(ours, swapped, (x,)),
        torch.func.functional_call(theirs, swapped, (x,)),
    )
    assert torch.equal(ours(x)[0], before)


def test_parametrizations():
    theirs, ours = pair(3, 4, 2)
    for rnn in (theirs, ours):
        torch.manual_seed(1)
        parametrizations.weight_norm(rnn, "weight_hh_l0")
        parametrizations.orthogonal(rnn, "weight_ih_l1")
    x = torch.randn(4, 2, 3)
    assert_same_output(theirs, ours, x)
    for rnn in (theirs, ours):
        with torch.no_grad():
            rnn.parametrizations.weight_hh_l0.original0.mul_(2)
        rnn(x)[0].sum().backward()
    assert_same_output(theirs, ours, x)
    assert_same_output(theirs, copy.deepcopy(ours), x)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    for rnn in (theirs, ours):
        parametrize.remove_parametrizations(rnn, "weight_hh_l0")
    assert_same_output(theirs, ours, x)


def test_old_weight_norm():
    theirs, ours = pair(3, 4, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for rnn in (theirs, ours):
            nn.utils.weight_norm(rnn, "weight_hh_l1")
    with torch.no_grad():
        theirs.weight_hh_l1_g.mul_(3)
        ours.weight_hh_l1_g.mul_(3)
    assert_same_output(theirs, ours)


def test_pruning():
    from torch.nn.utils import prune

    theirs, ours = pair(3, 4, 2)
    for rnn in (theirs, ours):
        prune.l1_unstructured(rnn, "weight_hh_l0", amount=0.5)
    assert_same_output(theirs, ours)


def test_replicas_of_data_parallel():
    _, ours = pair(3, 4, 2)
    x = torch.randn(4, 2, 3)
    replica = ours._replicate_for_data_parallel()
    for name, p in ours._parameters.items():
        setattr(replica, name, p.detach().clone())
    assert torch.equal(replica(x)[0], ours(x)[0])
    replica.weight_hh_l0.zero_()
    assert not torch.equal(replica(x)[0], ours(x)[0])


def test_flatten_parameters_does_nothing():
    _, ours = pair(3, 4, 2)
    pointers = [p.data_ptr() for p in ours.parameters()]
    assert ours.flatten_parameters() is None
    ours.to(torch.float32).flatten_parameters()
    assert [p.data_ptr() for p in ours.parameters()] == pointers


def test_each_layer_is_laid_out_for_cudnn(monkeypatch):
    """One direction of nn.GRU's cell, when it is made and when it is moved."""
    seen: list[list[nn.Parameter]] = []
    monkeypatch.setattr(cudnn, "flatten", seen.append)
    for options in ({"cell": "no_reset"}, {"bidirectional": True}, {"num_heads": 2}):
        gru_fast.GRU(3, 4, 2, **options).flatten_parameters()
    assert not seen
    for bias in (True, False):
        ours = gru_fast.GRU(3, 4, 2, bias=bias)
        made = seen.copy()
        ours.double()
        weights = list(ours.parameters())
        half = len(weights) // 2
        for layers in (made, seen[len(made) :]):
            assert [*map(id, layers[0]), *map(id, layers[1])] == [*map(id, weights)]
            assert [len(layer) for layer in layers] == [half, half]
        seen.clear()


def test_no_look_up_of_torchs_gru_when_called(monkeypatch):
    ours, cell = gru_fast.GRU(3, 4, dropout=0.0), gru_fast.GRUCell(3, 4)
    monkeypatch.delattr(torch.nn, "GRU")
    monkeypatch.delattr(torch.nn, "GRUCell")
    monkeypatch.delattr(torch.nn.modules.rnn, "GRU")
    ours(torch.randn(2, 1, 3))
    cell(torch.randn(1, 3))
    copy.deepcopy(gru_fast.GRU(3, 4))


def test_hooks_fire():
    ours = gru_fast.GRU(3, 4)
    calls = []
    ours.register_forward_pre_hook(lambda m, a: calls.append("pre"))
    ours.register_forward_hook(lambda m, a, o: calls.append("post"))
    ours.weight_hh_l0.register_hook(lambda g: calls.append("grad"))
    ours(torch.randn(2, 1, 3))[0].sum().backward()
    assert calls == ["pre", "post", "grad"]
