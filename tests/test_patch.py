# SPDX-License-Identifier: Apache-2.0
"""gru_fast's classes under torch's names: what a patch reaches, what not, and the way back."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import GRU as TorchGRU
from torch.nn import GRUCell as TorchGRUCell

import gru_fast

PLACES = (nn, nn.modules, nn.modules.rnn)


@pytest.fixture(autouse=True)
def nothing_stays_patched():
    yield
    left = [place.GRU for place in PLACES] + [p.GRUCell for p in PLACES]
    gru_fast.unpatch()
    assert left == [TorchGRU] * 3 + [TorchGRUCell] * 3


class Borrowed(nn.Module):
    """Code that is not ours and builds its layers itself."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(5, 6, 2, True, True, 0.0, bidirectional=True)
        self.again = nn.GRU(12, 4)
        self.cell = torch.nn.GRUCell(4, 3)
        self.deep = torch.nn.modules.rnn.GRU(3, 3)

    def forward(self, x):
        y = self.again(self.rnn(x)[0].transpose(0, 1))[0]
        return self.deep(self.cell(y[-1])[None])[0]


def test_code_that_builds_its_own_layers_gets_ours_and_computes_the_same():
    torch.manual_seed(0)
    plain = Borrowed()
    torch.manual_seed(0)
    with gru_fast.patched():
        model = Borrowed()
        assert type(model.rnn) is nn.GRU and isinstance(model.cell, nn.GRUCell)
    assert [type(m) for m in model.children()] == [
        gru_fast.GRU, gru_fast.GRU, gru_fast.GRUCell, gru_fast.GRU,
    ]  # fmt: skip
    assert type(plain.rnn) is TorchGRU
    for (n, p), (m, q) in zip(plain.named_parameters(), model.named_parameters(), strict=True):
        assert n == m and torch.equal(p, q)
    x = torch.randn(2, 7, 5)
    torch.testing.assert_close(model(x), plain(x))
    assert type(Borrowed().rnn) is TorchGRU


def test_patch_and_unpatch_can_be_repeated():
    gru_fast.unpatch()
    assert nn.GRU is TorchGRU
    gru_fast.patch()
    gru_fast.patch()
    assert all(place.GRU is gru_fast.GRU for place in PLACES)
    assert all(place.GRUCell is gru_fast.GRUCell for place in PLACES)
    gru_fast.unpatch()
    assert nn.GRU is TorchGRU
    gru_fast.unpatch()


def test_patched_restores_what_it_found():
    gru_fast.patch()
    with gru_fast.patched(), gru_fast.patched():
        pass
    assert nn.GRU is gru_fast.GRU
    gru_fast.unpatch()

    with pytest.raises(ArithmeticError), gru_fast.patched():
        assert nn.GRU is gru_fast.GRU
        raise ArithmeticError
    assert nn.GRU is TorchGRU

    @gru_fast.patched()
    def build():
        return nn.GRU(2, 3)

    assert type(build()) is gru_fast.GRU
    assert nn.GRU is TorchGRU


def test_unpatch_leaves_what_others_bound_since():
    class Other(nn.GRU):
        pass

    gru_fast.patch()
    nn.GRU = Other
    try:
        gru_fast.unpatch()
        assert nn.GRU is Other
        assert nn.modules.rnn.GRU is TorchGRU
    finally:
        nn.GRU = TorchGRU


def test_isinstance_and_type_ask_for_what_the_name_means_at_that_time():
    old = nn.GRU(2, 3)
    with gru_fast.patched():
        new = nn.GRU(2, 3)
        assert isinstance(new, nn.GRU) and type(new) is nn.GRU
        assert not isinstance(old, nn.GRU), "an instance of torch's class, which the name is not"
        assert isinstance(old, nn.RNNBase) and isinstance(new, nn.RNNBase)
    assert isinstance(old, nn.GRU)
    assert not isinstance(new, nn.GRU)


