# SPDX-License-Identifier: Apache-2.0
"""CUDA calls past the dispatcher and past `functional`, on CPU tensors that claim to be on CUDA."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import gru_fast
from cases import Case, layer_inputs
from gru_fast import (
    GRU,
    GRUCell,
    cudnn,
    direct,
    direct_gpu,
    functional,
    kernels,
    ops,
    ops_past,
    reference,
)
from repository_tools import load

providers_kernels = load("benchmarks.providers_kernels")
Layer = load("benchmarks.providers_gru_fast").Layer
Problem = load("benchmarks.problem").Problem
Sizes = load("benchmarks.cases").Case


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors claim to be on CUDA, where no layer takes cuDNN."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(direct, "native", lambda *args: None)
    monkeypatch.setattr(direct_gpu, "route_of_inference", lambda *args: "ops")


@pytest.fixture
def past(monkeypatch: pytest.MonkeyPatch, on_cuda: None) -> list[str]:
    """Names of the ops whose CUDA kernel was called past the dispatcher; the reference runs."""
    called: list[str] = []

    def spy(name: str) -> Callable[..., Any]:
        def kernel(*args: Any) -> tuple[Tensor, ...]:
            called.append(name)
            return ops._reference_kernel(name)(*args)

        return kernel

    names = ("layer", "scan", "layer_backward", "scan_backward")
    monkeypatch.setattr(ops, "_cuda_kernels", {getattr(ops, name): spy(name) for name in names})
    monkeypatch.setattr(ops, "layer_of_fitting", spy("layer"))
    return called


def arguments() -> list[Any]:
    return list(layer_inputs(Case("reset_after", "everything"), torch.float32).arguments())


def test_inference(past):
    given = arguments()
    with torch.no_grad():
        outputs = ops.without_grad(ops.layer, *given)
    assert past == ["layer"]
    torch.testing.assert_close(outputs, reference.layer(*given))


def test_training(past):
    module = GRU(4, 5, 2, bidirectional=True)
    x = torch.randn(6, 3, 4, requires_grad=True)
    leaves = [x, *module.parameters()]
    ours = torch.autograd.grad(module(x)[0].square().sum(), leaves)
    assert past == ["layer"] * 2 + ["layer_backward"] * 2
    module.backend = "reference"
    theirs = torch.autograd.grad(module(x)[0].square().sum(), leaves)
    torch.testing.assert_close(ours, theirs)


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, value)
        yield


class Subclass(Tensor):
    pass


WATCHED = {
    "nothing": nullcontext,
    "mode": Mode,
    "profiler": torch.profiler.profile,
    "forward-mode": forward_ad.dual_level,
    "autocast": lambda: replaced(torch, "is_autocast_enabled", lambda device: True),
    "dynamo": lambda: replaced(ops_past, "_callback", lambda: False),
    "unknown": lambda: replaced(ops_past, "_callback", None),
}


@pytest.mark.parametrize("by", WATCHED)
def test_who_watches_sees_the_operator(past, by):
    given = arguments()
    with torch.no_grad(), WATCHED[by]():
        ops.without_grad(ops.layer, *given)
    assert past == (["layer"] if by == "nothing" else [])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.as_subclass(Subclass),
        torch._neg_view,
        lambda t: torch._efficientzerotensor(t.shape),
        lambda t: t.to_sparse(),
        lambda t: torch.nested.nested_tensor(list(t)),
    ],
    ids=["subclass", "negated", "zero", "sparse", "nested"],
)
def test_tensors_that_only_the_dispatcher_knows(change):
    plain = torch.ones(2, 3)
    with replaced(torch.Tensor, "is_cuda", True):
        assert ops_past.are_plain_cuda(
            (None, "cell", plain, [False], True, torch.nn.Parameter(plain))
        )
        assert not ops_past.are_plain_cuda((plain, change(plain)))
        assert not ops_past.are_plain_cuda((plain, 1.5))
    assert not ops_past.are_plain_cuda((plain,))


@pytest.fixture
def through_functional(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Has an element for each call that `functional` hands to a stack of layers."""
    calls: list[int] = []
    run_layers = functional.run_layers

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return run_layers(*args, **kwargs)

    monkeypatch.setattr(functional, "run_layers", spy)
    return calls


