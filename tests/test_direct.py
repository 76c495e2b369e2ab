# SPDX-License-Identifier: Apache-2.0
"""Calls past the dispatcher: taken where they are plain and nobody looks, with the ops' bits."""

import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import gru_fast
from cases import CELLS
from direct_spy import DTYPES, Spy, assert_as_by_ops, assert_same

_C = pytest.importorskip("gru_fast._C", reason="gru_fast was built without its CPU kernels")

I, H = 5, 19  # noqa: E741


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [None, 1, 2, 3, 33])
@pytest.mark.parametrize("cell", CELLS)
def test_cell_is_bitwise_the_op(
    spy: Spy, isa: str, cell: str, batch: int | None, bias: bool, mode: Any
) -> None:
    module = gru_fast.GRUCell(I, H, bias, cell=cell)
    rows = () if batch is None else (batch,)
    with mode():
        x, h = torch.randn(*rows, I), torch.randn(*rows, H)
        assert_as_by_ops(lambda: module(x, h))
        assert_as_by_ops(lambda: module(x))
    assert spy.taken == 2


@pytest.mark.parametrize("steps", [1, 2, 9])
@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize("batch", [None, 1, 2, 3, 33])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_gru_is_bitwise_the_op(
    spy: Spy, isa: str, cell: str, both: bool, batch_first: bool, batch: int | None, layers: int,
    steps: int,
) -> None:  # fmt: skip
    rows = () if batch is None else (batch,)
    x = torch.randn(*((*rows[:1], steps, I) if batch_first else (steps, *rows, I)))
    h = torch.randn(layers * (1 + both), *rows, H)
    for bias in (True, False):
        module = gru_fast.GRU(I, H, layers, bias, batch_first, bidirectional=both, cell=cell)
        with torch.no_grad():
            assert_as_by_ops(lambda module=module: module(x, h))
            assert_as_by_ops(lambda module=module: module(x))
            x_before, h_before = x.clone(), h.clone()
            output, h_n = module(x, h)
        assert torch.equal(x, x_before) and torch.equal(h, h_before)
        assert output.data_ptr() != h_n.data_ptr()
    assert spy.taken == 6


@pytest.mark.parametrize("steps", [1, 2, 9])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("batch", [None, 1, 3, 33])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d is not torch.float32], ids=str)
@torch.no_grad()
def test_other_dtypes_have_the_bits_of_the_op(
    spy: Spy, isa: str, dtype: torch.dtype, cell: str, both: bool, batch: int | None, layers: int,
    steps: int,
) -> None:  # fmt: skip
    rows = () if batch is None else (batch,)
    module = gru_fast.GRU(I, H, layers, bidirectional=both, cell=cell, dtype=dtype)
    one = gru_fast.GRUCell(I, H, cell=cell, dtype=dtype)
    x = torch.randn(steps, *rows, I, dtype=dtype)
    h = torch.randn(layers * (1 + both), *rows, H, dtype=dtype)
    calls = (lambda: module(x, h), lambda: module(x), lambda: one(x[0], h[0]), lambda: one(x[0]))
    for call in calls:
        assert_as_by_ops(call)
    assert spy.taken == 4


@torch.no_grad()
def test_dtypes_that_differ_go_to_the_ops(spy: Spy) -> None:
    low = torch.bfloat16
    for module, x, h in (
        (torch.float32, low, low),
        (low, torch.float32, low),
        (low, low, torch.float32),
        (low, low, torch.float16),
        (torch.float16, low, low),
    ):
        gru, cell = gru_fast.GRU(I, H).to(module), gru_fast.GRUCell(I, H).to(module)
        inputs, state = torch.randn(1, 2, I).to(x), torch.randn(1, 2, H).to(h)
        assert_as_by_ops(lambda gru=gru, x=inputs, h=state: gru(x, h))
        assert_as_by_ops(lambda cell=cell, x=inputs, h=state: cell(x[0], h[0]))
    mixed = gru_fast.GRU(I, H).bfloat16()
    mixed.bias_hh_l0.data = mixed.bias_hh_l0.data.float()
    assert_as_by_ops(
        lambda: mixed(torch.zeros(1, 2, I, dtype=low), torch.zeros(1, 2, H, dtype=low))
    )
    assert spy.taken == 0


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("B", [1, 17])
@torch.no_grad()
def test_both_directions_of_many_units(spy: Spy, threads: int, B: int, steps: int) -> None:
    module = gru_fast.GRU(300, 270, 2, bidirectional=True)
    x, h = torch.randn(steps, B, 300), torch.randn(4, B, 270)
    assert_as_by_ops(lambda: module(x, h))
    assert spy.taken == 1


@pytest.mark.parametrize("both", [False, True])
@torch.no_grad()
def test_layers_with_dropout_between_them(spy: Spy, both: bool) -> None:
    """In training mode, but without gradients: one after the other."""
    module = gru_fast.GRU(I, H, 3, dropout=0.5, bidirectional=both)

    def call() -> Any:
        torch.manual_seed(0)
        return module(torch.randn(4, 2, I))

    assert_as_by_ops(call)
    assert spy.taken == 3