def test_names_that_were_taken_before_stay_torchs_and_convert_reaches_them():
    registry = {"gru": nn.GRU}
    with gru_fast.patched():
        model = nn.Sequential(TorchGRU(2, 3), registry["gru"](3, 3), nn.GRU(3, 3))
    assert [type(m) for m in model] == [TorchGRU, TorchGRU, gru_fast.GRU]
    assert gru_fast.convert(model).converted == ("0", "1")
    assert all(type(m) is gru_fast.GRU for m in model)


class Tagged:
    """A mixin with a constructor of its own."""

    def __init__(self, *args, tag, **kwargs):
        super().__init__(*args, **kwargs)
        self.tag = tag


def test_classes_that_are_derived_while_patched_are_ours_also_with_several_bases():
    class Before(nn.GRU):
        pass

    with gru_fast.patched():

        class First(Tagged, nn.GRU):
            def forward(self, input, hx=None):
                output, h_n = super().forward(input, hx)
                return output + 1, h_n

        class Second(nn.GRU, nn.RNNBase):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.flatten_parameters()

    assert issubclass(First, gru_fast.GRU) and issubclass(Second, gru_fast.GRU)
    first, second = First(2, 3, tag="x"), Second(2, 3, batch_first=True)
    first.load_state_dict(second.state_dict())
    x = torch.randn(4, 1, 2)
    assert first.tag == "x"
    torch.testing.assert_close(first(x)[0] - 1, second(x.transpose(0, 1))[0].transpose(0, 1))
    assert issubclass(Before, TorchGRU) and not issubclass(Before, gru_fast.GRU)
    assert gru_fast.convert(Before(2, 3)).skipped[""].endswith("Before is a subclass")


def test_a_base_that_is_called_by_name_is_the_one_that_is_bound_then():
    class Old(nn.GRU):
        def __init__(self, *args):
            nn.GRU.__init__(self, *args)

    with gru_fast.patched():

        class New(nn.GRU):
            def __init__(self, *args):
                nn.GRU.__init__(self, *args)

        assert isinstance(New(2, 3), gru_fast.GRU)
        with pytest.raises(TypeError):
            Old(2, 3)
    assert isinstance(Old(2, 3), TorchGRU)
    with pytest.raises(TypeError):
        New(2, 3)


def test_pickles():
    old = nn.GRU(2, 3)
    data, saved = pickle.dumps(old), io.BytesIO()
    torch.save(old, saved)
    saved.seek(0)
    with gru_fast.patched():
        for loaded in (pickle.loads(data), torch.load(saved, weights_only=False)):
            assert type(loaded) is gru_fast.GRU
            x = torch.randn(4, 1, 2)
            torch.testing.assert_close(loaded(x)[0], old(x)[0])
        assert type(copy.deepcopy(old)) is TorchGRU
        with pytest.raises(pickle.PicklingError):
            pickle.dumps(old)
        new = pickle.dumps(nn.GRU(2, 3))
    assert type(pickle.loads(data)) is TorchGRU
    assert type(pickle.loads(new)) is gru_fast.GRU


def test_state_dicts_go_both_ways():
    with gru_fast.patched():
        new = nn.GRU(2, 3, 2)
    old = nn.GRU(2, 3, 2)
    new.load_state_dict(old.state_dict())
    old.load_state_dict(new.state_dict())


def test_torch_compile_takes_the_graph_whole_outside_of_the_patch_only():
    with gru_fast.patched():
        model = nn.GRU(2, 3)
        x = torch.randn(4, 1, 2)
        expected = model(x)[0]
        torch._dynamo.reset()
        refused = "python_type" if torch.__version__ >= (2, 15) else "RNN, GRU, or LSTM"
        with pytest.raises(torch._dynamo.exc.Unsupported, match=refused):
            torch.compile(model, backend="eager", fullgraph=True)(x)
        torch._dynamo.reset()
        broken = torch.compile(model, backend="eager")(x)[0]
        torch.testing.assert_close(broken, expected)
    torch._dynamo.reset()
    whole = torch.compile(model, backend="eager", fullgraph=True)(x)[0]
    torch.testing.assert_close(whole, expected)
    torch._dynamo.reset()
