# SPDX-License-Identifier: Apache-2.0
"""What `functional.gru` adds to the ops: layers, layouts, packed sequences, backends by name."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from cases import CELLS
from gru_fast import backends, functional, reference
from gru_fast.reference import GATES

T, B, I, H, L, D = 6, 4, 3, 5, 2, 2  # noqa: E741


def weights(cell: str, bias: bool = True) -> list[Tensor]:
    rows = GATES[cell] * H
    shapes: list[tuple[int, ...]] = []
    for k in range(L):
        own: list[tuple[int, ...]] = [(rows, D * H if k else I), (rows, H)]
        shapes += (own + [(rows,), (rows,)] * bias) * D
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]


def options() -> dict[str, Tensor]:
    return {
        "reset_mask": torch.rand(T, B) < 0.3,
        "reset_state": torch.randn(L * D, B, H, dtype=torch.float64),
        "h_scale": torch.rand(L * D, B, H, dtype=torch.float64),
    }


def one_direction_at_a_time(
    x: Tensor, hx: Tensor, params: list[Tensor], cell: str, lengths: Tensor | None, **given: Tensor
) -> tuple[Tensor, Tensor]:
    """Layers and directions by hand, on the reference."""
    finals = []
    per = len(params) // (L * D)
    for k in range(L):
        outputs = []
        for d in range(D):
            row = k * D + d
            own: list[Any] = [w[None] for w in params[row * per : (row + 1) * per]]
            own += [None] * (4 - per)
            output, h_n, _ = reference.layer(
                x, hx[row, None], *own, lengths, given.get("reset_mask"),
                given["reset_state"][row, None] if "reset_state" in given else None,
                given["h_scale"][row] if "h_scale" in given else None, cell, [d == 1], True,
            )  # fmt: skip
            outputs.append(output)
            finals.append(h_n)
        x = torch.cat(outputs, -1)
    return x, torch.cat(finals)


def same(ours: Any, truth: Any) -> None:
    torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_layers_and_directions(cell: str, bias: bool, batch_first: bool, backend: str) -> None:
    params, given = weights(cell, bias), options()
    x, hx = torch.randn(T, B, I).double(), torch.randn(L * D, 1, H).double().expand(-1, B, -1)
    lengths = torch.tensor([6, 0, 3, 1])
    truth, truth_h_n = one_direction_at_a_time(x, hx, params, cell, lengths, **given)
    if batch_first:
        given["reset_mask"] = given["reset_mask"].T
    output, h_n = functional.gru(
        x.transpose(0, 1) if batch_first else x, hx, params, num_layers=L, bias=bias,
        bidirectional=True, batch_first=batch_first, cell=cell, backend=backend, lengths=lengths,
        **given,
    )  # fmt: skip
    same((output.transpose(0, 1) if batch_first else output, h_n), (truth, truth_h_n))
    gradients = [
        torch.autograd.grad(o.square().sum() + h.sum(), params)
        for o, h in ((output, h_n), (truth, truth_h_n))
    ]
    same(*gradients)


@pytest.mark.parametrize("batch_first", [False, True])
def test_unbatched(batch_first: bool) -> None:
    params, given = weights("reset_after"), options()
    x, hx = torch.randn(T, B, I).double(), torch.randn(L * D, B, H).double()
    one = {"reset_mask": given["reset_mask"][:, 2]}
    one |= {k: given[k][:, 2] for k in ("reset_state", "h_scale")}
    truth, truth_h_n = one_direction_at_a_time(
        x, hx, params, "reset_after", torch.full((B,), 4), **given
    )
    ours = functional.gru(
        x[:, 2], hx[:, 2], params, num_layers=L, bidirectional=True, batch_first=batch_first,
        lengths=torch.tensor(4), **one,
    )  # fmt: skip
    same(ours, (truth[:, 2], truth_h_n[:, 2]))


@pytest.mark.parametrize("enforce_sorted", [False, True])
def test_packed_sequence_with_every_option(enforce_sorted: bool) -> None:
    """All options are in the user's order of rows, not in the sorted one."""
    params, given = weights("reset_before"), options()
    x, hx = torch.randn(T, B, I).double(), torch.randn(L * D, B, H).double()
    lengths = torch.tensor([6, 4, 4, 1] if enforce_sorted else [4, 1, 6, 4])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted)
    output, h_n = functional.gru(
        packed, hx, params, num_layers=L, bidirectional=True, cell="reset_before", **given
    )
    truth, truth_h_n = one_direction_at_a_time(x, hx, params, "reset_before", lengths, **given)
    same((pad_packed_sequence(output)[0], h_n), (truth, truth_h_n))
    assert output.sorted_indices is packed.sorted_indices
    with pytest.raises(ValueError, match="lengths: expected None"):
        functional.gru(packed, hx, params, num_layers=L, bidirectional=True, lengths=lengths)


