# SPDX-License-Identifier: Apache-2.0
"""`num_heads=`: block-diagonal recurrent weights, the same as a loop of small GRUs."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, func, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import gru_fast
from cases import CELLS
from gru_fast import init, notations, packed, reference
from versions import EXPORTS_FREE_HEADS

K, H, I = 3, 12, 5  # noqa: E741


def heads_gru(**options: Any) -> gru_fast.GRU:
    return gru_fast.GRU(I, H, num_heads=K, **({"dtype": torch.float64} | options))


def small_grus(gru: gru_fast.GRU, layer: int) -> list[gru_fast.GRU]:
    """Each head of a layer as a GRU of its own, by the rule of the documentation."""
    width = gru.weight_ih_l0.shape[1] if layer == 0 else gru.weight_ih_l1.shape[1]
    options = {"bias": gru.bias, "bidirectional": gru.bidirectional, "cell": gru.cell}
    N = reference.GATES[gru.cell]
    found = []
    for head in range(K):
        small = gru_fast.GRU(width, H // K, dtype=torch.float64, backend="reference", **options)
        with torch.no_grad():
            for name, parameter in small.named_parameters():
                whole = gru.get_parameter(name.replace("_l0", f"_l{layer}"))
                gates = [gate.chunk(K)[head] for gate in whole.chunk(N)]
                parameter.copy_(torch.cat(gates))
        found.append(small)
    return found


def by_loop(gru: gru_fast.GRU, x: Tensor, hx: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    """The layers as loops over their heads; outputs are joined direction by direction."""
    D = 2 if gru.bidirectional else 1
    reset_state = given.pop("reset_state", None)
    finals = []
    for layer in range(gru.num_layers):
        rows = slice(layer * D, (layer + 1) * D)
        parts = []
        for head, small in enumerate(small_grus(gru, layer)):
            start = None if reset_state is None else reset_state[rows].chunk(K, -1)[head]
            parts.append(small(x, hx[rows].chunk(K, -1)[head], reset_state=start, **given))
        outputs = torch.stack([output.unflatten(-1, (D, H // K)) for output, _ in parts], -2)
        x = outputs.flatten(-3)
        finals.append(torch.cat([h_n for _, h_n in parts], -1))
    return x, torch.cat(finals)


@pytest.mark.parametrize("features", ["plain", "everything"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("cell", CELLS)
def test_heads_are_a_loop_of_small_grus(cell: str, bidirectional: bool, features: str) -> None:
    gru = heads_gru(num_layers=2, cell=cell, bidirectional=bidirectional, bias=features != "plain")
    T, B, D = 6, 4, 2 if bidirectional else 1
    x = torch.randn(T, B, I, dtype=torch.float64)
    hx, start = torch.randn(2, 2 * D, B, H, dtype=torch.float64)
    given: dict[str, Any] = {}
    if features == "everything":
        lengths, mask = torch.tensor([6, 0, 3, 5]), torch.rand(T, B) < 0.3
        given = {"lengths": lengths, "reset_mask": mask, "reset_state": start}
    output, h_n = gru(x, hx, **given)
    truth, truth_h_n = by_loop(gru, x, hx, **given)
    torch.testing.assert_close((output, h_n), (truth, truth_h_n), rtol=0, atol=1e-13)
    torch.testing.assert_close(gru(x)[0], by_loop(gru, x, torch.zeros_like(hx))[0])


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
@pytest.mark.parametrize("cell", CELLS)
def test_gradients(cell: str, recompute: bool) -> None:
    """Against the reference on the dense weights: blocks on the diagonal, nothing beside them."""
    gru = heads_gru(cell=cell, bidirectional=True, recompute=recompute)
    dense = gru_fast.GRU(
        I, H, bidirectional=True, cell=cell, dtype=torch.float64, backend="reference"
    )
    N = reference.GATES[cell]
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            own = gru.get_parameter(name)
            if name.startswith("weight_hh"):
                own = torch.cat([torch.block_diag(*gate.chunk(K)) for gate in own.chunk(N)])
            parameter.copy_(own)
    x = torch.randn(6, 4, I, dtype=torch.float64)
    found = []
    for model in (gru, dense):
        leaf = x.clone().requires_grad_()
        output, h_n = model(leaf)
        (output.square().sum() + h_n.sin().sum()).backward()
        found.append({"x": leaf.grad} | {n: p.grad for n, p in model.named_parameters()})
    for name, truth in found[1].items():
        if name.startswith("weight_hh"):
            gates = [gate.unflatten(0, (K, -1)) for gate in truth.chunk(N)]
            truth = torch.cat([g[k].chunk(K, -1)[k] for g in gates for k in range(K)])
        torch.testing.assert_close(found[0][name], truth, rtol=1e-10, atol=1e-12)


def test_heads_do_not_see_each_other() -> None:
    gru = heads_gru()
    x, hx = torch.randn(6, 1, I, dtype=torch.float64), torch.zeros(1, 1, H, dtype=torch.float64)
    other = hx.clone()
    other[..., : H // K] = 1.0
    before, after = gru(x, hx)[0], gru(x, other)[0]
    assert torch.equal(before[..., H // K :], after[..., H // K :])
    assert not torch.equal(before, after)


def test_one_grouped_call_of_the_op() -> None:
    gru = heads_gru(bidirectional=True)
    x = torch.randn(6, 2, I, dtype=torch.float64)
    with torch.profiler.profile(record_shapes=True) as profile:
        gru(x)
    (call,) = [e for e in profile.events() if e.name == "gru_fast::layer"]
    assert call.input_shapes[:2] == [[6, 2, I], [2 * K, 2, H // K]]


def test_one_head_is_a_plain_gru_to_the_bit() -> None:
    torch.manual_seed(0)
    one = gru_fast.GRU(I, H, 2, num_heads=1)
    torch.manual_seed(0)
    theirs = nn.GRU(I, H, 2)
    assert all(map(torch.equal, one.parameters(), theirs.parameters()))


def test_parameters_and_initial_values() -> None:
    gru = heads_gru(num_layers=2, bidirectional=True, cell="no_reset")
    shapes = {n: tuple(p.shape) for n, p in gru.named_parameters() if not n.endswith("reverse")}
    assert shapes == {
        "weight_ih_l0": (2 * H, I), "weight_hh_l0": (2 * H, H // K),
        "bias_ih_l0": (2 * H,), "bias_hh_l0": (2 * H,),
        "weight_ih_l1": (2 * H, 2 * H), "weight_hh_l1": (2 * H, H // K),
        "bias_ih_l1": (2 * H,), "bias_hh_l1": (2 * H,),
    }  # fmt: skip
    largest = max(float(p.detach().abs().max()) for p in gru.parameters())
    assert 0.95 * (H // K) ** -0.5 < largest <= (H // K) ** -0.5
    init.orthogonal_(gru)
    for block in gru.weight_hh_l0.chunk(2 * K):
        torch.testing.assert_close(block @ block.T, torch.eye(H // K, dtype=torch.float64))


def test_state_dict_pickle_and_copy() -> None:
    gru = heads_gru(bidirectional=True)
    x = torch.randn(6, 2, I, dtype=torch.float64)
    file = io.BytesIO()
    torch.save(gru.state_dict(), file)
    file.seek(0)
    other = heads_gru(bidirectional=True)
    other.load_state_dict(torch.load(file, weights_only=True))
    file = io.BytesIO()
    torch.save(gru, file)
    file.seek(0)
    for again in (other, copy.deepcopy(gru), torch.load(file, weights_only=False)):
        assert torch.equal(again(x)[0], gru(x)[0])
    with pytest.raises(RuntimeError, match="size mismatch for weight_hh_l0"):
        gru_fast.GRU(I, H, bidirectional=True).load_state_dict(gru.state_dict())
    assert "num_heads=3" in repr(gru)


def test_forms_of_the_call() -> None:
    """Batch first, unbatched, packed, one step, and without a gradient."""
    gru = heads_gru(batch_first=True)
    x = torch.randn(2, 6, I, dtype=torch.float64)
    output, h_n = gru(x)
    assert output.shape == (2, 6, H) and h_n.shape == (1, 2, H)
    torch.testing.assert_close(gru(x[0])[0], output[0])
    packed_x = pack_padded_sequence(x, torch.tensor([4, 6]), True, enforce_sorted=False)
    by_packed, h_packed = gru(packed_x, torch.zeros_like(h_n))
    padded = pad_packed_sequence(by_packed, True)[0]
    by_lengths, h_lengths = gru(x, lengths=torch.tensor([4, 6]))
    torch.testing.assert_close((padded, h_packed), (by_lengths, h_lengths))
    hx = torch.zeros_like(h_n)
    with torch.no_grad():
        for t in range(6):
            step, hx = gru(x[:, t : t + 1], hx)
            torch.testing.assert_close(step[:, 0], output[:, t])
    assert gru(x[:, :0])[0].shape == (2, 0, H) and gru(x[:0])[0].shape == (0, 6, H)


def test_float32_single_steps() -> None:
    """The way of single steps past the dispatcher knows no heads."""
    gru = heads_gru(dtype=torch.float32)
    x, hx = torch.randn(1, 2, I), torch.randn(1, 2, H)
    with torch.no_grad():
        output, h_n = gru(x, hx)
    torch.testing.assert_close(h_n, gru(x, hx)[1])
    torch.testing.assert_close(output, h_n)


@pytest.mark.skipif(not EXPORTS_FREE_HEADS, reason="torch.export of before 2.13")
def test_exported_with_free_sizes() -> None:
    gru, x = heads_gru(bidirectional=True), torch.randn(6, 2, I, dtype=torch.float64)
    T, B = torch.export.Dim("T"), torch.export.Dim("B")
    program = torch.export.export(gru, (x,), dynamic_shapes={"input": {0: T, 1: B}})
    longer = torch.randn(9, 3, I, dtype=torch.float64)
    torch.testing.assert_close(program.module()(longer), gru(longer))


@pytest.mark.usefixtures("fresh_compiler")
def test_transforms() -> None:
    """Compiled, and as an ensemble: groups of groups."""
    gru = heads_gru(bidirectional=True)
    x = torch.randn(6, 2, I, dtype=torch.float64)
    compiled = torch.compile(gru, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), gru(x))
    models = [gru, heads_gru(bidirectional=True)]
    params, _ = func.stack_module_state(models)

    def loss(p: dict[str, Tensor]) -> Tensor:
        return func.functional_call(gru, p, (x,))[0].square().sum()

    found = torch.vmap(func.grad(loss))(params)
    for k, model in enumerate(models):
        truth = torch.autograd.grad(model(x)[0].square().sum(), list(model.parameters()))
        for value, expected in zip(found.values(), truth, strict=True):
            torch.testing.assert_close(value[k], expected)


def test_what_has_no_heads_says_so() -> None:
    gru = heads_gru()
    report = gru_fast.revert(nn.ModuleList([gru]))
    assert report.skipped == {"0": "torch has no num_heads=3"}
    assert type(gru) is gru_fast.GRU
    reason = packed.why_not(gru)
    assert reason is not None and "num_heads=3" in reason
    for convert in (notations.to_keras, notations.to_onnx):
        with pytest.raises(ValueError, match="num_heads=3"):
            convert(gru)
    with pytest.raises(ValueError, match="num_heads=3"):
        notations.to_course(heads_gru(cell="reset_before"))


def test_explained() -> None:
    gru = heads_gru(bidirectional=True)
    found = gru_fast.explain(gru, torch.randn(6, 2, I, dtype=torch.float64))
    assert found.backend == "cpu"
    assert found.flops == 2 * 6 * 2 * 2 * 3 * H * (I + H // K)


def test_bad_arguments() -> None:
    for given in (0, -2, 5, 24):
        with pytest.raises(ValueError, match=f"num_heads: .*hidden_size=12, got {given}"):
            gru_fast.GRU(I, H, num_heads=given)
    for wrong in (True, 2.0, "2"):
        with pytest.raises(TypeError, match="num_heads should be of type int"):
            gru_fast.GRU(I, H, num_heads=wrong)
    gru = heads_gru()
    x = torch.randn(6, 2, I, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="hx: expected hidden size"):
        gru(x, torch.zeros(1, 2, H // K, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="weight_hh: expected shape"):
        gru_fast.functional.gru(x, None, list(gru.parameters()), num_heads=4)
    for given in (0, -1, 5, 24):
        with pytest.raises(ValueError, match=f"num_heads: .*the hidden size 12, got {given}$"):
            gru_fast.functional.gru(x, None, list(gru.parameters()), num_heads=given)
    with pytest.raises(RuntimeError, match="cell: expected one of"):
        gru_fast.functional.gru(x, None, list(gru.parameters()), num_heads=K, cell="gru")


@pytest.mark.parametrize("cell", CELLS)
def test_gates_and_recurrent_dropout(cell: str) -> None:
    """Units in the order of the output, and one mask for all heads."""
    gru = heads_gru(num_layers=2, bidirectional=True, cell=cell)
    x = torch.randn(6, 4, I, dtype=torch.float64)
    output, _, gates = gru(x, return_gates=True)
    torch.testing.assert_close(output, gru(x)[0])
    small = [s(x, return_gates=True)[2] for s in small_grus(gru, 0)]
    for name in ("r", "z", "n"):
        parts = [getattr(g, name) for g in small]
        ours = getattr(gates, name)
        assert (ours is None) == (parts[0] is None)
        if ours is not None:
            torch.testing.assert_close(ours[:2], torch.cat(parts, -1))
    scale = (torch.rand(4, 4, H) < 0.5).double() * 2
    params = list(gru.parameters())
    options: dict[str, Any] = {"bidirectional": True, "cell": cell, "num_heads": K}
    first = gru_fast.functional.gru(x, None, params[:8], h_scale=scale[:2], **options)[1]
    for head, model in enumerate(small_grus(gru, 0)):
        own = scale[:2].chunk(K, -1)[head].contiguous()
        truth = gru_fast.functional.gru(
            x, None, list(model.parameters()), bidirectional=True, cell=cell, h_scale=own
        )
        torch.testing.assert_close(first.chunk(K, -1)[head], truth[1])
    dropped = heads_gru(recurrent_dropout=0.5)
    assert not torch.equal(dropped(x)[0], dropped.eval()(x)[0])
