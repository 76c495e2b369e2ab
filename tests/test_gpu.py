# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show: `pytest -m gpu`, alone or on several processes."""

import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import gru_fast
from cases import CELLS, Case, LayerInputs, layer_inputs
from gru_fast import reference
from helpers import assert_parity
from repository_tools import load
from triton_support.outcome import RESULTS, outcome

if not torch.cuda.is_available():
    pytest.skip("there is no GPU here", allow_module_level=True)

pytest.importorskip("triton")

from gru_fast import kernels  # where triton is, a package without them is an error

pytestmark = pytest.mark.gpu

KERNELS = tuple(kernels.KERNELS)
float32_as = load("benchmarks.precision").float32_as
NUMBERS = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
HIDDEN = {"cta": (32, 50, 64), "grid": (256, 200), "step": (72,)}
"""Sizes that a kernel takes in every dtype: for `grid` one on chip and one that is not."""


ROUNDING = {"tf32": 2.0**-10, "float32": 2.0**-21}
"""What a product with float32 rounds its operands by: to TF32, or to the sum of two TF32 values."""


def on_gpu(inputs: LayerInputs) -> LayerInputs:
    moved = {
        f.name: value.cuda()
        for f in fields(inputs)
        if isinstance(value := getattr(inputs, f.name), Tensor)
    }
    return replace(inputs, **moved)


def check(kernel: str, case: Case, numbers: str, recompute: bool = False, draws: int = 2) -> None:
    """Forward and every gradient against the reference on the same GPU, by the parity rule."""
    dtype = NUMBERS[numbers]
    collected: list[dict[str, list[Tensor]]] = [{}, {}, {}]
    specification = (reference.layer, reference.layer_backward)
    for draw in range(draws):
        inputs = on_gpu(layer_inputs(case, dtype, draw=draw))
        with float32_as(numbers):
            mine = outcome(
                partial(kernels.layer, kernel=kernel),
                partial(kernels.layer_backward, kernel=kernel),
                inputs, dtype, recompute,
            )  # fmt: skip
            expected = outcome(*specification, inputs, dtype, recompute)
        truth = outcome(*specification, inputs, torch.float64, recompute)
        for values, found in zip((mine, expected, truth), collected, strict=True):
            for name, value in values.items():
                found.setdefault(name, []).append(value)
    for name in RESULTS:
        assert_parity(name, *(found[name] for found in collected), rounding=ROUNDING.get(numbers))


def call_of(module: nn.Module, *inputs: Tensor) -> Callable[[], list[Tensor]]:
    """Results and gradients of every parameter."""

    def call() -> list[Tensor]:
        output, h_n = module(*inputs)
        loss = (output.float() * 0.1).sum() + h_n.float().square().sum()
        return [output, h_n, *torch.autograd.grad(loss, list(module.parameters()))]

    return call


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b), float((a.float() - b.float()).abs().max())


def make(H, **options):
    torch.manual_seed(0)
    like = {"device": "cuda", "dtype": torch.bfloat16}
    module = gru_fast.GRU(48, H, backend="triton", **like, **options)
    return module, torch.randn(12, 20, 48, **like), torch.randn(1, 20, H, **like)


EACH_KERNEL = pytest.mark.parametrize("H", [64, 256, 1600])
"""For `backend="triton"`, a size of each: `cta`, `grid` on chip, `grid` from L2."""


@EACH_KERNEL
class TestModule:
    def test_runs_repeat_bit_by_bit(self, H):
        call = call_of(*make(H))
        assert_same(call(), call())

    def test_deterministic_algorithms(self, H):
        call = call_of(*make(H))
        expected = call()
        torch.use_deterministic_algorithms(True)
        try:
            assert_same(call(), expected)
        finally:
            torch.use_deterministic_algorithms(False)

    def test_inside_a_cuda_graph(self, H):
        module, x, h0 = make(H)
        with torch.no_grad():
            expected = list(module(x, h0))
            torch.cuda.synchronize()  # the other stream would not wait for what is made here
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                module(x, h0)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                found = list(module(x, h0))
        for t in found:
            t.zero_()
        graph.replay()
        assert_same(found, expected)

    def test_a_training_step_inside_a_cuda_graph(self, H):
        call = call_of(*make(H))
        torch.cuda.synchronize()  # the other stream would not wait for what is made here
        # Away from the default stream, and no graph of autograd's left over from it.
        with torch.cuda.stream(torch.cuda.Stream()):
            expected = [t.detach() for t in call()]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = call()
        for t in found:
            t.zero_()
        graph.replay()
        assert_same(found, expected)

    @pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
    def test_compiled_whole(self, H, mode, fresh_compiler):
        module, x, h0 = make(H)
        expected = call_of(module, x, h0)()
        compiled = torch.compile(module, fullgraph=True, mode=mode)

        def call():
            output, h_n = compiled(x, h0)
            loss = (output.float() * 0.1).sum() + h_n.float().square().sum()
            gradients = torch.autograd.grad(loss, list(module.parameters()))
            return [t.clone() for t in (output, h_n, *gradients)]

        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*may not alias.*")
            for _ in range(3):
                found = call()
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=2**-6, atol=2**-6 * float(b.abs().max()))

    def test_long_runs_repeat(self, H):
        """A barrier that lets a program through too early shows as a run that differs."""
        module, x, h0 = make(H)
        with torch.no_grad():
            x = x.repeat(200 if H == 1600 else 1600, 1, 1)
            runs = [module(x, h0) for _ in range(4)]
        for output, h_n in runs[1:]:
            assert torch.equal(output, runs[0][0]) and torch.equal(h_n, runs[0][1])


