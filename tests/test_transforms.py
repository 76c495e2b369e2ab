# SPDX-License-Identifier: Apache-2.0
"""Every transform of PyTorch, eager and compiled: right, or a clear error, never silently wrong."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, func, nn
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad

from cases import CELLS, Case, layer_inputs
from gru_fast import backends, functional, ops, reference
from versions import COMPILES_JACFWD

Layer = Callable[..., Tensor]

CASES = {
    "plain": Case(T=3, B=2, I=3, H=2),
    "everything": Case("reset_before", "everything", (False, True), T=3, B=2, I=3, H=2),
}


def layer_of(case: Case, function: Any) -> tuple[Layer, tuple[Tensor, ...]]:
    """output and h_n in one tensor as a function of the differentiable inputs, and their values."""
    inputs = layer_inputs(case)
    names = list(inputs.leaves())

    def call(*values: Tensor) -> Tensor:
        given = dict(zip(names, values, strict=True))
        if function is functional.layer:
            optional = {"lengths": inputs.lengths, "reset_mask": inputs.reset_mask}
            output, h_n = functional.layer(
                **given, **optional, cell=case.cell, reverse=case.reverse
            )
        else:
            output, h_n = function(*inputs.arguments(**given))[:2]
        return torch.cat([output.flatten(), h_n.flatten()])

    return call, tuple(inputs.leaves().values())


def loss(layer: Layer) -> Layer:
    return lambda *values: layer(*values).square().sum()


def stack_of(values: tuple[Tensor, ...], k: int) -> Tensor:
    shifts = torch.arange(3, dtype=values[k].dtype).reshape(3, *[1] * values[k].dim())
    return values[k] + 0.3 * shifts


def double_backward(layer: Layer, values: tuple[Tensor, ...]) -> Any:
    leaves = [v.clone().requires_grad_() for v in values]
    first = torch.autograd.grad(loss(layer)(*leaves), leaves, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)


def backward(layer: Layer, values: tuple[Tensor, ...]) -> Any:
    leaves = [v.clone().requires_grad_() for v in values]
    return torch.autograd.grad(loss(layer)(*leaves), leaves)


def jvp(layer: Layer, values: tuple[Tensor, ...]) -> Any:
    return func.jvp(layer, values, tuple(v.cos() for v in values))


def dual_numbers(layer: Layer, values: tuple[Tensor, ...]) -> Any:
    with forward_ad.dual_level():
        out = layer(*[forward_ad.make_dual(v, v.cos()) for v in values])
        return forward_ad.unpack_dual(out).tangent


def grad(layer: Layer, values: tuple[Tensor, ...]) -> Any:
    return func.grad(loss(layer), argnums=tuple(range(len(values))))(*values)


def vmap_inputs(layer: Layer, values: tuple[Tensor, ...]) -> Any:
    x = stack_of(values, 0)
    return torch.vmap(lambda x, h0: layer(x, h0, *values[2:]), (0, 0))(x, stack_of(values, 1))


def vmap_one_input_of_another_axis(layer: Layer, values: tuple[Tensor, ...]) -> Any:
    x = stack_of(values, 0).movedim(0, 2)
    return torch.vmap(lambda x: layer(x, *values[1:]), in_dims=2, out_dims=1)(x)


def vmap_parameters(layer: Layer, values: tuple[Tensor, ...]) -> Any:
    weights = [stack_of(values, k) for k in range(2, 6)]
    return torch.vmap(lambda *w: layer(*values[:2], *w, *values[6:]))(*weights)


def vmap_everything(layer: Layer, values: tuple[Tensor, ...]) -> Any:
    return torch.vmap(layer)(*[stack_of(values, k) for k in range(len(values))])


def vmap_twice(layer: Layer, values: tuple[Tensor, ...]) -> Any:
    inner = torch.vmap(lambda w, x: layer(x, values[1], w, *values[3:]), (None, 0))
    return torch.vmap(inner, (0, None))(stack_of(values, 2), stack_of(values, 0))


def jacobians(layer: Layer, values: tuple[Tensor, ...]) -> Any:
    return func.jacrev(layer, argnums=(0, 1, 3))(*values)


def forward_jacobians(layer: Layer, values: tuple[Tensor, ...]) -> Any:
    return func.jacfwd(layer, argnums=(0, 1, 3))(*values)


def hessian(layer: Layer, values: tuple[Tensor, ...]) -> Any:
    return func.hessian(lambda h0: loss(layer)(values[0], h0, *values[2:]))(values[1])


def per_sample_gradients(layer: Layer, values: tuple[Tensor, ...]) -> Any:
    one = func.grad(lambda w, x: loss(layer)(x, values[1], w, *values[3:]))
    return torch.vmap(one, (None, 0))(values[2], stack_of(values, 0))


def gradient_of_vmap(layer: Layer, values: tuple[Tensor, ...]) -> Any:
    def total(w: Tensor) -> Tensor:
        outputs = torch.vmap(lambda x: layer(x, values[1], w, *values[3:]))(stack_of(values, 0))
        return outputs.square().sum()

    return func.grad(total)(values[2])


TRANSFORMS = {
    t.__name__: t
    for t in (
        backward,
        double_backward,
        jvp,
        dual_numbers,
        grad,
        vmap_inputs,
        vmap_one_input_of_another_axis,
        vmap_parameters,
        vmap_everything,
        vmap_twice,
        jacobians,
        forward_jacobians,
        hessian,
        per_sample_gradients,
        gradient_of_vmap,
    )
}

# torch.compile does not trace torch.autograd.grad by default, and compiled code has no second
# derivatives: torch says so in an error.
NOT_TRACED = {"backward", "double_backward"}


def expected(name: str, case: Case) -> Any:
    return TRANSFORMS[name](*layer_of(case, reference.layer))


def assert_same(ours: Any, truth: Any) -> None:
    torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_eager(name: str, case: str) -> None:
    ours = TRANSFORMS[name](*layer_of(CASES[case], functional.layer))
    assert_same(ours, expected(name, CASES[case]))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", [n for n in TRANSFORMS if n not in NOT_TRACED])
def test_transform_inside_compile(name: str, case: str) -> None:
    if name == "forward_jacobians" and not COMPILES_JACFWD:
        pytest.skip("torch.compile of before 2.13 does not take torch.func.jacfwd")
    layer, values = layer_of(CASES[case], functional.layer)
    transformed = torch.compile(
        lambda *v: TRANSFORMS[name](layer, v), fullgraph=True, backend="aot_eager"
    )
    assert_same(transformed(*values), expected(name, CASES[case]))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", [n for n in TRANSFORMS if n != "double_backward"])
def test_compile_inside_transform(name: str) -> None:
    """The compiled function has seen a plain call before, whose graph must not be used again."""
    layer, values = layer_of(CASES["plain"], functional.layer)
    compiled = torch.compile(layer, backend="aot_eager")
    compiled(*values)
    assert_same(TRANSFORMS[name](compiled, values), expected(name, CASES["plain"]))


@pytest.mark.usefixtures("fresh_compiler")
def test_double_backward_of_compiled_code_is_an_error() -> None:
    layer, values = layer_of(CASES["plain"], functional.layer)
    with pytest.raises(RuntimeError, match="double backward"):
        double_backward(torch.compile(layer, fullgraph=True, backend="aot_eager"), values)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("case", CASES)
def test_inductor(case: str) -> None:
    layer, values = layer_of(CASES[case], functional.layer)
    compiled = torch.compile(layer, fullgraph=True)
    assert_same(backward(compiled, values), expected("backward", CASES[case]))


def test_jacfwd_is_jacrev() -> None:
    layer, values = layer_of(CASES["everything"], functional.layer)
    assert_same(forward_jacobians(layer, values), jacobians(layer, values))


def test_batched_gradients() -> None:
    """torch.autograd's own vectorised Jacobian puts the backward op under vmap."""

    def jacobian(layer: Layer, values: tuple[Tensor, ...]) -> Any:
        return torch.autograd.functional.jacobian(layer, values, vectorize=True)

    for case in CASES.values():
        ours = jacobian(*layer_of(case, functional.layer))
        assert_same(ours, jacobian(*layer_of(case, reference.layer)))


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("name", ["layer", "scan"])
def test_batching_rules_of_the_ops(name: str, cell: str, recompute: bool) -> None:
    """Every argument batched alone, then all, against a loop; lengths and masks too."""
    inputs = layer_inputs(Case(cell, "everything", (False, True), T=3, B=2, I=3, H=2))
    arguments = inputs.arguments(recompute=recompute)
    if name == "scan":
        gates_x = reference.project(inputs.x, inputs.weight_ih, inputs.bias_ih)
        arguments = [gates_x, arguments[1], arguments[3], *arguments[5:]]
    op = getattr(ops, name)
    tensors = [k for k, a in enumerate(arguments) if isinstance(a, Tensor)]

    def call(*given: Tensor) -> Any:
        full = list(arguments)
        for k, a in zip(tensors, given, strict=True):
            full[k] = a
        return op(*full)[: 2 if recompute else 3]

    def variant(k: int, v: int) -> Tensor:
        a = arguments[k]
        if a.is_floating_point():
            return a + 0.3 * v
        return a.roll(v, -1)

    floating = [k for k in tensors if arguments[k].is_floating_point()]
    for batched in ([k] for k in tensors), [tensors, floating], [[0, 2], [1, 3], [2, 4]]:
        for chosen in batched:
            stacked = list(arguments)
            for k in chosen:
                stacked[k] = torch.stack([variant(k, v) for v in range(3)], -1)
            in_dims = [-1 if k in chosen else None for k in range(len(arguments))]
            ours = torch.vmap(call, tuple(in_dims[k] for k in tensors))(
                *[stacked[k] for k in tensors]
            )
            rows = [
                op(*[variant(k, v) if k in chosen else a for k, a in enumerate(arguments)])
                for v in range(3)
            ]
            for k, value in enumerate(ours):
                assert_same(value, torch.stack([r[k] for r in rows]))


