# SPDX-License-Identifier: Apache-2.0
"""The small table of committed figures that `gru_fast.explain` quotes, as gru_fast/measured.py.

`python -m benchmarks report` writes it; a test holds it to the committed results.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.records import Record, read

PATH = ROOT / "gru_fast" / "measured.py"
FILES = ("cpu-layers.json", "cpu-step.json", "gpu-h200.json")
HEAD = '''# SPDX-License-Identifier: Apache-2.0
"""Committed figures of the benchmarks, for `explain`. Made by `python -m benchmarks report`.

A row: the code that ran, what was timed, dtype, threads, (I, H, B, T), then microseconds and the
microseconds that the machine allows at best (0: unknown). One layer, one direction, with biases.
"""

'''


def code_of(r: Record) -> str | None:
    """The name by which `explain` knows what a record timed; None for what it does not quote."""
    if r.suite not in ("train", "infer", "step") or r.median_s is None or r.case["resets"]:
        return None
    name = r.provider.removeprefix("gru_fast.")
    if name in ("cpu", "cpu.cell"):
        return name
    kernel = name.removeprefix("triton.")
    return kernel if kernel != name and "." not in kernel else None


def name_of(machine: dict[str, Any]) -> str:
    """In a few words."""
    if machine["gpu"]:
        return str(machine["gpu"]["name"])
    return f"{machine['cpu']}, {machine['cpus']} cpus, {machine['isa']}"


def number(microseconds: float) -> str:
    """Four digits, without an exponent."""
    return f"{float(f'{microseconds:.4g}'):.10g}"


def source(folder: Path) -> str:
    """The module's text."""
    lines, machines = [], {}
    for name in FILES:
        results = read(folder / name)
        kind = "cuda" if results.machine["gpu"] else "cpu"
        machines[kind] = name_of(results.machine)
        for r in results.records:
            code = code_of(r)
            if code is None or r.median_s is None:
                continue
            sizes = tuple(r.case[letter] for letter in "IHBT")
            suite = "infer" if r.suite == "step" else r.suite
            threads = r.threads if kind == "cpu" else 0
            key = (code, suite, r.dtype, threads, *sizes)
            numbers = f"{number(1e6 * r.median_s)}, {number(1e6 * (r.bound_s or 0))}"
            lines.append(f"    {_row(key)}: ({numbers}),")
    found = [HEAD, "MACHINES = {\n"]
    found += [f'    "{kind}": "{text}",\n' for kind, text in machines.items()]
    found += ["}\n", "MEASURED: dict[tuple[str, str, str, int, int, int, int, int], "]
    found += ["tuple[float, float]] = {\n", "\n".join(lines), "\n}\n"]
    return "".join(found)


def _row(key: tuple[str | int, ...]) -> str:
    parts = ", ".join(f'"{part}"' if isinstance(part, str) else str(part) for part in key)
    return f"({parts})"
