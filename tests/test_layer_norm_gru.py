# SPDX-License-Identifier: Apache-2.0
"""`gru_fast.LayerNormGRU`: the numbers of haste's form, and the interface of `gru_fast.GRU`."""

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import gru_fast
from gru_fast import LayerNormGRU, backends, ops
from gru_fast.recurrence_norm import norm_layer
from helpers import assert_parity

needs_cpu_kernels = pytest.mark.skipif(not ops.HAS_CPU_KERNELS, reason="no compiled CPU kernels")


def randomised(*args: Any, dtype: torch.dtype = torch.float64, **kwargs: Any) -> LayerNormGRU:
    """A module whose gains and biases are not those of the start."""
    rnn = LayerNormGRU(*args, dtype=torch.float32, **kwargs)
    with torch.no_grad():
        for name, parameter in rnn.named_parameters():
            if not name.startswith("weight"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return rnn.to(dtype)


def plain_layer(x: Tensor, h: Tensor, weights: list[Any], eps: float) -> Tensor:
    """haste's LayerNormGRU written with torch's own operations: one layer, forwards."""
    weight_ih, weight_hh, gamma_ih, gamma_hh, bias_ih, bias_hh = weights
    width = weight_ih.shape[:1]
    a = F.layer_norm(F.linear(x, weight_ih), width, gamma_ih, bias_ih, eps)
    steps = []
    for t in range(x.shape[0]):
        k = F.layer_norm(F.linear(h, weight_hh), width, gamma_hh, bias_hh, eps)
        (a_r, a_z, a_n), (k_r, k_z, k_n) = a[t].chunk(3, -1), k.chunk(3, -1)
        r, z = torch.sigmoid(a_r + k_r), torch.sigmoid(a_z + k_z)
        h = z * h + (1 - z) * torch.tanh(a_n + r * k_n)
        steps.append(h)
    return torch.stack(steps)


def plain(rnn: LayerNormGRU, x: Tensor, hx: Tensor) -> tuple[Tensor, Tensor]:
    """All layers and directions of a module, by `plain_layer`."""
    D, per = 2 if rnn.bidirectional else 1, 6 if rnn.bias else 4
    flat, finals = rnn._flat_weights, []
    for k in range(rnn.num_layers):
        parts = []
        for d in range(D):
            j = k * D + d
            weights = [*flat[j * per : (j + 1) * per], None, None][:6]
            out = plain_layer(x.flip(0) if d else x, hx[j], weights, rnn.eps)
            finals.append(out[-1])
            parts.append(out.flip(0) if d else out)
        x = torch.cat(parts, -1)
    return x, torch.stack(finals)


SHAPES = [
    {},
    {"bias": False, "bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "eps": 1e-3},
    {"num_layers": 3, "recompute": True},
]


class TestNumbers:
    @pytest.mark.parametrize("options", SHAPES, ids=str)
    @pytest.mark.parametrize("backend", ("auto", "reference"))
    def test_is_hastes_form(self, backend: str, options: dict[str, Any]) -> None:
        rnn = randomised(5, 19, backend=backend, **options)
        layers = rnn.num_layers * (2 if rnn.bidirectional else 1)
        x = torch.randn(6, 3, 5, dtype=torch.float64, requires_grad=True)
        hx = torch.randn(layers, 3, 19, dtype=torch.float64, requires_grad=True)
        inputs = [x, hx, *rnn.parameters()]
        results = []
        for outputs in (rnn(x, hx), plain(rnn, x, hx)):
            grads = torch.autograd.grad(outputs, inputs, [torch.ones_like(o) for o in outputs])
            results.append([*outputs, *grads])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)

    @needs_cpu_kernels
    def test_float32_parity_with_hastes_form(self) -> None:
        found: list[list[list[Tensor]]] = [[], [], []]
        for draw in range(8):
            torch.manual_seed(draw)
            exact = randomised(33, 40)
            x, hx = torch.randn(20, 7, 33).double(), torch.randn(1, 7, 40).double()
            single = copy.deepcopy(exact).float()
            calls = (
                (single, single, x.float(), hx.float()),
                (partial_plain(single), single, x.float(), hx.float()),
                (partial_plain(exact), exact, x, hx),
            )
            for values, (call, rnn, *inputs) in zip(found, calls, strict=True):
                leaves = [t.requires_grad_() for t in inputs] + list(rnn.parameters())
                outputs = call(*leaves[:2])
                grads = torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])
                values.append([*(o.detach() for o in outputs), *grads])
        for k in range(len(found[0][0])):
            assert_parity(f"result {k}", *([draw[k] for draw in side] for side in found))

    def test_no_layer_norm_is_another_layer(self) -> None:
        rnn = LayerNormGRU(4, 6)
        gru = gru_fast.GRU(4, 6)
        gru.load_state_dict({k: v for k, v in rnn.state_dict().items() if "gamma" not in k})
        x = torch.randn(5, 2, 4)
        assert (rnn(x)[0] - gru(x)[0]).abs().max() > 0.01

    def test_scale_of_the_weights_does_not_matter(self) -> None:
        """What the norm is for: the products may be of any size."""
        rnn = LayerNormGRU(4, 8, eps=1e-12, dtype=torch.float64)
        x, hx = torch.randn(5, 2, 4).double(), torch.randn(1, 2, 8).double()
        before = rnn(x, hx)[0]
        with torch.no_grad():
            rnn.weight_ih_l0 *= 100
            rnn.weight_hh_l0 *= 0.1
        torch.testing.assert_close(rnn(x, hx)[0], before, rtol=1e-8, atol=1e-8)


