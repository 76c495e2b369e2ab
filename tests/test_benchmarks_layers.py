# SPDX-License-Identifier: Apache-2.0
"""The suite `layers`: what is particular to its rows, and busy neighbours. No time is judged."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gru_fast import ops
from repository_tools import ROOT, load

contention = load("benchmarks.contention")
features = load("benchmarks.features")
features_cli = load("benchmarks.features.cli")
figures = load("benchmarks.figures")
instruction_sets = load("benchmarks.features.instruction_sets")
records = load("benchmarks.records")
row = load("benchmarks.features.row")
runner = load("benchmarks.runner")
timing = load("benchmarks.timing")

SETTING = runner.Setting(1, timing.DRY, footprint=False)
PART = "reset_before"
NEEDS_KERNELS = pytest.mark.skipif(not ops.HAS_CPU_KERNELS, reason="no compiled CPU kernels")
NEEDS_PROC = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")


def until(condition) -> bool:
    """Whether it comes true within a generous while."""
    for _ in range(2000):
        if condition():
            return True
        time.sleep(0.01)
    return False


def state(pid: int) -> str:
    """One letter, as ps shows it; X where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


@NEEDS_KERNELS
def test_the_command(tmp_path, capsys):
    path = tmp_path / "cpu-layer-facts.json"
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        arguments = ["--quick", "--rows", "isa/infer,contention", "--json", str(path)]
        assert features_cli.main("layers", arguments) == 0
    finally:
        torch.set_num_threads(before)
    found = records.read(path)
    sets = instruction_sets.instruction_sets()
    assert [r.provider for r in found.records] == ["nn.GRU", *(f"gru_fast.cpu.{s}" for s in sets)]
    assert {r.parity for r in found.records} == {"ok"}
    contended = [f for f in found.figures if f["name"] == "contention"]
    assert [(f["suite"], f["provider"], f["threads"]) for f in contended] == [
        (suite, provider, n)
        for suite in ("train", "infer")
        for provider in ("gru_fast.cpu", "nn.GRU")
        for n in (1, 2)
    ]
    for f in contended:
        assert f["neighbours"] == contention.cpus() and f["rounds"] >= 2
        assert f["value"] > 0 and f["alone"] > 0 and f["cpus_used"] > 0
        assert f["alone"] == 1 or f["threads"] > 1
    page = figures.report(tmp_path)
    assert "| train I5-H8-B3-T9 |" in page and "`nn.GRU`, 2 threads" in page
    assert f"| {sets[-1]}, 1 thread |" in page and "| infer: I 5, 8, 3, 9 |" in page
    assert "isa/infer" in page

    assert features_cli.main("layers", ["--rows", "reset_mask"]) == 2
    assert "padding/train" in capsys.readouterr().err
    assert features_cli.main("features", ["--rows", "contention"]) == 2


def test_the_rows_of_the_command():
    names = {chosen.name.partition("/")[0] for chosen in features_cli.choose("layers", None)}
    assert names == {"bidirectional", "cells", "isa", "padding"}
    assert not names & {r.name.partition("/")[0] for r in features_cli.choose("features", None)}


def test_a_cell_is_judged_by_its_own_equations():
    cells = load("benchmarks.features.cells")
    chosen = features.find("cells/train")
    (problem,) = chosen.problems(quick=True)
    ways = [
        row.Named("gru_fast.right", cells.cell("reset_before", "train"), baseline=True, part=PART),
        row.Named("gru_fast.other", cells.cell("reset_after", "train"), part=PART),
    ]
    found, _ = runner.run_problem(problem, ways, SETTING)
    assert [r.parity for r in found] == ["ok", "wrong"]
    assert found[1].error.startswith("reset_before.y: error") and found[1].median_s is None


def test_half_of_the_padded_steps_count():
    chosen = features.find("padding/train")
    for problem in [*chosen.problems(quick=True), *chosen.problems(quick=False)]:
        case = problem.case
        tensors = problem.draw(case, torch.Generator().manual_seed(0))
        assert int(tensors["lengths"].sum()) == case.T * (case.B // 2)


@NEEDS_KERNELS
def test_a_call_on_another_instruction_set():
    from gru_fast import _C

    before = _C.cpu_isa()
    for name in instruction_sets.instruction_sets():
        assert instruction_sets.on(name, _C.cpu_isa)() == name
        assert _C.cpu_isa() == before
        with pytest.raises(ZeroDivisionError):
            instruction_sets.on(name, lambda: 1 // 0)()
        assert _C.cpu_isa() == before


@NEEDS_PROC
def test_neighbours_compute_only_while_told_so():
    with contention.neighbours(2) as others:
        pids = [process.pid for process in others.processes]
        assert until(lambda: {state(pid) for pid in pids} == {"S"})
        others.set(True)
        assert until(lambda: {state(pid) for pid in pids} == {"R"})
        others.set(False)
        assert until(lambda: {state(pid) for pid in pids} == {"S"})
        others.set(True)
    assert {state(pid) for pid in pids} == {"X"}


@NEEDS_PROC
@pytest.mark.parametrize("busy", [True, False])
def test_neighbours_end_with_their_parent_however_it_died(busy):
    code = f"""
import os, signal
from benchmarks.contention import Neighbours
others = Neighbours(2)
others.set(True)
others.set({busy})
print(*(process.pid for process in others.processes), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    pids = [int(pid) for pid in run.stdout.split()]
    assert len(pids) == 2, run.stderr
    assert until(lambda: {state(pid) for pid in pids} <= {"X", "Z"})


def test_a_neighbour_that_died_is_noticed():
    others = contention.Neighbours(1)
    others.processes[0].kill()
    others.processes[0].wait()
    with pytest.raises((RuntimeError, BrokenPipeError)):
        others.set(True)
    others.close()


def test_blocks_with_something_to_do_before_them():
    log = []
    calls = {name: lambda name=name: log.append(name) for name in "ab"}

    def clock(call, count):
        call()
        return 1.0

    effort = timing.Effort(block_s=0.0, budget_s=0.0, least=3, most=3)
    timing.interleave(calls, clock, effort, lambda name: log.append(f"before {name}"))
    blocks = [log[i : i + 2] for i in range(0, len(log), 2)]
    assert len(blocks) == 2 + 6 and all(b == [f"before {b[1]}", b[1]] for b in blocks)
