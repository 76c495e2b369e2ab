# SPDX-License-Identifier: Apache-2.0
"""Training past torch.library's wrapper of autograd: the same numbers, where nothing looks."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import pack_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import gru_fast
from cases import CELLS, Case, layer_inputs
from gru_fast import ops, recurrence
from op_calls import run, scan_arguments

MAKE = {"layer": lambda inputs: inputs.arguments(), "scan": scan_arguments}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("name", MAKE)
def test_same_bits_as_the_operator(name: str, cell: str, recompute: bool) -> None:
    inputs = layer_inputs(Case(cell, "everything", (True, False)), torch.float32, grad=True)
    arguments = [*MAKE[name](inputs)[:-1], recompute]
    with torch.no_grad():
        grads = [torch.randn_like(t) for t in getattr(ops, name)(*arguments)[:2]]
    ours = run(getattr(ops, f"eager_{name}"), arguments, grads)
    expected = run(getattr(ops, name), arguments, grads)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("recompute", [False, True])
def test_first_and_second_derivatives(recompute: bool) -> None:
    case = Case("reset_after", "everything", (False, True), T=3, B=2, H=3, I=2)
    inputs = layer_inputs(case, grad=True)
    leaves = list(inputs.leaves().values())
    arguments = [*inputs.arguments()[:-1], recompute]
    places = [next(i for i, a in enumerate(arguments) if a is leaf) for leaf in leaves]

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = list(arguments)
        for place, tensor in zip(places, tensors, strict=True):
            given[place] = tensor
        return ops.eager_layer(*given)[:2]

    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What trained calls go through, in order."""
    calls: list[str] = []

    def spy(name: str) -> Callable:
        function = getattr(ops, name)

        def called(*args):
            calls.append(name)
            return function(*args)

        return called

    for name in ("eager_layer", "eager_scan", "layer", "scan"):
        monkeypatch.setattr(ops, name, spy(name))
    yield calls


class TestWhoIsServed:
    @staticmethod
    def train(module: gru_fast.GRU) -> None:
        module(torch.randn(3, 2, 4))[0].sum().backward()

    def test_a_plain_training_step(self, taken: list[str]) -> None:
        self.train(gru_fast.GRU(4, 5, num_layers=2, recompute=True))
        gates_x, h0, weight = torch.randn(3, 2, 1, 15), torch.zeros(1, 2, 5), torch.randn(1, 15, 5)
        recurrence.scan(gates_x.requires_grad_(), h0, weight)
        assert taken == ["eager_layer"] * 2 + ["eager_scan"]

    def test_not_under_a_mode(self, taken: list[str]) -> None:
        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                seen.append(str(function))
                return function(*args, **(kwargs or {}))

        seen: list[str] = []
        module = gru_fast.GRU(4, 5, recompute=True)
        with Mode():
            self.train(module)
        assert taken == ["layer"]
        assert "gru_fast.layer.default" in seen and "gru_fast.layer_backward.default" in seen

    def test_not_under_a_transform(self, taken: list[str]) -> None:
        module = gru_fast.GRU(4, 5)
        torch.vmap(lambda x: module(x)[0])(torch.randn(2, 3, 2, 4))
        assert set(taken) == {"layer"}

    def test_not_while_compiling(self, taken: list[str], fresh_compiler: None) -> None:
        module = gru_fast.GRU(4, 5)
        torch.compile(module, fullgraph=True, backend="aot_eager")(torch.randn(3, 2, 4))
        assert "eager_layer" not in taken

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_saved_tensors_can_be_taken_elsewhere(
        self, taken: list[str], dtype: torch.dtype
    ) -> None:
        packed = []
        module = gru_fast.GRU(4, 5, dtype=dtype)

        def pack(t: Tensor) -> Tensor:
            packed.append(tuple(t.shape))
            return t.clone()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            output, _ = module(torch.randn(3, 2, 4, dtype=dtype))
        assert (3, 2, 1, 20) in packed
        assert taken == ([] if dtype is torch.float32 else ["eager_layer"])  # [] where it is direct
        output.sum().backward()
        assert module.weight_hh_l0.grad is not None

    def test_what_backward_needs_is_watched(self) -> None:
        module = gru_fast.GRU(4, 5)
        output, _ = module(torch.randn(3, 2, 4))
        with torch.no_grad():
            module.weight_hh_l0.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