def partial_plain(rnn: LayerNormGRU) -> Any:
    return lambda x, hx: plain(rnn, x, hx)


class TestInterface:
    def test_parameters(self) -> None:
        rnn = LayerNormGRU(3, 5, 2, bidirectional=True)
        shapes = {name: tuple(p.shape) for name, p in rnn.named_parameters()}
        assert len(shapes) == 24
        assert shapes["weight_ih_l1_reverse"] == (15, 10) and shapes["weight_hh_l0"] == (15, 5)
        for name in ("gamma_ih_l0", "gamma_hh_l1_reverse", "bias_ih_l0", "bias_hh_l1"):
            assert shapes[name] == (15,)
        assert not any(
            "bias" in name for name, _ in LayerNormGRU(3, 5, bias=False).named_parameters()
        )

    def test_start(self) -> None:
        """Weights as nn.GRU draws them, gains 1, biases 0, as nn.LayerNorm's."""
        torch.manual_seed(3)
        rnn = LayerNormGRU(3, 5, bias=False)
        torch.manual_seed(3)
        gru = nn.GRU(3, 5, bias=False)
        assert torch.equal(rnn.weight_ih_l0, gru.weight_ih_l0)
        assert torch.equal(rnn.weight_hh_l0, gru.weight_hh_l0)
        rnn = LayerNormGRU(3, 5)
        assert bool((rnn.gamma_ih_l0 == 1).all()) and not rnn.bias_hh_l0.any()
        assert rnn.weight_hh_l0.abs().max() <= 5**-0.5
        with torch.no_grad():
            rnn.gamma_hh_l0.fill_(7)
        rnn.reset_parameters()
        assert bool((rnn.gamma_hh_l0 == 1).all())

    @pytest.mark.parametrize("change", (weight_norm, spectral_norm))
    def test_what_it_does_not_know_is_drawn(self, change: Any) -> None:
        """As by nn.GRU: what a weight is computed from, and the modules of a derived class."""
        rnn = LayerNormGRU(3, 5)
        change(rnn, "weight_hh_l0")
        rnn.head = nn.Linear(5, 2)
        rnn.reset_parameters()
        assert rnn.weight_hh_l0.isfinite().all() and rnn.weight_hh_l0.any()
        assert rnn(torch.randn(4, 2, 3))[0].isfinite().all()
        assert rnn.head.weight.any() and rnn.head.bias.any()
        assert bool((rnn.gamma_ih_l0 == 1).all()) and not rnn.bias_ih_l0.any()

    def test_layouts(self) -> None:
        rnn = randomised(3, 5, 2, bidirectional=True)
        x, hx = torch.randn(6, 4, 3).double(), torch.randn(4, 4, 5).double()
        output, h_n = rnn(x, hx)
        rnn.batch_first = True
        turned, _ = rnn(x.transpose(0, 1), hx)
        torch.testing.assert_close(turned.transpose(0, 1), output, rtol=0, atol=1e-12)
        one, h_one = rnn(x[:, 1], hx[:, 1])
        torch.testing.assert_close(one, output[:, 1], rtol=0, atol=1e-12)
        torch.testing.assert_close(h_one, h_n[:, 1], rtol=0, atol=1e-12)

    @pytest.mark.parametrize("enforce_sorted", (False, True))
    def test_lengths_and_packed(self, enforce_sorted: bool) -> None:
        rnn = randomised(3, 5, 2, bidirectional=True)
        lengths = torch.tensor([6, 4, 1] if enforce_sorted else [4, 6, 1])
        x = torch.randn(6, 3, 3).double().requires_grad_()
        output, h_n = rnn(x, lengths=lengths)
        packed, h_packed = rnn(pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted))
        torch.testing.assert_close(pad_packed_sequence(packed)[0], output, rtol=0, atol=1e-12)
        torch.testing.assert_close(h_packed, h_n, rtol=0, atol=1e-12)
        for b, length in enumerate(lengths.tolist()):
            alone, h_alone = rnn(x[:length, b : b + 1])
            torch.testing.assert_close(output[:length, b : b + 1], alone, rtol=0, atol=1e-12)
            torch.testing.assert_close(h_n[:, b : b + 1], h_alone, rtol=0, atol=1e-12)
            assert not output[length:, b].any()

    @pytest.mark.parametrize("lengths", [torch.ones(4), torch.tensor([1, 2]), torch.ones(1, 4)])
    def test_lengths_that_do_not_fit(self, lengths: Tensor) -> None:
        rnn, x = LayerNormGRU(3, 5), torch.randn(6, 4, 3)
        with pytest.raises(RuntimeError, match=r"^lengths: expected .* got "):
            rnn(x, lengths=lengths)
        rnn.batch_first = True
        with pytest.raises(RuntimeError, match=r"^lengths: expected .* got "):
            rnn(x.transpose(0, 1), lengths=lengths)

    def test_nan_in_the_padding_reaches_nothing(self) -> None:
        rnn = randomised(3, 5)
        lengths = torch.tensor([2, 4])
        x = torch.randn(4, 2, 3).double()
        x[2:, 0] = torch.nan
        x.requires_grad_()
        output, _ = rnn(x, lengths=lengths)
        output.sum().backward()
        for tensor in (output, x.grad, *(p.grad for p in rnn.parameters())):
            assert tensor is not None and bool(tensor.isfinite().all())

    def test_resets(self) -> None:
        rnn = randomised(3, 5)
        x, start = torch.randn(6, 1, 3).double(), torch.randn(1, 1, 5).double()
        mask = torch.tensor([0, 0, 0, 1, 0, 0])[:, None] > 0
        output, _ = rnn(x, reset_mask=mask, reset_state=start)
        torch.testing.assert_close(output[:3], rnn(x[:3])[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(output[3:], rnn(x[3:], start)[0], rtol=0, atol=1e-12)

    @pytest.mark.parametrize("backend", ("auto", "reference"))
    @pytest.mark.parametrize("T, B", [(0, 2), (3, 0)])
    def test_empty(self, T: int, B: int, backend: str) -> None:
        rnn = LayerNormGRU(3, 5, bidirectional=True, backend=backend)
        hx = torch.randn(2, B, 5)
        output, h_n = rnn(torch.randn(T, B, 3), hx)
        assert output.shape == (T, B, 10) and torch.equal(h_n, hx)
        output.sum().backward()

    @pytest.mark.parametrize("backend", ("auto", "reference"))
    @pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
    def test_16_bits_from_a_state_of_zeros(self, dtype: torch.dtype, backend: str) -> None:
        """Where the variance is 0: rstd^3 is beyond float16."""
        rnn = LayerNormGRU(4, 8, dtype=dtype, backend=backend)
        rnn(torch.randn(2, 3, 4, dtype=dtype))[0].sum().backward()
        for name, parameter in rnn.named_parameters():
            assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name

    def test_dropout_between_layers(self) -> None:
        rnn = LayerNormGRU(3, 5, 2, dropout=0.5)
        x = torch.randn(4, 2, 3)
        assert not torch.equal(rnn(x)[0], rnn(x)[0])
        rnn.eval()
        assert torch.equal(rnn(x)[0], rnn(x)[0])

    def test_recurrent_dropout(self) -> None:
        """One mask for a sequence: the cell with a scaled state, and none in eval mode."""
        rnn = randomised(3, 5, recurrent_dropout=0.5)
        x = torch.randn(4, 2, 3).double()
        torch.manual_seed(1)
        output, _ = rnn(x)
        torch.manual_seed(1)
        scale = torch.nn.functional.dropout(torch.ones(1, 2, 5).double(), 0.5)
        weights = [w.unsqueeze(0) for w in rnn._flat_weights]
        expected, _ = norm_layer(x, x.new_zeros(1, 2, 5), *weights, h_scale=scale[0])
        assert torch.equal(output, expected)
        rnn.eval()
        assert torch.equal(rnn(x)[0], rnn(x)[0])

    def test_copies(self) -> None:
        rnn = randomised(3, 5, 2, dtype=torch.float32)
        x = torch.randn(4, 2, 3)
        for other in (copy.deepcopy(rnn), pickle.loads(pickle.dumps(rnn))):
            assert torch.equal(other(x)[0], rnn(x)[0])
        fresh = LayerNormGRU(3, 5, 2)
        fresh.load_state_dict(rnn.state_dict())
        assert torch.equal(fresh(x)[0], rnn(x)[0])

    def test_repr(self) -> None:
        assert repr(LayerNormGRU(3, 5, 2)) == "LayerNormGRU(3, 5, num_layers=2)"
        shown = repr(LayerNormGRU(3, 5, eps=0.1, backend="reference", recompute=True))
        assert shown == "LayerNormGRU(3, 5, eps=0.1, backend='reference', recompute=True)"
        shown = repr(LayerNormGRU(3, 5, recurrent_dropout=0.5))
        assert shown == "LayerNormGRU(3, 5, recurrent_dropout=0.5)"

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"eps": 0.0}, "eps: expected a positive number, got 0.0"),
            ({"eps": "1"}, "eps: expected a positive number, got '1'"),
            ({"backend": "gpu"}, "backend: expected one of .*, got 'gpu'"),
            ({"recurrent_dropout": 2}, "recurrent_dropout: expected a number in"),
            ({"hidden_size": 0}, "hidden_size must be greater than zero"),
        ],
        ids=str,
    )
    def test_constructor_errors(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            LayerNormGRU(**{"input_size": 3, "hidden_size": 4, **options})

    def test_call_errors(self) -> None:
        rnn = LayerNormGRU(3, 5)
        with pytest.raises(RuntimeError, match=r"input\.size\(-1\) to be equal to input_size, 3"):
            rnn(torch.randn(4, 2, 4))
        with pytest.raises(RuntimeError, match=r"hx: expected hidden size \(1, 2, 5\), got"):
            rnn(torch.randn(4, 2, 3), torch.randn(1, 2, 4))
        with pytest.raises(ValueError, match="input: expected the dtype of the weights"):
            rnn(torch.randn(4, 2, 3).double())
        rnn.backend = "cudnn"
        with pytest.raises(RuntimeError, match="backend='cudnn' cannot take this call"):
            rnn(torch.randn(4, 2, 3))

    @pytest.mark.parametrize("missing", (True, False))
    @pytest.mark.parametrize(
        "name", ("weight_ih_l1", "weight_hh_l0", "gamma_ih_l0", "gamma_hh_l1", "bias_hh_l0")
    )
    def test_a_parameter_that_is_missing_is_named(self, name: str, missing: bool) -> None:
        rnn = LayerNormGRU(3, 5, 2, recurrent_dropout=0.5)
        delattr(rnn, name) if missing else setattr(rnn, name, None)
        for call in (rnn, partial(gru_fast.explain, rnn)):
            with pytest.raises(TypeError, match=f"^{name} should be a Tensor, got: NoneType"):
                call(torch.zeros(4, 2, 3))

    def test_is_no_gru(self) -> None:
        """What converts or packs a GRU must not take this one for it."""
        rnn = LayerNormGRU(3, 5)
        assert not isinstance(rnn, gru_fast.GRU | nn.GRU)
        assert gru_fast.revert(nn.Sequential(rnn)).converted == ()


class TestTransforms:
    def test_compile(self, fresh_compiler: None) -> None:
        rnn = randomised(3, 5, 2, bidirectional=True)
        compiled = torch.compile(rnn, fullgraph=True)
        x = torch.randn(4, 2, 3).double().requires_grad_()
        for call in (rnn, compiled):
            x.grad = None
            rnn.zero_grad()
            output, _ = call(x)
            output.square().sum().backward()
            found = [output, x.grad, *(p.grad for p in rnn.parameters())]
            if call is rnn:
                expected = [t.clone() for t in found]
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)

    def test_export_with_dynamic_sizes(self) -> None:
        rnn = randomised(3, 5)
        T, B = torch.export.Dim("T", min=2, max=64), torch.export.Dim("B", min=2, max=64)
        program = torch.export.export(
            rnn, (torch.randn(4, 2, 3).double(),), dynamic_shapes=({0: T, 1: B},)
        )
        x = torch.randn(7, 3, 3).double()
        torch.testing.assert_close(program.module()(x)[0], rnn(x)[0])

    def test_functional_transforms(self) -> None:
        """vmap, grad of grad, forward mode and per-sample gradients agree with plain autograd."""
        rnn = randomised(3, 4)
        params = dict(rnn.named_parameters())
        xs = torch.randn(3, 5, 2, 3).double()

        def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(rnn, p, (x,))[0].square().sum()

        per_sample = torch.vmap(torch.func.grad(loss), (None, 0))(params, xs)
        for v, x in enumerate(xs):
            single = torch.autograd.grad(loss(params, x), list(params.values()))
            for a, b in zip(per_sample.values(), single, strict=True):
                torch.testing.assert_close(a[v], b)
        many = torch.vmap(lambda x: rnn(x)[0])(xs)
        torch.testing.assert_close(many, torch.stack([rnn(x)[0] for x in xs]))
        stacked = {k: torch.stack([v, 2 * v]) for k, v in params.items()}
        models = torch.vmap(loss, (0, None))(stacked, xs[0])
        torch.testing.assert_close(models[0], loss(params, xs[0]))
        x, direction = xs[0], torch.randn_like(xs[0])
        _, tangent = torch.func.jvp(lambda v: loss(params, v), (x,), (direction,))
        expected = (torch.func.grad(lambda v: loss(params, v))(x) * direction).sum()
        torch.testing.assert_close(tangent, expected)
        (first,) = torch.autograd.grad(loss(params, x.requires_grad_()), x, create_graph=True)
        (second,) = torch.autograd.grad((first * direction).sum(), x)
        hvp = torch.func.jvp(torch.func.grad(lambda v: loss(params, v)), (x,), (direction,))[1]
        torch.testing.assert_close(second, hvp)

    def test_autocast_leaves_float32(self) -> None:
        rnn, x = randomised(3, 5, dtype=torch.float32), torch.randn(4, 2, 3)
        expected = rnn(x)[0]
        with torch.autocast("cpu", torch.bfloat16):
            output, _ = rnn(x)
            state, mask = torch.randn(1, 2, 5).bfloat16(), torch.rand(4, 2) < 0.5
            reset, _ = rnn(x, reset_mask=mask, reset_state=state)
        assert output.dtype == torch.float32 and torch.equal(output, expected)
        assert torch.equal(reset, rnn(x, reset_mask=mask, reset_state=state.float())[0])


