# SPDX-License-Identifier: Apache-2.0
"""The state as a feature: learned or expanded initial states, recurrent dropout, gate values."""

import copy
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import gru_fast
from cases import CELLS
from gru_fast import functional, notations
from torch_threads import torch_threads

T, B, I, H, L = 6, 4, 3, 5, 2  # noqa: E741
DIRECTIONS = pytest.mark.parametrize("bidirectional", [False, True])
F64 = {"dtype": torch.float64}


class TestLearnedState:
    def module(self, **options):
        rnn = gru_fast.GRU(I, H, L, learn_h0=True, **F64, **options)
        nn.init.normal_(rnn.h0)
        return rnn

    def test_begins_as_nn_gru_does(self):
        torch.manual_seed(3)
        theirs = nn.GRU(I, H, L)
        torch.manual_seed(3)
        ours = gru_fast.GRU(I, H, L, learn_h0=True)
        assert torch.equal(torch.rand(3), torch.rand(3, generator=_generator_after(theirs)))
        assert ours.h0.shape == (L, H) and not ours.h0.any()
        for name, weight in theirs.named_parameters():
            assert torch.equal(weight, ours.get_parameter(name))
        x = torch.randn(T, B, I)
        torch.testing.assert_close(ours(x), theirs(x))

    @DIRECTIONS
    @pytest.mark.parametrize("form", ["batched", "batch_first", "unbatched", "packed"])
    def test_is_the_state_of_a_call_without_one(self, form, bidirectional):
        rnn = self.module(bidirectional=bidirectional, batch_first=form == "batch_first")
        x = torch.randn(T, B, I, **F64)
        hx = rnn.h0.detach()[:, None].repeat(1, B, 1).requires_grad_()
        if form == "batch_first":
            x = x.transpose(0, 1)
        elif form == "unbatched":
            x, hx = x[:, 0], hx.detach()[:, 0].clone().requires_grad_()
        elif form == "packed":
            x = pack_padded_sequence(x, torch.tensor([2, 6, 1, 6]), enforce_sorted=False)
        given, expected = rnn(x)[1], rnn(x, hx)[1]
        assert torch.equal(given, expected)
        (expected_grad,) = torch.autograd.grad(expected.square().sum(), [hx])
        (grad,) = torch.autograd.grad(given.square().sum(), [rnn.h0])
        torch.testing.assert_close(
            grad, expected_grad if form == "unbatched" else expected_grad.sum(1)
        )

    def test_is_what_a_reset_goes_to(self):
        rnn = self.module()
        x, hx = torch.randn(T, B, I, **F64), torch.randn(L, B, H, **F64)
        mask = torch.zeros(T, B, dtype=torch.bool)
        mask[2] = True
        output, h_n = rnn(x, hx, reset_mask=mask)
        after = rnn(x[2:])
        assert torch.equal(output[2:], after[0]) and torch.equal(h_n, after[1])
        zeros = rnn(x, hx, reset_mask=mask, reset_state=torch.zeros_like(hx))
        assert torch.equal(zeros[1], rnn(x[2:], torch.zeros_like(hx))[1])
        assert torch.autograd.grad(output[2:].sum(), [rnn.h0])[0].any()

    def test_state_dicts(self):
        ours, theirs = self.module(), nn.GRU(I, H, L, **F64)
        assert list(ours.state_dict()) == [*theirs.state_dict(), "h0"]
        again = self.module()
        again.load_state_dict(ours.state_dict())
        assert torch.equal(again.h0, ours.h0)
        # nn.GRU begins with zeros, and so does what is loaded from it, in a larger model too.
        model, theirs_in_model = (
            nn.Sequential(nn.Linear(I, I), again),
            nn.Sequential(nn.Linear(I, I), theirs),
        )
        model.load_state_dict(theirs_in_model.double().state_dict(), assign=True)
        assert isinstance(again.h0, nn.Parameter) and not again.h0.any()
        with pytest.raises(RuntimeError, match=r"Unexpected key.*h0"):
            theirs.load_state_dict(ours.state_dict())
        with pytest.raises(RuntimeError, match=r"Missing key.*weight_ih_l0.*h0"):
            again.load_state_dict({})

    @pytest.mark.parametrize(
        "change",
        [
            lambda rnn, name: parametrizations.weight_norm(rnn, name),
            lambda rnn, name: prune.l1_unstructured(rnn, name, 0.5),
        ],
        ids=["parametrized", "pruned"],
    )
    def test_state_dicts_of_weights_under_other_names(self, change):
        ours, theirs, again = self.module(), nn.GRU(I, H, L, **F64), self.module()
        for rnn in (ours, theirs):
            change(rnn, "weight_ih_l0")
        ours.load_state_dict(theirs.state_dict())
        assert not ours.h0.any()
        change(again, "h0")
        copied = {name: value.clone() for name, value in again.state_dict().items()}
        again.load_state_dict(copied)
        assert again.h0.any() and again.state_dict().keys() == copied.keys()

    def test_a_failed_reset_of_parameters_keeps_the_state(self):
        rnn = self.module().to(torch.float8_e4m3fn)  # torch draws no such numbers
        with pytest.raises(NotImplementedError):
            rnn.reset_parameters()
        assert "h0" in rnn.state_dict()

    def test_reset_parameters(self):
        rnn = self.module()
        torch.manual_seed(1)
        rnn.reset_parameters()
        torch.manual_seed(1)
        assert torch.equal(rnn.weight_hh_l1, gru_fast.GRU(I, H, L, **F64).weight_hh_l1)
        assert not rnn.h0.any() and "h0" in dict(rnn.named_parameters())

    def test_copies_and_repr(self):
        rnn = self.module()
        other = copy.deepcopy(rnn)
        x = torch.randn(T, B, I, **F64)
        assert torch.equal(other(x)[1], rnn(x)[1]) and other.h0 is not rnn.h0
        assert repr(rnn).endswith("learn_h0=True)")

    @pytest.mark.parametrize("options", [{"learn_h0": True}, {"recurrent_dropout": 0.1}])
    def test_is_not_reverted(self, options):
        model = nn.Sequential(gru_fast.GRU(I, H, **options))
        report = gru_fast.revert(model)
        assert report.skipped == {"0": f"torch has no {next(iter(options))}"}

    def test_compiled(self, fresh_compiler):
        rnn = self.module()
        compiled = torch.compile(rnn, backend="aot_eager", fullgraph=True)
        mask = torch.rand(T, B) < 0.3
        x = torch.randn(T, B, I, **F64)
        torch.testing.assert_close(compiled(x, reset_mask=mask), rnn(x, reset_mask=mask))


