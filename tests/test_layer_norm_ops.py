# SPDX-License-Identifier: Apache-2.0
"""`gru_fast::norm_scan` and its backward: the specification, the schema, transforms, numbers."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from cases import FEATURES, Case
from gru_fast import ops_norm, reference_norm
from helpers import assert_parity
from norm_cases import (
    EPS,
    GRADIENTS,
    backward_arguments,
    cast,
    is_float,
    norm_arguments,
    with_recompute,
)
from op_calls import DIRECTIONS, draws
from torch_threads import torch_threads

SCHEMAS = {
    "norm_scan": "gru_fast::norm_scan(Tensor gates_x, Tensor h0, Tensor weight_hh, "
    "Tensor gamma_hh, Tensor? bias_hh, Tensor? lengths, Tensor? reset_mask, Tensor? reset_state, "
    "Tensor? h_scale, float eps, bool[] reverse, bool recompute) -> "
    "(Tensor output, Tensor h_n, Tensor workspace, Tensor rstd)",
    "norm_scan_backward": "gru_fast::norm_scan_backward(Tensor? grad_output, Tensor? grad_h_n, "
    "Tensor gates_x, Tensor h0, Tensor weight_hh, Tensor gamma_hh, Tensor? bias_hh, "
    "Tensor? lengths, Tensor? reset_mask, Tensor? reset_state, Tensor? h_scale, Tensor output, "
    "Tensor workspace, Tensor rstd, float eps, bool[] reverse, bool recompute, "
    "bool[] output_mask) -> (Tensor grad_gates_x, Tensor grad_h0, Tensor grad_weight_hh, "
    "Tensor grad_gamma_hh, Tensor grad_bias_hh, Tensor grad_reset_state, Tensor grad_h_scale)",
}

poisoned = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema(name: str) -> None:
    """The schema never changes: exported programs and saved graphs hold it."""
    assert str(getattr(torch.ops.gru_fast, name).default._schema) == SCHEMAS[name]


def leaves(arguments: list[Any]) -> list[Tensor]:
    return [a for a in arguments if is_float(a)]


def run(op: Any, arguments: list[Any], grads: list[Tensor]) -> list[Tensor]:
    """output, h_n and the gradient of every differentiable argument."""
    outputs = op(*arguments)[:2]
    given = [g.to(outputs[0].dtype) for g in grads]
    gradients = torch.autograd.grad(outputs, leaves(arguments), given)
    return [*(o.detach() for o in outputs), *gradients]


def run_specification(arguments: list[Any], grads: list[Tensor]) -> list[Tensor]:
    """`run` on the reference, on one thread: its small operations are five times faster so."""
    with torch_threads(1):
        return run(reference_norm.norm_scan, arguments, grads)


def random_grads(case: Case) -> list[Tensor]:
    G = len(case.reverse)
    return [torch.randn(case.T, case.B, G * case.H), torch.randn(G, case.B, case.H)]


def labels(arguments: list[Any]) -> list[str]:
    names = [a.name for a in ops_norm.norm_scan._schema.arguments]
    floats = [name for name, a in zip(names, arguments, strict=True) if is_float(a)]
    return ["output", "h_n", *floats]


class TestSpecification:
    """The reference against torch's own layer norm, and its backward against autograd."""

    @pytest.mark.parametrize("bias", (True, False))
    def test_forward_is_a_loop_over_layer_norms(self, bias: bool) -> None:
        arguments = norm_arguments(Case(T=5, B=3, H=7, bias=bias))
        gates_x, h, weight, gamma, c, *_ = arguments
        output, h_n, _, _ = reference_norm.norm_scan(*arguments)
        h = h[0]
        for t in range(5):
            k = F.layer_norm(F.linear(h, weight[0]), (21,), gamma[0], None if c is None else c[0])
            x_r, x_z, x_n = gates_x[t, :, 0].chunk(3, 1)
            k_r, k_z, k_n = k.chunk(3, 1)
            z = torch.sigmoid(x_z + k_z)
            h = z * h + (1 - z) * torch.tanh(x_n + torch.sigmoid(x_r + k_r) * k_n)
            torch.testing.assert_close(output[t], h, rtol=0, atol=1e-14)
        assert torch.equal(h_n[0], output[-1])

    @pytest.mark.parametrize("recompute", (False, True))
    @pytest.mark.parametrize("features", FEATURES)
    @pytest.mark.parametrize("reverse", DIRECTIONS, ids=str)
    def test_backward_is_the_gradient(
        self, reverse: tuple[bool, ...], features: str, recompute: bool
    ) -> None:
        case = Case(features=features, reverse=reverse, T=5, B=4, H=5)
        arguments = norm_arguments(case, grad=True)
        grads = [g.double() for g in random_grads(case)]
        expected = run(reference_norm.norm_scan, arguments, grads)[2:]
        given = backward_arguments(reference_norm.norm_scan, arguments, recompute, grads)
        found = [g for g in reference_norm.norm_scan_backward(*given) if g.numel()]
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


