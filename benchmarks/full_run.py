# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks all`: Every committed result of a CPU, file by file.

Each file is made by a command of its own in a fresh process and takes its place when that command
has ended: what fails or is interrupted costs no other file, and leaves FILE.part.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import ROOT, machine, program
from benchmarks.records import Results, read
from benchmarks.report import minutes


@dataclass(frozen=True)
class Part:
    """What makes one file.

    Attributes:
        arguments: of `python -m benchmarks`; {cpus} is the number of processors that it may use.
        expected: minutes on two cores.
        shapes: other than the suite's own.
    """

    arguments: str
    expected: float
    shapes: str | None = None

    def command(self, quick: bool) -> list[str]:
        found = self.arguments.format(cpus=machine.processors()).split()
        if quick:
            return [*found, "--quick"]
        return found if self.shapes is None else [*found, "--shapes", self.shapes]


PARTS = {
    "layers": Part(
        "train infer --providers "
        "gru_fast.cpu,gru_fast.cpu.prepacked,onnxruntime,openvino,jax.lax.scan",
        12.5,
    ),
    "peers": Part(
        "train infer --threads {cpus} "
        "--providers gru_fast.cpu,keras.torch,nn.LSTM,nn.GRUCell,nn.GRU.compile",
        5,
        "H64-B1-T256,H256-B1-T256,H256-B32-T128,H512-B64-T64,H256-B32-T8",
    ),
    "bfloat16": Part(
        "train infer --dtype bfloat16 --providers gru_fast.cpu",
        4,
        "H256-B1-T256,H256-B32-T128,H512-B64-T64,H1024-B64-T32",
    ),
    "step": Part("step --providers gru_fast.cpu*,nn.GRUCell,onnxruntime,openvino,jax.lax.scan", 5),
    "step-bfloat16": Part(
        "step --dtype bfloat16 --providers gru_fast.cpu,gru_fast.cpu.prepacked,nn.GRUCell", 3
    ),
    "lm": Part("lm", 2.5),
    "features": Part("features", 15),
    "layer-facts": Part("layers", 6),
    "sample": Part("sample", 8.5),
    "scaling": Part("scaling", 3.5),
    "sweep": Part("sweep", 9.5),
    "import": Part("import", 2.5),
}
"""By name: NAME makes cpu-NAME.json."""


def plan(names: Sequence[str], quick: bool) -> str:
    """The commands, and the minutes that each takes on two cores."""
    lines = [
        f"{PARTS[name].expected:>5g} min  python -m benchmarks "
        f"{' '.join(PARTS[name].command(quick))} --json cpu-{name}.json"
        for name in names
    ]
    total = sum(PARTS[name].expected for name in names)
    return "\n".join([*lines, f"{total:>5g} min on two cores, without --quick"])


def make(name: str, out: Path, quick: bool) -> tuple[bool, str]:
    """Make one file.

    Returns:
        Whether it is complete, and what there is to say.
    """
    target = out / f"cpu-{name}.json"
    part = target.with_name(f"{target.name}.part")
    part.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks", *PARTS[name].command(quick)]
    code = subprocess.run([*command, "--json", str(part.resolve())], cwd=ROOT).returncode
    try:
        results = read(part)
    except OSError:
        return False, f"nothing: exit code {code}"
    if not results.is_complete:
        return False, f"cut off, exit code {code}: {part.name}"
    part.replace(target)
    return True, told(results)


def told(results: Results) -> str:
    """How many figures a file has, who has none, how quiet the machine was, and the commit."""
    have = sum(r.median_s is not None for r in results.records)
    gaps = sorted({r.provider for r in results.records if r.median_s is None})
    shares = [r.other_cpu or 0.0 for r in results.records]
    shares += [f.get("other_cpu") or 0.0 for f in results.figures]
    lacking = f", {len(results.records) - have} without: {', '.join(gaps)}" if gaps else ""
    return (
        f"{have} records{lacking}, {len(results.figures)} figures, "
        f"others took up to {max(shares, default=0.0):.0%} of the CPU, "
        f"commit {results.machine['commit']}"
    )


def main(suite: str, arguments: list[str]) -> int:
    """Run; 0 if every file is complete, else 1."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {suite}", description=__doc__.split(": ", 1)[1]
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the files go")
    parser.add_argument("--only", metavar="NAMES", help=f"list of {', '.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="small sizes, a few minutes")
    parser.add_argument("--plan", action="store_true", help="show the commands, run nothing")
    options = parser.parse_args(arguments)
    try:
        names = list(PARTS) if not options.only else program.some_of("only", options.only, PARTS)
        if options.out is None and not options.plan:
            raise ValueError("out: expected a folder (or --plan)")
        if not options.plan:
            program.make_folder(options.out)
    except ValueError as error:
        return program.complain(suite, error)
    print(plan(names, options.quick), flush=True)
    if options.plan:
        return 0
    print(f"commit {machine.git_commit()}")
    lines, left, start = [], list(names), time.monotonic()
    try:
        for name in names:
            print(f"\n== cpu-{name}.json", flush=True)
            begun = time.monotonic()
            complete, text = make(name, options.out, options.quick)
            taken = time.monotonic() - begun
            lines.append(f"cpu-{name}.json  {minutes(taken)}  {text}")
            print(f"\n{lines[-1]}", flush=True)
            if complete:
                left.remove(name)
    except KeyboardInterrupt:
        print("\ninterrupted")
    print("\n" + "\n".join([*lines, f"{minutes(time.monotonic() - start)} in all"]))
    if left:
        print(f"left: python -m benchmarks {suite} --out {options.out} --only {','.join(left)}")
        return 1
    print("python -m benchmarks report shows what is in benchmarks/results")
    return 0