def _generator_after(module):
    """The default generator's state after a module with torch's seed 3."""
    generator = torch.Generator().manual_seed(3)
    for weight in module.parameters():
        torch.empty_like(weight).uniform_(generator=generator)
    return generator


@DIRECTIONS
@pytest.mark.parametrize("cell", CELLS)
def test_an_expanded_state_gets_summed_gradients(cell, bidirectional):
    rnn = gru_fast.GRU(I, H, L, cell=cell, bidirectional=bidirectional, **F64)
    one = torch.randn(L * (1 + bidirectional), 1, H, **F64, requires_grad=True)
    x = torch.randn(T, B, I, **F64)
    wide = one.expand(-1, B, -1)
    assert wide.stride(1) == 0
    copied = one.detach().repeat(1, B, 1).requires_grad_()
    mask = torch.rand(T, B) < 0.3
    results = []
    for hx in (wide, copied):
        output, h_n = rnn(x, hx, reset_mask=mask, reset_state=hx)
        results.append((output, h_n))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    grad, expected = (
        torch.autograd.grad(output.square().sum() + h_n.sum(), [leaf])[0]
        for (output, h_n), leaf in zip(results, (one, copied), strict=True)
    )
    torch.testing.assert_close(grad, expected.sum(1, keepdim=True))


