# SPDX-License-Identifier: Apache-2.0
"""Which kernel takes a CUDA call; without a GPU, on tensors that hold no data."""

import math
from importlib.util import find_spec
from itertools import product

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cases import CELLS, Case, layer_inputs
from gpu_devices import DEVICES, HOPPER, KIB, sizes
from gru_fast import GRU, backends, cudnn, explain, kernels, ops, recurrence, reference
from gru_fast.kernels import measured, problem, registry, tables
from gru_fast.kernels.measured import Point
from gru_fast.kernels.tiling import Device, Sizes

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def name(device: Device, call: Sizes, direction="forward", suite="train") -> str:
    return registry.choose(device, call, direction, suite)[0].name


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA tensors, which hold no data here, are on an H100."""
    monkeypatch.setattr(problem, "device_of", lambda tensor: HOPPER)
    monkeypatch.setattr(problem, "dot_precision", lambda tensor: "tf32")


@pytest.fixture
def points(monkeypatch: pytest.MonkeyPatch) -> None:
    found = (
        Point(90, "infer", "bfloat16", 128, 64, 512, "cta", 1.5),
        Point(90, "infer", "bfloat16", 128, 1024, 512, "grid", 1.2),
        Point(90, "infer", "bfloat16", 512, 64, 512, "step", 0.9),
        Point(90, "train", "bfloat16", 512, 64, 24, "step", 1.1),
        Point(90, "step", "bfloat16", 512, 64, 1, "step", 1.2),
    )
    monkeypatch.setattr(measured, "POINTS", found)


class TestTables:
    @pytest.mark.parametrize("device", DEVICES, ids=lambda d: f"sm_{d.arch}")
    @pytest.mark.parametrize("direction", ["forward", "backward"])
    def test_every_call_has_a_kernel_that_fits(self, device, direction):
        seen = set()
        for numbers in ("16", "tf32", "tf32x3") if device.arch >= 80 else ("16", "ieee"):
            for H in (1, 32, 33, 64, 100, 128, 129, 256, 500, 1024, 5000, 20000):
                for B, plain in ((1, True), (64, False), (4096, True)):
                    call = sizes(B=B, H=H, numbers=numbers, plain=plain)
                    kernel, config = registry.choose(device, call, direction, "train")
                    assert config == kernel.config(device, call, direction)
                    seen.add(kernel.name)
                    if kernel.name == "grid":
                        units = math.ceil(H / config.BLOCK_H)
                        assert units <= device.processors
                    if kernel.name == "cta":
                        assert config.BLOCK_H >= H
        assert seen == {"cta", "grid", "step"}

    def test_rows_are_by_limit(self):
        assert name(HOPPER, sizes(H=128)) == "cta"
        assert name(Device(90, 99 * KIB, 132), sizes(H=128)) == "grid"
        assert name(HOPPER, sizes(H=128, numbers="tf32")) == "cta"
        assert name(Device(90, 163 * KIB, 132), sizes(H=128, numbers="tf32")) == "grid"
        resident = tables.config("grid", HOPPER, sizes(H=512), "forward")
        streamed = tables.config("grid", Device(90, 64 * KIB, 132), sizes(H=512), "forward")
        assert resident.RESIDENT and not streamed.RESIDENT

    def test_odd_sizes_stream_their_weights(self):
        assert tables.config("grid", HOPPER, sizes(H=496), "forward").RESIDENT
        assert not tables.config("grid", HOPPER, sizes(H=497), "forward").RESIDENT

    def test_what_programs_exchange_is_loaded_ahead_in_copies_of_16_bytes_only(self):
        """Smaller asynchronous copies go through the L1 cache, which may hold what was there."""
        for device, direction in product(DEVICES, ("forward", "backward")):
            for numbers, plain in product(("16", "tf32"), (True, False)):
                for H in (250, 436, 440, 497, 2000, 5001):
                    call = sizes(H=H, B=4096, numbers=numbers, plain=plain)
                    found = tables.config("grid", device, call, direction)
                    assert found is None or found.num_stages == 1 or H % 16 == 0

    def test_one_step_and_crowds(self):
        assert name(HOPPER, sizes(T=1)) == "step"
        assert name(HOPPER, sizes(H=1024, B=16)) == "grid"
        assert name(HOPPER, sizes(H=1024, B=4096)) == "step"

    def test_more_rows_take_larger_tiles(self):
        few = tables.config("cta", HOPPER, sizes(B=64), "forward")
        many = tables.config("cta", HOPPER, sizes(B=2048), "forward")
        assert few.BLOCK_B < many.BLOCK_B

    def test_optional_inputs_avoid_rows_that_would_spill(self):
        call = {"B": 512, "H": 512}
        assert tables.config("grid", HOPPER, sizes(**call), "forward").BLOCK_B == 64
        assert tables.config("grid", HOPPER, sizes(**call, plain=False), "forward").BLOCK_B == 32

    def test_a_named_kernel_that_does_not_fit(self):
        call = (torch.device("cpu"), torch.float32, (2, 2, 1, 300), "reset_after", True)
        assert kernels.why_not("cta", *call) == (
            "no compiled tiles for H=300 in tf32 on sm_90 (227 KiB of shared memory, 132 "
            "processors)"
        )
        assert kernels.why_not("grid", *call) is None
        inputs = layer_inputs(Case(T=2, B=2, H=300), torch.float32)
        with pytest.raises(RuntimeError, match="kernel='cta': no compiled tiles for H=300 in tf32"):
            call = problem.problem_of(
                reference.project(inputs.x, inputs.weight_ih, inputs.bias_ih),
                inputs.h0, inputs.weight_hh, inputs.bias_hh, None, None, None, None,
                inputs.cell, [False],
            )  # fmt: skip
            registry.take("cta", call, "forward", "infer")
        with pytest.raises(ValueError, match=r"kernel: expected one of \('cta', .*, got 'warp'"):
            registry.take("warp", call, "forward", "infer")


class TestMeasured:
    def test_the_table_is_of_kernels_that_fit(self):
        """Every point names a kernel with tiles for its size on a device of its architecture."""
        assert not backends.nothing_measured()
        places = [(p.arch, p.suite, p.kind, p.H, p.B, p.T) for p in measured.POINTS]
        assert len(places) == len(set(places))
        devices = {d.arch: d for d in DEVICES}
        for p in measured.POINTS:
            assert p.suite in ("train", "infer", "step") and p.ratio > 0
            dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(
                p.kind, torch.float32
            )
            call = Sizes(p.T, p.B, 1, p.H, "reset_after", dtype, p.kind)
            assert registry.KERNELS[p.kernel].config(devices[p.arch], call, "forward")

    def test_the_nearest_size_decides(self, points):
        assert measured.nearest(HOPPER, sizes(H=150, B=40), "infer").kernel == "cta"
        far = (sizes(H=256, B=64), sizes(H=128, B=32), sizes(T=127), sizes(numbers="tf32"))
        for call in far:
            assert measured.nearest(HOPPER, call, "infer") is None
        half = Sizes(512, 64, 1, 128, "reset_after", torch.float16, "tf32")
        assert measured.nearest(HOPPER, half, "infer") is None
        assert measured.nearest(Device(80, 163 * KIB, 108), sizes(), "infer") is None
        assert measured.nearest(HOPPER, sizes(T=1, H=512), "infer").suite == "step"
        assert measured.nearest(HOPPER, sizes(T=1, H=512), "train") is None
        assert measured.nearest(HOPPER, sizes(T=6, H=512), "train").T == 24

    def test_between_two_batch_sizes_the_less_favourable_decides(self, points):
        assert measured.nearest(HOPPER, sizes(H=128, B=256), "infer").ratio == 1.2
        assert measured.nearest(HOPPER, sizes(H=128, B=100), "infer").ratio == 1.5
        assert measured.nearest(HOPPER, sizes(H=128, B=2048), "infer") is None

    def test_the_measured_kernel_is_chosen(self, points):
        assert name(HOPPER, sizes(H=512)) == "step"
        assert name(HOPPER, sizes(H=512, B=16)) == "grid"
        # Where its tiles do not fit, the next that do.
        assert name(HOPPER, sizes(H=150), suite="infer") == "grid"

    def test_cudnn_by_measurement(self, points, hopper):
        device, half = torch.device("cuda"), torch.bfloat16

        def why(H, training, B=64):
            return backends.why_cudnn(device, half, (512, B, 1, H), "reset_after", training)

        with FakeTensorMode():
            assert why(128, False) is None
            assert why(512, False) == "it was measured faster near this size on sm_90"
            assert why(512, True) is None
            assert why(128, True) == "nothing near this size is measured on sm_90"
            assert why(128, True, B=0) is None


@pytest.fixture
def cuda_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what CUDA calls reach, in order."""
    calls = []

    def spy(what, function):
        def called(*args):
            calls.append(what)
            return function(*args)

        return called

    monkeypatch.setattr(torch, "_cudnn_rnn", spy("cudnn", torch._cudnn_rnn))
    monkeypatch.setattr(ops, "without_grad", spy("ops", ops.without_grad))
    monkeypatch.setattr(torch.nn.RNNBase, "reset_parameters", lambda self: None)
    return calls


