# SPDX-License-Identifier: Apache-2.0
"""`recurrent_dropout`: one mask for a sequence on the state that enters the recurrent products.

The mask is given, so that all solve the same problem: beside a Python loop over nn.GRUCell's
equations. What the mask costs is seen where it is all ones: beside the same call without it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.cases import Case, square
from benchmarks.features.layer import draw
from benchmarks.features.row import Call, Drawn, Named, Row, Tensors, leaves, training
from benchmarks.problem import WEIGHTS as NAMES
from gru_fast import functional


def _draw(case: Case, generator: torch.Generator) -> Tensors:
    keep = torch.rand(1, case.B, case.H, generator=generator) < 0.75
    return draw(case, generator) | {"scale": keep.float() / 0.75}


def loop(tensors: Tensors) -> Call:
    """Step by step: nn.GRUCell has no place for the mask, so its equations are written out."""
    weights = leaves(tensors, NAMES)
    x, scale = tensors["x"], tensors["scale"][0]

    def forward() -> Tensors:
        w_ih, w_hh, b_ih, b_hh = (weights[name] for name in NAMES)
        gates = torch.nn.functional.linear(x, w_ih, b_ih)
        h = torch.zeros_like(scale)
        outputs: list[Tensor] = []
        for a in gates.unbind(0):
            r, z, n = a.chunk(3, -1)
            s_r, s_z, s_n = torch.nn.functional.linear(h * scale, w_hh, b_hh).chunk(3, -1)
            z = torch.sigmoid(z + s_z)
            n = torch.tanh(n + torch.sigmoid(r + s_r) * s_n)
            h = n + z * (h - n)
            outputs.append(h)
        return {"y": torch.stack(outputs)}

    return training(forward, weights, {"y": tensors["grad_y"]})


def _ones(case: Case, generator: torch.Generator) -> Tensors:
    return draw(case, generator) | {"scale": torch.ones(1, case.B, case.H)}


def _call(tensors: Tensors, scale: Tensor | None) -> Call:
    weights = leaves(tensors, NAMES)

    def forward() -> Tensors:
        params = list(weights.values())
        return {"y": functional.gru(tensors["x"], None, params, h_scale=scale)[0]}

    return training(forward, weights, {"y": tensors["grad_y"]})


def fused(tensors: Tensors) -> Call:
    """One call with the mask."""
    return _call(tensors, tensors["scale"])


def without(tensors: Tensors) -> Call:
    """One call without it."""
    return _call(tensors, None)


def _cost() -> Row:
    return Row(
        Drawn(
            square(256, 32, 128), "train", "float32", "cpu", feature="recurrent_dropout/cost",
            draw=_ones, exact=loop,
        ),
        [
            Named("gru_fast.without", without, baseline=True),
            Named("gru_fast.h_scale", fused),
        ],
        quick=Case(5, 8, 3, 9),
        more=[square(64, 32, 256)],
    )  # fmt: skip


def _row() -> Row:
    return Row(
        Drawn(
            square(256, 32, 128), "train", "float32", "cpu", feature="recurrent_dropout/train",
            draw=_draw, exact=loop,
        ),
        [
            Named("torch.loop", loop, baseline=True, package="torch"),
            Named("gru_fast.h_scale", fused),
        ],
        quick=Case(5, 8, 3, 9),
        more=[square(64, 32, 256)],
    )  # fmt: skip


ROWS = [_row(), _cost()]