class TestRecurrentDropout:
    def module(self, p=0.4, **options):
        return gru_fast.GRU(I, H, L, recurrent_dropout=p, **F64, **options)

    @DIRECTIONS
    @pytest.mark.parametrize("cell", CELLS)
    def test_is_one_mask_per_row(self, cell, bidirectional):
        rnn = self.module(cell=cell, bidirectional=bidirectional)
        x = torch.randn(T, B, I, **F64)
        torch.manual_seed(7)
        output, h_n = rnn(x)
        torch.manual_seed(7)
        layers = L * (1 + bidirectional)
        scale = nn.functional.dropout(torch.ones(layers, B, H, **F64), 0.4)
        assert 0 < (scale == 0).sum() < scale.numel()
        expected = functional.gru(
            x, None, rnn._flat_weights, num_layers=L, bidirectional=bidirectional, cell=cell,
            h_scale=scale, backend="reference",
        )  # fmt: skip
        torch.testing.assert_close((output, h_n), expected)

    def test_training_only(self):
        rnn = self.module().eval()
        x = torch.randn(T, B, I, **F64)
        state = torch.get_rng_state()
        plain = functional.gru(x, None, rnn._flat_weights, num_layers=L)
        assert torch.equal(rnn(x)[0], plain[0])
        assert torch.equal(torch.get_rng_state(), state)
        assert not torch.equal(rnn.train()(x)[0], plain[0])

    @pytest.mark.parametrize("form", ["batch_first", "unbatched", "packed"])
    def test_forms_of_input(self, form):
        rnn = self.module(batch_first=form == "batch_first")
        x = torch.randn(T, B, I, **F64)
        torch.manual_seed(2)
        if form == "packed":
            lengths = torch.tensor([2, 6, 1, 6])
            packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
            h_n, expected = rnn(packed)[1], lambda: rnn(x, lengths=lengths)[1]
        elif form == "unbatched":
            h_n, expected = rnn(x[:, 0])[1], lambda: rnn(x[:, :1])[1][:, 0]
        else:
            h_n, expected = rnn(x.transpose(0, 1))[1], lambda: self.as_time_first(rnn, x)
        torch.manual_seed(2)
        assert torch.equal(h_n, expected())

    @staticmethod
    def as_time_first(rnn, x):
        rnn.batch_first = False
        return rnn(x)[1]

    @pytest.mark.parametrize("H", [16, 257])
    def test_threads_and_recompute_change_no_bit(self, H):
        rnn = gru_fast.GRU(I, H, L, recurrent_dropout=0.3, dropout=0.2)
        x = torch.randn(9, 33, I)
        results = []
        for threads, recompute in product((1, 2), (False, True)):
            with torch_threads(threads):
                rnn.recompute = recompute
                torch.manual_seed(11)
                output, h_n = rnn(x)
                grads = torch.autograd.grad(output.sum() + h_n.sum(), list(rnn.parameters()))
                results.append((output, h_n, *grads))
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))

    def test_under_checkpoint(self):
        rnn = self.module()
        x = torch.randn(T, B, I, **F64, requires_grad=True)
        grads = []
        for run in (rnn, lambda x: checkpoint(rnn, x, use_reentrant=False)):
            torch.manual_seed(5)
            grads.append(torch.autograd.grad(run(x)[0].sum(), [x, *rnn.parameters()]))
        assert all(map(torch.equal, *grads))

    def test_mean_is_kept(self):
        """Of what the recurrent product sees, over many rows."""
        scale = torch.stack(
            [
                functional.state_scale(p, (1, 20000, 4), torch.ones(1)).mean()
                for p in (0.1, 0.5, 0.9)
            ]
        )
        torch.testing.assert_close(scale, torch.ones(3), rtol=0.03, atol=0)
        assert not functional.state_scale(1.0, (2, 3), torch.ones(1)).any()

    @pytest.mark.parametrize("p", [-0.1, 1.1, True, "0.5", None])
    def test_bad_probabilities(self, p):
        with pytest.raises(ValueError, match=r"recurrent_dropout: expected a number in \[0, 1\]"):
            gru_fast.GRU(I, H, recurrent_dropout=p)

    def test_compiled(self, fresh_compiler):
        rnn = self.module()
        compiled = torch.compile(rnn, backend="aot_eager", fullgraph=True)
        x = torch.randn(T, B, I, **F64)
        torch.manual_seed(4)
        expected = rnn(x)
        torch.manual_seed(4)
        torch.testing.assert_close(compiled(x), expected)

    def test_repr(self):
        assert repr(self.module()).endswith("recurrent_dropout=0.4)")


