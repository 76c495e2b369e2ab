# SPDX-License-Identifier: Apache-2.0
"""The numbers, gradients and exceptions of GRU.forward beside torch.nn.GRU's."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import gru_fast
from helpers import assert_parity

CONFIGS = [
    {"num_layers": layers, "bias": bias, "batch_first": batch_first, "bidirectional": bidirectional}
    for layers, bias, batch_first, bidirectional in itertools.product(
        (1, 3), (True, False), (True, False), (True, False)
    )
]
DRAWS = 6
SIZES = [
    (4, 3, 5, 7),
    (1, 1, 1, 1),
    (1, 5, 3, 17),
    (11, 1, 6, 31),
    (2, 13, 16, 16),
    (5, 0, 3, 4),
    (20, 8, 24, 40),
]


# The sizes are too small for two, on a busy machine by a factor of twenty.
pytestmark = pytest.mark.usefixtures("one_thread")


def hidden(kind, module, batch, dtype):
    layers = module.num_layers * (2 if module.bidirectional else 1)
    H = module.hidden_size
    if kind == "none":
        return None
    if kind == "given":
        return torch.randn(layers, batch, H, dtype=dtype)
    if kind == "expanded":
        return torch.randn(layers, 1, H, dtype=dtype).expand(layers, batch, H)
    if kind == "strided":
        return torch.randn(H, layers, 2 * batch, dtype=dtype)[..., ::2].permute(1, 2, 0)
    raise AssertionError(kind)


def run(module, x, hx, lengths=None, train=True):
    """Outputs, and the gradient of x, hx and every parameter; leaves nothing behind."""
    module = copy.deepcopy(module).train(train)
    dtype = module.weight_ih_l0.dtype
    x = x.detach().to(dtype).requires_grad_()
    leaf = state = None
    if hx is not None:
        leaf = hx.detach().to(dtype).requires_grad_()
        state = leaf
    given = x
    if lengths is not None:
        given = pack_padded_sequence(x, lengths, module.batch_first, enforce_sorted=False)
    output, h_n = module(given, state)
    results = {"h_n": h_n}
    if lengths is not None:
        for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
            assert torch.equal(getattr(output, name), getattr(given, name))
        output = output.data
    results["output"] = output
    weights = [torch.linspace(-1, 1, v.numel(), dtype=dtype).view(v.shape) for v in (output, h_n)]
    ((output * weights[0]).sum() + (h_n * weights[1]).sum()).backward()
    results["grad x"] = x.grad
    if leaf is not None:
        results["grad hx"] = leaf.grad
    results |= {f"grad {n}": p.grad for n, p in module.named_parameters()}
    return {name: value.detach() for name, value in results.items()}


def compare(ours, theirs, inputs, lengths=None, train=True):
    """Every output and gradient of ours over several draws of the inputs, by assert_parity."""
    exact = copy.deepcopy(theirs).double()
    draws = [inputs() for _ in range(DRAWS)]
    truth, given, expected = (
        [run(module, x, hx, lengths, train) for x, hx in draws] for module in (exact, ours, theirs)
    )
    assert given[0].keys() == expected[0].keys() == truth[0].keys()
    for name in truth[0]:
        assert_parity(name, *([draw[name] for draw in v] for v in (given, expected, truth)))


def pair(*args, **kwargs):
    theirs = nn.GRU(*args, **kwargs)
    ours = gru_fast.GRU(*args, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("hx", ["none", "given", "expanded", "strided"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: "-".join(map(str, c.values())))
def test_padded(config, hx, dtype):
    ours, theirs = pair(5, 7, dtype=dtype, **config)
    B = 4 if ours.batch_first else 3
    compare(
        ours,
        theirs,
        lambda: (torch.randn(4, 3, 5, dtype=dtype), hidden(hx, ours, B, dtype)),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("T", "B", "I", "H"), SIZES)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_sizes(T, B, I, H, bidirectional, dtype):  # noqa: E741
    ours, theirs = pair(I, H, 2, bidirectional=bidirectional, dtype=dtype)
    compare(
        ours,
        theirs,
        lambda: (torch.randn(T, B, I, dtype=dtype), hidden("given", ours, B, dtype)),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_half_precision(dtype, bidirectional):
    ours, theirs = pair(5, 9, 2, bidirectional=bidirectional, dtype=dtype)
    compare(
        ours,
        theirs,
        lambda: (torch.randn(6, 3, 5, dtype=dtype), hidden("given", ours, 3, dtype)),
    )


@pytest.mark.parametrize("hx", ["none", "given", "expanded", "strided"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: "-".join(map(str, c.values())))
def test_packed(config, hx):
    ours, theirs = pair(5, 7, **config)
    lengths = torch.tensor([2, 6, 1, 6])
    shape = (4, 6, 5) if ours.batch_first else (6, 4, 5)
    compare(
        ours,
        theirs,
        lambda: (torch.randn(shape), hidden(hx, ours, 4, torch.float32)),
        lengths,
    )


def test_packed_and_sorted_has_no_indices():
    ours, theirs = pair(3, 4, bidirectional=True)
    packed = pack_padded_sequence(torch.randn(5, 3, 3), torch.tensor([5, 3, 3]))
    output, h_n = ours(packed)
    assert isinstance(output, PackedSequence)
    assert output.sorted_indices is None and output.unsorted_indices is None
    expected, expected_h_n = theirs(packed)
    torch.testing.assert_close(output.data, expected.data)
    torch.testing.assert_close(h_n, expected_h_n)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: "-".join(map(str, c.values())))
@pytest.mark.parametrize("with_hx", [False, True])
def test_unbatched(config, with_hx):
    ours, theirs = pair(5, 7, **config)
    layers = ours.num_layers * (2 if ours.bidirectional else 1)
    compare(
        ours,
        theirs,
        lambda: (torch.randn(4, 5), torch.randn(layers, 7) if with_hx else None),
    )


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_backward_works_in_eval(bidirectional, packed):
    ours, theirs = pair(5, 7, 2, dropout=0.5, bidirectional=bidirectional)
    lengths = torch.tensor([2, 4, 1]) if packed else None
    compare(ours, theirs, lambda: (torch.randn(4, 3, 5), None), lengths, train=False)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: "-".join(map(str, c.values())))
@pytest.mark.parametrize("packed", [False, True])
def test_dropout_draws_torchs_random_stream(config, packed):
    config = config | {"num_layers": 3, "dropout": 0.4}
    ours, theirs = pair(3, 6, dtype=torch.float64, **config)
    x = torch.randn(5, 5, 3, dtype=torch.float64)
    lengths = torch.tensor([3, 5, 1, 5, 2]) if packed else None
    torch.manual_seed(4)
    given, state = run(ours, x, None, lengths), torch.get_rng_state()
    torch.manual_seed(4)
    expected = run(theirs, x, None, lengths)
    assert torch.equal(torch.get_rng_state(), state)
    for name, truth in expected.items():
        assert_parity(name, given[name], truth, truth)


def test_dropout_of_one():
    ours, theirs = pair(3, 6, 2, dropout=1.0)
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("p", [1.5, -0.5, float("nan"), "half"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_dropout_that_was_set_to_no_probability(packed, p):
    ours, theirs = pair(3, 6, 2)
    x = torch.randn(5, 2, 3)
    x = pack_padded_sequence(x, torch.tensor([5, 2])) if packed else x
    ours.dropout = theirs.dropout = p
    with pytest.raises(Exception) as expected:
        theirs(x)
    for ours.recompute in (False, True):  # packed rows are padded where gates are rebuilt
        with pytest.raises(expected.type):
            ours(x)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_grad(context):
    ours, theirs = pair(3, 6, 2, bidirectional=True)
    x = torch.randn(5, 2, 3)
    with context():
        given, expected = ours(x), theirs(x)
    torch.testing.assert_close(given, expected)
    assert not given[0].requires_grad and not given[1].requires_grad


def test_autocast_leaves_float32_on_the_cpu():
    # torch.nn.GRU returns float32 too, from products that it rounds to bfloat16.
    ours, theirs = pair(3, 6, 2)
    x = torch.randn(5, 2, 3)
    expected = ours(x)
    with torch.autocast("cpu", torch.bfloat16):
        given = ours(x)
        assert given[0].dtype is theirs(x)[0].dtype is torch.float32
    assert torch.equal(given[0], expected[0]) and torch.equal(given[1], expected[1])


def test_an_input_of_another_dtype_under_autocast():
    ours, theirs = pair(3, 6, 2)
    x = torch.randn(5, 2, 3).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        given, expected = ours(x), theirs(x)
    assert given[0].dtype is expected[0].dtype
    torch.testing.assert_close(given[0], expected[0], rtol=0.0, atol=2**-7)


@pytest.mark.parametrize("cell", ["reset_after", "reset_before", "no_reset"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_length_zero_and_no_time_steps(cell, bidirectional, batch_first):
    rnn = gru_fast.GRU(3, 4, 2, cell=cell, bidirectional=bidirectional, batch_first=batch_first)
    D = 2 if bidirectional else 1
    hx = torch.randn(2 * D, 2, 4, requires_grad=True)
    x = torch.randn(*((2, 5) if batch_first else (5, 2)), 3)
    output, h_n = rnn(x, hx, lengths=torch.tensor([0, 3]))
    row = output[0] if batch_first else output[:, 0]
    assert torch.equal(row, torch.zeros(5, 4 * D))
    assert torch.equal(h_n[:, 0], hx[:, 0])
    empty = x[:, :0] if batch_first else x[:0]
    output, h_n = rnn(empty, hx)
    assert output.shape == ((2, 0, 4 * D) if batch_first else (0, 2, 4 * D))
    assert torch.equal(h_n, hx)
    h_n.sum().backward()
    assert torch.equal(hx.grad, torch.ones_like(hx))
    assert rnn(empty[:, 0] if not batch_first else empty[0])[0].shape == (0, 4 * D)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_no_time_steps_have_gradients(backend):
    rnn = gru_fast.GRU(3, 4, 2, bidirectional=True, backend=backend)
    x = torch.randn(0, 2, 3, requires_grad=True)
    rnn(x)[0].sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: "-".join(map(str, c.values())))
def test_lengths_are_a_packed_sequence_without_packing(config, dtype):
    ours, theirs = pair(5, 7, **config)
    lengths = torch.tensor([2, 6, 1, 6])
    x = torch.randn(*((4, 6) if ours.batch_first else (6, 4)), 5)
    hx = hidden("given", ours, 4, torch.float32)
    packed = pack_padded_sequence(x, lengths, ours.batch_first, enforce_sorted=False)
    exact = copy.deepcopy(theirs).double()
    with torch.no_grad():
        truth, truth_h_n = exact(packed.to(torch.float64), hx.double())
        expected, expected_h_n = theirs(packed, hx)
    padding = torch.full_like(x, float("nan"))
    real = torch.arange(6) < lengths[:, None]
    real = real if ours.batch_first else real.T
    with torch.no_grad():
        output, h_n = ours(torch.where(real[..., None], x, padding), hx, lengths=lengths.to(dtype))
    assert_parity("h_n", h_n, expected_h_n, truth_h_n)
    unpacked = [pad_packed_sequence(v, ours.batch_first)[0] for v in (expected, truth)]
    assert_parity("output", output, *unpacked)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
def test_a_reset_begins_a_new_sequence(batch_first, bidirectional, with_state):
    ours, theirs = pair(
        3, 4, 1, batch_first=batch_first, bidirectional=bidirectional, dtype=torch.float64
    )
    T, cut, D = 7, 3, 2 if bidirectional else 1
    x = torch.randn(T, 1, 3, dtype=torch.float64)
    hx = torch.randn(D, 1, 4, dtype=torch.float64)
    start = torch.randn(D, 1, 4, dtype=torch.float64) if with_state else torch.zeros_like(hx)
    mask = torch.zeros(T, 1, dtype=torch.bool)
    mask[cut] = True
    arrange = (lambda v: v.transpose(0, 1)) if batch_first else (lambda v: v)
    reset_state = start if with_state else None
    output, h_n = ours(arrange(x), hx, reset_mask=arrange(mask), reset_state=reset_state)
    # The forward direction enters the second part with `start`, the reverse one the first part.
    first_hx, second_hx = hx.clone(), start.clone()
    if bidirectional:
        first_hx[1], second_hx[1] = start[1], hx[1]
    first, first_h_n = theirs(arrange(x[:cut]), first_hx)
    second, second_h_n = theirs(arrange(x[cut:]), second_hx)
    expected = torch.cat([first, second], 1 if batch_first else 0)
    expected_h_n = second_h_n.clone()
    if bidirectional:
        expected_h_n[1] = first_h_n[1]
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(h_n, expected_h_n)


def test_a_reset_stops_gradients():
    rnn = gru_fast.GRU(3, 4)
    x = torch.randn(5, 1, 3, requires_grad=True)
    hx = torch.randn(1, 1, 4, requires_grad=True)
    mask = torch.tensor([False, False, True, False, False])[:, None]
    rnn(x, hx, reset_mask=mask)[0][2:].sum().backward()
    assert not x.grad[:2].any() and x.grad[2:].all()
    assert not hx.grad.any()


@pytest.mark.parametrize("cell", ["reset_after", "reset_before", "no_reset"])
def test_compiled_whole_with_gradients(cell, fresh_compiler):
    rnn = gru_fast.GRU(3, 4, 2, bidirectional=True, cell=cell)
    compiled = torch.compile(rnn, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 2, 3)
    given = compiled(x)
    torch.testing.assert_close(given, rnn(x))
    rnn.zero_grad()
    given[0].square().sum().backward()
    grads = [p.grad.clone() for p in rnn.parameters()]
    rnn.zero_grad()
    rnn(x)[0].square().sum().backward()
    torch.testing.assert_close(grads, [p.grad for p in rnn.parameters()])
    with torch.no_grad():
        rnn.weight_hh_l0.mul_(2)
        torch.testing.assert_close(compiled(x), rnn(x))


def test_exported_with_dynamic_sizes():
    rnn = gru_fast.GRU(3, 4, 2, batch_first=True, bidirectional=True)
    T, B = torch.export.Dim("T", min=2), torch.export.Dim("B", min=2)
    x = torch.randn(3, 5, 3)
    program = torch.export.export(rnn, (x,), dynamic_shapes={"input": {0: B, 1: T}})
    for shape in ((2, 7, 3), (6, 2, 3)):
        x = torch.randn(shape)
        torch.testing.assert_close(program.module()(x), rnn(x))


@pytest.mark.parametrize("cell", ["reset_after", "reset_before", "no_reset"])
def test_recompute_saves_less_for_the_same_gradients(cell):
    rnn = gru_fast.GRU(3, 8, 2, cell=cell, bidirectional=True, dtype=torch.float64)
    x = torch.randn(9, 2, 3, dtype=torch.float64, requires_grad=True)
    results, saved = [], []

    def count(tensor):
        saved[-1] += tensor.numel()
        return tensor

    for recompute in (False, True):
        rnn.recompute = recompute
        saved.append(0)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            output, h_n = rnn(x)
        loss = output.square().sum() + h_n.sum()
        results.append((output, h_n, *torch.autograd.grad(loss, [x, *rnn.parameters()])))
    torch.testing.assert_close(results[0], results[1])
    slots = {"reset_after": 4, "reset_before": 3, "no_reset": 2}[cell]
    assert saved[0] - saved[1] == 2 * 9 * 2 * 2 * slots * 8


def test_compiled_cell_and_converted_model(fresh_compiler):
    model = nn.ModuleList([nn.GRU(3, 4, batch_first=True), nn.GRUCell(4, 4)])
    gru_fast.convert(model)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x, lengths):
        output, h_n = model[0](x, lengths=lengths)
        return model[1](output[:, -1], h_n[0])

    x, lengths = torch.randn(2, 5, 3), torch.tensor([5, 2])
    output, h_n = model[0](x, lengths=lengths)
    torch.testing.assert_close(step(x, lengths), model[1](output[:, -1], h_n[0]))


def packed(width=3, dtype=torch.float32, *trailing):
    return pack_padded_sequence(
        torch.randn(3, 2, width, *trailing, dtype=dtype), torch.tensor([3, 2])
    )


BAD_CALLS = {
    "nothing": lambda: (),
    "none": lambda: (None,),
    "list": lambda: ([1.0, 2.0],),
    "numpy": lambda: (torch.zeros(2, 2, 3).numpy(),),
    "0d": lambda: (torch.zeros(()),),
    "1d": lambda: (torch.zeros(3),),
    "4d": lambda: (torch.zeros(1, 2, 2, 3),),
    "width": lambda: (torch.zeros(2, 2, 5),),
    "width_0": lambda: (torch.zeros(2, 2, 0),),
    "width_unbatched": lambda: (torch.zeros(2, 5),),
    "float64": lambda: (torch.zeros(2, 2, 3, dtype=torch.float64),),
    "bfloat16": lambda: (torch.zeros(2, 2, 3, dtype=torch.bfloat16),),
    "int64": lambda: (torch.zeros(2, 2, 3, dtype=torch.int64),),
    "complex": lambda: (torch.zeros(2, 2, 3, dtype=torch.complex64),),
    "meta": lambda: (torch.zeros(2, 2, 3, device="meta"),),
    "hx_2d": lambda: (torch.zeros(2, 2, 3), torch.zeros(2, 4)),
    "hx_4d": lambda: (torch.zeros(2, 2, 3), torch.zeros(1, 2, 2, 4)),
    "hx_3d_unbatched": lambda: (torch.zeros(2, 3), torch.zeros(2, 1, 4)),
    "hx_layers": lambda: (torch.zeros(2, 2, 3), torch.zeros(1, 2, 4)),
    "hx_layers_unbatched": lambda: (torch.zeros(2, 3), torch.zeros(1, 4)),
    "hx_batch": lambda: (torch.zeros(2, 2, 3), torch.zeros(2, 3, 4)),
    "hx_batch_1": lambda: (torch.zeros(2, 2, 3), torch.zeros(2, 1, 4)),
    "hx_width": lambda: (torch.zeros(2, 2, 3), torch.zeros(2, 2, 5)),
    "hx_float64": lambda: (torch.zeros(2, 2, 3), torch.zeros(2, 2, 4, dtype=torch.float64)),
    "hx_meta": lambda: (torch.zeros(2, 2, 3), torch.zeros(2, 2, 4, device="meta")),
    "hx_list": lambda: (torch.zeros(2, 2, 3), [torch.zeros(2, 2, 4)]),
    "hx_tuple": lambda: (torch.zeros(2, 2, 3), (torch.zeros(2, 2, 4),)),
    "three_positional": lambda: (torch.zeros(2, 2, 3), None, None),
    "packed_width": lambda: (packed(5),),
    "packed_float64": lambda: (packed(3, torch.float64),),
    "packed_3d": lambda: (packed(5, torch.float32, 3),),
    "packed_hx_2d": lambda: (packed(), torch.zeros(2, 4)),
    "packed_hx_batch": lambda: (packed(), torch.zeros(2, 3, 4)),
    "packed_hx_float64": lambda: (packed(), torch.zeros(2, 2, 4, dtype=torch.float64)),
}


@pytest.mark.parametrize("bad", BAD_CALLS)
@pytest.mark.parametrize("grad", [True, False])
def test_exceptions_have_torchs_types(bad, grad):
    ours, theirs = pair(3, 4, 2)
    arguments = BAD_CALLS[bad]()
    with torch.set_grad_enabled(grad):
        with pytest.raises(Exception) as expected:
            theirs(*arguments)
        with pytest.raises(Exception) as given:
            ours(*arguments)
    assert given.type is expected.type, f"{given.value!r} where torch raises {expected.value!r}"


@pytest.mark.parametrize(
    ("extras", "error"),
    [
        ({"lengths": torch.tensor([1, 2, 3])}, RuntimeError),
        ({"lengths": torch.tensor([1, 6])}, RuntimeError),
        ({"lengths": torch.tensor([-1, 2])}, RuntimeError),
        ({"lengths": torch.tensor([1.0, 2.0])}, RuntimeError),
        ({"reset_mask": torch.zeros(2, 5, dtype=torch.bool)}, RuntimeError),
        ({"reset_mask": torch.zeros(5, 2)}, RuntimeError),
        ({"reset_state": torch.zeros(1, 2, 4)}, RuntimeError),
        (
            {
                "reset_mask": torch.zeros(5, 2, dtype=torch.bool),
                "reset_state": torch.zeros(1, 1, 4),
            },
            RuntimeError,
        ),
    ],
)
def test_bad_extras(extras, error):
    argument = list(extras)[-1]
    with pytest.raises(error, match=argument):
        gru_fast.GRU(3, 4)(torch.randn(5, 2, 3), **extras)


def test_lengths_with_a_packed_sequence():
    with pytest.raises((ValueError, RuntimeError), match="lengths"):
        gru_fast.GRU(3, 4)(packed(), lengths=torch.tensor([1, 1]))


def test_a_named_backend_that_cannot_take_the_call():
    with pytest.raises(RuntimeError, match=r"backend='cudnn' .* the input is on cpu"):
        gru_fast.GRU(3, 4, backend="cudnn")(torch.randn(5, 2, 3))
