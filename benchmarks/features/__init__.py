# SPDX-License-Identifier: Apache-2.0
"""What users do beyond a plain layer, each beside what they would write without it.

One file per feature in this folder, with a list `ROWS`. docs/benchmarks.md says how to add one.
"""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module

from benchmarks.features.row import Row

__all__ = ["Row", "all_rows", "find"]

OTHERS = ("cli", "layer", "row")


@cache
def all_rows() -> tuple[Row, ...]:
    """Of every file, by the files' names."""
    names = sorted(info.name for info in pkgutil.iter_modules(__path__))
    modules = [import_module(f"{__name__}.{name}") for name in names if name not in OTHERS]
    rows = tuple(row for module in modules for row in module.ROWS)
    found = [row.name for row in rows]
    assert len(found) == len(set(found)), found
    return rows


def find(name: str) -> Row:
    """The row of that name."""
    return next(row for row in all_rows() if row.name == name)
