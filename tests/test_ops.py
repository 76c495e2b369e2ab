# SPDX-License-Identifier: Apache-2.0
"""The operators: their schema, their edge cases, and what PyTorch asks of them."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import CELLS, FEATURES, Case, LayerInputs, layer_inputs
from gru_fast import ops, reference
from op_calls import (
    DIRECTIONS,
    backward_arguments,
    run,
    scan_arguments,
)

SCHEMAS = {
    "layer": "gru_fast::layer(Tensor x, Tensor h0, Tensor weight_ih, Tensor weight_hh, "
    "Tensor? bias_ih, Tensor? bias_hh, Tensor? lengths, Tensor? reset_mask, Tensor? reset_state, "
    "Tensor? h_scale, str cell, bool[] reverse, bool recompute) -> "
    "(Tensor output, Tensor h_n, Tensor workspace)",
    "scan": "gru_fast::scan(Tensor gates_x, Tensor h0, Tensor weight_hh, Tensor? bias_hh, "
    "Tensor? lengths, Tensor? reset_mask, Tensor? reset_state, Tensor? h_scale, str cell, "
    "bool[] reverse, bool recompute) -> (Tensor output, Tensor h_n, Tensor workspace)",
    "layer_backward": "gru_fast::layer_backward(Tensor? grad_output, Tensor? grad_h_n, "
    "Tensor? grad_workspace, Tensor x, Tensor h0, Tensor weight_ih, Tensor weight_hh, "
    "Tensor? bias_ih, Tensor? bias_hh, Tensor? lengths, Tensor? reset_mask, Tensor? reset_state, "
    "Tensor? h_scale, Tensor output, Tensor workspace, str cell, bool[] reverse, bool recompute, "
    "bool[] output_mask) -> (Tensor grad_x, Tensor grad_h0, Tensor grad_weight_ih, "
    "Tensor grad_weight_hh, Tensor grad_bias_ih, Tensor grad_bias_hh, Tensor grad_reset_state, "
    "Tensor grad_h_scale)",
    "scan_backward": "gru_fast::scan_backward(Tensor? grad_output, Tensor? grad_h_n, "
    "Tensor? grad_workspace, Tensor gates_x, Tensor h0, Tensor weight_hh, Tensor? bias_hh, "
    "Tensor? lengths, Tensor? reset_mask, Tensor? reset_state, Tensor? h_scale, Tensor output, "
    "Tensor workspace, str cell, bool[] reverse, bool recompute, bool[] output_mask) -> "
    "(Tensor grad_gates_x, Tensor grad_h0, Tensor grad_weight_hh, Tensor grad_bias_hh, "
    "Tensor grad_reset_state, Tensor grad_h_scale)",
}

poisoned = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema(name: str) -> None:
    """The schema never changes: exported programs and saved graphs hold it."""
    assert str(getattr(torch.ops.gru_fast, name).default._schema) == SCHEMAS[name]


@poisoned
@pytest.mark.parametrize("name", ["layer", "scan"])
@pytest.mark.parametrize("cell", CELLS)
def test_output_mask_and_missing_gradients(cell: str, name: str) -> None:
    inputs = layer_inputs(Case(cell, "everything", (True, False)))
    arguments = backward_arguments(name, inputs)
    op = getattr(ops, f"{name}_backward")
    everything = op(*arguments)
    for k in range(len(everything)):
        mask = [j == k for j in range(len(everything))]
        for j, gradient in enumerate(op(*arguments[:-1], mask)):
            if j == k:
                torch.testing.assert_close(gradient, everything[k], rtol=1e-12, atol=1e-13)
            else:
                assert gradient.shape == (0,)
    zero = [torch.zeros_like(a) for a in arguments[:2]]
    for k in range(2):
        absent = [None if j == k else arguments[j] for j in range(2)]
        zeroed = [zero[j] if j == k else arguments[j] for j in range(2)]
        for a, b in zip(op(*absent, *arguments[2:]), op(*zeroed, *arguments[2:]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


CONFIGURATIONS = [
    Case(cell, features, reverse, T=3, B=2, I=2, H=3, bias=bias)
    for cell, features, reverse, bias in (
        ("reset_after", "plain", (False,), True),
        ("reset_after", "everything", (False, True), True),
        ("reset_before", "lengths", (True,), False),
        ("no_reset", "resets", (False, False), True),
    )
]


# PyTorch 2.15 warns of what opcheck itself does.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
@pytest.mark.parametrize("case", CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("name", ["layer", "scan"])
def test_opcheck(name: str, case: Case, recompute: bool) -> None:
    inputs = layer_inputs(case, torch.float32, grad=True)
    make = LayerInputs.arguments if name == "layer" else scan_arguments
    torch.library.opcheck(getattr(ops, name), make(inputs, recompute=recompute))


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
@pytest.mark.parametrize("case", CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("name", ["layer", "scan"])
def test_opcheck_backward(name: str, case: Case, recompute: bool) -> None:
    inputs = layer_inputs(case, torch.float32)
    arguments = backward_arguments(name, inputs, not recompute, recompute=recompute)
    torch.library.opcheck(getattr(ops, f"{name}_backward"), arguments)


def differentiable_call(name: str, inputs: LayerInputs, recompute: bool) -> tuple[Any, Any]:
    make = LayerInputs.arguments if name == "layer" else scan_arguments
    arguments = make(inputs, recompute=recompute)
    where = [k for k, a in enumerate(arguments) if isinstance(a, Tensor) and a.requires_grad]

    def call(*values: Tensor) -> tuple[Tensor, Tensor]:
        given = list(arguments)
        for k, v in zip(where, values, strict=True):
            given[k] = v
        return getattr(ops, name)(*given)[:2]

    return call, tuple(arguments[k] for k in where)


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
@pytest.mark.parametrize("features", ["plain", "everything"])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("name", ["layer", "scan"])
def test_gradcheck_and_gradgradcheck(name: str, cell: str, features: str, recompute: bool) -> None:
    reverse = (False, True) if features == "everything" else (False,)
    inputs = layer_inputs(Case(cell, features, reverse, T=3, B=2, I=2, H=2), grad=True)
    call, values = differentiable_call(name, inputs, recompute)
    assert torch.autograd.gradcheck(call, values)
    assert torch.autograd.gradgradcheck(call, values)


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
@pytest.mark.parametrize("cell", CELLS)
def test_third_order(cell: str, recompute: bool) -> None:
    inputs = layer_inputs(Case(cell, "everything", T=3, B=2, I=2, H=2), grad=True)
    call, values = differentiable_call("layer", inputs, recompute)

    def third(function: Any) -> Sequence[Tensor]:
        total = sum(v.square().sum() for v in function(*values))
        for _ in range(2):
            grads = torch.autograd.grad(total, values, create_graph=True)
            total = sum(g.sin().sum() for g in grads)
        return torch.autograd.grad(total, values)

    def specification(*given: Tensor) -> tuple[Tensor, ...]:
        return reference.layer(*inputs.arguments(**dict(zip(inputs.leaves(), given, strict=True))))[
            :2
        ]

    for ours, truth in zip(third(call), third(specification), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-10)


@poisoned
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("sizes", [(0, 3), (4, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_no_steps_or_no_rows(
    cell: str, sizes: tuple[int, int], features: str, recompute: bool
) -> None:
    T, B = sizes
    inputs = layer_inputs(Case(cell, features, (True, False), T=T, B=B), grad=True)
    output, h_n, _ = ops.layer(*inputs.arguments(recompute=recompute))
    assert output.shape == (T, B, 14) and h_n.shape == (2, B, 7)
    assert torch.equal(h_n, inputs.h0)
    leaves = inputs.leaves()
    grads = torch.autograd.grad(
        (output, h_n), list(leaves.values()), [output, torch.ones_like(h_n)]
    )
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        assert torch.equal(grad, torch.full_like(leaf, 1.0 if name == "h0" else 0.0)), name


@pytest.mark.parametrize("name", ["layer", "scan"])
def test_the_reference_has_gradients_of_no_steps(name: str) -> None:
    arguments = backward_arguments(name, layer_inputs(Case(features="everything", T=0)))
    found = getattr(reference, f"{name}_backward")(*arguments)
    for ours, theirs in zip(getattr(ops, f"{name}_backward")(*arguments), found, strict=True):
        assert torch.equal(ours, theirs)
    none = [False] * len(arguments[-1])
    for gradient in getattr(reference, f"{name}_backward")(*arguments[:-1], none):
        assert gradient.shape == (0,)


@poisoned
def test_rows_of_length_zero_keep_their_state() -> None:
    inputs = layer_inputs(Case(features="lengths", reverse=(False, True)), grad=True)
    inputs.lengths = torch.zeros(3, dtype=torch.int32)
    output, h_n, workspace = ops.layer(*inputs.arguments())
    assert torch.equal(h_n, inputs.h0) and not output.any() and not workspace.any()
    grads = torch.autograd.grad(h_n.sum(), [inputs.x, inputs.h0, inputs.weight_hh])
    assert not grads[0].any() and bool((grads[1] == 1).all()) and not grads[2].any()


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("reverse", DIRECTIONS[:3], ids=str)
def test_padding_is_never_used(cell: str, reverse: tuple[bool, ...]) -> None:
    """NaN in the padding of x stays out of every output and every gradient."""
    inputs = layer_inputs(Case(cell, "everything", reverse), grad=True)
    assert inputs.lengths is not None
    grads = [torch.randn(4, 3, 7 * len(reverse)), torch.randn(len(reverse), 3, 7)]
    padding = (torch.arange(4)[:, None] >= inputs.lengths)[..., None]
    garbage = torch.where(padding, torch.nan, inputs.x.detach()).requires_grad_()
    for recompute in (False, True):
        clean = run(ops.layer, inputs.arguments(recompute=recompute), grads)
        dirty = run(ops.layer, inputs.arguments(x=garbage, recompute=recompute), grads)
        for a, b in zip(dirty, clean, strict=True):
            assert torch.equal(a, b)


def test_outputs_share_no_memory() -> None:
    for T in (0, 1, 3):
        inputs = layer_inputs(Case(T=T, B=2))
        tensors = [*ops.layer(*inputs.arguments()), *inputs.leaves().values()]
        places = [t.untyped_storage().data_ptr() for t in tensors if t.numel()]
        assert len(set(places)) == len(places)


@pytest.mark.parametrize("name", ["layer", "scan"])
def test_backward_leaves_its_inputs_alone(name: str) -> None:
    inputs = layer_inputs(Case(features="everything", reverse=(False, True)))
    for recompute in (False, True):
        arguments = backward_arguments(name, inputs, not recompute, recompute=recompute)
        copies = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
        op = getattr(ops, f"{name}_backward")
        first, second = op(*arguments), op(*arguments)
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)
        for a, b in zip(arguments, copies, strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


@poisoned
@pytest.mark.parametrize("cell", CELLS)
def test_any_strides(cell: str) -> None:
    inputs = layer_inputs(Case(cell, "everything", (True, False), B=5, H=9))
    expected = ops.layer(*inputs.arguments())

    def scattered(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        spread = torch.stack([t, torch.zeros_like(t)], -1)[..., 0]
        if t.dim() == 1:
            return spread
        return spread.transpose(0, -1).contiguous().transpose(0, -1)

    strided = [scattered(a) for a in inputs.arguments()]
    for a, b in zip(ops.layer(*strided), expected, strict=True):
        assert a.is_contiguous()
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    gradients = backward_arguments("layer", inputs, True)
    for a, b in zip(
        ops.layer_backward(*map(scattered, gradients)), ops.layer_backward(*gradients), strict=True
    ):
        assert a.is_contiguous()
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    expanded = inputs.arguments(h0=inputs.h0[:, :1].expand(2, 5, 9))
    dense = inputs.arguments(h0=inputs.h0[:, :1].expand(2, 5, 9).clone())
    for a, b in zip(ops.layer(*expanded), ops.layer(*dense), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def wrong(t: Tensor) -> Tensor:
    return torch.cat([t, t], -1)


ONLY_ON_THE_CPU = ("lengths above", "lengths below")
"""Elsewhere values are not read: they are brought into 0 ... T."""

BAD = {
    "cell": lambda i: {"cell": "lstm"},
    "x": lambda i: {"x": i.x[0]},
    "h0": lambda i: {"h0": i.h0[:, 1:]},
    "weight_ih": lambda i: {"weight_ih": wrong(i.weight_ih)},
    "weight_hh": lambda i: {"weight_hh": i.weight_hh[:, 1:]},
    "bias_ih": lambda i: {"bias_ih": wrong(i.bias_ih)},
    "bias_hh": lambda i: {"bias_hh": i.bias_hh.to(torch.float32)},
    "lengths": lambda i: {"lengths": i.lengths[1:]},
    "lengths dtype": lambda i: {"lengths": i.lengths.to(torch.float64)},
    "lengths above": lambda i: {"lengths": torch.tensor([1, 2, 5])},
    "lengths below": lambda i: {"lengths": torch.tensor([1, 2, -1])},
    "reset_mask": lambda i: {"reset_mask": i.reset_mask.T},
    "reset_mask dtype": lambda i: {"reset_mask": i.reset_mask.to(torch.uint8)},
    "reset_state": lambda i: {"reset_state": i.reset_state[:, :1]},
    "reset_state alone": lambda i: {"reset_mask": None},
    "h_scale": lambda i: {"h_scale": wrong(i.h_scale)},
    "reverse": lambda i: {"reverse": [True, False]},
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what: str) -> None:
    """A clear error before anything is computed, and the arguments stay as they were."""
    inputs = layer_inputs(Case(features="everything"))
    arguments = inputs.arguments(**BAD[what](inputs))
    copies = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    with pytest.raises(RuntimeError, match=rf"{what.split()[0]}: expected"):
        ops.layer(*arguments)
    for a, b in zip(arguments, copies, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize("what", [w for w in BAD if w not in ONLY_ON_THE_CPU])
def test_bad_input_on_cuda(what: str) -> None:
    """The same errors, before a kernel is launched; the tensors lie on the CPU."""
    inputs = layer_inputs(Case(features="everything"), torch.float32)
    changes = BAD[what](inputs)
    if what == "bias_hh":
        changes = {"bias_hh": inputs.bias_hh.to(torch.float64)}
    with pytest.raises(RuntimeError, match=rf"{what.split()[0]}: expected"):
        ops._cuda_kernel("layer")(*inputs.arguments(**changes))


@pytest.mark.parametrize("what", [w for w in BAD if w not in ONLY_ON_THE_CPU])
def test_bad_input_on_meta(what: str) -> None:
    inputs = layer_inputs(Case(features="everything"))
    arguments = [
        a.to("meta") if isinstance(a, Tensor) else a for a in inputs.arguments(**BAD[what](inputs))
    ]
    with pytest.raises(RuntimeError, match=rf"{what.split()[0]}: expected"):
        ops.layer(*arguments)


@pytest.mark.parametrize(
    "argument, shape, dtype, message",
    [
        ("gates_x", (3, 2, 12), None, r"gates_x: expected shape \(T, B, G, 3\*H\), got \(3, 2, 12"),
        ("h0", (2, 4), None, r"h0: expected shape \(G, B, H\), got \(2, 4\)"),
        (
            "gates_x",
            (3, 2, 1, 12),
            torch.int32,
            "gates_x: expected a floating dtype, got torch.int",
        ),
        ("lengths", (2,), torch.int32, "lengths: expected the device of gates_x, meta, got cpu"),
    ],
)
def test_bad_scans_on_meta(
    argument: str, shape: tuple[int, ...], dtype: torch.dtype | None, message: str
) -> None:
    device = "cpu" if argument == "lengths" else "meta"
    arguments: dict[str, Any] = {
        "gates_x": torch.empty(3, 2, 1, 12, device="meta"),
        "h0": torch.empty(1, 2, 4, device="meta"),
        "weight_hh": torch.empty(1, 12, 4, device="meta"),
        "lengths": None,
        argument: torch.empty(shape, dtype=dtype, device=device),
    }
    gates_x, h0, weight_hh, lengths = arguments.values()
    with pytest.raises(RuntimeError, match=message):
        ops.scan(
            gates_x, h0, weight_hh, None, lengths, None, None, None, "reset_after", [False], False
        )


def test_no_units_on_meta() -> None:
    empty = [torch.empty(shape, device="meta") for shape in ((3, 2, 1, 0), (1, 2, 0), (1, 0, 0))]
    with pytest.raises(RuntimeError, match="h0: expected G >= 1 and H >= 1"):
        ops.scan(*empty, *[None] * 5, "reset_after", [False], False)


@pytest.mark.parametrize("index", [0, 1, 2, 13, 14, 18])
def test_bad_input_of_backward(index: int) -> None:
    inputs = layer_inputs(Case(features="everything"))
    arguments = backward_arguments("layer", inputs, True)
    bad = arguments[index]
    arguments[index] = bad[1:] if isinstance(bad, list) else wrong(bad)
    name = ops.layer_backward._schema.arguments[index].name
    meta = [a.to("meta") if isinstance(a, Tensor) else a for a in arguments]
    for op, given in (
        (ops.layer_backward, arguments),
        (ops._cuda_kernel("layer_backward"), arguments),
        (ops.layer_backward, meta),
    ):
        with pytest.raises(RuntimeError, match=f"{name}: expected"):
            op(*given)


def test_masks_and_gradients_that_do_not_fit_a_backward() -> None:
    inputs = layer_inputs(Case())
    for name, count in (("layer", 8), ("scan", 6)):
        arguments = backward_arguments(name, inputs)
        for op in (getattr(ops, f"{name}_backward"), ops._cuda_kernel(f"{name}_backward")):
            with pytest.raises(RuntimeError, match=f"output_mask: expected {count} values, got"):
                op(*arguments[:-1], [True] * (count + 1))
    arguments = backward_arguments("layer", inputs, workspace_grad=True)
    arguments[14], arguments[17] = torch.zeros(0, dtype=torch.float64), True
    with pytest.raises(RuntimeError, match="grad_workspace: expected none with recompute"):
        ops.layer_backward(*arguments)


@poisoned
@pytest.mark.parametrize("G, H", [(2, 0), (0, 4), (0, 0)])
def test_no_units_or_no_groups(G: int, H: int) -> None:
    x, h0 = torch.randn(3, 2, 5, requires_grad=True), torch.zeros(G, 2, H, requires_grad=True)
    weights = torch.zeros(G, 3 * H, 5), torch.zeros(G, 3 * H, H), *[torch.zeros(G, 3 * H)] * 2
    output, h_n, workspace = ops.layer(
        x, h0, *weights, None, None, None, None, "reset_after", [False] * G, False
    )
    assert output.shape == (3, 2, 0) and h_n.shape == h0.shape and workspace.numel() == 0
    grad_x, grad_h0 = torch.autograd.grad((output, h_n), (x, h0), (output, h_n))
    assert torch.equal(grad_x, torch.zeros_like(x)) and grad_h0.shape == h0.shape


def test_meta_device() -> None:
    inputs = layer_inputs(Case(features="everything", reverse=(True, False)), grad=True)
    meta = [a.to("meta") if isinstance(a, Tensor) else a for a in inputs.arguments()]
    for a, b in zip(ops.layer(*meta), ops.layer(*inputs.arguments()), strict=True):
        assert a.is_meta and a.shape == b.shape and a.stride() == b.stride()