# Every H and every B of the lists, in pairs that are not multiples of each other.
SIZES = ((1, 17), (3, 1), (7, 2), (16, 9), (17, 5), (33, 8), (64, 3), (65, 17))
PARITY = [
    Case("reset_after", features, DIRECTIONS[(k + j) % 4], T=5, B=B, H=H, bias=(k + j) % 3 > 0)
    for k, features in enumerate(FEATURES)
    for j, (H, B) in enumerate(SIZES)
]


def check_parity(case: Case, dtype: torch.dtype) -> None:
    """Parity of outputs and of every gradient, saved and recomputed."""
    ours: dict[bool, list[list[Tensor]]] = {False: [], True: []}
    theirs, truth = [], []
    for draw in draws(case, dtype):
        arguments = norm_arguments(case, dtype, grad=True, draw=draw)
        grads = [g.to(dtype) for g in random_grads(case)]
        theirs.append(run_specification(arguments, grads))
        truth.append(run_specification(cast(arguments, torch.float64), grads))
        for mode, found in ours.items():
            found.append(run(ops_norm.norm_scan, with_recompute(arguments, mode), grads))
    for mode, found in ours.items():
        for k, what in enumerate(labels(arguments)):
            a, b, c = ([d[k] for d in values] for values in (found, theirs, truth))
            assert_parity(f"{what}{' recomputed' if mode else ''}", a, b, c)


@poisoned
@pytest.mark.parametrize("case", PARITY[::3], ids=str)
def test_parity_float32(case: Case) -> None:
    check_parity(case, torch.float32)


@poisoned
@pytest.mark.parametrize("case", PARITY[1::6], ids=str)
def test_parity_float64(case: Case) -> None:
    check_parity(case, torch.float64)


@poisoned
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("case", PARITY[1::12], ids=str)
def test_parity_in_half_precision(case: Case, dtype: torch.dtype) -> None:
    check_parity(case, dtype)


@poisoned
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("features", ("plain", "everything"))
@pytest.mark.parametrize("T, B, H", [(1, 1, 24), (1, 2, 5), (150, 4, 20)])
def test_parity_of_one_step_and_many(
    T: int, B: int, H: int, features: str, dtype: torch.dtype
) -> None:
    check_parity(Case("reset_after", features, (False, True), T=T, B=B, H=H), dtype)


@poisoned
@pytest.mark.parametrize("features", ("plain", "everything"))
def test_workspace(features: str) -> None:
    arguments = norm_arguments(Case("reset_after", features, (True, False), T=6, B=5, H=19))
    ours, truth = ops_norm.norm_scan(*arguments), reference_norm.norm_scan(*arguments)
    for k, what in enumerate(("output", "h_n", "workspace", "rstd")):
        assert_parity(what, ours[k], truth[k], truth[k])


@poisoned
@pytest.mark.parametrize("recompute", (False, True))
def test_output_mask_and_missing_gradients(recompute: bool) -> None:
    arguments = norm_arguments(Case("reset_after", "everything", (False, True), T=5, B=3, H=7))
    given = backward_arguments(ops_norm.norm_scan, arguments, recompute)
    full = ops_norm.norm_scan_backward(*given)
    for k in range(7):
        mask = [i == k for i in range(7)]
        part = ops_norm.norm_scan_backward(*given[:-1], mask)
        for i in range(7):
            assert torch.equal(part[i], full[i]) if mask[i] else part[i].shape == (0,), GRADIENTS[i]
    for grads in ((given[0], None), (None, given[1])):
        zeros = [torch.zeros_like(a) if b is None else a
                 for a, b in zip(given[:2], grads, strict=True)]  # fmt: skip
        some = ops_norm.norm_scan_backward(*grads, *given[2:])
        for a, b in zip(some, ops_norm.norm_scan_backward(*zeros, *given[2:]), strict=True):
            assert torch.equal(a, b)


