# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks report`: the tables and plots of README and docs, from committed results.

A block between `<!-- figures: NAME PART ... -->` and `<!-- end of figures -->` is replaced by these
parts of `benchmarks/results/NAME`. docs/results.md is made as a whole, from every file that is
there, and a page of its own from each folder there, which holds the results of another machine.
Nothing is typed by hand; rows that we lose are in bold, and none is left out.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from benchmarks import ROOT, figures_cpu, figures_gpu, machine, measured
from benchmarks.markdown import BUSY_LEGEND
from benchmarks.records import Results, read

CLAIMS = (ROOT / "README.md", ROOT / "docs" / "speed.md")
"""The pages whose ratios `python -m benchmarks claims` measures again."""
PAGES = (*CLAIMS, ROOT / "docs" / "gpu-kernels.md")
RESULTS = ROOT / "benchmarks" / "results"
REPORT = ROOT / "docs" / "results.md"
BUSY = re.compile(r"[,|] busy\b")
BLOCK = re.compile(r"(<!-- figures: (\S+) ([a-z ]+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)

PARTS: dict[str, tuple[str, Callable[[Results], str]]] = {
    "train": (
        "`nn.GRU`'s time / ours, and the share of the physical limit that is reached:",
        figures_cpu.layers,
    ),
    "infer": ("ONNX Runtime's time / ours:", figures_cpu.beside_onnx),
    "step": (
        "One call of one step under `no_grad`, PyTorch's time / ours, and ours:",
        figures_cpu.steps,
    ),
    "facts": (
        "What no table of tokens a second shows (`--facts`; docs/benchmarks.md says what each is):",
        figures_cpu.facts,
    ),
    "isas": (
        "The kernels of each instruction set: their share of the speed of the best that this CPU "
        "has, and (in brackets, or alone for the best) `nn.GRU`'s time / theirs:",
        figures_cpu.isas,
    ),
    "contention": (
        "While other processes keep every core busy: the time over that of one thread of the same "
        "alone on the machine, less is better (in brackets without them, and how many cores the "
        "calls then used, waiting included):",
        figures_cpu.contention,
    ),
    "interrupts": (
        "Ctrl-C during a call: the longest wait for `KeyboardInterrupt`, and the time of a whole "
        "call:",
        figures_cpu.interrupts,
    ),
    "gpu": (
        "cuDNN's time / that of the fastest of our kernels, and ours per time step, Python and "
        "launches included:",
        figures_gpu.gpu,
    ),
    "gpumemory": (
        "Peak memory of a training step beyond what was there before it:",
        figures_gpu.gpu_memory,
    ),
    "gpusteps": (
        "One call of one step under `no_grad`, launched from Python, and beside it a step of "
        "`nn.GRUCell` captured in a CUDA graph:",
        figures_gpu.gpu_steps,
    ),
    "peers": (
        "Other peers' time / ours (`nn.LSTM` is there for scale; inexact: the error of its results "
        "exceeds the gate's limit, so that it has no figure; -: it does not take the case):",
        figures_cpu.peers,
    ),
    "lost": ("Where a peer is faster:", figures_cpu.lost),
    "features": (
        "The time of what users write without the feature, how many times faster the others are, "
        "and how far memory grows:",
        figures_cpu.features,
    ),
    "lm": (
        "Tokens a second of a training step, and how many times faster:",
        figures_cpu.language_models,
    ),
    "scaling": (
        "The exponent with which time grows over the larger half of the sizes, 1 where it is "
        "proportional, beside that of the bound:",
        figures_cpu.slopes,
    ),
    "sweep": (
        "`nn.GRU`'s time / ours over the grid, without cells of H * H * B * T above 2^28:",
        figures_cpu.sweep,
    ),
    "import": (
        "In fresh processes: imports, a first and a second training call (I = 64, H = 128, B = 4, "
        "T = 50), and a wheel from a clean checkout:",
        figures_cpu.before_the_first_result,
    ),
    "sample": (
        "The time of a loop around `nn.GRU` / ours, and our tokens a second:",
        figures_cpu.samples,
    ),
    "loops": (
        "The time of the other peers' loops, in float32, / ours:",
        figures_cpu.loops,
    ),
}


def render(results: Results, suites: list[str]) -> str:
    """The tables of the suites, and the machine."""
    blocks = []
    for suite in suites:
        text, part = PARTS[suite]
        table = part(results)
        blocks += [f"{text}\n\n{table}", *([BUSY_LEGEND] if BUSY.search(table) else [])]
    return "\n\n".join([*blocks, machine.line(results.machine)])


def with_figures(text: str, folder: Path = RESULTS) -> str:
    """The page with every block of figures made anew."""

    def block(match: re.Match[str]) -> str:
        return f"{match[1]}\n{render(read(folder / match[2]), match[3].split())}\n\n{match[4]}"

    return BLOCK.sub(block, text)


CONTENTS: dict[str, tuple[str, list[str]]] = {
    "cpu-layers.json": ("Layers", ["train", "peers", "lost"]),
    "cpu-peers.json": ("Other peers", ["peers", "lost"]),
    "cpu-bfloat16.json": ("Layers in bfloat16", ["train"]),
    "cpu-step.json": ("Single steps", ["step", "peers", "lost"]),
    "cpu-step-bfloat16.json": ("Single steps in bfloat16", ["step"]),
    "cpu-sweep.json": ("The grid", ["sweep"]),
    "cpu-scaling.json": ("How time grows", ["scaling"]),
    "cpu-features.json": ("Features", ["features"]),
    "cpu-layer-facts.json": (
        "Directions, cells, step by step, padding, instruction sets, busy neighbours, Ctrl-C",
        ["isas", "contention", "interrupts", "features"],
    ),
    "cpu-lm.json": ("Training a language model", ["lm"]),
    "cpu-sample.json": ("Sampling", ["sample", "loops", "lost", "facts"]),
    "cpu-import.json": ("Before the first result", ["import"]),
    "gpu-h200.json": ("GPU", ["gpu", "gpusteps", "gpumemory"]),
}
"""What docs/results.md shows of each committed file."""


MACHINES = {"": "Results", "zen3": "Results on a Zen 3", "zen5": "Results on a Zen 5"}
"""Folders of `benchmarks/results/`, and the titles of their pages."""


def report_of(machine: str) -> Path:
    """The page of a folder of results."""
    return REPORT.with_stem(f"results-{machine}") if machine else REPORT


def plots_of(machine: str) -> Path:
    """Where its plots are."""
    return REPORT.parent / "plots" / machine


def report(results: Path = RESULTS, machine: str = "") -> str:
    """docs/results.md, or another machine's page: every committed result."""
    from benchmarks import plots

    folder = results / machine
    source = (RESULTS / machine).relative_to(ROOT).as_posix()
    parts = [
        f"# {MACHINES[machine]}\n\nMade by `python -m benchmarks report` from `{source}/`; how it "
        "is measured is told in [benchmarks.md](benchmarks.md). Bold: the peer of that "
        "figure is faster."
    ]
    pictures = plots_of(machine).relative_to(REPORT.parent)
    for name, (title, shown) in CONTENTS.items():
        if not (folder / name).exists():
            continue
        parts.append(f"## {title}\n\n{render(read(folder / name), shown)}")
        parts += [f"![{p.title}]({pictures}/{p.file})" for p in plots.PLOTS if p.source == name]
    return "\n\n".join(parts) + "\n"


def main(command: str, arguments: list[str]) -> int:
    """Rewrite the figures of every page, the table that `explain` quotes, and the plots."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {command}", description=main.__doc__
    )
    parser.parse_args(arguments)
    from benchmarks import plots

    texts = {measured.PATH: measured.source(RESULTS)}
    texts |= {page: with_figures(page.read_text("utf-8")) for page in PAGES}
    texts |= {report_of(name): report(machine=name) for name in MACHINES}
    for path, text in texts.items():
        path.write_text(text, "utf-8")
        print(path.relative_to(ROOT))
    if find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed (the extra `bench` or `plot`)")
        return 1
    for name in MACHINES:
        for path in plots.draw_all(RESULTS / name, plots_of(name)):
            print(path.relative_to(ROOT))
    return 0