class TestOneStepMayBeChanged:
    """Backward of a single step does not read its output, so it may be changed in place."""

    @pytest.mark.parametrize("recompute", [False, True])
    @pytest.mark.parametrize("cell", ["reset_after", "reset_before", "no_reset"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_gradients_do_not_depend_on_it(self, cell: str, recompute: bool, dtype) -> None:
        module = gru_fast.GRU(
            4, 5, 2, bidirectional=True, cell=cell, recompute=recompute, dtype=dtype
        )
        self.check(module, dtype)

    @pytest.mark.parametrize("recompute", [False, True])
    def test_layer_norm(self, recompute: bool) -> None:
        self.check(gru_fast.LayerNormGRU(4, 5, recompute=recompute), torch.float32)

    def check(self, module: nn.Module, dtype: torch.dtype) -> None:
        x = torch.randn(1, 3, 4, dtype=dtype)
        mask = torch.tensor([[True, False, False]])
        lengths = torch.tensor([1, 1, 0])
        grads = []
        for spoil in (False, True):
            output, h_n = module(x, lengths=lengths, reset_mask=mask)
            total = output.sum() + 2 * h_n.sum()
            if spoil:
                output.fill_(torch.nan)
            grads.append(torch.autograd.grad(total, list(module.parameters())))
        torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)

    @pytest.mark.parametrize("bidirectional", [False, True])
    def test_packed_rows(self, bidirectional: bool) -> None:
        torch.manual_seed(0)
        theirs = nn.GRU(4, 5, 2, bidirectional=bidirectional)
        ours = gru_fast.GRU(4, 5, 2, bidirectional=bidirectional)
        ours.load_state_dict(theirs.state_dict())
        packed = pack_sequence([torch.randn(1, 4) for _ in range(3)])
        grads = []
        for module in (ours, theirs):
            rows = module(packed)[0].data
            rows.mul_(2)
            grads.append(torch.autograd.grad(rows.square().sum(), list(module.parameters())))
        torch.testing.assert_close(*grads)

    def test_a_state_that_is_reset_in_place(self) -> None:
        torch.manual_seed(0)
        ours, theirs = gru_fast.GRUCell(4, 5), nn.GRUCell(4, 5)
        theirs.load_state_dict(ours.state_dict())
        x, done = torch.randn(6, 3, 4), torch.rand(6, 3) < 0.4
        grads = []
        for module in (ours, theirs):
            h, total = torch.zeros(3, 5), torch.zeros(())
            for step in range(6):
                h = module(x[step], h)
                h[done[step]] = 0
                total = total + h.square().sum()
            (first,) = torch.autograd.grad(total, module.weight_hh, create_graph=True)
            first.square().sum().backward()
            grads.append([first, *(p.grad for p in module.parameters())])
        torch.testing.assert_close(grads[0], grads[1])

    def test_compiled(self, fresh_compiler: None) -> None:
        cell = gru_fast.GRUCell(4, 5)
        x, done = torch.randn(2, 3, 4), torch.tensor([[True, False, False], [False, True, False]])

        def loss(x: Tensor) -> Tensor:
            h = torch.zeros(3, 5)
            for step in range(2):
                h = cell(x[step], h)
                h[done[step]] = 0
            return h.square().sum()

        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        (expected,) = torch.autograd.grad(loss(x), cell.weight_hh)
        (found,) = torch.autograd.grad(compiled(x), cell.weight_hh)
        torch.testing.assert_close(found, expected)