@poisoned
@pytest.mark.parametrize("recompute", (False, True))
@pytest.mark.parametrize("T, B", [(0, 3), (3, 0), (0, 0)])
def test_nothing_to_do(T: int, B: int, recompute: bool) -> None:
    G, H = 2, 4
    shapes = (T, B, G, 3 * H), (G, B, H), (G, 3 * H, H), (G, 3 * H), (G, 3 * H)
    arguments = [torch.randn(s, requires_grad=True) for s in shapes]
    output, h_n, workspace, rstd = ops_norm.norm_scan(
        *arguments, *[None] * 4, EPS, [False, True], recompute
    )
    assert output.shape == (T, B, G * H) and torch.equal(h_n, arguments[1])
    assert workspace.shape == ((0,) if recompute else (T, B, G, 6 * H))
    assert rstd.shape == ((0,) if recompute else (T, B, G))
    grads = torch.autograd.grad((output, h_n), arguments, [output, h_n])
    assert torch.equal(grads[1], h_n)
    assert not any(bool(g.any()) for g in grads[2:])


@poisoned
def test_padding_is_not_read() -> None:
    arguments = norm_arguments(Case("reset_after", "lengths", (False, True), T=6, B=4, H=9))
    padding = torch.arange(6)[:, None] >= arguments[5]
    grads = [torch.ones(6, 4, 18, dtype=torch.float64), None]
    dirty = [torch.where(padding[..., None, None], torch.nan, arguments[0]), *arguments[1:]]
    for recompute in (False, True):
        results = []
        for some in (arguments, dirty):
            given = backward_arguments(ops_norm.norm_scan, some, recompute, grads)
            results.append(ops_norm.norm_scan_backward(*given))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


MESSAGES = [
    ({0: torch.zeros(2, 1, 1, 9)}, r"gates_x: expected shape .*\(2, 1, 1, 12\), got"),
    ({3: torch.zeros(1, 4)}, r"gamma_hh: expected shape .*\(1, 12\), got \(1, 4\)"),
    (
        {3: torch.zeros(1, 12).double()},
        "gamma_hh: expected the dtype of .*, got",
    ),
    ({4: torch.zeros(1, 4)}, r"bias_hh: expected shape .*\(1, 12\), got \(1, 4\)"),
    ({5: torch.tensor([3])}, "lengths: expected values from 0 to T = 2, got"),
    ({9: 0.0}, "eps: expected a positive number, got 0"),
    ({9: float("inf")}, "eps: expected a positive number, got inf"),
    ({10: [False, True]}, "reverse: expected 1 values, one .* got 2"),
    (
        {
            0: torch.zeros(2, 1, 0, 12),
            1: torch.zeros(0, 1, 4),
            2: torch.zeros(0, 12, 4),
            3: torch.zeros(0, 12),
            10: [],
        },
        r"h0: expected G >= 1 and H >= 1, got \(0, 1, 4\)",
    ),
]


@pytest.mark.parametrize("changes, message", MESSAGES, ids=lambda v: str(v)[:20])
def test_errors(changes: dict[int, Any], message: str) -> None:
    arguments: list[Any] = [
        torch.zeros(2, 1, 1, 12), torch.zeros(1, 1, 4), torch.zeros(1, 12, 4), torch.ones(1, 12),
        None, None, None, None, None, EPS, [False], False,
    ]  # fmt: skip
    for k, value in changes.items():
        arguments[k] = value
    with pytest.raises(RuntimeError, match=message):
        ops_norm.norm_scan(*arguments)
    meta = [a.to("meta") if isinstance(a, Tensor) else a for a in arguments]
    if 5 not in changes:  # nobody can read these lengths
        with pytest.raises(RuntimeError, match=message):
            ops_norm.norm_scan(*meta)


def test_the_reference_has_gradients_of_no_steps() -> None:
    arguments = norm_arguments(Case("reset_after", "everything", T=0))
    given = backward_arguments(ops_norm.norm_scan, arguments)
    found = reference_norm.norm_scan_backward(*given)
    for ours, theirs in zip(ops_norm.norm_scan_backward(*given), found, strict=True):
        assert torch.equal(ours, theirs)
    for gradient in reference_norm.norm_scan_backward(*given[:-1], [False] * 7):
        assert gradient.shape == (0,)


def test_a_backward_mask_of_another_length() -> None:
    given = backward_arguments(ops_norm.norm_scan, norm_arguments(Case("reset_after", T=2, B=1)))
    with pytest.raises(RuntimeError, match="output_mask: expected 7 values, got 6"):
        ops_norm.norm_scan_backward(*given[:-1], [True] * 6)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("recompute", (False, True))
