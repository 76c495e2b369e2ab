# SPDX-License-Identifier: Apache-2.0
"""One step at a time in Python, `h = cell(x[t], h)`: decoders with attention, agents, own cells.

The same loop over nn.GRUCell and over ours; docs/results.md has single steps without gradients.
"""

from __future__ import annotations

from benchmarks.cases import Case, square
from benchmarks.features.row import Row
from benchmarks.problem import Problem
from benchmarks.providers_gru_fast import OwnCellLoop
from benchmarks.providers_torch import CellLoop


def _row(suite: str) -> Row:
    return Row(
        Problem(square(64, 1, 32), suite, "float32", "cpu", feature=f"cell_loop/{suite}"),
        [CellLoop(baseline=True), OwnCellLoop()],
        quick=Case(5, 8, 3, 9),
        more=[square(64, 32, 32), square(256, 32, 32), square(512, 8, 16)],
        command="layers",
    )


ROWS = [_row("train"), _row("infer")]
