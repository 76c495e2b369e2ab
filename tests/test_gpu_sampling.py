# SPDX-License-Identifier: Apache-2.0
"""Which loop takes a call of `generate` on CUDA, what `explain_generate` says, and the tiles."""

from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import gru_fast
from cases import CELLS
from gru_fast import GRULanguageModel, backends, explain_generate, gpu_sampling, sampling

kernels = pytest.importorskip("gru_fast.kernels")

from gru_fast.kernels import (  # noqa: E402
    generate_tables,
    measured,
    norm_tables,
    registry,
    tiling,
)
from gru_fast.kernels.generate import _hand_over  # noqa: E402
from gru_fast.kernels.generate_tables import FORMS, Model  # noqa: E402

DEVICES = [
    tiling.Device(75, 64 * 1024, 40),
    tiling.Device(80, 163 * 1024, 108),
    tiling.Device(86, 99 * 1024, 82),
    tiling.Device(89, 99 * 1024, 128),
    tiling.Device(90, 227 * 1024, 132),
    tiling.Device(100, 227 * 1024, 148),
    tiling.Device(120, 99 * 1024, 170),
]


def model_of(H=64, L=1, V=65, numbers="16", B=4, cell="reset_after"):
    dtype = torch.bfloat16 if numbers == "16" else torch.float32
    precision = "tf32" if numbers == "16" else numbers
    return Model(tiling.Sizes(1, B, 1, H, cell, dtype, precision), L, V)


BY_ARCH = {device.arch: device for device in DEVICES}


@pytest.fixture(params=[(3, 6), (3, 8), (3, 9)], ids=lambda v: f"triton-{v[0]}.{v[1]}")
def version(request, monkeypatch):
    """The Triton that the tables believe to be installed."""
    monkeypatch.setattr(tiling, "triton_version", lambda: request.param)
    generate_tables.config_of.cache_clear()
    yield request.param
    generate_tables.config_of.cache_clear()


