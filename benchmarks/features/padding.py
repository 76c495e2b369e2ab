# SPDX-License-Identifier: Apache-2.0
"""`padding`: a batch that is half padding, beside half as many rows without any.

Both have the same number of steps that count, so that 1 means that padding costs no time.
docs/variable-length-and-resets.md tells how; the row `lengths` is beside nn.GRU.
"""

from __future__ import annotations

import torch

import gru_fast
from benchmarks.cases import Case, square
from benchmarks.features.layer import draw, module_of
from benchmarks.features.row import (
    Call,
    Drawn,
    Named,
    Row,
    Tensors,
    Way,
    call_of,
    every_part,
)
from benchmarks.problem import WEIGHTS as NAMES

PARTS = ("full", "padded")


def _draw(case: Case, generator: torch.Generator) -> Tensors:
    """Rows of 0 to T steps in random order; B is even."""
    lengths = torch.linspace(0, case.T, case.B).round().long()
    return draw(case, generator) | {"lengths": lengths[torch.randperm(case.B, generator=generator)]}


def batch(part: str, suite: str, backend: str = "auto") -> Way:
    """The padded batch, or half of its rows to their ends."""

    def way(tensors: Tensors) -> Call:
        x, grad_y, lengths = (tensors[name] for name in ("x", "grad_y", "lengths"))
        module = module_of(gru_fast.GRU, tensors, backend=backend)
        options = {"lengths": lengths} if part == "padded" else {}
        if part == "full":
            x, grad_y = (t[:, : len(lengths) // 2].contiguous() for t in (x, grad_y))

        def forward() -> Tensors:
            return {"y": module(x, **options)[0]}

        leaves: Tensors = {name: module.get_parameter(name) for name in NAMES}
        return call_of(suite, forward, leaves, {"y": grad_y})

    return way


def _exact(suite: str) -> Way:
    return every_part({part: batch(part, suite, "reference") for part in PARTS})


def _row(suite: str) -> Row:
    return Row(
        Drawn(
            square(256, 1024, 24), suite, "float32", "cpu", feature=f"padding/{suite}",
            draw=_draw, exact=_exact(suite),
        ),
        [
            Named(f"gru_fast.{part}", batch(part, suite), baseline=part == "full", part=part)
            for part in PARTS
        ],
        quick=Case(5, 8, 4, 9),
        more=[square(64, 32, 256)],
        command="layers",
    )  # fmt: skip


ROWS = [_row("train"), _row("infer")]
