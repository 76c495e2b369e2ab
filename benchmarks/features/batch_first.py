# SPDX-License-Identifier: Apache-2.0
"""`batch_first`: sequences and the gradients of outputs with the batch in front.

The kernels want time in front. What lies in another order costs a copy, and has to find its way
past the dispatcher all the same.
"""

from __future__ import annotations

import torch
from torch import nn

import gru_fast
from benchmarks.cases import Case, square
from benchmarks.features.layer import draw, module_of
from benchmarks.features.row import Call, Drawn, Named, Row, Tensors, Way, call_of
from benchmarks.problem import WEIGHTS as NAMES


def _draw(case: Case, generator: torch.Generator) -> Tensors:
    tensors = draw(case, generator)
    turned = {name: tensors[name].transpose(0, 1).contiguous() for name in ("x", "grad_y")}
    return tensors | turned


def _way(kind: type[nn.RNNBase], suite: str) -> Way:
    def way(tensors: Tensors) -> Call:
        module = module_of(kind, tensors, batch_first=True)
        leaves: Tensors = {name: module.get_parameter(name) for name in NAMES}

        def forward() -> Tensors:
            return {"y": module(tensors["x"])[0]}

        return call_of(suite, forward, leaves, {"y": tensors["grad_y"]})

    return way


def _row(suite: str) -> Row:
    return Row(
        Drawn(
            square(32, 4, 8), suite, "float32", "cpu", feature=f"batch_first/{suite}", draw=_draw,
            exact=_way(nn.GRU, suite),
        ),
        [
            Named("nn.GRU.batch_first", _way(nn.GRU, suite), baseline=True),
            Named("gru_fast.GRU.batch_first", _way(gru_fast.GRU, suite)),
        ],
        quick=Case(5, 8, 3, 9),
        more=[square(64, 16, 32), square(256, 32, 64)],
    )  # fmt: skip


ROWS = [_row("train"), _row("infer")]
