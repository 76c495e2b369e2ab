# SPDX-License-Identifier: Apache-2.0
"""Compile every row of the kernels' tables for every architecture and write what it takes.

`python scripts/gpu_resources.py [--arch 80 90 ...] [--only TEXT] [--markdown]`, no GPU needed. It
adds what is missing to the snapshot of the Triton version that is imported,
tests/triton_support/resources-triton-*.json, which tests compare, and drops what is no row any
more; `--only` takes points whose name has the text. `--markdown` compiles nothing and prints the
snapshot as the tables of docs/gpu-kernels.md and docs/gpu-sampling.md.
"""

import argparse
import json
import sys
from dataclasses import astuple
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from gru_fast.kernels import tables
from triton_support import resources, resources_generate


def save(found: dict[str, list[int]]) -> None:
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(found[name])}" for name in sorted(found))
    resources.SNAPSHOT.write_text("{\n" + lines + "\n}\n")


def write(archs: list[int], only: str, *, again: bool) -> int:
    """The number of points that spill or do not fit."""
    names = {str(point) for point in resources.points()}
    points = [p for p in resources.points() if p.arch in archs and only in str(p)]
    found = {k: used for k, used in resources.read().items() if k.partition(" #")[0] in names}
    if again:
        chosen = {str(point) for point in points}
        found = {k: used for k, used in found.items() if k.partition(" #")[0] not in chosen}
    save(found)
    wrong = 0
    for number, point in enumerate(points):
        if str(point) not in found:
            for name, used in resources.compile_point(point).items():
                found[name] = list(astuple(used))
            save(found)
        several = [used for name, used in found.items() if name.partition(" #")[0] == str(point)]
        most = resources.DEVICES[point.arch].shared_bytes
        if any(spilled or shared > most for _, spilled, shared, _ in several):
            wrong += 1
            print("WRONG", end=" ")
        print(f"{number + 1}/{len(points)} {point}: {several}", flush=True)
    return wrong


def markdown() -> str:
    """One line per architecture and row: registers and shared memory, forward and backward."""
    snapshot = resources.read()
    lines: dict[tuple[Any, ...], dict[str, list[int]]] = {}
    for point in resources.scans():
        if (point.cell, point.features) == ("reset_after", "everything"):
            name = str(point)
            tiles = name.partition(": ")[2]
            key = (point.arch, point.kernel, point.numbers, point.most, tiles)
            several = lines.setdefault(key, {})
            for used in (u for n, u in snapshot.items() if n.partition(" #")[0] == name):
                before = several.get(point.direction, used)
                several[point.direction] = [max(pair) for pair in zip(before, used, strict=True)]
    text = "| arch | kernel | numbers | H to | tiles | forward | backward | wgmma |\n"
    text += "|---|---|---|---|---|---|---|---|\n"
    for key in sorted(lines):
        cells = [f"sm_{key[0]}", *map(str, key[1:])]
        for direction in ("forward", "backward"):
            used = lines[key].get(direction)
            cells.append(f"{used[0]} / {used[2] / 1024:.0f}" if used else "")
        cells.append("yes" if any(used[3] for used in lines[key].values()) else "")
        text += "| " + " | ".join(cells) + " |\n"
    return text


def generate_markdown() -> str:
    """One line per architecture and row of `generate`: the most of all that it is compiled for."""
    snapshot = resources.read()
    lines: dict[tuple[Any, ...], list[int]] = {}
    for point in resources_generate.points():
        if point.cell != "reset_after":
            continue
        row, name = point.of, str(point)
        tiles = name.partition(": ")[2]
        key = (point.arch, row.form, row.numbers, row.L, row.H, row.V, row.least_H, tiles)
        for number in range(3):
            used = snapshot.get(f"{name} #{number}" if number else name, (0, 0, 0, 0))
            lines[key] = [max(pair) for pair in zip(lines.get(key, used), used, strict=True)]
    text = "| arch | form | numbers | layers | H | V | tiles | registers / KiB | wgmma |\n"
    text += "|---|---|---|---|---|---|---|---|---|\n"
    for (arch, form, numbers, L, H, V, least_H, tiles), used in sorted(lines.items()):
        sizes = [_range(1, L), _range(least_H, H), _range(1, V)]
        taken = [f"{used[0]} / {used[2] / 1024:.0f}", "yes" if used[3] else ""]
        text += "| " + " | ".join([f"sm_{arch}", form, numbers, *sizes, tiles, *taken]) + " |\n"
    return text


def _range(least: int, most: int) -> str:
    if most == tables.ANY:
        return "any" if least == 1 else f"from {least}"
    if least == most:
        return str(most)
    return f"to {most}" if least == 1 else f"{least} to {most}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, nargs="*", default=list(resources.DEVICES))
    parser.add_argument("--only", default="", help="points whose name has this text")
    parser.add_argument("--again", action="store_true", help="compile what is in the snapshot too")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    if options.markdown:
        print(markdown() + "\n" + generate_markdown())
        return 0
    return 1 if write(options.arch, options.only, again=options.again) else 0


if __name__ == "__main__":
    sys.exit(main())