@pytest.mark.parametrize("transform", ["none", "vmap"])
def test_the_op_is_used(transform: str) -> None:
    """A quiet use of the reference would pass every other test."""
    layer, values = layer_of(CASES["plain"], functional.layer)
    with torch.profiler.profile() as profile:
        if transform == "none":
            layer(*values)
        else:
            vmap_inputs(layer, values)
            vmap_parameters(layer, values)
    calls = [e.name for e in profile.events() if e.name == "gru_fast::layer"]
    assert len(calls) >= (1 if transform == "none" else 2)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("transform", [backward, vmap_inputs, vmap_parameters])
def test_the_op_is_compiled(transform: Any) -> None:
    layer, values = layer_of(CASES["plain"], functional.layer)
    graphs: list[torch.fx.GraphModule] = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    if transform is backward:
        transform(torch.compile(layer, fullgraph=True, backend=record), values)
    else:
        torch.compile(lambda *v: transform(layer, v), fullgraph=True, backend=record)(*values)
    targets = [n.target for g in graphs for n in g.graph.nodes]
    assert ops.layer in targets


def test_private_names_of_torch_exist() -> None:
    """`needs_composition` stands on these; without them it would be silently wrong."""
    assert isinstance(forward_ad._current_level, int)
    assert torch._C._are_functorch_transforms_active() is False
    assert torch._C._functorch.get_interpreter_stack() is None
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append(backends.needs_composition(x))
        return x.sum()

    look(torch.ones(2))
    torch.vmap(look)(torch.ones(2, 2))
    func.grad(look)(torch.ones(2))
    torch.vmap(func.grad(look))(torch.ones(2, 2))
    func.jvp(look, (torch.ones(2),), (torch.ones(2),))
    with forward_ad.dual_level():
        look(torch.ones(2))
    func.grad(func.grad(look))(torch.ones(()))
    func.vjp(lambda x: func.jvp(look, (x,), (x,))[1], torch.ones(2))
    assert seen == [False, False, False, False, True, True, True, True]


