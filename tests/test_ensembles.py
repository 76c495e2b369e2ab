# SPDX-License-Identifier: Apache-2.0
"""Ensembles, per-sample gradients and checkpointing: one call of the ops, and the right numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, func, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import gru_fast
from cases import CELLS, Case, layer_inputs
from gru_fast import functional, ops
from op_calls import backward_arguments, scan_arguments

N = 3


def assert_same(ours: Any, truth: Any) -> None:
    torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-12)


def calls_of(run: Callable[[], Any]) -> dict[str, list[Any]]:
    """Shapes of the arguments of every call of our ops that reached a kernel, by op."""
    with torch.profiler.profile(record_shapes=True) as profile:
        run()

    def holds_another(event: Any) -> bool:
        children = event.cpu_children
        return any(c.name.startswith("gru_fast::") or holds_another(c) for c in children)

    found: dict[str, list[Any]] = {}
    for event in profile.events():
        if event.name.startswith("gru_fast::") and not holds_another(event):
            found.setdefault(event.name.removeprefix("gru_fast::"), []).append(event.input_shapes)
    return found


def ensemble(**options: Any) -> list[gru_fast.GRU]:
    return [gru_fast.GRU(5, 4, dtype=torch.float64, **options) for _ in range(N)]


def member(model: nn.Module) -> Callable[..., Tensor]:
    """Loss of the model's structure as a function of parameters and data."""

    def loss(params: dict[str, Tensor], *data: Any, **options: Any) -> Tensor:
        output, h_n = func.functional_call(model, params, data, options)
        return output.square().sum() + h_n.sin().sum()

    return loss


STRUCTURES = {
    "plain": {},
    "layers": {"num_layers": 2, "bidirectional": True, "cell": "reset_before"},
    "no_reset": {"bias": False, "cell": "no_reset", "recompute": True},
}


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("own_data", [False, True], ids=["same_data", "own_data"])
def test_ensemble_is_its_models(name: str, own_data: bool) -> None:
    """Outputs, gradients by autograd through vmap, and by vmap of torch.func.grad."""
    models = ensemble(**STRUCTURES[name])
    params, buffers = func.stack_module_state(models)
    assert buffers == {}
    x = torch.randn(N, 6, 2, 5, dtype=torch.float64)
    data = x if own_data else x[0]
    loss, dims = member(models[0]), (0, 0 if own_data else None)
    rows = [model(x[k if own_data else 0]) for k, model in enumerate(models)]
    assert_same(
        torch.vmap(lambda p, x: func.functional_call(models[0], p, (x,)), dims)(params, data),
        tuple(torch.stack(column) for column in zip(*rows, strict=True)),
    )
    truth = [
        torch.autograd.grad(output.square().sum() + h_n.sin().sum(), list(model.parameters()))
        for model, (output, h_n) in zip(models, rows, strict=True)
    ]
    stacked = [torch.stack(column) for column in zip(*truth, strict=True)]
    total = torch.vmap(loss, dims)(params, data).sum()
    assert_same(list(torch.autograd.grad(total, list(params.values()))), stacked)
    by_func = torch.vmap(func.grad(loss), dims)(params, data)
    assert_same(list(by_func.values()), stacked)


