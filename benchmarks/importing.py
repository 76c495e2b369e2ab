# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks import`: What comes before the first result.

In fresh processes: importing torch, then gru_fast; the first call of a GRU, then the second. And
building a wheel from a copy of the tracked files, with all processors: its time and its size.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import ROOT, machine, program, report, timing

IMPORTS = """
import json, sys, time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import gru_fast
end = time.perf_counter()
torch.set_num_threads(1)
# Here already, so that it is not the first call that loads MKL.
torch.mm(torch.ones(8, 8), torch.ones(8, 8))
found = {"import_torch torch": middle - start, "import_gru_fast gru_fast": end - middle}
name = sys.argv[1]
gru = {"nn.GRU": torch.nn.GRU, "gru_fast.GRU": gru_fast.GRU}[name](64, 128)
x = torch.ones(50, 4, 64)
for call in ("first", "second"):
    start = time.perf_counter()
    gru(x)[0].sum().backward()
    found[f"{call}_call_{name} {name}"] = time.perf_counter() - start
print(json.dumps(found))
"""
NAMES = ("nn.GRU", "gru_fast.GRU")


def fresh(name: str) -> dict[str, float]:
    """Seconds by figure and provider, in a new process that calls that GRU."""
    run = subprocess.run(
        [sys.executable, "-c", IMPORTS, name],
        cwd=tempfile.gettempdir(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    return dict(json.loads(run.stdout.splitlines()[-1]))


def figure(name: str, unit: str, values: list[float], **more: Any) -> dict[str, Any]:
    """The median as a named number, with its percentiles."""
    found = timing.summary(values)
    spread = {"p20": found.p20_s, "p80": found.p80_s, "rounds": found.rounds}
    return {"name": name, "value": found.median_s, "unit": unit, **spread, **more}


def processes(rounds: int) -> list[dict[str, Any]]:
    """Imports and first calls; before several rounds one process fills the disk's cache."""
    if rounds > 1:
        fresh(NAMES[0])
    samples: dict[str, list[float]] = {}
    for name in NAMES * rounds:
        for key, value in fresh(name).items():
            samples.setdefault(key, []).append(value)
    return [
        figure(key.split()[0], "s", values, provider=key.split()[1])
        for key, values in samples.items()
    ]


def wheel() -> list[dict[str, Any]]:
    """Seconds of a build from scratch, bytes of the wheel and of its library.

    Raises:
        RuntimeError: the build fails; the message is its last lines.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "source"), Path(folder, "out")
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).is_file():
                (source / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, source / name)
        command = ["-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", str(out), "."]
        start = time.perf_counter()
        run = subprocess.run([sys.executable, *command], cwd=source, capture_output=True, text=True)
        taken = time.perf_counter() - start
        if run.returncode:
            raise RuntimeError(f"pip wheel failed: {run.stderr.strip()[-500:]}")
        (built,) = out.glob("*.whl")
        library = [path.stat().st_size for path in source.glob("build/**/*.so")]
        found = [
            figure("wheel_build", "s", [taken], processors=machine.processors()),
            figure("wheel", "B", [float(built.stat().st_size)]),
        ]
        return found + [figure("library", "B", [float(size)]) for size in library[:1]]


def main(suite: str, arguments: list[str]) -> int:
    """Run; 0 if all went well, else 1."""
    assert __doc__ is not None
    parser = program.parser(suite, __doc__.split(": ", 1)[1])
    options = parser.parse_args(arguments)
    run = program.Run(options, probing=False)
    run.results.figures += processes(1 if options.quick else 7)
    failed = False
    if options.quick:
        run.note("--quick builds no wheel")
    else:
        run.say("building a wheel ...")
        try:
            run.results.figures += wheel()
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            run.note(f"no wheel: {error}")
            failed = True
    for found in run.results.figures:
        value, unit = found["value"], found["unit"]
        shown = report.seconds(value) if unit == "s" else f"{value:,.6g} {unit}"
        run.say(f"{found['name']:<26}{shown:>14}")
    return run.finish() or int(failed)