class Stack(nn.Module):
    """Two bidirectional layers with resets, on the functional interface."""

    def __init__(self) -> None:
        super().__init__()
        weights = nn.GRU(5, 4, 2, bidirectional=True).parameters()
        self.weights = nn.ParameterList(weights)

    def forward(self, x: Tensor, reset_mask: Tensor) -> tuple[Tensor, Tensor]:
        params = list(self.weights)
        return functional.gru(
            x, None, params, num_layers=2, bidirectional=True, reset_mask=reset_mask
        )


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_counts_for_changing_sizes() -> None:
    """T and B change freely: one graph, and at most two more when they first do or are one."""
    model = Stack()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for T, B in ((6, 3), (7, 3), (8, 4), (9, 5), (13, 2), (2, 7), (11, 3)):
        x, mask = torch.randn(T, B, 5), torch.rand(T, B) < 0.3
        output, h_n = compiled(x, mask)
        truth, truth_h_n = model(x, mask)
        torch.testing.assert_close(output, truth)
        torch.testing.assert_close(h_n, truth_h_n)
        output.sum().backward()
    assert counter.frame_count <= 3


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_backward_for_changing_sizes() -> None:
    model = Stack()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for T, B in ((6, 3), (7, 4), (5, 2)):
        x, mask = torch.randn(T, B, 5), torch.rand(T, B) < 0.3
        results = []
        for run in (compiled, model):
            model.zero_grad()
            output, h_n = run(x, mask)
            (output.square().sum() + h_n.sum()).backward()
            results.append([p.grad for p in model.parameters()])
        torch.testing.assert_close(results[0], results[1])


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "nonstrict"])
def test_export_with_dynamic_sizes(strict: bool) -> None:
    model = Stack().eval()
    T, B = torch.export.Dim("T"), torch.export.Dim("B")
    sizes = {"x": {0: T, 1: B}, "reset_mask": {0: T, 1: B}}
    example = torch.randn(6, 3, 5), torch.rand(6, 3) < 0.3
    program = torch.export.export(model, example, dynamic_shapes=sizes, strict=strict)
    assert sum(n.target is ops.layer for n in program.graph.nodes) == 2
    for t, b in ((6, 3), (9, 2), (1, 1)):
        x, mask = torch.randn(t, b, 5), torch.rand(t, b) < 0.3
        torch.testing.assert_close(program.module()(x, mask), model(x, mask))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_autocast_on_the_cpu_keeps_float32(backend: str) -> None:
    theirs = nn.GRU(5, 4)
    x = torch.randn(6, 3, 5)

    def run(x: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return functional.gru(x, hx, theirs._flat_weights, backend=backend)

    plain, gradients = run(x), []
    for autocast in (False, True):
        theirs.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            output, h_n = run(x)
            assert output.dtype == h_n.dtype == torch.float32
            torch.testing.assert_close((output, h_n), plain, rtol=0, atol=0)
        output.square().sum().backward()
        gradients.append([p.grad for p in theirs.parameters()])
    assert_same(gradients[1], gradients[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for arguments in ((x.bfloat16(),), (x, torch.zeros(1, 3, 4).bfloat16())):
            ours, truth = run(*arguments), theirs(*arguments)
            for a, b in zip(ours, truth, strict=True):
                assert a.dtype == b.dtype
                torch.testing.assert_close(a, b, rtol=0, atol=0.02)
        state, mask = torch.randn(1, 3, 4).bfloat16(), torch.rand(6, 3) < 0.5
        for name, more in (("reset_state", {"reset_mask": mask}), ("h_scale", {})):
            ours = functional.gru(x, None, theirs._flat_weights, **{name: state}, **more)
            truth = functional.gru(x, None, theirs._flat_weights, **{name: state.float()}, **more)
            assert_same(ours, truth)
    with pytest.raises(RuntimeError, match="reset_state: expected the dtype of input"):
        functional.gru(x, None, theirs._flat_weights, reset_mask=mask, reset_state=state)
    with pytest.raises(ValueError, match="input: expected the dtype of the weights"):
        run(x.bfloat16())


def test_inference_mode_and_no_grad() -> None:
    case = CASES["everything"]
    layer, values = layer_of(case, functional.layer)
    truth = layer_of(case, reference.layer)[0](*values)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            out = layer(*[v.clone().requires_grad_() for v in values])
        assert not out.requires_grad
        assert_same(out.clone(), truth)


def test_functional_call_and_an_ensemble_of_modules() -> None:
    models = [nn.GRU(5, 4).double() for _ in range(3)]
    params, _ = func.stack_module_state(models)
    x = torch.randn(6, 2, 5, dtype=torch.float64)

    def one(p: dict[str, Tensor]) -> Tensor:
        return functional.gru(x, None, list(p.values()))[0]

    assert_same(torch.vmap(one)(params), torch.stack([m(x)[0] for m in models]))