class TestBackends:
    def test_reasons(self) -> None:
        cuda = backends.why_not_norm("cuda", torch.float32, unfit="too large")
        assert cuda["cudnn"] == "it does not have layer normalisation"
        if backends.HAS_TRITON:
            assert cuda["triton"] == "too large"
            assert "triton" not in backends.why_not_norm("cuda", torch.float32)
            assert backends.select_norm("auto", "cuda", torch.float32) == "triton"
        assert backends.select_norm("auto", "cuda", torch.float32, unfit="x") == "reference"
        assert backends.select_norm("auto", "cuda", torch.float64) == "reference"
        with pytest.raises(RuntimeError, match="backend='triton' cannot take this call: "):
            backends.select_norm("triton", "cuda", torch.float32, unfit="too large")
        assert set(backends.why_not_norm("cpu", torch.float32)) == {
            "triton", "cudnn", *([] if ops.HAS_CPU_KERNELS else ["cpu"]),
        }  # fmt: skip
        assert backends.select_norm("auto", "mps", torch.float32) == "reference"
        composed = backends.why_not_norm("cpu", torch.float32, composed=True)
        assert set(composed) == {"cpu", "triton", "cudnn"}

    @needs_cpu_kernels
    def test_explain(self) -> None:
        from gru_fast import _C

        rnn = LayerNormGRU(3, 4, 2, bidirectional=True)
        x = torch.randn(5, 2, 3)
        told = gru_fast.explain(rnn, x)
        assert (told.backend, told.kernel) == ("cpu", f"C++, {_C.cpu_isa()}")
        assert told.saved_bytes == 2 * 2 * 5 * 2 * 6 * 4 * 4
        plain = gru_fast.explain(gru_fast.GRU(3, 4, 2, bidirectional=True), x)
        assert (told.flops, told.backward_flops) == (plain.flops, plain.backward_flops)
        assert "input is on cpu" in told.why_not["cudnn"]
        rnn.backend = "reference"
        assert gru_fast.explain(rnn, x).kernel == "PyTorch operations"
        rnn.backend = "cudnn"
        error = gru_fast.explain(rnn, x).error
        with pytest.raises(RuntimeError) as raised:
            rnn(x)
        assert error == str(raised.value)
