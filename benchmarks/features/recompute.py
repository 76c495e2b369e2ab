# SPDX-License-Identifier: Apache-2.0
"""`recompute=True`: training without saved gates, beside the same layer with them.

The time that it costs; the bytes that it saves are in docs/memory.md.
"""

from __future__ import annotations

from torch import nn

import gru_fast
from benchmarks.cases import Case, square
from benchmarks.features.layer import draw, module_of
from benchmarks.features.row import Call, Drawn, Named, Row, Tensors, Way, training
from benchmarks.problem import WEIGHTS as NAMES


def _way(kind: type[nn.RNNBase], **options: bool) -> Way:
    def way(tensors: Tensors) -> Call:
        module = module_of(kind, tensors, **options)
        leaves: Tensors = {name: module.get_parameter(name) for name in NAMES}

        def forward() -> Tensors:
            return {"y": module(tensors["x"])[0]}

        return training(forward, leaves, {"y": tensors["grad_y"]})

    return way


ROWS = [
    Row(
        Drawn(
            square(256, 32, 128), "train", "float32", "cpu", feature="recompute/train",
            draw=draw, exact=_way(nn.GRU),
        ),
        [
            Named("gru_fast.GRU", _way(gru_fast.GRU), baseline=True),
            Named("gru_fast.recompute", _way(gru_fast.GRU, recompute=True)),
            Named("nn.GRU", _way(nn.GRU)),
        ],
        quick=Case(5, 8, 3, 9),
        more=[square(64, 32, 256), square(512, 1, 128)],
    )
]  # fmt: skip