class TestCuDNN:
    """What "auto" hands to cuDNN."""

    @pytest.mark.parametrize("moved", [False, True], ids=["", "weights apart"])
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("sizes", [(16, 24), (3, 5)], ids=str)
    @pytest.mark.parametrize("bidirectional", [False, True])
    def test_same_numbers_as_nn_gru(self, bidirectional, sizes, bias, moved):
        torch.manual_seed(0)
        same = {"num_layers": 2, "bias": bias, "bidirectional": bidirectional, "device": "cuda"}
        theirs = nn.GRU(*sizes, **same)
        ours = gru_fast.GRU(*sizes, **same, backend="cudnn")
        ours.load_state_dict(theirs.state_dict())
        if moved:
            for parameter in ours.parameters():
                parameter.data = parameter.data.clone()
        x = torch.randn(7, 5, sizes[0], device="cuda")
        with float32_as("float32"):
            with torch.no_grad():
                torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
            for a, b in zip(call_of(ours, x)(), call_of(theirs, x)(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("shape", [(7, 5, 16), (0, 5, 16), (7, 0, 16)], ids=str)
    def test_other_dtypes_and_nothing_to_compute(self, shape, dtype):
        module = gru_fast.GRU(16, 24, device="cuda", dtype=dtype)
        x = torch.randn(shape, device="cuda", dtype=dtype)
        output, h_n = module(x)
        module.backend = "reference"
        expected = module(x)
        torch.testing.assert_close((output, h_n), expected, rtol=0.02, atol=0.02)

    @pytest.mark.parametrize("backend", ["auto", "cudnn"])
    def test_backward_in_eval(self, backend):
        module = gru_fast.GRU(16, 24, device="cuda", backend=backend).eval()
        module(torch.randn(7, 5, 16, device="cuda"))[0].sum().backward()
        assert module.weight_hh_l0.grad is not None

    def test_weights_lie_where_cudnn_takes_them(self):
        """torch warns where they have to be copied at every call."""
        module = gru_fast.GRU(16, 24, num_layers=2, device="cuda", backend="cudnn")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            module(torch.randn(7, 5, 16, device="cuda"))[0].sum().backward()

    def test_states_of_any_strides(self):
        """PyTorch's operator takes contiguous ones only; a learned state is expanded."""
        module = gru_fast.GRU(16, 24, num_layers=2, device="cuda", backend="cudnn", learn_h0=True)
        x = torch.randn(7, 5, 16, device="cuda")
        module(x)[0].sum().backward()
        assert module.h0.grad is not None
        hx = torch.randn(5, 2, 24, device="cuda").transpose(0, 1)
        torch.testing.assert_close(module(x, hx), module(x, hx.contiguous()))

    def test_switched_off(self):
        """As PyTorch's error for a second derivative asks for."""
        module = gru_fast.GRU(16, 24, device="cuda")
        x = torch.randn(7, 5, 16, device="cuda", requires_grad=True)
        with torch.backends.cudnn.flags(enabled=False):
            (gradient,) = torch.autograd.grad(module(x)[0].sum(), x, create_graph=True)
        gradient.square().sum().backward()
        assert module.weight_hh_l0.grad is not None

    def test_compiled_whole(self, fresh_compiler):
        module = gru_fast.GRU(16, 24, device="cuda")
        x = torch.randn(7, 5, 16, device="cuda")
        found = torch.compile(module, fullgraph=True)(x)[0]
        torch.testing.assert_close(found, module(x)[0], rtol=1e-2, atol=1e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="it takes two GPUs")
@pytest.mark.parametrize("backend", ["auto", "triton", "cudnn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_another_device_than_the_current_one(backend, dtype):
    here = gru_fast.GRU(16, 24, num_layers=2, device="cuda:0", dtype=dtype, backend=backend)
    there = gru_fast.GRU(16, 24, num_layers=2, device="cuda:1", dtype=dtype, backend=backend)
    there.load_state_dict(here.state_dict())
    x = torch.randn(7, 5, 16, device="cuda:0", dtype=dtype)
    for a, b in zip(call_of(here, x)(), call_of(there, x.to("cuda:1"))(), strict=True):
        assert b.device.index == 1
        torch.testing.assert_close(b.to("cuda:0"), a, rtol=1e-2, atol=1e-2)
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("backend", ["auto", "triton", "cudnn", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_the_dtype_asked_for(backend, dtype):
    """nn.GRU takes float16 for any."""
    x = torch.randn(7, 5, 16, device="cuda")
    theirs = nn.GRU(16, 24, device="cuda")
    ours = gru_fast.GRU(16, 24, device="cuda", backend=backend)
    ours.load_state_dict(theirs.state_dict())
    with torch.autocast("cuda", dtype):
        expected, found = theirs(x), ours(x)
    assert [t.dtype for t in found] == [dtype, dtype]
    torch.testing.assert_close(found[0].float(), expected[0].float(), rtol=0.05, atol=0.05)
    (found[0].float().sum() + found[1].float().sum()).backward()
    assert ours.weight_hh_l0.grad.dtype == torch.float32


def test_one_step_is_one_launch():
    cell = gru_fast.GRUCell(32, 64, device="cuda", dtype=torch.bfloat16, backend="triton")
    x, h = (torch.randn(8, n, device="cuda", dtype=torch.bfloat16) for n in (32, 64))
    with torch.no_grad():
        cell(x, h)
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            cell(x, h)
            torch.cuda.synchronize()
    names = [event.name for event in profile.events()]
    assert sum("forward_step" in name for name in names) == 1
    assert len([n for n in names if "Memcpy" in n or "Memset" in n]) == 0


def test_memory_of_a_training_step():
    """Input, output, workspace; in backward their gradients, what entered, the rows: 13H a step."""
    T, B, H = 512, 256, 128
    like = {"device": "cuda", "dtype": torch.bfloat16}
    module = gru_fast.GRU(H, H, backend="triton", **like)

    def step() -> None:
        x = torch.randn(T, B, H, **like, requires_grad=True)
        module(x)[0].sum().backward()

    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    used = (torch.cuda.max_memory_allocated() - before) / (T * B * H * 2)
    assert used < 14.5, used


def test_offsets_beyond_32_bits():
    """The last rows of an output of more than 2**31 values are those of a small call."""
    if torch.cuda.mem_get_info()[0] < 32 * 2**30:
        pytest.skip("it takes about 24 GB")
    T, B, H = 1100, 16384, 128
    like = {"device": "cuda", "dtype": torch.bfloat16}
    module = gru_fast.GRU(8, H, backend="triton", **like)
    x = torch.randn(T, B, 8, **like)
    with torch.no_grad():
        output, _ = module(x)
        few, _ = module(x[:, -16:].contiguous())
    assert output.numel() > 2**31
    assert torch.equal(output[:, -16:], few)


def test_import_touches_no_gpu():
    code = (
        "import sys, torch, gru_fast\n"
        "gru_fast.GRU(4, 4)(torch.zeros(2, 1, 4))\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert 'triton' not in sys.modules and 'gru_fast.kernels' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("kernel", KERNELS)
class TestParity:
    def test_plain(self, kernel, cell, numbers):
        for H in HIDDEN[kernel]:
            check(kernel, Case(cell, T=9, B=37, I=24, H=H), numbers)

    def test_everything_in_both_directions(self, kernel, cell, numbers):
        H = HIDDEN[kernel][0]
        check(kernel, Case(cell, "everything", (False, True), T=7, B=19, I=24, H=H), numbers)

    def test_recompute(self, kernel, cell, numbers):
        H = HIDDEN[kernel][0]
        check(kernel, Case(cell, "resets", T=7, B=19, I=24, H=H), numbers, recompute=True)


@pytest.mark.parametrize("kernel, H", [("cta", 128), ("grid", 512), ("grid", 1024), ("step", 512)])
def test_large_tiles(kernel, H):
    for B in (3, 64, 300):
        check(kernel, Case(T=5, B=B, I=H, H=H), "bfloat16", draws=1)


@EACH_KERNEL
def test_on_several_streams_at_once(H):
    """Cooperative launches that do not fit side by side wait for each other."""
    module, x, h0 = make(H)
    with torch.no_grad():
        expected = list(module(x, h0))
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in range(4)]
        found = []
        for stream in streams * 5:
            with torch.cuda.stream(stream):
                found.append(list(module(x, h0)))
        torch.cuda.synchronize()
    for results in found:
        assert_same(results, expected)
