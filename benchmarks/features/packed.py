# SPDX-License-Identifier: Apache-2.0
"""`packed`: rows of T to T / 2 steps as a `PackedSequence`, packed in advance; `packed_both` in
both directions.

nn.GRU computes it as it lies. So must who is to take its place, without padding it first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import gru_fast
from benchmarks.cases import Case, square
from benchmarks.features.directions import draw_both
from benchmarks.features.layer import draw
from benchmarks.features.row import Call, Drawn, Named, Row, Tensors, Way, call_of, load


def _draw(both: bool) -> Callable[[Case, torch.Generator], Tensors]:
    def drawn(case: Case, generator: torch.Generator) -> Tensors:
        tensors = (draw_both if both else draw)(case, generator)
        lengths = torch.linspace(case.T, max(1, case.T // 2), case.B).round().long()
        for name in ("x", "grad_y"):
            rows = pack_padded_sequence(tensors[name], lengths)
            tensors[name] = rows.data
        return tensors | {"batch_sizes": rows.batch_sizes}

    return drawn


def _way(kind: type[nn.RNNBase], suite: str, both: bool) -> Way:
    def way(tensors: Tensors) -> Call:
        x, H = tensors["x"], tensors["weight_hh_l0"].shape[1]
        module = kind(x.shape[1], H, bidirectional=both, dtype=x.dtype)
        leaves = load(module, tensors)
        rows = PackedSequence(x, tensors["batch_sizes"])

        def forward() -> Tensors:
            output, h_n = module(rows)
            return {"y": output.data, "h_n": h_n}

        return call_of(suite, forward, leaves, {"y": tensors["grad_y"]})

    return way


def _row(suite: str, both: bool) -> Row:
    name = "packed_both" if both else "packed"
    return Row(
        Drawn(
            square(64, 1, 1), suite, "float32", "cpu", feature=f"{name}/{suite}",
            draw=_draw(both), exact=_way(nn.GRU, suite, both),
        ),
        [
            Named(f"nn.GRU.{name}", _way(nn.GRU, suite, both), baseline=True),
            Named(f"gru_fast.GRU.{name}", _way(gru_fast.GRU, suite, both)),
        ],
        quick=Case(5, 8, 3, 9),
        more=[square(64, 8, 16), square(256, 4, 4), square(512, 16, 8)],
    )  # fmt: skip


ROWS = [_row(suite, both) for both in (False, True) for suite in ("train", "infer")]
