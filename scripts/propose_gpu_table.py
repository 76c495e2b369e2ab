# SPDX-License-Identifier: Apache-2.0
"""Propose POINTS of kernels/measured.py from what a run on a GPU left.

`python scripts/propose_gpu_table.py DIR/gpu.json [--write]` prints the table, or puts it in place
of the rows of the same architecture. Only rows with a green parity gate count, against cuDNN timed
in the same row; rows of a dry run never do.
"""

import argparse
import json
import re
import sys
from dataclasses import astuple
from pathlib import Path
from typing import Any

from gru_fast.kernels import KERNELS
from gru_fast.kernels.measured import POINTS, Point

TABLE = Path(__file__).parents[1] / "kernels" / "measured.py"
PREFIX = "gru_fast.triton."
KINDS = {"bfloat16": "bfloat16", "float16": "float16", "tf32": "tf32", "float32": "tf32x3"}


def propose(results: dict[str, Any]) -> list[Point]:
    """The fastest of our kernels at each size.

    Raises:
        ValueError: the file is not of a GPU, or names no kernel that was right.
    """
    gpu = results["machine"].get("gpu")
    if not gpu:
        raise ValueError("machine.gpu: expected a GPU, got none: a dry run proposes nothing")
    arch = int(gpu["capability"].replace(".", ""))
    best: dict[tuple[str, str, int, int, int], tuple[float, str]] = {}
    for record in results["records"]:
        case, kernel = record["case"], record["provider"].removeprefix(PREFIX)
        ratio = record.get("ratio_to_torch")
        if (
            kernel not in KERNELS
            or record["suite"] not in ("train", "infer", "step")
            or record["dtype"] not in KINDS
            or record.get("dry")
            or record.get("parity") != "ok"
            or record.get("baseline") != "cudnn"
            or case.get("resets")
            or not ratio
        ):
            continue
        place = (record["suite"], KINDS[record["dtype"]], case["H"], case["B"], case["T"])
        best[place] = max(best.get(place, (0.0, "")), (ratio, kernel))
    if not best:
        raise ValueError("records: expected a kernel of ours with parity ok beside cuDNN, got none")
    return [
        Point(arch, *place, kernel, round(ratio, 3))
        for place, (ratio, kernel) in sorted(best.items())
    ]


def source(points: list[Point]) -> str:
    """The assignment to POINTS."""
    if not points:
        return "POINTS: tuple[Point, ...] = ()\n"
    rows = "".join(f"    Point{_arguments(point)},\n" for point in points)
    return f"POINTS: tuple[Point, ...] = (\n{rows})\n"


def _arguments(point: Point) -> str:
    return "(" + ", ".join(json.dumps(value) for value in astuple(point)) + ")"


def rewritten(text: str, points: list[Point]) -> str:
    """measured.py with another table."""
    pattern = re.compile(
        r"^POINTS: tuple\[Point, \.\.\.\] = (\(\)|\(\n.*?^\))\n", re.MULTILINE | re.DOTALL
    )
    assert len(pattern.findall(text)) == 1, "kernels/measured.py: expected one POINTS"
    return pattern.sub(lambda _: source(points), text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="gpu.json of `python -m benchmarks gpu`")
    parser.add_argument("--write", action="store_true", help="change kernels/measured.py")
    options = parser.parse_args()
    try:
        points = propose(json.loads(options.results.read_text()))
    except ValueError as error:
        print(f"propose_gpu_table: {error}", file=sys.stderr)
        return 2
    others = [point for point in POINTS if point.arch != points[0].arch]
    if options.write:
        TABLE.write_text(rewritten(TABLE.read_text(), [*others, *points]))
    else:
        print(source([*others, *points]), end="")
    lost = [point for point in points if point.ratio < 1]
    print(f"{len(points)} sizes, cuDNN faster at {len(lost)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