@needs_triton
class TestCalls:
    """In auto, on CUDA tensors that hold no data."""

    def run(self, module, **more):
        x = torch.empty(5, 3, 4, device="cuda", dtype=module.weight_ih_l0.dtype)
        output, h_n, *_ = module(x, **more)
        directions = 2 if module.bidirectional else 1
        assert output.shape == (5, 3, 8 * directions) and h_n.shape == (directions, 3, 8)
        assert output.device.type == "cuda"
        return explain(module, x, **more)

    @pytest.mark.parametrize("bidirectional", [False, True])
    @pytest.mark.parametrize("bias", [False, True])
    def test_cudnn_where_nothing_is_measured(self, cuda_calls, hopper, bidirectional, bias):
        with torch.no_grad(), FakeTensorMode():
            module = GRU(4, 8, bidirectional=bidirectional, bias=bias, device="cuda")
            found = self.run(module)
        assert cuda_calls == ["cudnn"] and found.backend == "cudnn"
        assert found.why_not["triton"].endswith("nothing near this size is measured on sm_90")

    def test_triton_where_cudnn_cannot(self, cuda_calls, hopper):
        with torch.no_grad(), FakeTensorMode():
            found = [
                self.run(GRU(4, 8, cell=cell, device="cuda"))
                for cell in ("reset_before", "no_reset")
            ]
            mask = torch.zeros(5, 3, dtype=torch.bool, device="cuda")
            found.append(self.run(GRU(4, 8, device="cuda"), reset_mask=mask))
            found.append(self.run(GRU(4, 8, device="cuda"), return_gates=True))
        assert cuda_calls == ["ops"] * 4
        assert {f.backend for f in found} == {"triton"}
        assert found[0].kernel == "Triton, cta, because it fits; not measured at this size"
        assert found[0].why_not["cudnn"] == "it does not have cell='reset_before'"
        assert found[2].why_not["cudnn"] == "it does not have resets"
        assert found[3].why_not["cudnn"] == "it does not have the values of the gates"

    def test_triton_where_it_was_faster(self, cuda_calls, hopper, monkeypatch):
        point = Point(90, "infer", "tf32", 8, 3, 5, "grid", 1.5)
        monkeypatch.setattr(measured, "POINTS", (point,))
        with torch.no_grad(), FakeTensorMode():
            found = self.run(GRU(4, 8, device="cuda"))
        assert cuda_calls == ["ops"]
        assert (found.backend, found.kernel) == ("triton", "Triton, grid, as measured")
        assert found.why_not["cudnn"] == "a Triton kernel was measured faster near this size"

    def test_by_name(self, cuda_calls):
        with torch.no_grad(), FakeTensorMode():
            for backend in ("cudnn", "triton"):
                module = GRU(4, 8, backend=backend, device="cuda")
                module(torch.empty(5, 3, 4, device="cuda"))
            module = GRU(4, 8, cell="no_reset", backend="cudnn", device="cuda")
            with pytest.raises(RuntimeError, match="it does not have cell='no_reset'"):
                module(torch.empty(5, 3, 4, device="cuda"))
        assert cuda_calls == ["cudnn", "ops"]

    @pytest.mark.parametrize("shape", [(0, 3, 4), (5, 0, 4)])
    def test_nothing_to_compute(self, cuda_calls, shape):
        """cuDNN refuses it, and there is no Triton kernel for float64."""
        with torch.no_grad(), FakeTensorMode():
            x = torch.empty(shape, device="cuda", dtype=torch.float64)
            module = GRU(4, 8, device="cuda", dtype=torch.float64)
            found = explain(module, x)
            h0 = torch.empty(1, shape[1], 8, device="cuda", dtype=torch.float64)
            features = dict.fromkeys(("lengths", "resets", "h_scale", "gates", "grouped"), False)
            route = recurrence._route(x, h0, "auto", "reset_after", False, **features)
            module.backend = "cudnn"
            with pytest.raises(RuntimeError, match="does not have calls without steps or seq"):
                module(x)
        assert cuda_calls == [] and found.backend == route == "reference"

    @pytest.mark.parametrize(
        "version, capability, takes",
        [
            (91900, (9, 0), True),
            (91300, (8, 0), True),
            (91002, (9, 0), False),
            (91900, (7, 5), False),
        ],
    )
    def test_bfloat16_as_pytorch_has_it(self, monkeypatch, version, capability, takes):
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
        for name, value in (
            ("is_available", True), ("current_device", 0), ("get_device_capability", capability)
        ):  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
        monkeypatch.setattr(cudnn, "_has_bfloat16", cudnn._has_bfloat16.__wrapped__)
        for dtype in (torch.bfloat16, torch.float16):
            expected = "cudnn" if takes or dtype == torch.float16 else "triton"
            assert backends.select("auto", "cuda", dtype) == expected

    def test_float64(self, cuda_calls):
        with torch.no_grad(), FakeTensorMode():
            found = self.run(GRU(4, 8, device="cuda", dtype=torch.float64))
        assert cuda_calls == ["cudnn"]
        assert found.why_not["triton"] == "there is no kernel for torch.float64"
        assert backends.select("auto", "cuda", torch.float64, "no_reset") == "reference"


