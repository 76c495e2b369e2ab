# SPDX-License-Identifier: Apache-2.0
"""`lengths`: rows of 1 to T steps in random order, half of the batch being padding.

Beside nn.GRU on a packed sequence, packing and padding included.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import gru_fast
from benchmarks.cases import Case, square
from benchmarks.features.layer import draw, module_of
from benchmarks.features.row import Call, Drawn, Named, Row, Tensors, Way, call_of
from benchmarks.problem import WEIGHTS as NAMES


def _draw(case: Case, generator: torch.Generator) -> Tensors:
    lengths = torch.linspace(1, case.T, case.B).round().long()
    order = torch.randperm(case.B, generator=generator)
    return draw(case, generator) | {"lengths": lengths[order]}


def _way(kind: type[nn.RNNBase], suite: str) -> Way:
    def way(tensors: Tensors) -> Call:
        x, lengths = tensors["x"], tensors["lengths"]
        module = module_of(kind, tensors)

        def packed() -> tuple[Tensor, Tensor]:
            rows = pack_padded_sequence(x, lengths, enforce_sorted=False)
            output, h_n = module(rows)
            return pad_packed_sequence(output, total_length=len(x))[0], h_n

        def forward() -> Tensors:
            y, h_n = module(x, lengths=lengths) if kind is gru_fast.GRU else packed()
            return {"y": y, "h_n": h_n}

        leaves: Tensors = {name: module.get_parameter(name) for name in NAMES}
        return call_of(suite, forward, leaves, {"y": tensors["grad_y"]})

    return way


def _row(suite: str) -> Row:
    return Row(
        Drawn(
            square(256, 32, 128), suite, "float32", "cpu", feature=f"lengths/{suite}",
            draw=_draw, exact=_way(nn.GRU, suite),
        ),
        [
            Named("nn.GRU.packed", _way(nn.GRU, suite), baseline=True),
            Named("gru_fast.GRU.lengths", _way(gru_fast.GRU, suite)),
        ],
        quick=Case(5, 8, 3, 9),
        more=[square(64, 32, 256)],
    )  # fmt: skip


ROWS = [_row("train"), _row("infer")]