@pytest.mark.parametrize("B", [1, 2, 3])
@torch.no_grad()
def test_stepping_is_bitwise_the_whole_sequence_and_any_batch(
    spy: Spy, isa: str, B: int, threads: int
) -> None:
    module = gru_fast.GRU(300, 270, 2)
    x, start = torch.randn(6, B, 300), torch.randn(2, B, 270)
    output, h_n = module(x, start)
    state = start
    for t in range(6):
        step, state = module(x[t : t + 1], state)
        assert torch.equal(step[0], output[t])
    assert torch.equal(state, h_n)
    some, _ = module(x[:1, :1], start[:, :1].contiguous())
    assert torch.equal(some[0], output[0, :1])
    assert spy.taken == 8


class SeesOps(TorchDispatchMode):
    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class SeesFunctions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


CONTEXTS: dict[str, Callable[[], Any]] = {
    "dispatch mode": lambda: SeesOps([]),
    "function mode": SeesFunctions,
    "default device": lambda: torch.device("cpu"),
    "profiler": torch.profiler.profile,
    "profiler of autograd": torch.autograd.profiler.profile,
    "forward mode": torch.autograd.forward_ad.dual_level,
}


@pytest.mark.parametrize("name", CONTEXTS)
@torch.no_grad()
def test_whoever_looks_at_operators_gets_them(spy: Spy, name: str) -> None:
    gru, cell = gru_fast.GRU(I, H), gru_fast.GRUCell(I, H)
    x, h = torch.randn(1, 2, I), torch.randn(1, 2, H)
    expected = *gru(x, h), cell(x[0], h[0])
    assert spy.taken == 2
    with CONTEXTS[name]():
        given = *gru(x, h), cell(x[0], h[0])
    assert spy.taken == 2
    for a, b in zip(given, expected, strict=True):
        torch.testing.assert_close(a, b)


@torch.no_grad()
def test_modes_and_profilers_see_the_operator() -> None:
    module = gru_fast.GRUCell(I, H)
    x, h = torch.randn(2, I), torch.randn(2, H)
    seen: list[str] = []
    with SeesOps(seen):
        module(x, h)
    assert "gru_fast.layer.default" in seen
    with torch.profiler.profile() as profile:
        module(x, h)
    assert "gru_fast::layer" in {event.key for event in profile.key_averages()}


TRANSFORMS: dict[str, Callable[..., Callable[..., Tensor]]] = {
    "vmap": torch.func.vmap,
    "functionalize": torch.func.functionalize,
    "make_fx": lambda f: lambda x, h: make_fx(f)(x, h)(x, h),
    # Its check calls what was traced once more as it is.
    "trace": lambda f: lambda x, h: torch.jit.trace(f, (x, h), check_trace=False)(x, h),
    "jvp": lambda f: lambda x, h: torch.func.jvp(f, (x, h), (x, h))[0],
    "compile": lambda f: torch.compile(f, backend="eager", fullgraph=True),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", TRANSFORMS)
@torch.no_grad()
def test_transforms_and_tracers_get_the_operator(spy: Spy, name: str, fresh_compiler: None) -> None:
    module = gru_fast.GRUCell(I, H).requires_grad_(False)

    def call(x: Tensor, h: Tensor) -> Tensor:
        return module(x, h)

    x, h = torch.randn(2, I), torch.randn(2, H)
    assert_as_by_ops(lambda: TRANSFORMS[name](call)(x, h))
    assert spy.taken == 0


@torch.no_grad()
def test_inside_a_transform_also_what_is_not_transformed(spy: Spy) -> None:
    module = gru_fast.GRUCell(I, H)
    x, h = torch.randn(2, I), torch.randn(2, H)
    assert_as_by_ops(lambda: torch.func.functionalize(lambda a: a + module(x, h))(h))
    assert spy.taken == 0


@torch.no_grad()
def test_a_change_of_steps_compiles_no_more_often(fresh_compiler: None) -> None:
    frames = CompileCounter()
    module = torch.compile(gru_fast.GRU(I, H), backend=frames, fullgraph=True, dynamic=True)
    for T in (3, 4, 5):
        module(torch.randn(T, 2, I), torch.zeros(1, 2, H))
    assert frames.frame_count == 1


@pytest.mark.parametrize("hx", [Tensor.clone, nn.Parameter])
def test_states_that_are_plain(spy: Spy, hx: Callable[[Tensor], Tensor]) -> None:
    """A learnt state; a row of a sequence, whose first stride says nothing; autocast."""
    cell, gru = gru_fast.GRUCell(I, H), gru_fast.GRU(I, H, batch_first=True)
    x, h = torch.randn(1, 4, I), hx(torch.randn(1, 1, H))
    with torch.no_grad():
        assert_as_by_ops(lambda: gru(x[:, 2:3], h))
        with torch.autocast("cpu", torch.bfloat16):
            assert_as_by_ops(lambda: cell(x[:, 1], h[0]))
    assert spy.taken == 2


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, 2:3],
        lambda x: x[1::2],
        lambda x: x.transpose(0, 1),
        lambda x: x[:, :1].expand(-1, 3, -1),
        lambda x: x[:1].expand(4, -1, -1),
        lambda x: torch.cat((x, x), 2)[:, :, 1 : 1 + I],
    ],
    ids=["steps", "rows", "transposed", "one step", "one row", "columns"],
)
@pytest.mark.parametrize("batch_first", [False, True])
@torch.no_grad()
def test_rows_of_an_input_may_lie_as_they_like(
    spy: Spy, view: Callable[[Tensor], Tensor], batch_first: bool
) -> None:
    gru, cell = gru_fast.GRU(I, H, batch_first=batch_first), gru_fast.GRUCell(I, H)
    x = view(torch.randn(4, 5, I))
    h = torch.randn(1, x.shape[0 if batch_first else 1], H)
    assert_as_by_ops(lambda: gru(x, h))
    assert_as_by_ops(lambda: gru(x[0], h[:, 0]))
    assert_as_by_ops(lambda: cell(x[:, 0], torch.ones(len(x), H)))
    assert_as_by_ops(lambda: cell(x[0, 0], h[0, 0]))
    assert spy.taken == 4
    torch.testing.assert_close(gru(x, h), gru(x.contiguous(), h), rtol=0, atol=0)


