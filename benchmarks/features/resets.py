# SPDX-License-Identifier: Apache-2.0
"""`reset_mask`: episodes inside a sequence, as reinforcement learning has them.

Beside nn.GRU on the episodes as rows of a packed sequence, and a Python loop over nn.GRUCell.
"""

from __future__ import annotations

from benchmarks.cases import Case, square
from benchmarks.features.row import Row
from benchmarks.problem import Problem
from benchmarks.providers_gru_fast import Layer
from benchmarks.providers_torch import CellLoop, SplitAndPad


def _row(suite: str) -> Row:
    problem = Problem(
        square(64, 16, 512, resets=0.02), suite, "float32", "cpu", feature=f"reset_mask/{suite}"
    )
    return Row(
        problem,
        [SplitAndPad("cpu"), CellLoop(), Layer("cpu")],
        quick=Case(5, 8, 3, 9, resets=0.2),
        more=[square(64, 4, 128, resets=0.02), square(256, 64, 64, resets=0.02)],
    )


ROWS = [_row("train"), _row("infer")]