@pytest.mark.parametrize("raised", [False, True])
def test_the_version_of_triton(monkeypatch, raised):
    """Also where it was installed under another name, as for Windows or AMD devices."""
    triton = pytest.importorskip("triton")

    def unknown(name):
        raise PackageNotFoundError(name)

    if raised:
        monkeypatch.setattr(tiling, "version", unknown)
    found = tiling.triton_version.__wrapped__()
    assert triton.__version__.startswith("{}.{}.".format(*found))


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: f"sm_{d.arch}")
def test_every_model_has_a_form_that_fits(device, version):
    seen = set()
    numbers = ("16", "ieee") if device.arch < 80 else ("16", "tf32", "tf32x3")
    models = product(numbers, (1, 40, 64, 100, 300, 1024, 20000), (2, 65, 256, 50_000), (1, 2, 6))
    for kind, H, V, L in models:
        for cell in CELLS:
            model = model_of(H, L, V, kind, cell=cell)
            form = generate_tables.choose(device, model)
            config = generate_tables.config_of(form, device, model)
            seen.add(form)
            if form == "cta":
                assert config.BLOCK_H >= H
            if form == "grid":
                programs = -(-H // config.BLOCK_H)
                assert programs <= device.processors
                # What each draws for is held in registers.
                rows = -(-config.BLOCK_B // programs)
                assert rows <= 2 or (rows <= 4 and V <= 256)
    assert seen == set(FORMS)


def form_of(arch, *args, shared_kib=None, **options):
    device = BY_ARCH[arch]
    if shared_kib is not None:
        device = replace(device, shared_bytes=shared_kib * 1024)
    return generate_tables.choose(device, model_of(*args, **options))


@pytest.mark.parametrize("version", [(3, 9)], indirect=True)
@pytest.mark.usefixtures("version")
class TestForms:
    def test_small_models_stay_in_one_program(self):
        for arch in (80, 86, 89, 90, 120):
            assert form_of(arch, 128) == "cta"
            assert form_of(arch, 64, V=256) == "cta"
            assert form_of(arch, 64, numbers="tf32x3") == "cta"
        for arch in (86, 89, 90, 100, 120):
            assert form_of(arch, 64, 2) == "cta"
        assert form_of(75, 32) == form_of(75, 32, numbers="ieee") == "cta"
        assert form_of(100, 128, V=64) == "cta"

    def test_larger_ones_are_split(self):
        for arch in BY_ARCH:
            precise = "ieee" if arch < 80 else "tf32x3"
            for args in ((512,), (256, 3), (256, 1, 65, precise), (512, 2, 1000, precise)):
                assert form_of(arch, *args) == "grid", (arch, args)

    def test_what_nothing_fits_takes_a_launch_a_layer(self):
        for arch in BY_ARCH:
            assert form_of(arch, 20_000) == "step"
            # More rows to draw for than a program has registers.
            assert form_of(arch, 32, 6) == "step"
            assert form_of(arch, 128, shared_kib=48) == "step"

    def test_by_shared_memory(self):
        assert form_of(90, 128, V=256, shared_kib=163) == "grid"
        assert form_of(80, 128, shared_kib=99) == "grid"
        on_chip = generate_tables.config_of("grid", BY_ARCH[80], model_of(512))
        streamed = replace(BY_ARCH[80], shared_bytes=99 * 1024)
        assert on_chip.RESIDENT
        assert not generate_tables.config_of("grid", streamed, model_of(512)).RESIDENT

    def test_cells_that_would_spill(self):
        assert form_of(120, 64, 2, cell="no_reset") == "cta"
        assert form_of(120, 64, 2, cell="reset_before") == "grid"

    def test_weights_stay_on_chip_where_they_can(self):
        for arch, V in ((100, 65), (80, 200), (86, 200), (120, 200)):
            assert form_of(arch, 128, V=V) == "grid"
            assert generate_tables.config_of("grid", BY_ARCH[arch], model_of(128, V=V)).RESIDENT

    def test_any_hidden_size_takes_the_tiles_of_the_next_multiple_of_16(self):
        for arch, H, L in product(BY_ARCH, (19, 57, 121, 300, 497), (1, 2)):
            for B, numbers in product((4, 4096), ("16",) if arch < 80 else ("16", "tf32")):
                for form in FORMS[:2]:
                    odd, whole = (
                        generate_tables.row_of(form, BY_ARCH[arch], model_of(h, L, 65, numbers, B))
                        for h in (H, tiling.whole(H))
                    )
                    assert odd is whole

    @pytest.mark.parametrize(
        "form, arch, H, L, numbers",
        [
            ("cta", 86, 64, 1, "16"),
            ("grid", 80, 512, 2, "16"),
            ("grid", 90, 512, 2, "16"),
            ("grid", 90, 512, 2, "tf32"),
            ("grid", 100, 512, 2, "tf32"),
        ],
    )
    def test_more_rows_take_larger_tiles(self, form, arch, H, L, numbers):
        few, many = (
            generate_tables.config_of(form, BY_ARCH[arch], model_of(H, L, numbers=numbers, B=B))
            for B in (8, 4096)
        )
        assert (few.BLOCK_B, many.BLOCK_B) == (8, 16)


@pytest.mark.parametrize("version", [(3, 6), (3, 7)], indirect=True)
def test_a_few_spilled_bytes_do_not_cost_a_launch_a_layer(version):
    """On Hopper under Triton 3.6, which was compiled for it; elsewhere such rows are missing."""
    models = [
        {"H": H, "L": L, "V": V, "numbers": numbers}
        for numbers, sizes in (
            ("16", ((64, 2, 256), (128, 2, 65), (512, 2, 65), (896, 1, 256), (300, 2, 50_000))),
            ("tf32", ((128, 1, 65), (256, 1, 65), (512, 1, 65), (64, 1, 256), (128, 2, 65))),
        )
        for H, L, V in sizes
    ]
    forms = {form_of(90, **model) for model in models}
    assert forms == ({"grid"} if version == (3, 6) else {"step"})
    if version == (3, 6):
        assert form_of(90, 64, 2, 256, cell="reset_before") == "step"  # 24 bytes
        assert form_of(100, 128, 2) == "step"


def test_every_row_is_reached(monkeypatch):
    """By a model within its limits, on some device, under one of the versions of Triton."""
    reached = set()
    for installed in ((3, 6), (3, 9)):
        monkeypatch.setattr(tiling, "triton_version", lambda v=installed: v)
        for row, device, B in product(generate_tables.ROWS, DEVICES, (4, 4096)):
            for H, cell in product({row.least_H, min(row.H, 1024)}, row.cells):
                shared = {row.shared_kib * 1024, device.shared_bytes}
                L, V = min(row.L, 3), min(row.V, 50_000)
                model = model_of(H, L, V, row.numbers, B, cell)
                for offered in (replace(device, shared_bytes=size) for size in shared):
                    reached.add(generate_tables.row_of(row.form, offered, model))
    assert set(generate_tables.ROWS) <= reached


@pytest.mark.usefixtures("version")
def test_what_is_computed_at_each_position(version):
    """Addresses in `grid` where logits are read in parts; from Hopper on always, but for 3.6."""

    def compiled(form, arch, *args, **options):
        model = model_of(*args, **options)
        config = generate_tables.config_of(form, BY_ARCH[arch], model)
        return generate_tables.compiled_as(form, BY_ARCH[arch], model, config)

    found = [
        compiled("grid", 80, 256, V=1000), compiled("grid", 80, 256, V=50_000),
        compiled("grid", 90, 512, V=1000), compiled("cta", 90, 64),
        compiled("cta", 90, 128, B=4096),
    ]  # fmt: skip
    nothing, addresses = {"ANEW": "nothing"}, {"ANEW": "addresses"}
    in_parts = addresses | {"maxnreg": 255}
    new = [nothing] * 3 if version == (3, 6) else [addresses, nothing, addresses]
    assert found == [nothing, in_parts, *new]


def test_amd_devices_are_offered_launches_only():
    """torch numbers gfx942 as 9.4 and gfx90a as 9.0; rows and figures of sm_90 are not theirs."""
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=304)
    assert tiling.device_with(properties, hip=None).arch == 90
    device = tiling.device_with(properties, hip="6.4")
    assert device.name == "an AMD device"
    for numbers, H in product(("16", "tf32", "ieee"), (32, 64, 512)):
        model = model_of(H, numbers=numbers)
        assert generate_tables.choose(device, model) == "step"
        sizes = model.sizes._replace(T=512)
        assert measured.nearest(device, sizes, "infer") is None
        assert registry.choose(device, sizes, "forward", "infer")[0].name == "step"
        assert norm_tables.config(device, sizes, "forward") is None


@pytest.fixture
def on_cuda(monkeypatch):
    """Models count as being on CUDA; nothing is launched."""
    monkeypatch.setattr(gpu_sampling, "_device_type", lambda model: "cuda")
    monkeypatch.setattr(sampling.packed, "why_not_model", lambda *_: "weights are on cuda:0")
    monkeypatch.setattr(sampling.ops, "HAS_CPU_KERNELS", False)


class TestRouting:
    def test_by_backend(self, on_cuda):
        for backend, loop in (
            ("auto", sampling.triton_loop), ("triton", sampling.triton_loop),
            ("cudnn", sampling.generate_loop), ("reference", sampling.generate_loop),
        ):  # fmt: skip
            model = GRULanguageModel(5, None, 8, backend=backend)
            assert sampling.choose_loop(model) is loop

    def test_a_head_elsewhere_is_called(self, on_cuda):
        model = GRULanguageModel(5, None, 8)
        model.head.to("meta")
        assert sampling.choose_loop(model) is sampling.generate_loop
        expected = "its weights are on several devices: ['cpu', 'meta']"
        assert gpu_sampling.why_not(model) == expected

    @pytest.mark.parametrize("version", [(3, 9)], indirect=True)
    @pytest.mark.usefixtures("version")
    def test_explained(self, on_cuda):
        model = GRULanguageModel(65, None, 128, 2)
        found = explain_generate(model, [[1, 2], [3]], max_new_tokens=10, num_return_sequences=4)
        assert found.backend == "triton" and "generate_grid" in found.kernel
        assert found.why_not == {
            "cpu": "weights are on cuda:0",
            "generate_cta": "no compiled tiles for 2 layers reset_after of H=128 and V=65 in tf32 "
            "on sm_90 (227 KiB of shared memory, 132 processors) with Triton 3.9",
        }
        text = str(found)
        assert "\n  not cpu:          weights are on cuda:0\n" in text
        assert "\n  not generate_cta: no compiled tiles for 2 layers" in text
        fed = 3 * 4 + 8 * 10
        assert found.flops == 2 * (fed * 3 * 384 * 128 + 80 * 65 * 128)
        assert found.dependent_steps == (2 + 10) * 2
        assert "not measured" in str(found)
        model.gru.backend = "reference"
        found = explain_generate(model, max_new_tokens=10)
        assert found.backend == "reference"
        assert found.why_not["triton"] == "backend='reference' was asked for"

    def test_explained_on_the_cpu(self):
        model = GRULanguageModel(65, None, 128)
        found = explain_generate(model, max_new_tokens=10)
        assert found.why_not["triton"] == "the model is on cpu, not on cuda"
        if gru_fast.ops.HAS_CPU_KERNELS:
            assert found.backend == "cpu" and "C++ sampler" in found.kernel
        nothing = explain_generate(model, max_new_tokens=0, seed=3)
        assert nothing.backend == found.backend and nothing.dependent_steps == 0

    def test_only_of_a_language_model(self):
        expected = r"model should be a GRULanguageModel, got: gru_fast\.gru\.GRU$"
        with pytest.raises(TypeError, match=expected):
            explain_generate(gru_fast.GRU(3, 4), max_new_tokens=1)

    def test_who_cannot(self, on_cuda, monkeypatch):
        model = GRULanguageModel(5, None, 8)
        assert gpu_sampling.why_not(model) is None
        assert "float64" in gpu_sampling.why_not(GRULanguageModel(5, None, 8).double())
        odd = GRULanguageModel(5, None, 8)
        for options, reason in (
            ({"learn_h0": True}, "learn_h0=True"),
            ({"num_heads": 2}, "num_heads=2"),
            ({"bidirectional": True}, "bidirectional layers need the whole sequence"),
        ):
            odd.gru = gru_fast.GRU(5, 8, **options)
            assert reason in gpu_sampling.why_not(odd)
        odd = GRULanguageModel(5, None, 8)
        odd.head = odd.head.bfloat16()
        assert "several dtypes" in gpu_sampling.why_not(odd)
        odd.head = nn.Sequential(nn.Linear(8, 5))
        odd.head.weight = odd.head[0].weight
        assert "Sequential" in gpu_sampling.why_not(odd)
        monkeypatch.setattr(backends, "HAS_TRITON", False)
        assert sampling.choose_loop(model) is sampling.generate_loop


def test_what_is_handed_over_is_the_receivers_own():
    tokens = torch.tensor([[1, 2, -100], [3, 4, -100]])
    received = []

    def overwrite(column):
        received.append(column.tolist())
        column.fill_(0)

    assert _hand_over(tokens, 0, 3, overwrite) == 3
    assert received == [[1, 3], [2, 4]]
    assert tokens.tolist() == [[1, 2, -100], [3, 4, -100]]


def test_thresholds_have_one_type_whatever_they_are():
    for top_p in (5e-324, 1e-320, 1e-9, 0.5, None):
        assert kernels.Rules(top_p=top_p).arguments(5)["top_p"] >= 2**31


class TestWeights:
    def weights(self, model):
        return gpu_sampling._weights(model)

    def test_layers_are_stacked(self):
        model = GRULanguageModel(5, None, 16, 3, cell="no_reset")
        found = self.weights(model)
        assert found.weight_hh.shape == (3, 32, 16) and found.weight_ih.shape == (2, 32, 16)
        assert torch.equal(found.weight_ih[1], model.gru.weight_ih_l2)
        assert torch.equal(found.bias_hh[2], model.gru.bias_hh_l2)
        assert (found.L, found.H, found.units, found.V) == (3, 16, 16, 5)

    def test_hidden_units_are_padded(self):
        """To a multiple of 16, each gate by itself, with zeros."""
        model = GRULanguageModel(5, None, 19, 2)
        found, gru = self.weights(model), model.gru
        assert (found.H, found.units) == (32, 19)
        for mine, theirs in (
            (found.table, model.token_table()), (found.weight_ih[0], gru.weight_ih_l1),
            (found.weight_hh[1], gru.weight_hh_l1), (found.bias_ih[0], gru.bias_ih_l1),
            (found.bias_hh[1], gru.bias_hh_l1), (found.head, model.head.weight),
        ):  # fmt: skip
            assert mine.is_contiguous()
            units = [
                torch.arange(size).remainder(32) < 19 if size % 32 == 0 else torch.ones(size).bool()
                for size in mine.shape
            ]
            kept = units[0] if mine.ndim == 1 else units[0][:, None] & units[1]
            assert torch.equal(mine[kept], theirs.flatten())
            assert bool((mine[~kept] == 0).all()) and not bool(kept.all())

    def test_one_layer_is_not_copied(self):
        model = GRULanguageModel(5, None, 16, bias=False)
        found = self.weights(model)
        assert found.weight_ih is found.bias_ih is found.bias_hh is None
        assert found.weight_hh.data_ptr() == model.gru.weight_hh_l0.data_ptr()

    def test_autocast_does_not_round_the_table(self):
        model = GRULanguageModel(5, 3, 8)
        expected = self.weights(model).table
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(self.weights(model).table, expected)

    def test_what_does_not_fit(self):
        table, head = torch.zeros(6, 24), torch.zeros(5, 8)
        layer = [torch.zeros(24, 5), torch.zeros(24, 8)]
        for arguments, message in (
            (("gru", table, [layer], head, None), "cell: expected one of"),
            (("reset_after", table.double(), [layer], head, None), "table: expected a dtype of"),
            (("reset_after", table[:5], [layer], head, None), r"table: expected shape \(6, 24\)"),
            (("reset_after", table, [layer, layer], head, None), "weight_ih of layer 1: expected"),
            (("reset_after", table, [layer], head.half(), None), "head: expected shape"),
        ):
            with pytest.raises(RuntimeError, match=message):
                kernels.weights_of(*arguments)


def test_tokens_are_handed_over_on_the_device_of_the_caller(monkeypatch):
    """What a callback makes on "cuda", or changes, is the caller's; each launch has the model's."""
    module, on_model, seen = import_module("gru_fast.kernels.generate"), [False], []

    @contextmanager
    def on_device(tensor):
        on_model[0] = True
        yield
        on_model[0] = False

    def launch(call, steps, config):
        seen.append(("launch", *on_model))
        call.rows.tokens.fill_(1)

    monkeypatch.setattr(module, "on_device", on_device)
    monkeypatch.setattr(module, "_launcher", lambda form: launch)
    layer = [torch.zeros(24, 8)] * 2
    weights = kernels.weights_of(
        "reset_after", torch.zeros(6, 24), [layer], torch.zeros(5, 8), None
    )
    prompts, lengths = torch.zeros(2, 1).long(), torch.ones(2).long()
    steps = module.STREAMED + 1
    kernels.generate(
        weights, prompts, lengths, kernels.Rules(), steps,
        lambda tokens: seen.append(("tokens", *on_model)), "step",
    )  # fmt: skip
    launches, tokens = [("launch", True)], [("tokens", False)]
    assert seen == launches + tokens * (steps - 1) + launches + tokens
