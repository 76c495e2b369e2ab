# SPDX-License-Identifier: Apache-2.0
"""GRUCell beside torch.nn.GRUCell, and beside one step of GRU."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import gru_fast
from helpers import assert_parity

CELLS = ("reset_after", "reset_before", "no_reset")
DRAWS = 6


def pair(*args, **kwargs):
    torch.manual_seed(0)
    theirs = nn.GRUCell(*args, **kwargs)
    torch.manual_seed(0)
    return gru_fast.GRUCell(*args, **kwargs), theirs


def run(cell, x, hx):
    cell = copy.deepcopy(cell)
    dtype = cell.weight_ih.dtype
    x = x.to(dtype).requires_grad_()
    leaf = state = None
    if hx is not None:
        leaf = hx.detach().to(dtype).requires_grad_()
        state = leaf
    h = cell(x, state)
    (h * torch.linspace(-1, 1, h.numel(), dtype=dtype).view(h.shape)).sum().backward()
    results = {"h": h, "grad x": x.grad}
    if leaf is not None:
        results["grad hx"] = leaf.grad
    results |= {f"grad {n}": p.grad for n, p in cell.named_parameters()}
    return {name: value.detach() for name, value in results.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
def test_a_seed_gives_the_same_module(bias, dtype):
    ours, theirs = pair(3, 5, bias, "cpu", dtype)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    for name in {k for k in theirs.__dict__ if not k.startswith("_")}:
        assert getattr(ours, name) == getattr(theirs, name)
    assert repr(ours) == repr(theirs)
    assert isinstance(ours, nn.RNNCellBase)
    if not bias:
        assert ours.bias_ih is None and ours.bias_hh is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [None, 0, 1, 3, 33])
@pytest.mark.parametrize("with_hx", [True, False])
def test_numbers_and_gradients(batch, bias, with_hx, dtype):
    ours, theirs = pair(5, 7, bias, dtype=dtype)
    exact = copy.deepcopy(theirs).double()
    lead = () if batch is None else (batch,)
    draws = [
        (
            torch.randn(*lead, 5, dtype=dtype),
            torch.randn(*lead, 7, dtype=dtype) if with_hx else None,
        )
        for _ in range(DRAWS)
    ]
    truth, given, expected = ([run(m, *d) for d in draws] for m in (exact, ours, theirs))
    for name in truth[0]:
        assert_parity(name, *([r[name] for r in v] for v in (given, expected, truth)))


def test_hx_of_any_strides():
    ours, theirs = pair(5, 7)
    x = torch.randn(3, 5)
    for hx in (torch.randn(1, 7).expand(3, 7), torch.randn(7, 6)[:, ::2].T):
        torch.testing.assert_close(ours(x, hx), theirs(x, hx))
        torch.testing.assert_close(ours(x.T.contiguous().T, hx), theirs(x, hx))


@pytest.mark.parametrize("cell", CELLS)
def test_a_loop_of_cells_is_a_layer(cell):
    rnn = gru_fast.GRU(3, 4, cell=cell, dtype=torch.float64)
    step = gru_fast.GRUCell(3, 4, cell=cell, dtype=torch.float64)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        getattr(step, name).data.copy_(getattr(rnn, f"{name}_l0"))
    x, h = torch.randn(6, 2, 3, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    output, h_n = rnn(x, h[None])
    for t in range(6):
        h = step(x[t], h)
        torch.testing.assert_close(h, output[t])
    torch.testing.assert_close(h[None], h_n)
    h.sum().backward()
    h_n.sum().backward()
    torch.testing.assert_close(step.weight_hh.grad, rnn.weight_hh_l0.grad)


def test_no_reset_has_two_rows_of_gates():
    cell = gru_fast.GRUCell(3, 4, cell="no_reset")
    assert cell.weight_ih.shape == (8, 3) and cell.weight_hh.shape == (8, 4)
    assert cell.bias_ih.shape == cell.bias_hh.shape == (8,)
    assert repr(cell) == "GRUCell(3, 4, cell='no_reset' (n = tanh(W_in x + b_in + W_hn h + b_hn)))"


def test_copies_meta_and_functional_call():
    cell = gru_fast.GRUCell(3, 4, cell="reset_before", backend="reference")
    x = torch.randn(2, 3)
    for twin in (copy.deepcopy(cell), pickle.loads(pickle.dumps(cell))):
        assert repr(twin) == repr(cell)
        assert torch.equal(twin(x), cell(x))
    meta = gru_fast.GRUCell(3, 4, cell="reset_before", device="meta")
    assert meta(x.to("meta")).shape == (2, 4)
    meta.to_empty(device="cpu").load_state_dict(cell.state_dict())
    torch.testing.assert_close(meta(x), cell(x))
    swapped = {k: v * 2 for k, v in cell.named_parameters()}
    doubled = copy.deepcopy(cell)
    doubled.load_state_dict(swapped)
    assert torch.equal(torch.func.functional_call(cell, swapped, (x,)), doubled(x))


def test_changed_weights_are_seen():
    ours, theirs = pair(3, 4)
    x = torch.randn(2, 3)
    for cell in (ours, theirs):
        cell.weight_hh.data.copy_(torch.linspace(-1, 1, 48).view(12, 4))
        cell.bias_ih = nn.Parameter(torch.ones(12))
        cell.weight_ih.data.add_(1)
    torch.testing.assert_close(ours(x), theirs(x))
    for cell in (ours, theirs):
        torch.manual_seed(1)
        parametrizations.orthogonal(cell, "weight_hh")
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lead", [(), (2,)])
def test_a_state_is_no_view_and_may_be_detached_in_place(lead, dtype):
    cell, h = gru_fast.GRUCell(3, 4, dtype=dtype), None
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for _ in range(2):
                h = cell(torch.ones(*lead, 3, dtype=dtype), h)
                h.square().sum().backward() if grad else None
                h.detach_()


def test_a_weight_that_is_missing_is_named():
    cell, x = gru_fast.GRUCell(3, 4), torch.zeros(2, 3)
    cell.weight_hh = None
    with pytest.raises(TypeError, match="weight_hh should be a Tensor, got: NoneType"):
        cell(x)
    del cell.weight_hh
    with pytest.raises(AttributeError, match="no attribute 'weight_hh'"):
        cell(x)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("hx", [None, torch.ones(2, 4)])
def test_a_bias_that_was_deleted_is_not_left_out(hx, grad):
    for name in ("bias_ih", "bias_hh"):
        for cell in pair(3, 4):
            delattr(cell, name)
            message = f"'GRUCell' object has no attribute '{name}'$"
            with torch.set_grad_enabled(grad), pytest.raises(AttributeError, match=message):
                cell(torch.zeros(2, 3), hx)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("names", [["bias_ih"], ["bias_hh"], ["bias_ih", "bias_hh"]])
def test_a_bias_of_none_is_left_out_as_by_torch(names, grad):
    x, (ours, theirs) = torch.randn(2, 3), pair(3, 4)
    for cell in (ours, theirs):
        for name in names:
            setattr(cell, name, None)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(ours(x), theirs(x))


CONSTRUCTOR_ERRORS = [
    ((), {}),
    ((3,), {}),
    ((-1, 4), {}),
    ((3, -1), {}),
    ((3.0, 4), {}),
    ((3, 4, True, "cpu", torch.float64, 1), {}),
    ((3, 4), {"dtype": torch.long}),
    ((3, 4), {"device": "nowhere"}),
    ((3, 4), {"unknown": 1}),
    ((3, 4), {"num_chunks": 3}),
]


@pytest.mark.parametrize(("args", "kwargs"), CONSTRUCTOR_ERRORS, ids=str)
def test_constructor_errors_are_torchs(args, kwargs):
    with pytest.raises(Exception) as expected:
        nn.GRUCell(*args, **kwargs)
    with pytest.raises(Exception) as given:
        gru_fast.GRUCell(*args, **kwargs)
    assert given.type is expected.type


BAD_CALLS = {
    "nothing": lambda: (),
    "none": lambda: (None,),
    "list": lambda: ([1.0],),
    "numpy": lambda: (np.zeros((2, 3), np.float32),),
    "numpy_hx": lambda: (torch.zeros(2, 3), np.zeros((2, 4), np.float32)),
    "0d": lambda: (torch.zeros(()),),
    "3d": lambda: (torch.zeros(1, 2, 3),),
    "width": lambda: (torch.zeros(2, 5),),
    "width_unbatched": lambda: (torch.zeros(5),),
    "float64": lambda: (torch.zeros(2, 3, dtype=torch.float64),),
    "float64_hx": lambda: (torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 4)),
    "int64": lambda: (torch.zeros(2, 3, dtype=torch.int64),),
    "meta": lambda: (torch.zeros(2, 3, device="meta"),),
    "hx_0d": lambda: (torch.zeros(2, 3), torch.zeros(())),
    "hx_3d": lambda: (torch.zeros(2, 3), torch.zeros(1, 2, 4)),
    "hx_1d": lambda: (torch.zeros(2, 3), torch.zeros(4)),
    "hx_2d_unbatched": lambda: (torch.zeros(3), torch.zeros(1, 4)),
    "hx_width": lambda: (torch.zeros(2, 3), torch.zeros(2, 5)),
    "hx_batch": lambda: (torch.zeros(2, 3), torch.zeros(3, 4)),
    "hx_float64": lambda: (torch.zeros(2, 3), torch.zeros(2, 4, dtype=torch.float64)),
    "hx_list": lambda: (torch.zeros(2, 3), [1.0]),
    "hx_tuple": lambda: (torch.zeros(2, 3), (torch.zeros(2, 4),)),
    "three_positional": lambda: (torch.zeros(2, 3), None, None),
}


@pytest.mark.parametrize("bad", BAD_CALLS)
@pytest.mark.parametrize("grad", [True, False])
def test_exceptions_have_torchs_types(bad, grad):
    ours, theirs = pair(3, 4)
    arguments = BAD_CALLS[bad]()
    with torch.set_grad_enabled(grad):
        with pytest.raises(Exception) as expected:
            theirs(*arguments)
        with pytest.raises(Exception) as given:
            ours(*arguments)
    assert given.type is expected.type, f"{given.value!r} where torch raises {expected.value!r}"
    if bad.startswith("numpy"):
        assert str(given.value) == str(expected.value)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"cell": "gru"}, "cell: expected one of .*'no_reset', got 'gru'"),
        ({"backend": "cuda"}, "backend: expected one of .*'cudnn', got 'cuda'"),
    ],
)
def test_bad_extras(kwargs, message):
    with pytest.raises(ValueError, match=message):
        gru_fast.GRUCell(3, 4, **kwargs)