@pytest.mark.parametrize("enforce_sorted", [False, True])
def test_resets_beside_a_packed_sequence_lie_as_batch_first_says(enforce_sorted: bool) -> None:
    params, x = weights("reset_after")[:4], torch.randn(B, B, I).double()
    mask = torch.rand(B, B) < 0.5
    lengths = torch.tensor([4, 3, 2, 1] if enforce_sorted else [2, 4, 1, 3])
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=enforce_sorted)
    output, h_n = functional.gru(packed, None, params, reset_mask=mask, batch_first=True)
    expected = functional.gru(x, None, params, reset_mask=mask, lengths=lengths, batch_first=True)
    same((pad_packed_sequence(output, batch_first=True)[0], h_n), expected)


@pytest.mark.parametrize("enforce_sorted", [False, True])
def test_what_does_not_fit_a_packed_sequence_is_refused_before_it_is_sorted(
    enforce_sorted: bool,
) -> None:
    params, mask = weights("reset_after")[:4], torch.zeros(T, B, dtype=torch.bool)
    lengths = torch.tensor([6, 5, 4, 1] if enforce_sorted else [4, 1, 6, 5])
    x = torch.randn(T, B, I).double()
    packed = pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted)
    wide = torch.zeros(1, B + 1, H).double()
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"reset_mask": [True]}, TypeError, "reset_mask should be a Tensor, got: list"),
        ({"reset_mask": mask[0]}, RuntimeError, rf"reset_mask: expected shape \(T, B\) = \({T}"),
        ({"reset_mask": mask.new_zeros(T, B + 1)}, RuntimeError, "reset_mask: expected shape"),
        ({"reset_mask": mask, "batch_first": True}, RuntimeError, rf"\(B, T\) = \({B}, {T}\)"),
        ({"reset_mask": mask.int()}, RuntimeError, "reset_mask: expected dtype bool"),
        ({"reset_mask": mask, "reset_state": wide}, RuntimeError, "reset_state: expected hidden"),
        ({"h_scale": wide}, RuntimeError, "h_scale: expected hidden size"),
    ]
    for given, error, message in cases:
        with pytest.raises(error, match=message):
            functional.gru(packed, None, params, **given)


@pytest.mark.parametrize("packed", [False, True])
def test_dropout_takes_the_random_stream_of_nn_gru(packed: bool) -> None:
    theirs = nn.GRU(I, H, L, bidirectional=True, dropout=0.4).double()
    x: Any = torch.randn(T, B, I).double()
    if packed:
        x = pack_padded_sequence(x, torch.tensor([4, 1, 6, 4]), enforce_sorted=False)
    torch.manual_seed(3)
    truth, truth_h_n = theirs(x)
    after = torch.rand(1)
    torch.manual_seed(3)
    output, h_n = functional.gru(
        x, None, theirs._flat_weights, num_layers=L, bidirectional=True, dropout=0.4, training=True
    )
    same((output, h_n), (truth, truth_h_n))
    assert torch.equal(torch.rand(1), after)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_dropout_of_one_unit_in_both_directions(backend: str) -> None:
    """The one size at which the reference's output lies otherwise in memory than its shape says."""
    theirs = nn.GRU(I, 1, L, bidirectional=True, dropout=0.4).double()
    options: Any = {"num_layers": L, "bidirectional": True, "dropout": 0.4, "training": True}
    x = torch.randn(T, B, I).double()
    torch.manual_seed(3)
    truth = theirs(x)
    torch.manual_seed(3)
    same(functional.gru(x, None, theirs._flat_weights, backend=backend, **options), truth)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("batched", [False, True])