def test_gradcheck(features: str, recompute: bool) -> None:
    case = Case("reset_after", features, (False, True), T=3, B=2, H=3)
    arguments = with_recompute(norm_arguments(case, grad=True), recompute)
    places = [i for i, a in enumerate(arguments) if is_float(a)]

    def call(*tensors: Tensor) -> Any:
        changed = list(arguments)
        for i, tensor in zip(places, tensors, strict=True):
            changed[i] = tensor
        return ops_norm.norm_scan(*changed)[:2]

    inputs = [arguments[i] for i in places]
    assert gradcheck(call, inputs, fast_mode=True)
    assert gradgradcheck(call, inputs, fast_mode=True)


def check_ops(recompute: bool, utils: tuple[str, ...]) -> None:
    arguments = norm_arguments(Case("reset_after", "everything", (False, True)), grad=True)
    forward = with_recompute(arguments, recompute)
    torch.library.opcheck(ops_norm.norm_scan, forward, test_utils=utils)
    given = backward_arguments(ops_norm.norm_scan, arguments, recompute)
    torch.library.opcheck(ops_norm.norm_scan_backward, given, test_utils=utils)


@pytest.mark.parametrize("recompute", (False, True))
def test_opcheck(recompute: bool) -> None:
    check_ops(recompute, ("test_schema", "test_autograd_registration", "test_faketensor"))


@pytest.mark.slow
@pytest.mark.parametrize("recompute", (False, True))
def test_opcheck_compiled(recompute: bool) -> None:
    check_ops(recompute, ("test_aot_dispatch_dynamic",))


def test_workspace_has_no_gradient() -> None:
    arguments = norm_arguments(Case(), grad=True)
    for op in (ops_norm.norm_scan, lambda *a: ops_norm.eager_norm_scan(*a)):
        output, h_n, workspace, rstd = op(*arguments)
        assert output.requires_grad and h_n.requires_grad
        assert not (workspace.requires_grad or rstd.requires_grad)


VMAPPED = {
    "sequences": ((0, 1, None, None, None, None, None, None, None), "plain"),
    "every input": ((2, 0, None, None, None, 0, 1, 1, 0), "everything"),
    "some inputs": ((None, 0, None, None, None, None, None, 0, None), "everything"),
    "weights": ((None, None, 0, None, None, None, None, None, None), "plain"),
    "all": ((0, 0, 0, 0, 0, 0, 0, 0, 0), "everything"),
}


@pytest.mark.parametrize("what", VMAPPED)
@pytest.mark.parametrize("recompute", (False, True))
def test_vmap(what: str, recompute: bool) -> None:
    dims, features = VMAPPED[what]
    case = Case("reset_after", features, (False, True), T=3, B=2, H=5)
    several = [norm_arguments(case, draw=draw) for draw in range(3)]
    single = [a[:9] for a in several]
    stacked = [
        single[0][i] if d is None or single[0][i] is None
        else torch.stack([s[i] for s in single], d)
        for i, d in enumerate(dims)
    ]  # fmt: skip
    in_dims = tuple(d if stacked[i] is not None else None for i, d in enumerate(dims))

    def call(*tensors: Any) -> Any:
        return ops_norm.norm_scan(*tensors, EPS, [False, True], recompute)[:2]

    found = torch.vmap(call, in_dims)(*stacked)
    for v in range(3):
        one = [a if d is None or a is None else a.select(d, v)
               for a, d in zip(stacked, dims, strict=True)]  # fmt: skip
        for a, b in zip(found, call(*one), strict=True):
            torch.testing.assert_close(a[v], b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("G, H", [(0, 4), (2, 0), (0, 0)])
def test_nothing_to_compute_is_an_error_of_backward_too(G: int, H: int) -> None:
    T, B = 2, 1
    shapes = (T, B, G, 3 * H), (G, B, H), (G, 3 * H, H), (G, 3 * H)
    saved = [torch.zeros(s) for s in ((T, B, G * H), (T, B, G, 6 * H), (T, B, G))]
    with pytest.raises(RuntimeError, match=r"h0: expected G >= 1 and H >= 1, got"):
        ops_norm.norm_scan_backward(
            None, None, *map(torch.zeros, shapes), *[None] * 5, *saved, EPS, [False] * G, False,
            [True] * 7,
        )  # fmt: skip
