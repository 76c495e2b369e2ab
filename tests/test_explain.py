# SPDX-License-Identifier: Apache-2.0
"""explain(): the backend that it names is the one that runs, and its counts are the call's."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

import gru_fast
from gru_fast import GRU, GRUCell, backends, explain, measured, ops
from torch_threads import torch_threads

needs_cpu_kernels = pytest.mark.skipif(not ops.HAS_CPU_KERNELS, reason="no compiled CPU kernels")
CELLS = ("reset_after", "reset_before", "no_reset")


@needs_cpu_kernels
@pytest.mark.parametrize("module", [GRU(3, 4, 2), GRUCell(3, 4)], ids=["layer", "cell"])
def test_names_the_kernel_that_runs(module):
    from gru_fast import _C

    x = torch.randn(2, 3)
    explanation = explain(module, x)
    assert explanation.backend == "cpu"
    assert explanation.kernel == f"C++, {_C.cpu_isa()}"
    assert "cpu" not in explanation.why_not
    before = _C.launches()
    module(x)
    assert _C.launches() > before
    module.backend = "reference"
    explanation = explain(module, x)
    assert (explanation.backend, explanation.kernel) == ("reference", "PyTorch operations")
    assert explanation.why_not["cpu"] == "backend='reference' was asked for"
    before = _C.launches()
    module(x)
    assert _C.launches() == before
    module.backend = "auto"


def test_every_other_backend_has_a_reason():
    explanation = explain(GRU(3, 4), torch.randn(2, 1, 3))
    named = {explanation.backend, *explanation.why_not}
    assert named >= set(backends.NAMES) - {"auto", "reference"}
    assert explanation.backend in gru_fast.available_backends()
    assert explanation.why_not["cudnn"] == "the input is on cpu, not on cuda"


def test_a_transform_takes_the_reference():
    rnn = GRU(3, 4)
    seen = []

    def f(x):
        seen.append(explain(rnn, x))
        return rnn(x)[0].sum()

    x = torch.randn(2, 1, 3)
    torch.func.jvp(f, (x,), (x,))
    assert seen[0].backend == "reference"
    assert "torch.func" in seen[0].why_not["cpu"]


@needs_cpu_kernels
def test_a_gradient_of_torch_func_takes_the_kernels():
    from gru_fast import _C

    rnn = GRU(3, 4)
    seen = []

    def f(x):
        seen.append(explain(rnn, x))
        return rnn(x)[0].sum()

    before = _C.launches()
    torch.func.grad(f)(torch.randn(2, 1, 3))
    assert seen[0].backend == "cpu"
    assert _C.launches() == before + 2


def test_a_dtype_without_a_kernel():
    explanation = explain(
        GRU(3, 4).to(torch.float8_e5m2), torch.empty(2, 1, 3).to(torch.float8_e5m2)
    )
    assert explanation.backend == "reference"
    assert "cpu" in explanation.why_not


def test_a_call_that_raises():
    rnn, x = GRU(3, 4, backend="triton"), torch.randn(2, 1, 3)
    explanation = explain(rnn, x)
    assert explanation.backend is None and explanation.kernel == "none"
    with pytest.raises(RuntimeError) as raised:
        rnn(x)
    assert explanation.error == str(raised.value)
    assert f"raises RuntimeError: {raised.value}" in str(explanation)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_flops_are_those_of_the_reference(cell, bidirectional, requires_grad, recompute):
    rnn = GRU(3, 4, 2, cell=cell, bidirectional=bidirectional, backend="reference")
    x = torch.randn(5, 2, 3, requires_grad=requires_grad)
    hx = torch.randn(4 if bidirectional else 2, 2, 4, requires_grad=True)
    explanation = explain(rnn, x, hx)
    with FlopCounterMode(display=False) as counter:
        output, _ = rnn(x, hx)
    assert explanation.flops == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    assert explanation.backward_flops == counter.get_total_flops()
    rnn.recompute = recompute
    extra = explanation.flops if recompute else 0
    assert explain(rnn, x, hx).backward_flops == explanation.backward_flops + extra


def test_bytes_of_a_call_counted_by_hand():
    T, B, I, H = 5, 2, 3, 4  # noqa: E741
    rnn, x, hx = GRU(I, H), torch.randn(T, B, I), torch.randn(1, B, H)
    weights = sum(p.numel() for p in rnn.parameters())
    with torch.no_grad():
        explanation = explain(rnn, x, hx)
        assert explanation.bytes == 4 * (T * B * I + weights + T * B * H + 2 * B * H)
        assert explanation.saved_bytes == explanation.backward_flops == 0
        assert explain(rnn, x).bytes == explanation.bytes - 4 * B * H
        assert explain(rnn.double(), x.double(), hx.double()).bytes == 2 * explanation.bytes
    rnn.float()
    training = explain(rnn, x, hx)
    assert training.saved_bytes == 4 * T * B * 4 * H
    assert training.bytes == explanation.bytes + training.saved_bytes
    rnn.recompute = True
    assert explain(rnn, x, hx).saved_bytes == 0


def test_padding_costs_nothing():
    rnn = GRU(3, 4, batch_first=True)
    x, lengths = torch.randn(2, 6, 3), torch.tensor([6, 2])
    full, short = explain(rnn, x), explain(rnn, x, lengths=lengths)
    assert short.flops * 12 == full.flops * 8
    packed = explain(rnn, pack_padded_sequence(x, lengths, batch_first=True))
    assert (packed.flops, packed.bytes) == (short.flops, short.bytes)
    assert full.dependent_steps == packed.dependent_steps == 6
    assert " T=6 B=2 " in full.call and " T=6 B=2 " in packed.call


def test_one_step():
    cell, x = GRUCell(3, 4), torch.randn(7, 3)
    explanation = explain(cell, x)
    assert explanation.flops == 2 * 7 * 12 * (3 + 4)
    assert explanation.dependent_steps == 1
    assert explain(cell, x[0]).flops * 7 == explanation.flops


def test_a_learned_state_is_trained_where_it_is_used():
    gru, x = gru_fast.GRU(4, 8, learn_h0=True).requires_grad_(False), torch.randn(5, 2, 4)
    gru.h0.requires_grad_()
    hx, mask = torch.zeros(1, 2, 8), torch.zeros(5, 2, dtype=torch.bool)
    for call in ({}, {"hx": hx}, {"hx": hx, "reset_mask": mask}):
        trained = gru(x, **call)[0].requires_grad
        assert ("training" in gru_fast.explain(gru, x, **call).call) == trained
    call = {"hx": hx, "reset_mask": mask, "reset_state": hx}
    assert "inference" in gru_fast.explain(gru, x, **call).call


@pytest.mark.parametrize("train", [False, True])
def test_a_parametrization_is_left_as_it_is(train):
    """In training a look at a spectrally normalised weight takes a step of power iteration."""
    rnn = GRU(3, 4, learn_h0=True)
    for name in ("weight_ih_l0", "h0"):
        nn.init.normal_(rnn.get_parameter(name))
        nn.utils.parametrizations.spectral_norm(rnn, name)
    rnn.train(train)
    before = {name: value.clone() for name, value in rnn.state_dict().items()}
    assert "training" in explain(rnn, torch.randn(2, 1, 3)).call
    for name, value in rnn.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(part.training == train for part in rnn.modules())


@needs_cpu_kernels
def test_an_input_that_autocast_lets_differ_is_computed_in_the_dtype_of_the_weights():
    x = torch.randn(2, 1, 3)
    for rnn in (GRU(3, 4), GRUCell(3, 4)):
        given = x if isinstance(rnn, GRU) else x[0]
        plain = explain(rnn, given)
        with torch.autocast("cpu", torch.bfloat16):
            found = explain(rnn, given.bfloat16())
        assert found.kernel == plain.kernel and "bfloat16" in found.call
        assert (found.bytes, found.saved_bytes) == (plain.bytes, plain.saved_bytes)


def test_returned_gates_are_written_with_and_without_training():
    rnn, x = GRU(3, 4, recompute=True), torch.randn(5, 2, 3)
    workspace = 4 * 4 * 5 * 2 * 4
    plain, gates = explain(rnn, x), explain(rnn, x, return_gates=True)
    assert plain.saved_bytes == 0 and gates.saved_bytes == workspace  # kept, so not recomputed
    assert gates.backward_flops == plain.backward_flops - plain.flops
    with torch.no_grad():
        plain, gates = explain(rnn, x), explain(rnn, x, return_gates=True)
    assert gates.saved_bytes == 0 and gates.bytes == plain.bytes + workspace
    assert "not measured" in str(gates)


@pytest.mark.parametrize("name", ["lengths", "reset_mask", "reset_state", "return_gates"])
def test_arguments_that_the_module_does_not_have(name):
    given = {name: True if name == "return_gates" else torch.ones(2, dtype=torch.int64)}
    refused = [GRUCell(3, 4)] + [gru_fast.LayerNormGRU(3, 4)] * (name == "return_gates")
    for module in refused:
        for call in (module, lambda x, module=module, **more: explain(module, x, **more)):
            with pytest.raises(TypeError, match=name):
                call(torch.randn(2, 3), **given)


def test_the_bound_in_seconds():
    rnn, x = GRU(3, 4), torch.randn(2, 1, 3)
    explanation = explain(rnn, x)
    assert explanation.bound_seconds is None
    compute = explain(rnn, x, peak_flops=explanation.flops / 2, peak_bytes=explanation.bytes)
    assert compute.bound_seconds == pytest.approx(2.0)
    memory = explain(rnn, x, peak_flops=explanation.flops, peak_bytes=explanation.bytes / 3)
    assert memory.bound_seconds == pytest.approx(3.0)
    assert "bound      at least 3 s" in str(memory)


def test_the_text():
    explanation = explain(GRU(3, 4, cell="reset_before"), torch.randn(5, 2, 3))
    lines = str(explanation).splitlines()
    assert lines[0].startswith("GRU(3, 4, cell='reset_before'")
    assert lines[0].endswith("training, input T=5 B=2 I=3 float32 cpu")
    assert f"  taken by   {explanation.backend} ({explanation.kernel})" in lines
    assert "  not triton:    the input is on cpu, not on cuda" in lines
    assert "  bound      unknown without peak_flops= and peak_bytes=" in lines
    assert lines[-1] == "  measured   not measured"
    assert all(len(line) < 200 for line in lines)


@pytest.mark.parametrize("module", [nn.GRU(3, 4), nn.Linear(3, 4), None])
def test_other_modules(module):
    with pytest.raises(TypeError, match=r"module should be a gru_fast.GRU .*convert"):
        explain(module, torch.randn(2, 1, 3))


def test_an_input_of_another_type():
    with pytest.raises(TypeError, match="input should be a Tensor, got: NoneType"):
        explain(gru_fast.GRU(3, 4), None)


@pytest.mark.parametrize("module", [gru_fast.GRU, gru_fast.GRUCell, gru_fast.LayerNormGRU])
def test_an_input_that_does_not_fit(module):
    rnn = module(3, 4)
    deep = 3 if module is gru_fast.GRUCell else 4
    calls = [(torch.randn(2, 5), {}), (torch.randn([1] * deep), {}), (torch.tensor(1.0), {})]
    if module is not gru_fast.GRUCell:
        calls.append((torch.randn(2, 3, 3), {"lengths": [1, 2]}))
        calls.append((torch.randn(2, 3, 3), {"reset_mask": torch.zeros(3, 2).bool()}))
        calls.append((torch.randn(2, 3, 3), {"reset_state": 0.0}))
    for x, given in calls:
        with pytest.raises(
            (TypeError, ValueError, RuntimeError), match=r"expected|should be"
        ) as at:
            rnn(x, **given)
        with pytest.raises(at.type, match=r"expected|should be"):
            explain(rnn, x, **given)


@needs_cpu_kernels
@pytest.mark.parametrize("training", [False, True])
def test_quotes_the_committed_figure(training):
    """Of a call that the README has: the figure, the bound and the machine of that run."""
    rnn, x = GRU(64, 64), torch.randn(256, 1, 64)
    with torch_threads(1), torch.set_grad_enabled(training):
        explanation = explain(rnn, x)
        others = [
            explain(GRU(64, 64, 2), x),
            explain(GRU(64, 64, cell="no_reset"), x),
            explain(rnn, x, lengths=torch.tensor([3])),
            explain(rnn, x[1:]),
            explain(rnn.bfloat16(), x.bfloat16()),
        ]
    suite = "train" if training else "infer"
    seconds, bound = measured.MEASURED["cpu", suite, "float32", 1, 64, 64, 1, 256]
    assert explanation.measured_seconds == pytest.approx(seconds * 1e-6)
    assert explanation.measured_bound_seconds == pytest.approx(bound * 1e-6)
    assert bound < seconds
    passes = "forward and backward" if training else "forward"
    assert f"measured   {passes} " in str(explanation)
    assert f"{measured.MACHINES['cpu']}, 1 thread" in str(explanation)
    for other in others:
        assert other.measured_seconds is None and "not measured" in str(other)