def test_one_step(cell: str, batched: bool) -> None:
    rows = GATES[cell] * H
    own = [torch.randn(s).double() for s in ((rows, I), (rows, H), (rows,), (rows,))]
    x, hx = torch.randn(B, I).double(), torch.randn(B, H).double()
    truth = functional.gru(x[None], hx[None], own, cell=cell)[1][0]
    if batched:
        same(functional.gru_cell(x, hx, *own, cell=cell), truth)
        zero = functional.gru_cell(x, torch.zeros_like(hx), *own, cell=cell)
        same(functional.gru_cell(x, None, *own, cell=cell), zero)
    else:
        same(functional.gru_cell(x[1], hx[1], *own, cell=cell), truth[1])


def test_one_step_of_inputs_as_wide_as_the_state() -> None:
    """So that no shape tells the two from each other."""
    theirs = nn.GRUCell(4, 4)
    x, hx = torch.randn(2, 3, 4)
    for run in (torch.no_grad, torch.enable_grad):
        with run():
            own = functional.gru_cell(x, hx, *theirs.parameters())
            torch.testing.assert_close(own, theirs(x, hx))


def test_backends_by_name() -> None:
    own = weights("reset_after")[:4]
    x = torch.randn(T, B, I).double()
    for name in backends.available_backends():
        same(functional.gru(x, None, own, backend=name), functional.gru(x, None, own))
    reasons = backends.why_not("cpu", torch.float64)
    assert set(reasons) | set(backends.available_backends()) == set(backends.NAMES) - {"auto"}
    for name, reason in reasons.items():
        with pytest.raises(RuntimeError, match=f"backend='{name}' cannot take this call") as error:
            functional.gru(x, None, own, backend=name)
        assert reason in str(error.value)
    with pytest.raises(ValueError, match="backend: expected one of"):
        functional.gru(x, None, own, backend="fastest")
    if "cpu" in backends.available_backends():
        with pytest.raises(RuntimeError, match="only the reference has it"):
            torch.func.jvp(lambda x: functional.gru(x, None, own, backend="cpu")[0], (x,), (x,))


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"input": torch.randn(3)}, ValueError, "input: expected 2 or 3 dimensions, got 1"),
    ({"input": torch.randn(T, B, I)}, ValueError, "input: expected the dtype of the weights"),
    ({"input": torch.randn(T, B, 7).double()}, RuntimeError, "input_size, 3, got 7"),
    ({"hx": torch.randn(1, H).double()}, RuntimeError, "hx: expected 3 dimensions"),
    ({"hx": torch.randn(1, 3, H).double()}, RuntimeError, "hx: expected hidden size"),
    ({"hx": torch.randn(1, B, H)}, RuntimeError, "hx: expected the dtype of input"),
    ({"num_layers": 2}, RuntimeError, "params: expected 8 tensors"),
    ({"cell": "lstm"}, RuntimeError, "cell: expected"),
    ({"lengths": torch.ones(B)}, RuntimeError, "lengths: expected"),
    ({"lengths": [1, 2]}, TypeError, "lengths should be a Tensor, got: list"),
    ({"reset_mask": torch.zeros(T, B)}, RuntimeError, "reset_mask: expected dtype bool, got torch"),
    (
        {"reset_mask": torch.zeros(B + 1, T, dtype=torch.bool)},
        RuntimeError,
        rf"reset_mask: expected shape \(T, B\) = \({T}, {B}\), got \({B + 1}, {T}\)",
    ),
    (
        {"reset_mask": torch.zeros(B, T + 1, dtype=torch.bool), "batch_first": True}
        | {"input": torch.randn(B, T, I).double()},
        RuntimeError,
        rf"reset_mask: expected shape \(B, T\) = \({B}, {T}\), got \({B}, {T + 1}\)",
    ),
    (
        {"input": torch.randn(T, I).double(), "lengths": torch.tensor([1, 2])},
        RuntimeError,
        r"lengths: expected one value for an unbatched input, got shape \(2,\)",
    ),
    ({"h_scale": torch.ones(1, 3, H).double()}, RuntimeError, "h_scale: expected"),
    ({"reset_state": torch.ones(1, B, H).double()}, RuntimeError, "reset_state: expected"),
    ({"reset_state": 0.0}, TypeError, "reset_state should be a Tensor, got: float"),
    ({"num_layers": 0, "params": []}, ValueError, "num_layers: expected at least 1, got 0"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m for *_, m in BAD])
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    call = {
        "input": torch.randn(T, B, I).double(),
        "hx": None,
        "params": weights("reset_after")[:4],
    }
    with pytest.raises(error, match=message):
        functional.gru(**{**call, **change})


