# SPDX-License-Identifier: Apache-2.0
"""`LayerNormGRU` beside the same layer in plain torch, as the library haste writes it for the CPU.

A Python loop over `F.layer_norm` and the gates, and that loop scripted by TorchScript.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cases import Case, square
from benchmarks.features.row import (
    Call,
    Drawn,
    Named,
    Row,
    Tensors,
    Way,
    inference,
    leaves,
    load,
    training,
)
from gru_fast import LayerNormGRU

WEIGHTS = ("weight_ih_l0", "weight_hh_l0", "gamma_ih_l0", "gamma_hh_l0", "bias_ih_l0", "bias_hh_l0")


def _step(a: Tensor, h: Tensor, weight: Tensor, gamma: Tensor, bias: Tensor) -> Tensor:
    k = F.layer_norm(F.linear(h, weight), [weight.size(0)], gamma, bias)
    a_r, a_z, a_n = a.chunk(3, 1)
    k_r, k_z, k_n = k.chunk(3, 1)
    z = torch.sigmoid(a_z + k_z)
    return z * h + (1 - z) * torch.tanh(a_n + torch.sigmoid(a_r + k_r) * k_n)


def _loop(
    x: Tensor,
    h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    gamma_ih: Tensor,
    gamma_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
) -> Tensor:
    gates_x = F.layer_norm(F.linear(x, weight_ih), [weight_ih.size(0)], gamma_ih, bias_ih)
    steps = []
    for a in gates_x.unbind(0):
        h = _step(a, h, weight_hh, gamma_hh, bias_hh)
        steps.append(h)
    return torch.stack(steps)


Layer = Callable[..., Tensor]


def _scripted() -> Layer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted: Layer = torch.jit.script(_loop)
    return scripted


def _plain(make: Callable[[], Layer], train: bool) -> Way:
    """A loop over the tensors of the problem, as a way to solve it."""

    def way(tensors: Tensors) -> Call:
        layer = make()
        used = leaves(tensors, ("x", "h0", *WEIGHTS)) if train else tensors

        def forward() -> Tensors:
            output = layer(used["x"], used["h0"], *[used[name] for name in WEIGHTS])
            return {"output": output}

        return _finished(forward, used, tensors, train)

    return way


def _ours(train: bool) -> Way:
    def way(tensors: Tensors) -> Call:
        rnn = LayerNormGRU(tensors["x"].shape[2], tensors["h0"].shape[1], dtype=tensors["x"].dtype)
        used = load(rnn, tensors) | leaves(tensors, ("x", "h0")) if train else tensors
        if not train:
            load(rnn, tensors)

        def forward() -> Tensors:
            return {"output": rnn(used["x"], used["h0"].unsqueeze(0))[0]}

        return _finished(forward, used, tensors, train)

    return way


def _finished(forward: Call, used: Tensors, tensors: Tensors, train: bool) -> Call:
    if not train:
        return inference(forward)
    wanted = {name: used[name] for name in ("x", "h0", *WEIGHTS)}
    return training(forward, wanted, {"output": tensors["grad_output"]})


def _draw(case: Case, generator: torch.Generator) -> Tensors:
    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * scale

    rows, bound = 3 * case.H, case.H**-0.5
    return {
        "x": normal(case.T, case.B, case.I),
        "h0": normal(case.B, case.H, scale=0.5),
        "weight_ih_l0": normal(rows, case.I, scale=bound),
        "weight_hh_l0": normal(rows, case.H, scale=bound),
        "gamma_ih_l0": 1 + normal(rows, scale=0.2),
        "gamma_hh_l0": 1 + normal(rows, scale=0.2),
        "bias_ih_l0": normal(rows, scale=bound),
        "bias_hh_l0": normal(rows, scale=bound),
        "grad_output": normal(case.T, case.B, case.H),
    }


def _row(suite: str) -> Row:
    train = suite == "train"
    problem = Drawn(
        square(128, 32, 128), suite, "float32", "cpu", feature=f"layer_norm/{suite}",
        draw=_draw, exact=_plain(lambda: _loop, train),
    )  # fmt: skip
    return Row(
        problem,
        [
            Named("torch.loop", _plain(lambda: _loop, train), baseline=True),
            Named("torch.jit.loop", _plain(_scripted, train)),
            Named("gru_fast.LayerNormGRU", _ours(train)),
        ],
        quick=Case(5, 8, 3, 9),
        more=[square(64, 1, 256)],
    )


ROWS = [_row("train"), _row("infer")]
