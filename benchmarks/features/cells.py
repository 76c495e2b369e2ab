# SPDX-License-Identifier: Apache-2.0
"""`cells`: what the other cells cost beside `reset_after`, nn.GRU's."""

from __future__ import annotations

import gru_fast
from benchmarks.cases import Case, square
from benchmarks.features.layer import draw
from benchmarks.features.row import (
    Call,
    Drawn,
    Named,
    Row,
    Tensors,
    Way,
    call_of,
    every_part,
    load,
)

CELLS = {"reset_after": 3, "reset_before": 3, "no_reset": 2}
"""With how many gates each has."""


def cell(name: str, suite: str, backend: str = "auto") -> Way:
    """A layer of these cells; no_reset takes the first two gates' weights."""

    def way(tensors: Tensors) -> Call:
        x, grad_y = tensors["x"], tensors["grad_y"]
        H = grad_y.shape[2]
        module = gru_fast.GRU(x.shape[2], H, cell=name, backend=backend, dtype=x.dtype)
        rows = CELLS[name] * H
        leaves = load(module, {n: t[:rows] for n, t in tensors.items() if n not in ("x", "grad_y")})

        def forward() -> Tensors:
            return {"y": module(x)[0]}

        return call_of(suite, forward, leaves, {"y": grad_y})

    return way


def _exact(suite: str) -> Way:
    """Every cell's results, by the reference."""
    return every_part({name: cell(name, suite, "reference") for name in CELLS})


def _row(suite: str) -> Row:
    return Row(
        Drawn(
            square(64, 1, 256), suite, "float32", "cpu", feature=f"cells/{suite}",
            draw=draw, exact=_exact(suite),
        ),
        [
            Named(
                f"gru_fast.{name}", cell(name, suite), baseline=name == "reset_after", part=name
            )
            for name in CELLS
        ],
        quick=Case(5, 8, 3, 9),
        more=[square(256, 1, 256), square(64, 32, 256), square(256, 32, 128)],
        command="layers",
    )  # fmt: skip


ROWS = [_row("train"), _row("infer")]