@needs_triton
@pytest.mark.parametrize("backend", ["auto", "triton", "cudnn", "reference", "cpu", "nonsense"])
@pytest.mark.parametrize("cell", CELLS)
def test_the_short_way_is_the_same_way(hopper, points, backend, cell):
    """What `direct_gpu` asks answers as what every other call asks."""
    features = dict.fromkeys(("lengths", "resets", "h_scale", "gates", "grouped"), False)

    def answer(ask, *args, **features):
        try:
            return ask(*args, **features)
        except (RuntimeError, ValueError) as error:
            return type(error), str(error)

    seen = set()
    with FakeTensorMode():
        for dtype, H, B, T in product(
            (torch.bfloat16, torch.float32, torch.float64, torch.int32),
            (8, 128, 512), (0, 1, 64, 500), (0, 1, 512)):  # fmt: skip
            x, h0 = (torch.empty(*s, dtype=dtype, device="cuda") for s in ((T, B, 4), (1, B, H)))
            short = answer(recurrence.route_of_inference, x, H, backend, cell)
            usual = answer(recurrence._route, x, h0, backend, cell, False, **features)
            assert short == usual, (dtype, H, B, T)
            seen.add(short)
    wanted = {"ops", "reference"} | ({"cudnn"} if cell == "reset_after" else set())
    assert backend != "auto" or seen == wanted


