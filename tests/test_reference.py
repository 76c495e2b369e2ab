# SPDX-License-Identifier: Apache-2.0
"""The specification itself: against nn.GRU, a loop over scalars, and autograd."""

import numpy as np
import pytest
import torch
from torch import Tensor

from cases import CELLS, FEATURES, Case, LayerInputs, layer_inputs
from gru_fast import reference
from gru_fast import reference_sampling as sampling

DIRECTIONS = [(False,), (True,), (False, True), (True, False, True)]


def sigmoid(a: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-a))


def scalar_loop(i: LayerInputs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One row, one step at a time, written from the definition of the semantics."""
    T, B = i.x.shape[:2]
    G, _, H = i.h0.shape
    output, h_n = np.zeros((T, B, G * H)), np.zeros((G, B, H))
    slots = reference.SLOTS[i.cell]
    workspace = np.zeros((T, B, G, slots * H))
    for g in range(G):
        w, u = i.weight_ih[g].numpy(), i.weight_hh[g].numpy()
        zero = np.zeros(len(w))
        b = zero if i.bias_ih is None else i.bias_ih[g].numpy()
        c = zero if i.bias_hh is None else i.bias_hh[g].numpy()
        for row in range(B):
            end = T if i.lengths is None else int(i.lengths[row])
            mask = np.zeros(T + 1, bool)
            if i.reset_mask is not None:
                mask[:end] = i.reset_mask[:end, row].numpy()
            h = i.h0[g, row].numpy()
            for t in reversed(range(end)) if i.reverse[g] else range(end):
                if mask[t + 1] if i.reverse[g] else mask[t]:
                    h = np.zeros(H) if i.reset_state is None else i.reset_state[g, row].numpy()
                x = (i.x[t, row] if i.x.dim() == 3 else i.x[t, row, g]).numpy()
                a = w @ x + b
                s = h
                if i.h_scale is not None:
                    s = h * i.h_scale[row, g * H : (g + 1) * H].numpy()
                product = u @ s + c
                if i.cell == "no_reset":
                    z, n = sigmoid(a[:H] + product[:H]), np.tanh(a[H:] + product[H:])
                    saved = [z, n]
                else:
                    r, z = sigmoid(a[:H] + product[:H]), sigmoid(a[H : 2 * H] + product[H : 2 * H])
                    if i.cell == "reset_after":
                        n = np.tanh(a[2 * H :] + r * product[2 * H :])
                        saved = [product[2 * H :], r, z, n]
                    else:
                        n = np.tanh(a[2 * H :] + u[2 * H :] @ (r * s) + c[2 * H :])
                        saved = [r, z, n]
                h = (1 - z) * n + z * h
                output[t, row, g * H : (g + 1) * H] = h
                workspace[t, row, g] = np.concatenate(saved)
            h_n[g, row] = h
    return output, h_n, workspace


@pytest.mark.parametrize("reverse", DIRECTIONS, ids=str)
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("shape", [{}, {"bias": False, "shared_x": False, "T": 5, "H": 1}], ids=str)
def test_forward_against_a_scalar_loop(
    cell: str, features: str, reverse: tuple[bool, ...], shape: dict[str, int]
) -> None:
    inputs = layer_inputs(Case(cell, features, reverse, **shape))
    ours = reference.layer(*inputs.arguments())
    for name, value, truth in zip(
        ("output", "h_n", "workspace"), ours, scalar_loop(inputs), strict=True
    ):
        torch.testing.assert_close(value, torch.from_numpy(truth), rtol=0, atol=1e-14, msg=name)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_forward_against_nn_gru(bidirectional: bool) -> None:
    G, T, B, I, H = 2 if bidirectional else 1, 6, 4, 3, 5  # noqa: E741
    theirs = torch.nn.GRU(I, H, bidirectional=bidirectional, dtype=torch.float64)
    x, h0 = torch.randn(T, B, I).double(), torch.randn(G, B, H).double()
    expected, expected_h_n = theirs(x, h0)
    weights = [torch.stack(theirs._flat_weights[k::4]) for k in range(4)]
    output, h_n, _ = reference.layer(
        x, h0, *weights, None, None, None, None, "reset_after", [False, True][:G], False
    )
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(h_n, expected_h_n, rtol=0, atol=1e-14)


def through_autograd(inputs: LayerInputs, grads: list[Tensor]) -> list[Tensor | None]:
    outputs = reference.layer(*inputs.arguments())
    leaves = list(inputs.leaves().values())
    return list(torch.autograd.grad(outputs[: len(grads)], leaves, grads, allow_unused=True))


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recompute"])
@pytest.mark.parametrize("reverse", DIRECTIONS, ids=str)
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("cell", CELLS)
def test_backward_against_autograd(
    cell: str, features: str, reverse: tuple[bool, ...], recompute: bool
) -> None:
    """With a gradient of the workspace too, as in double backward."""
    inputs = layer_inputs(Case(cell, features, reverse), grad=True)
    output, h_n, workspace = (v.detach() for v in reference.layer(*inputs.arguments()))
    grads = [torch.randn_like(v) for v in (output, h_n, workspace)]
    if recompute:
        grads, workspace = grads[:2], workspace.new_empty(0)
    expected = dict(zip(inputs.leaves(), through_autograd(inputs, grads), strict=True))
    optional = {"reset_state": None, "h_scale": None, **expected}
    ours = reference.layer_backward(
        *grads, *[None] * (3 - len(grads)), *inputs.arguments()[:10], output, workspace, cell,
        list(reverse), recompute, [True] * 8,
    )  # fmt: skip
    for (name, truth), value in zip(_in_order(optional), ours, strict=True):
        if truth is None:
            assert value.shape == (0,), name
        else:
            torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-13, msg=name)


def _in_order(named: dict[str, Tensor | None]) -> list[tuple[str, Tensor | None]]:
    names = (
        "x", "h0", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "reset_state", "h_scale"
    )  # fmt: skip
    return [(n, named[n]) for n in names]


@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck(cell: str) -> None:
    inputs = layer_inputs(Case(cell, "everything", (False, True), T=3, B=3, I=2, H=2), grad=True)
    leaves = inputs.leaves()

    def call(*values: Tensor) -> tuple[Tensor, ...]:
        return reference.layer(*inputs.arguments(**dict(zip(leaves, values, strict=True))))

    assert torch.autograd.gradcheck(call, tuple(leaves.values()), check_forward_ad=True)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("reverse", DIRECTIONS[:3], ids=str)
def test_padding_is_never_used(cell: str, reverse: tuple[bool, ...]) -> None:
    inputs = layer_inputs(Case(cell, "everything", reverse), grad=True)
    assert inputs.lengths is not None and inputs.reset_mask is not None
    clean = reference.layer(*inputs.arguments())
    grads = [torch.randn_like(v) for v in clean]
    padding = torch.arange(4)[:, None] >= inputs.lengths
    garbage = torch.where(padding[..., None], torch.nan, inputs.x.detach()).requires_grad_()
    dirty = LayerInputs(*inputs.arguments(x=garbage, reset_mask=inputs.reset_mask | padding))
    for value, truth in zip(reference.layer(*dirty.arguments()), clean, strict=True):
        assert torch.equal(value, truth)
    for value, truth in zip(
        through_autograd(dirty, grads), through_autograd(inputs, grads), strict=True
    ):
        assert torch.equal(value, truth)


def test_scan_is_layer_after_projection() -> None:
    inputs = layer_inputs(Case("reset_before", "everything", (True, False)))
    gates_x = reference.project(inputs.x, inputs.weight_ih, inputs.bias_ih)
    rest = inputs.arguments()
    for ours, truth in zip(
        reference.scan(gates_x, rest[1], rest[3], *rest[5:]), reference.layer(*rest), strict=True
    ):
        assert torch.equal(ours, truth)


PHILOX_VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), PHILOX_VECTORS)
def test_philox_known_answers(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    """The vectors published with Random123 for philox4x32-10."""
    words = sampling.philox_block([torch.tensor(c) for c in counter], key)
    assert [int(w) for w in words] == list(expected)
    position = torch.tensor(counter[0] | _signed_high(counter[1]))
    stream = torch.tensor(counter[2] | _signed_high(counter[3]))
    assert int(sampling.philox(key[0] | key[1] << 32, position, stream)) == expected[0]


def _signed_high(word: int) -> int:
    return (word - (1 << 32) if word >> 31 else word) << 32


def test_uniform_is_in_the_unit_interval_and_depends_on_every_argument() -> None:
    position, stream = torch.arange(500)[:, None], torch.arange(40)
    u = sampling.uniform(7, position, stream)
    assert u.shape == (500, 40) and u.dtype == torch.float32
    assert 0 <= float(u.min()) and float(u.max()) < 1
    assert u.unique().numel() > 19900
    assert abs(float(u.mean()) - 0.5) < 0.01
    assert not torch.equal(u, sampling.uniform(7 + 2**32, position, stream))
    assert torch.equal(u[3, 5], sampling.uniform(7, torch.tensor(3), torch.tensor(5)))


def test_uniform_stays_below_one() -> None:
    assert float(torch.tensor(0xFFFFFFFF >> 8).float() * 2.0**-24) < 1


def draws(logits: Tensor, **filters: float) -> list[int]:
    u = (torch.arange(1000) + 0.5) / 1000
    return sampling.draw(logits.expand(1000, -1), u, **filters).tolist()


def test_draw_inverts_the_cumulative_distribution() -> None:
    tokens = draws(torch.tensor([0.2, 0.5, 0.3]).log())
    assert tokens == [0] * 200 + [1] * 500 + [2] * 300
    assert draws(torch.tensor([0.2, 0.5, 0.3]).log() * 3, temperature=3.0) == tokens


def test_draw_filters() -> None:
    logits = torch.tensor([0.1, 0.4, 0.1, 0.4]).log()
    assert set(draws(logits, top_k=1)) == {1}
    assert set(draws(logits, top_k=3)) == {0, 1, 3}
    assert set(draws(logits, top_p=0.39)) == {1}
    assert set(draws(logits, top_p=0.41)) == {1, 3}
    assert set(draws(logits, top_p=0.81)) == {0, 1, 3}
    assert set(draws(logits, top_p=1e-9)) == {1}
    assert set(draws(torch.zeros(4), top_p=0.5)) == {0, 1}
    assert set(draws(torch.zeros(4), top_k=3, min_p=1.0)) == {0, 1, 2}
    assert set(draws(logits, min_p=0.24)) == {0, 1, 2, 3}
    assert set(draws(logits, min_p=0.26)) == {1, 3}
    assert set(draws(logits, top_k=3, top_p=0.85, min_p=0.0)) == {1, 3}
    assert draws(logits, top_k=100, top_p=1.0) == draws(logits)


def test_draw_never_takes_what_has_no_weight() -> None:
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf])
    assert draws(logits) == [1] * 500 + [3] * 500
    edges = torch.tensor([0.0, 1 - 2.0**-24])
    assert sampling.draw(logits.expand(2, -1), edges).tolist() == [1, 3]


def test_greedy_takes_the_lowest_of_equals() -> None:
    assert sampling.greedy(torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]])).tolist() == [1, 0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_draw_rejects_bad_logits(bad: float) -> None:
    logits = torch.full((2, 3), -torch.inf if bad == -torch.inf else 0.0)
    logits[1, 1] = bad
    logits[0] = 0.0
    for call in (lambda: sampling.draw(logits, torch.zeros(2)), lambda: sampling.greedy(logits)):
        with pytest.raises(ValueError, match="logits: expected"):
            call()


@pytest.mark.parametrize(
    "argument",
    [
        {"temperature": 0.0}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0},
        {"top_p": 1.5}, {"min_p": -0.1}, {"min_p": 1.1},
    ],
    ids=str,
)  # fmt: skip
def test_draw_rejects_bad_arguments(argument: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(argument))):
        draws(torch.zeros(3), **argument)


def test_seed_from_generator_advances_it_once() -> None:
    first, second = (torch.Generator().manual_seed(5) for _ in range(2))
    seeds = [sampling.seed_from_generator(first) for _ in range(3)]
    assert len(set(seeds)) == 3
    assert seeds == [
        int(torch.empty((), dtype=torch.int64).random_(generator=second)) for _ in range(3)
    ]
    torch.manual_seed(5)
    assert [sampling.seed_from_generator() for _ in range(3)] == seeds