@pytest.mark.parametrize("name", ["hx", "reset_state", "h_scale"])
@pytest.mark.parametrize(
    ("form", "expected"), [("a batched", 3), ("an unbatched", 2), ("a packed", 3)]
)
def test_states_have_the_dimensions_of_the_input(form: str, expected: int, name: str) -> None:
    x: Any = torch.randn(T, 1, I).double()
    if form == "an unbatched":
        x = x.squeeze(1)
    elif form == "a packed":
        x = pack_padded_sequence(x, torch.tensor([T]))
    for dims in {0, 1, 2, 3, 4} - {expected}:
        state = torch.zeros((1, 1, 1, H)[4 - dims :]).double()
        message = f"^{name}: expected {expected} dimensions for {form} input, got {dims}$"
        with pytest.raises(RuntimeError, match=message):
            functional.gru(x, **{"hx": None, name: state}, params=weights("reset_after")[:4])


@pytest.mark.parametrize("name", ["input", "hx", "reset_mask", "reset_state", "h_scale"])
@pytest.mark.parametrize("form", ["padded", "unbatched", "packed"])
@pytest.mark.parametrize("grad", [False, True])
def test_what_lies_elsewhere_has_the_callers_name(name: str, form: str, grad: bool) -> None:
    rows = 1 if form == "unbatched" else B
    state = torch.zeros(1, rows, H).double()
    call: dict[str, Any] = {
        "input": torch.randn(T, rows, I).double(),
        "reset_mask": torch.zeros(T, rows, dtype=torch.bool),
        **dict.fromkeys(("hx", "reset_state", "h_scale"), state),
    }
    call[name] = call[name].to("meta")
    if form == "unbatched":
        call = {key: value.squeeze(1) for key, value in call.items()}
    elif form == "packed":
        call["input"] = pack_padded_sequence(call["input"], torch.full((B,), T))
    expected = "input" if name != "input" else "the weights"
    with (
        torch.set_grad_enabled(grad),
        pytest.raises(RuntimeError, match=f"{name}: expected the device of {expected}, cpu, got"),
    ):
        functional.gru(**call, params=weights("reset_after")[:4])


@pytest.mark.parametrize("grad", [False, True])
def test_the_same_of_one_step(grad: bool) -> None:
    x, own = torch.randn(B, I).double(), [w.detach() for w in weights("reset_after")[:4]]
    with torch.set_grad_enabled(grad):
        with pytest.raises(RuntimeError, match="hx: expected the device of input, cpu, got meta"):
            functional.gru_cell(x, torch.zeros(B, H, device="meta").double(), *own)
        with pytest.raises(RuntimeError, match="input: expected the device of the weights, cpu"):
            functional.gru_cell(x.to("meta"), torch.zeros(B, H).double(), *own)