def test_cudnn_is_not_called_where_it_is_switched_off_or_absent(monkeypatch):
    """Its error for a second derivative tells people to switch it off: then that has to work."""

    def why():
        reason = backends.why_not("cuda", torch.float32, lengths=True).get("cudnn")
        assert (backends.select("auto", "cuda", torch.float32) == "cudnn") == (
            reason == "it does not have lengths"
        )
        return reason

    assert why() == "it does not have lengths"
    with torch.backends.cudnn.flags(enabled=False):
        assert why() == "torch.backends.cudnn.enabled is False"
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "hip", "7.0")
        assert why() == "PyTorch for AMD devices does not have it"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    assert why() == "this PyTorch was built without it"


def test_what_cudnn_does_not_take():
    groups = recurrence._is_grouped
    x, bias = torch.zeros(2, 2, 2), torch.zeros(1)
    assert not groups(x, bias, bias, [False]) and not groups(x, None, None, (False, True))
    assert groups(x, bias, bias, [True]) and groups(x, bias, bias, [False, False])
    assert groups(x, None, bias, [False]) and groups(x[None], bias, bias, [False])
    seen = []
    torch.vmap(lambda x: seen.append(groups(x, bias, bias, [False])) or x)(x[None])
    assert seen == [True]


@pytest.mark.parametrize("cell", CELLS)
def test_without_triton_or_in_float64_the_reference_serves_cuda(cell, monkeypatch):
    def refuse(*args):
        raise AssertionError("a Triton kernel was called")

    monkeypatch.setattr(ops.importlib, "import_module", refuse)
    inputs = layer_inputs(Case(cell))
    expected = reference.layer(*inputs.arguments())
    with monkeypatch.context() as patch:
        patch.setattr(ops, "find_spec", lambda name: None)
        for dtype in (torch.float64, torch.float32):
            patch.setattr(ops, "cuda_functions", {})
            results = ops._cuda_kernel("layer")(*inputs.to(dtype).arguments())
            torch.testing.assert_close(results, expected, check_dtype=False)