def gates_by_hand(rnn, x, hx, layer=0, suffix=""):
    """r, z and n of each step from the equations, (T, B, H) each."""
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    w, u, b, c = (getattr(rnn, f"{name}_l{layer}{suffix}") for name in names)
    h, found = hx, []
    for x_t in x.flip(0) if suffix else x:
        a, s = (x_t @ w.T + b).chunk(w.shape[0] // H, -1), (h @ u.T + c).chunk(w.shape[0] // H, -1)
        z = torch.sigmoid(a[-2] + s[-2])
        r = torch.sigmoid(a[0] + s[0]) if rnn.cell != "no_reset" else torch.ones_like(z)
        product = r * s[-1] if rnn.cell != "reset_before" else (r * h) @ u[2 * H :].T + c[2 * H :]
        n = torch.tanh(a[-1] + product)
        h = (1 - z) * n + z * h
        found.append((r, z, n))
    stacked = [torch.stack(gate) for gate in zip(*found, strict=True)]
    return [gate.flip(0) for gate in stacked] if suffix else stacked


class TestGates:
    @pytest.mark.parametrize("backend", ["auto", "reference"])
    @pytest.mark.parametrize("grad", [False, True])
    @pytest.mark.parametrize("cell", CELLS)
    def test_are_those_of_the_equations(self, cell, grad, backend):
        rnn = gru_fast.GRU(I, H, 1, bidirectional=True, cell=cell, backend=backend, **F64)
        x, hx = torch.randn(T, B, I, **F64), torch.randn(2, B, H, **F64)
        with torch.set_grad_enabled(grad):
            output, h_n, gates = rnn(x, hx, return_gates=True)
        assert isinstance(gates, gru_fast.Gates)
        torch.testing.assert_close((output, h_n), rnn(x, hx))
        assert (gates.r is None) == (cell == "no_reset")
        for k, suffix in enumerate(("", "_reverse")):
            for name, expected in zip("rzn", gates_by_hand(rnn, x, hx[k], 0, suffix), strict=True):
                gate = getattr(gates, name)
                if gate is not None:
                    assert gate.shape == (2, T, B, H)
                    torch.testing.assert_close(gate[k], expected)

    @pytest.mark.parametrize("cell", CELLS)
    def test_gradients(self, cell):
        rnn = gru_fast.GRU(I, H, 1, cell=cell, recompute=True, **F64)
        x, hx = torch.randn(T, B, I, **F64, requires_grad=True), torch.randn(1, B, H, **F64)
        gates = rnn(x, hx, return_gates=True)[2]
        by_hand = gates_by_hand(rnn, x, hx[0])
        leaves = [x, *rnn.parameters()]
        ours = torch.autograd.grad(sum((g * g).sum() for g in gates if g is not None), leaves)
        expected = torch.autograd.grad(
            sum((g * g).sum() for g in by_hand[-len([g for g in gates if g is not None]) :]), leaves
        )
        torch.testing.assert_close(ours, expected)

    def test_layouts(self):
        rnn = gru_fast.GRU(I, H, L, bidirectional=True, **F64)
        x, lengths = torch.randn(T, B, I, **F64), torch.tensor([2, 6, 0, 5])
        gates = rnn(x, lengths=lengths, return_gates=True)[2]
        assert gates.z.shape == (2 * L, T, B, H)
        padding = torch.arange(T)[:, None] >= lengths
        for gate in gates:
            assert not gate[:, padding].any() and gate[:, ~padding].all()
        few = lengths.clamp(min=1)
        packed = pack_padded_sequence(x, few, enforce_sorted=False)
        for a, b in zip(
            rnn(packed, return_gates=True)[2], rnn(x, lengths=few, return_gates=True)[2],
            strict=True,
        ):  # fmt: skip
            assert torch.equal(a, b)
        alone = rnn(x[:5, 3], return_gates=True)[2]
        torch.testing.assert_close(alone.n, gates.n[:, :5, 3])
        rnn.batch_first = True
        turned = rnn(x.transpose(0, 1), lengths=lengths, return_gates=True)[2]
        assert torch.equal(turned.r, gates.r.transpose(1, 2))

    def test_compiled_and_batched(self, fresh_compiler):
        rnn = gru_fast.GRU(I, H, **F64)
        x = torch.randn(3, T, B, I, **F64)

        def update_gates(x):
            return rnn(x, return_gates=True)[2].z

        each = torch.stack([update_gates(one) for one in x])
        torch.testing.assert_close(torch.vmap(update_gates)(x), each)
        compiled = torch.compile(update_gates, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x[0]), each[0])
        jvp = torch.func.jvp(update_gates, (x[0],), (torch.ones_like(x[0]),))[1]
        vjp = torch.func.vjp(update_gates, x[0])[1](torch.ones_like(jvp))[0]
        torch.testing.assert_close(jvp.sum(), vjp.sum())


def test_what_begins_with_zeros_refuses_a_learned_state():
    gru = gru_fast.GRU(3, 4, learn_h0=True)
    with pytest.raises(RuntimeError, match="learn_h0=True"):
        gru_fast.Stream(gru)
    for convert in (notations.to_keras, notations.to_onnx, notations.to_course):
        with pytest.raises(ValueError, match="learn_h0=True"):
            convert(gru)