LAYERS = {
    **{name: (gru_fast.GRU, options) for name, options in STRUCTURES.items()},
    "layer norm": (gru_fast.LayerNormGRU, {"num_layers": 2}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_batch_of_nothing_has_the_shapes_of_its_members(name: str) -> None:
    make, options = LAYERS[name]
    models = [make(5, 4, **options) for _ in range(N)]
    params, _ = func.stack_module_state(models)
    own, loss = dict(models[0].named_parameters()), member(models[0])
    x = torch.randn(N, 6, 2, 5)
    rows = {"lengths": torch.full((N, 2), 6).int(), "reset_mask": torch.ones(N, 6, 2).bool()}

    def both(p: Any, x: Any, rows: Any) -> Any:
        return func.functional_call(models[0], p, (x,), rows)

    for call, dims, given in (
        (both, (None, 0, None), (own, x, {})),
        (both, (0, None, None), (params, x[0], {})),
        (both, (0, 0, 0), (params, x, rows)),
        (torch.vmap(both, (None, 0, None)), (None, 0, None), (own, torch.stack([x, x]), {})),
        (func.grad(loss, (0, 1)), (None, 0), (own, x)),
        (func.grad(loss, (0, 1)), (0, None), (params, x[0])),
    ):
        run = torch.vmap(call, dims)
        expected = pytree.tree_map(lambda t: t[:0], run(*given))
        nothing = [
            v if d is None else pytree.tree_map(lambda t: t[:0], v)
            for v, d in zip(given, dims, strict=True)
        ]
        assert_same(run(*nothing), expected)
        if call is both:
            leaves = [v for v in pytree.tree_leaves(nothing) if v.is_floating_point()]
            for v in leaves:
                v.requires_grad or v.requires_grad_()
            total = sum(v.sum() for v in run(*nothing))
            assert_same(
                torch.autograd.grad(total, leaves), tuple(torch.zeros_like(v) for v in leaves)
            )


@pytest.mark.parametrize("make", [gru_fast.GRU, gru_fast.LayerNormGRU])
def test_a_batch_of_nothing_has_no_steps_either(make: Any) -> None:
    model = make(5, 4)
    own = dict(model.named_parameters())

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return func.functional_call(model, params, (x,))[0].square().sum()

    found = torch.vmap(func.grad(loss), (None, 0))(own, torch.randn(0, 0, 2, 5))
    assert {k: v.shape for k, v in found.items()} == {k: (0, *v.shape) for k, v in own.items()}


def test_ensemble_is_one_grouped_call() -> None:
    models = ensemble()
    params, _ = func.stack_module_state(models)
    x = torch.randn(6, 2, 5, dtype=torch.float64)
    loss = member(models[0])
    by_autograd = calls_of(lambda: torch.vmap(loss, (0, None))(params, x).sum().backward())
    by_func = calls_of(lambda: torch.vmap(func.grad(loss), (0, None))(params, x))
    for calls in (by_autograd, by_func):
        assert set(calls) == {"layer", "layer_backward"}
        (forward,), (backward,) = calls.values()
        assert forward[0] == [6, 2, 5]  # one input, shared by all
        assert forward[1] == backward[4] == [N, 2, 4]


def samples() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(4, 6, 5, dtype=torch.float64)
    lengths = torch.tensor([6, 0, 2, 4])
    x[torch.arange(6) >= lengths[:, None]] = torch.nan
    return x, lengths, torch.rand(4, 6) < 0.3


@pytest.mark.parametrize("name", STRUCTURES)
def test_per_sample_gradients(name: str) -> None:
    """With lengths, padding that holds NaN, and resets of each sample's own."""
    model = ensemble(**STRUCTURES[name])[0]
    params = dict(model.named_parameters())
    loss = member(model)

    def one(p: dict[str, Tensor], x: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        return loss(p, x[:, None], lengths=lengths[None], reset_mask=mask[:, None])

    data = samples()
    ours = torch.vmap(func.grad(one), (None, 0, 0, 0))(params, *data)
    for k, sample in enumerate(zip(*data, strict=True)):
        truth = torch.autograd.grad(one(params, *sample), list(params.values()))
        assert_same([g[k] for g in ours.values()], list(truth))


def test_per_sample_gradients_under_autocast_stay_float32() -> None:
    model = gru_fast.GRU(5, 4)
    params, x = dict(model.named_parameters()), torch.randn(7, 6, 5)
    run = torch.vmap(func.grad(lambda p, x: member(model)(p, x[:, None])), (None, 0))
    truth = run(params, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = run(params, x)
    torch.testing.assert_close(ours, truth, rtol=0, atol=0)


@pytest.mark.parametrize("sizes", [(0, 2), (3, 0)], ids=["no_steps", "no_rows"])
def test_nothing_to_sum_is_zero(sizes: tuple[int, int]) -> None:
    model = ensemble()[0]
    params, x = dict(model.named_parameters()), torch.randn(7, *sizes, 5, dtype=torch.float64)
    for many, dims in ((params, None), ({k: torch.stack([v] * 7) for k, v in params.items()}, 0)):
        found = torch.vmap(func.grad(member(model)), (dims, 0))(many, x)
        assert {k: v.shape for k, v in found.items()} == {
            k: (7, *v.shape) for k, v in params.items()
        }
        assert not any(v.any() for v in found.values())


def test_per_sample_gradients_are_one_scan() -> None:
    """The samples are rows of one batch: the weights are neither copied nor read for each."""
    model = ensemble()[0]
    x = torch.randn(7, 6, 5, dtype=torch.float64)
    one = func.grad(lambda p, x: member(model)(p, x[:, None]))
    calls = calls_of(lambda: torch.vmap(one, (None, 0))(dict(model.named_parameters()), x))
    assert set(calls) == {"layer", "scan_backward"}
    (forward,), (backward,) = calls.values()
    assert forward[0] == [6, 7, 5] and forward[1] == backward[4] == [1, 7, 4]


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("shared_x", [True, False], ids=["shared", "per_group"])
@pytest.mark.parametrize("name", ["layer", "scan"])
def test_batching_rules_of_the_gradients(
    name: str, shared_x: bool, cell: str, recompute: bool
) -> None:
    """Every argument batched alone, and in groups, against a loop."""
    inputs = layer_inputs(
        Case(cell, "everything", (False, True), T=3, B=2, I=3, H=2, shared_x=shared_x)
    )
    arguments = backward_arguments(name, inputs, recompute=recompute)
    op = getattr(ops, f"{name}_backward")
    tensors = [k for k, a in enumerate(arguments) if isinstance(a, Tensor) and a.numel()]

    def variant(k: int, v: int) -> Tensor:
        a = arguments[k].detach()
        return a + 0.3 * v if a.is_floating_point() else a.roll(v, -1)

    floating = [k for k in tensors if arguments[k].is_floating_point()]
    per_row = [k for k in tensors if k not in ((5, 6, 7, 8) if name == "layer" else (5, 6))]
    for chosen in [[k] for k in tensors] + [tensors, floating, per_row, [0, 3], [0, 5], [3, 4, 5]]:
        given = [
            torch.stack([variant(k, v) for v in range(N)], -1) if k in chosen else a
            for k, a in enumerate(arguments)
        ]
        in_dims = tuple(-1 if k in chosen else None for k in tensors)

        def call(*values: Tensor, given: list[Any] = given) -> Any:
            full = list(given)
            for k, a in zip(tensors, values, strict=True):
                full[k] = a
            return op(*full)

        ours = torch.vmap(call, in_dims)(*[given[k] for k in tensors])
        rows = [
            op(*[variant(k, v) if k in chosen else a for k, a in enumerate(arguments)])
            for v in range(N)
        ]
        for k, value in enumerate(ours):
            assert_same(value, torch.stack([row[k] for row in rows]))


@pytest.mark.parametrize("cell", CELLS)
def test_scan(cell: str) -> None:
    """The recurrence over projected inputs, as language models use it."""
    inputs = layer_inputs(Case(cell, "everything", (False, True), T=3, B=2, I=3, H=2))
    gates_x, h0, weight, bias, *features = scan_arguments(inputs)[:8]
    options = dict(zip(("lengths", "reset_mask", "reset_state", "h_scale"), features, strict=True))

    def loss(backend: str) -> Callable[..., Tensor]:
        def run(gates_x: Tensor, weight: Tensor) -> Tensor:
            output, h_n = functional.scan(
                gates_x, h0, weight, bias, **options, cell=cell, reverse=[False, True],
                backend=backend,
            )  # fmt: skip
            return output.square().sum() + h_n.sin().sum()

        return run

    ours, truth = (func.grad(loss(name), (0, 1)) for name in ("auto", "reference"))
    assert_same(ours(gates_x, weight), truth(gates_x, weight))
    for dims, many in (
        ((0, None), (torch.stack([gates_x, gates_x.cos()]), weight)),
        ((None, 0), (gates_x, torch.stack([weight, weight.cos()]))),
    ):
        assert_same(torch.vmap(ours, dims)(*many), torch.vmap(truth, dims)(*many))


def test_wanted_gradients_only() -> None:
    """Frozen parameters, and data without a gradient, under vmap of grad."""
    models = ensemble()
    params, _ = func.stack_module_state(models)
    x = torch.randn(6, 2, 5, dtype=torch.float64)
    loss = member(models[0])
    for wanted in (["weight_hh_l0"], ["bias_ih_l0"], ["weight_ih_l0", "bias_hh_l0"]):
        frozen = {k: v for k, v in params.items() if k not in wanted}
        ours = torch.vmap(func.grad(lambda p, f: loss({**p, **f}, x)))(
            {k: params[k] for k in wanted}, frozen
        )
        truth = torch.vmap(func.grad(loss), (0, None))(params, x)
        assert_same(ours, {k: truth[k] for k in wanted})
    per_sample = torch.vmap(func.grad(lambda x: loss(dict(models[0].named_parameters()), x)), 1, 1)
    leaf = x.clone().requires_grad_()
    (truth_x,) = torch.autograd.grad(loss(dict(models[0].named_parameters()), leaf), leaf)
    torch.testing.assert_close(per_sample(x), truth_x, rtol=0, atol=1e-12)


def test_gradient_of_torch_func_is_differentiable() -> None:
    """An outer autograd, as a gradient penalty has it, through the gradient of torch.func."""
    model = ensemble()[0]
    x = torch.randn(4, 2, 5, dtype=torch.float64)
    found = []
    for backend in ("auto", "reference"):
        model.backend = backend
        params = {k: v.detach().requires_grad_() for k, v in model.named_parameters()}
        first = func.grad(member(model))(params, x)
        penalty = sum(g.square().sum() for g in first.values())
        found.append(torch.autograd.grad(penalty, list(params.values())))
    assert_same(found[0], found[1])


def test_no_grad_inside_a_gradient() -> None:
    model = ensemble()[0]
    x = torch.randn(4, 2, 5, dtype=torch.float64)

    def loss(params: dict[str, Tensor]) -> Tensor:
        output, _ = func.functional_call(model, params, (x,))
        with torch.no_grad():
            target, _ = func.functional_call(model, params, (x.flip(0),))
        return (output - target).square().sum()

    ours = func.grad(loss)(dict(model.named_parameters()))
    (model(x)[0] - model(x.flip(0))[0].detach()).square().sum().backward()
    assert_same(list(ours.values()), [p.grad for p in model.parameters()])


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])
def test_checkpointing(reentrant: bool, recompute: bool) -> None:
    """Same bits as without, dropout between the layers included, and nothing of the layers kept."""
    model = gru_fast.GRU(5, 8, 3, dropout=0.5, recompute=recompute)
    x = torch.randn(9, 2, 5, requires_grad=True)
    results, kept = [], []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        saved: list[int] = []

        def pack(tensor: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            if checkpointed:
                output, h_n = checkpoint(model, x, use_reentrant=reentrant)
            else:
                output, h_n = model(x)
        kept.append(sum(saved))
        leaves = [x, *model.parameters()]
        for leaf in leaves:
            leaf.grad = None
        (output.square().sum() + h_n.sum()).backward()
        results.append([output, h_n, *[leaf.grad for leaf in leaves]])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    assert kept[1] <= x.numel() < kept[0]