@pytest.mark.parametrize(
    "view",
    [
        lambda h: h[:, :1].expand(-1, 3, -1),
        lambda h: h[:1].expand(2, -1, -1)[:, :3],
        lambda h: h.transpose(0, 1)[:2],
        lambda h: h[:, ::2],
        lambda h: torch.cat((h, h), 2)[:, :3, 1 : 1 + H],
    ],
    ids=["one row", "one layer", "transposed", "every other row", "columns"],
)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("both", [False, True])
@torch.no_grad()
def test_rows_of_a_state_may_lie_as_they_like(
    spy: Spy, view: Callable[[Tensor], Tensor], both: bool, batch_first: bool
) -> None:
    gru = gru_fast.GRU(I, H, 1 if both else 2, batch_first=batch_first, bidirectional=both)
    cell = gru_fast.GRUCell(I, H)
    h = view(torch.randn(2, 5, H))
    B = h.shape[1]
    for steps in (1, 4):
        x = torch.randn(*((B, steps, I) if batch_first else (steps, B, I)))
        assert_as_by_ops(lambda x=x: gru(x, h))
        assert_as_by_ops(lambda x=x: gru(x[:, 0], h[:, -1]))
    assert_as_by_ops(lambda: cell(torch.ones(B, I), h[1]))
    assert_as_by_ops(lambda: cell(torch.ones(I), h[0, 0]))
    assert spy.taken == 6
    torch.testing.assert_close(gru(x, h), gru(x, h.contiguous()), rtol=0, atol=0)


def surrounded(tensor: Tensor) -> Tensor:
    """A copy with NaN on both sides, which a read out of bounds would bring in."""
    memory = torch.full((tensor.numel() + 128,), torch.nan, dtype=tensor.dtype)
    inner = memory[61 : 61 + tensor.numel()].view(tensor.shape)
    return inner.copy_(tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("B", [1, 2, 3, 9])
@pytest.mark.parametrize("cell", CELLS)
@torch.no_grad()
def test_nothing_is_read_beside_the_tensors(
    spy: Spy, isa: str, poisoned_memory: None, cell: str, B: int, both: bool, layers: int,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    module = gru_fast.GRU(I, H, layers, bidirectional=both, cell=cell).to(dtype)
    x = torch.randn(1, B, I).to(dtype)
    h = torch.randn(layers * (1 + both), B, H).to(dtype)
    expected = module(x, h)
    for parameter in module.parameters():
        parameter.data = surrounded(parameter.data)
    assert_same(module(surrounded(x), surrounded(h)), expected)
    assert not any(t.isnan().any() for t in expected)
    assert spy.taken == 2


def test_python_threads_step_beside_each_other() -> None:
    modules = [gru_fast.GRUCell(I, H) for _ in range(4)]
    x, start = torch.randn(3, I), torch.randn(3, H)
    results: dict[int, Tensor] = {}

    @torch.no_grad()
    def run(k: int) -> None:
        h = start
        for _ in range(500):
            h = modules[k](x, h)
        results[k] = h

    threads = [threading.Thread(target=run, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = dict(results)
    for k in range(4):
        run(k)
        assert torch.equal(together[k], results[k])


def test_without_the_exchange_api_the_ops_take_it() -> None:
    code = """if True:
        import torch
        del torch.Tensor.__dlpack_c_exchange_api__
        import gru_fast
        from gru_fast import _C, direct
        assert direct.native is None
        x, h = torch.zeros(2, 3), torch.zeros(2, 4)
        rest = (None, True, False, False, None, None, None, 1, "reset_after", False)
        assert _C.run_direct(x, h, [], *rest) is None
        assert _C.prepack(torch.zeros(12, 4), "reset_after", True, 1) is None
        with torch.no_grad():
            print(gru_fast.GRUCell(3, 4)(torch.zeros(2, 3), torch.zeros(2, 4)).shape)
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "torch.Size([2, 4])"