@pytest.mark.parametrize("given", [True, False], ids=["hx", "zeros"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layers", [1, 3])
def test_the_short_way(past, through_functional, layers, bias, batch_first, given):
    module = GRU(4, 5, layers, bias, batch_first)
    x, hx = torch.randn(6, 3, 4), None
    B = 6 if batch_first else 3
    if given:
        hx = torch.randn(layers, B, 5)
    with torch.no_grad():
        ours = module(x, hx)
    assert past == ["layer"] * layers and not through_functional
    theirs = module(x, hx)
    assert through_functional
    torch.testing.assert_close(ours, theirs)
    assert [t.shape for t in ours] == [t.shape for t in theirs]


@pytest.mark.parametrize("given", [True, False], ids=["hx", "zeros"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_short_way_of_a_cell(past, monkeypatch, bias, given):
    cell = GRUCell(4, 5, bias)
    x, hx = torch.randn(3, 4), torch.randn(3, 5) if given else None
    theirs = cell(x, hx)
    with torch.no_grad():
        row = cell(x[0], None if hx is None else hx[0])
        del past[:]
        monkeypatch.setattr(functional, "gru_cell", None)
        ours = cell(x, hx)
    assert past == ["layer"]
    torch.testing.assert_close(ours, theirs.detach())
    torch.testing.assert_close(row, theirs[0].detach())
    ours.detach_()  # not a view


@pytest.mark.parametrize("module", [GRU(4, 5), GRUCell(4, 5)], ids=["layer", "cell"])
class TestWithoutCPUKernels:
    """As they are missing from a package that was built for CUDA alone."""

    @pytest.fixture(autouse=True)
    def none_built(self, past, monkeypatch):
        monkeypatch.setattr(direct, "native", None)

    def test_the_short_way(self, past, monkeypatch, module):
        x = torch.randn(3, 3, 4) if isinstance(module, GRU) else torch.randn(3, 4)
        theirs = module(x)
        del past[:]
        monkeypatch.setattr(functional, "run_layers", None)
        monkeypatch.setattr(functional, "gru_cell", None)
        with torch.no_grad():
            ours = module(x)
        assert past == ["layer"]
        torch.testing.assert_close(ours, theirs)

    def test_turned_off(self, past, monkeypatch, module):
        monkeypatch.setattr(direct_gpu, "gru", None)
        x = torch.randn(3, 3, 4) if isinstance(module, GRU) else torch.randn(3, 4)
        with torch.no_grad(), direct.turned_off():
            module(x)

    def test_on_the_cpu(self, past, monkeypatch, module):
        """A packed sequence has its own way there."""
        monkeypatch.setattr(torch.Tensor, "is_cuda", False)
        x = torch.randn(3, 3, 4) if isinstance(module, GRU) else torch.randn(3, 4)
        if isinstance(module, GRU):
            x = pack_padded_sequence(x, torch.tensor([3, 2, 1]))
        with torch.no_grad():
            module(x)
        assert not past


@pytest.mark.parametrize(
    "module",
    [
        GRU(4, 5, bidirectional=True), GRU(4, 6, num_heads=2),
        GRU(4, 5, 2, dropout=0.5), GRU(4, 5, recurrent_dropout=0.5),
    ],
    ids=["directions", "heads", "dropout", "recurrent"],
)  # fmt: skip
def test_what_has_more_to_do_goes_the_long_way(past, through_functional, module):
    with torch.no_grad():
        module(torch.randn(6, 3, 4))
    assert through_functional


@pytest.mark.parametrize("by", WATCHED)
def test_who_watches_gets_the_long_way(past, through_functional, by):
    with torch.no_grad(), WATCHED[by]():
        GRU(4, 5)(torch.randn(6, 3, 4))
    assert len(through_functional) == (by != "nothing")


def test_a_weight_of_a_subclass_goes_the_long_way(past, through_functional):
    module = GRU(4, 5)
    module.weight_hh_l0 = torch.nn.Parameter(module.weight_hh_l0.detach().as_subclass(Subclass))
    with torch.no_grad():
        module(torch.randn(6, 3, 4))
    assert through_functional


@pytest.mark.parametrize("elsewhere", [(15,), (15, 5), (1, 3, 5)], ids=["bias", "weight", "hx"])
def test_what_is_on_another_device_goes_the_long_way(
    past, through_functional, monkeypatch, elsewhere
):
    devices = {True: -2, False: -1}
    monkeypatch.setattr(torch.Tensor, "get_device", lambda self: devices[self.shape == elsewhere])
    with torch.no_grad():
        GRU(4, 5)(torch.randn(6, 3, 4), torch.randn(1, 3, 5))
    assert through_functional


def test_what_the_reference_takes_goes_the_long_way(past, through_functional, monkeypatch):
    monkeypatch.setattr(direct_gpu, "route_of_inference", lambda *args: "reference")
    with torch.no_grad():
        GRU(4, 5)(torch.randn(6, 3, 4))
    assert through_functional


def errors(make: Callable[[], Any], call: Callable[[Any], Any]) -> list[tuple[type, str]]:
    """What is said of a wrong call: by the long way, which gradients take, and by the short one."""
    said = []
    for grad in (True, False):
        module = make()
        with torch.set_grad_enabled(grad), pytest.raises(Exception) as caught:
            call(module)
        said.append((caught.type, str(caught.value)))
    return said


def wrong_of_cell() -> dict[str, Callable[[GRUCell], Any]]:
    x = torch.randn(3, 4)
    return {
        "width": lambda c: c(x[..., :3]),
        "dtype": lambda c: c(x.double()),
        "axes": lambda c: c(x[None]),
        "state": lambda c: c(x, torch.zeros(2, 5)),
        "state axes": lambda c: c(x, torch.zeros(5)),
        "state dtype": lambda c: c(x, torch.zeros(3, 5).double()),
        "state type": lambda c: c(x, 1.5),
        "weight": lambda c: (setattr(c, "weight_hh", None), c(x)),
        "weight shape": lambda c: (setattr(c, "weight_hh", c.weight_ih), c(x)),
    }


@pytest.mark.parametrize("name", wrong_of_cell())
def test_what_is_wrong_with_a_cell_is_said_by_the_same_error(past, name):
    long_way, short_way = errors(lambda: GRUCell(4, 5), wrong_of_cell()[name])
    assert long_way == short_way


def wrong() -> dict[str, Callable[[GRU], Any]]:
    x = torch.randn(6, 3, 4)
    return {
        "width": lambda m: m(x[..., :3]),
        "dtype": lambda m: m(x.double()),
        "axes": lambda m: m(x[None]),
        "state": lambda m: m(x, torch.zeros(2, 2, 5)),
        "state axes": lambda m: m(x, torch.zeros(3, 5)),
        "state dtype": lambda m: m(x, torch.zeros(2, 3, 5).double()),
        "no tensor": lambda m: m([1.0]),
        "weight": lambda m: (setattr(m, "weight_hh_l0", None), m(x)),
        "later weight": lambda m: (setattr(m, "weight_ih_l1", m.weight_ih_l0), m(x)),
    }


@pytest.mark.parametrize("name", wrong())
def test_what_is_wrong_is_said_by_the_same_error(past, name):
    long_way, short_way = errors(lambda: GRU(4, 5, 2), wrong()[name])
    assert long_way == short_way


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layers", [1, 3])
def test_the_short_way_to_cudnn(past, through_functional, monkeypatch, layers, bias):
    """PyTorch's CPU recurrence stands in for cuDNN: it takes the same list of weights."""
    calls = []

    def stand_in(x, weights, stride, buffer, h0, c0, mode, H, P, count, first, p, train, both, *_):
        assert (stride, H, count, first, train, both) == (len(weights), 5, 1, False, False, False)
        calls.append(h0.is_contiguous())
        return *torch._VF.gru(x, h0, weights, bias, 1, 0.0, False, False, False), None, None, None

    monkeypatch.setattr(torch, "_cudnn_rnn", stand_in)
    monkeypatch.setattr(cudnn, "_weights_in_one_block", lambda *args: None)
    monkeypatch.setattr(direct_gpu, "route_of_inference", lambda *args: "cudnn")
    module = GRU(4, 5, layers, bias)
    x, hx = torch.randn(6, 3, 4), torch.randn(layers, 3, 10)[..., ::2]
    with torch.no_grad():
        ours = module(x, hx)
    assert calls == [True] * layers and not past and not through_functional
    torch.testing.assert_close(ours, module(x, hx))


@pytest.mark.parametrize("suite", ["infer", "train"])
def test_the_benchmarks_hold_each_call_to_the_kernel_they_name(on_cuda, monkeypatch, suite):
    """Such calls reach no operator that another function could serve."""
    held = []

    def spy(name: str) -> Callable[..., Any]:
        def function(*args: Any, kernel: str | None = None) -> tuple[Tensor, ...]:
            held.append((name, kernel))
            return ops._reference_kernel(name)(*args)

        return function

    for name in providers_kernels.OPERATORS:
        monkeypatch.setattr(kernels, name, spy(name))
    monkeypatch.setattr(ops, "cuda_functions", {})
    # On a CPU no backend by name reaches an operator.
    monkeypatch.setattr(gru_fast, "GRU", lambda *args, device, backend, **rest: GRU(*args, **rest))
    problem = Problem(Sizes(4, 5, 2, 3), suite, "float32", "cpu")
    plain = Layer("auto").prepare(problem, 1)
    expected = plain.results(plain.call())
    object.__setattr__(problem, "device", "cuda")
    held.clear()
    prepared = providers_kernels.Kernel("grid").prepare(problem, 1)
    found = prepared.results(prepared.call())
    names = ["layer", "layer_backward"] if suite == "train" else ["layer"]
    assert held == [(name, "grid") for name in names]
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name])