@needs_triton
@pytest.mark.parametrize("cell", CELLS)
def test_the_choice_can_be_compiled(cell, fresh_compiler):
    """What a CUDA call asks, in one graph; the tensor itself is on the CPU."""

    @torch.compile(backend="eager", fullgraph=True)
    def choice(x):
        name = backends.select(
            "auto", "cuda", backends.dtype_of_call("cuda", x.dtype), cell, lengths=False,
            grouped=recurrence._is_grouped(x, None, None, (False,)),
            composed=backends.needs_composition(x), prefer_cudnn=backends.nothing_measured(),
        )  # fmt: skip
        return x + 1 if name == "triton" else x

    assert choice(torch.zeros(2, 2, 2)).all()


@pytest.mark.parametrize(
    "dtype, asked, expected",
    [
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float16, torch.float16),
        (torch.float16, torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.bfloat16, torch.float64),
        (torch.bool, torch.bfloat16, torch.bool),
    ],
)
def test_the_dtype_that_autocast_asks_for(monkeypatch, dtype, asked, expected):
    assert backends.dtype_of_call("cuda", dtype) == dtype
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: asked)
    assert backends.dtype_of_call("cuda", dtype) == expected
    assert backends.dtype_of_call("cpu", dtype) == dtype
    assert backends.dtype_of_call("meta", dtype) == dtype


def test_rows_too_wide_for_a_tile_are_refused():
    def of(B):
        G = problem.MOST_UNITS + 1
        one = torch.zeros(1)
        gates_x, h0, weight = (one.expand(*s) for s in ((1, B, G, 3), (G, B, 1), (G, 3, 1)))
        return problem.problem_of(
            gates_x, h0, weight, None, None, None, None, None, "reset_after", [False] * G
        )

    with pytest.raises(RuntimeError, match=r"h0: expected G \* H <= 8388608 with B > 1"):
        of(2)
    assert of(1).G == problem.MOST_UNITS + 1


def test_triton_dtypes_are_those_of_the_kernels():
    assert backends.TRITON_DTYPES == kernels.DTYPES
