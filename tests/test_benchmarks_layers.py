# SPDX-License-Identifier: Apache-2.0
"""The suite `layers`: what is particular to its rows, and busy neighbours. No time is judged."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from gru_fast import GRU, ops
from repository_tools import ROOT, load

contention = load("benchmarks.contention")
features = load("benchmarks.features")
features_cli = load("benchmarks.features.cli")
figures = load("benchmarks.figures")
instruction_sets = load("benchmarks.features.instruction_sets")
machine = load("benchmarks.machine")
parity = load("benchmarks.parity")
problem = load("benchmarks.problem")
providers_gru_fast = load("benchmarks.providers_gru_fast")
providers_torch = load("benchmarks.providers_torch")
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
def test_the_command(tmp_path, capsys, two_threads):
    path = tmp_path / "cpu-layer-facts.json"
    arguments = ["--quick", "--rows", "isa/infer,contention,interrupt", "--json", str(path)]
    assert features_cli.main("layers", arguments) == 0
    found = records.read(path)
    sets = instruction_sets.instruction_sets()
    assert [r.provider for r in found.records] == ["nn.GRU", *(f"gru_fast.cpu.{s}" for s in sets)]
    assert {r.parity for r in found.records} == {"ok"}
    figs = [f for f in found.figures if f["name"] == "contention"]
    everybody = list(product(("train", "infer"), ("gru_fast.cpu", "nn.GRU"), (1, 2)))
    assert [(f["suite"], f["provider"], f["threads"]) for f in figs] == everybody
    for f in figs:
        assert f["neighbours"] == machine.processors() and f["rounds"] >= 2
        assert f["value"] > 0 and f["alone"] > 0 and f["cpus_used"] > 0
        assert f["alone"] == 1 or f["threads"] > 1
    figs = [f for f in found.figures if f["name"] == "interrupt"]
    assert [(f["suite"], f["provider"], f["threads"]) for f in figs] == everybody
    assert all(f["calls"] == 4 and f["value"] >= f["median_ms"] > 0 for f in figs)
    page = figures.report(tmp_path)
    assert re.search(r"\| train I5-H8-B3-T9 \| \d+ of \d+ ms \|", page)
    assert "| train I5-H8-B3-T9 |" in page and "`nn.GRU`, 2 threads" in page
    assert f"| {sets[-1]}, 1 thread |" in page and "| infer: I 5, 8, 3, 9 |" in page
    assert "isa/infer" not in page, "a second time, in another table"


@pytest.mark.parametrize(
    "command, rows",
    [
        ("layers", "reset_mask"),
        ("layers", ""),
        ("layers", "contention,"),
        ("features", "contention"),
        ("features", ""),
        ("features", "lengths,"),
    ],
)
def test_rows_that_are_not_there(command, rows, capsys):
    assert features_cli.main(command, ["--rows", rows]) == 2
    wrong = rows.rpartition(",")[2]
    assert f"got {wrong!r}" in capsys.readouterr().err


def test_the_rows_of_the_command():
    names = {chosen.name.partition("/")[0] for chosen in features_cli.choose("layers", None)}
    assert names == {"bidirectional", "cell_loop", "cells", "isa", "padding"}
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


def test_a_part_that_is_none():
    cells = load("benchmarks.features.cells")
    (case,) = features.find("cells/infer").problems(quick=True)
    way = cells.cell("reset_before", "infer")
    ways = [row.Named("gru_fast.mistyped", way, baseline=True, part="reset_befor")]
    (record,), _ = runner.run_problem(case, ways, SETTING)
    assert record.parity == "none" and record.median_s is None
    known = "reset_after, reset_before, no_reset"
    assert record.error == f"ValueError: part: expected one of {known}, got 'reset_befor'"


def test_the_gate_asks_for_something():
    with pytest.raises(ValueError, match="truth: expected at least one result"):
        parity.judge([{}], [{}], [{}], "float32")


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


@contextmanager
def seen_in_forward(look):
    """What `look` gives for each module of ours or torch's, as it runs."""
    seen = []
    watch = register_module_forward_pre_hook(
        lambda module, _: (
            seen.append(look(module)) if isinstance(module, GRU | torch.nn.GRU) else None
        )
    )
    try:
        yield seen
    finally:
        watch.remove()


@NEEDS_KERNELS
@pytest.mark.parametrize("name", ["isa/train", "isa/infer"])
def test_a_row_runs_on_the_instruction_set_of_its_name(name):
    from gru_fast import _C

    chosen = features.find(name)
    (quick,) = chosen.problems(quick=True)
    for provider in chosen.providers[1:]:
        call = provider.prepare(quick, 1).call
        with seen_in_forward(lambda _: _C.cpu_isa()) as seen:
            call()
        assert seen == [provider.name.removeprefix("gru_fast.cpu.")]
    assert [p.isa for p in chosen.providers[1:]] == instruction_sets.instruction_sets()


@pytest.mark.parametrize("name", ["bidirectional/train", "bidirectional/infer"])
def test_one_thread_is_one_thread(name, two_threads):
    chosen = features.find(name)
    (quick,) = chosen.problems(quick=True)
    for provider in chosen.providers:
        call = provider.prepare(quick, two_threads).call
        with seen_in_forward(lambda _: torch.get_num_threads()) as seen:
            call()
        assert set(seen) == {1 if provider.name.endswith(".one_thread") else 2}
        assert torch.get_num_threads() == 2


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
@pytest.mark.parametrize(
    "busy, death",
    [
        (True, "os.kill(os.getpid(), signal.SIGKILL)"),
        (False, "os.kill(os.getpid(), signal.SIGKILL)"),
        (True, "os.killpg(0, signal.SIGINT)"),  # Ctrl-C
    ],
)
def test_neighbours_end_with_their_parent_however_it_died(busy, death):
    code = f"""
import os, signal
from benchmarks.contention import Neighbours
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
others = Neighbours(2)
others.set(True)
others.set({busy})
print(*(process.pid for process in others.processes), flush=True)
{death}
"""
    command = [sys.executable, "-c", code]
    run = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, start_new_session=True
    )
    pids = [int(pid) for pid in run.stdout.split()]
    assert len(pids) == 2, run.stderr
    assert until(lambda: {state(pid) for pid in pids} <= {"X", "Z"})
    assert run.stderr.count("Traceback") == ("SIGINT" in death), "of the parent alone"


@NEEDS_PROC
def test_neighbours_are_not_others():
    with contention.neighbours(1) as others:
        pids = [process.pid for process in others.processes]
        without, counted = machine.OtherLoad(but=pids), machine.OtherLoad()
        others.set(True)
        before = machine.cpu_ticks(pids[0])
        assert until(lambda: machine.cpu_ticks(pids[0]) >= before + 20)
        assert without.share() < counted.share()


@NEEDS_PROC
def test_a_neighbour_that_does_not_end_by_itself(monkeypatch):
    monkeypatch.setattr(contention, "PATIENCE_S", 0.1)
    with contention.neighbours(1) as others:
        pid = others.processes[0].pid
        os.kill(pid, signal.SIGSTOP)
    assert state(pid) == "X"


@pytest.mark.parametrize("busy", [False, True])
def test_a_neighbour_that_died_is_noticed(busy):
    with contention.neighbours(2) as others:
        others.set(busy)
        others.processes[1].kill()
        others.processes[1].wait()
        with pytest.raises(contention.NeighbourEnded, match="exit code -9"):
            others.set(not busy)


def test_a_neighbour_that_dies_costs_its_row_only(monkeypatch, tmp_path, capsys):
    started = []

    class Watched(contention.Neighbours):
        def __init__(self, count):
            super().__init__(count)
            started.append(self)

    class Killer(providers_gru_fast.Layer):
        """Once a neighbour computes beside a training call of ours, it is killed."""

        def prepare(self, problem, threads):
            prepared = super().prepare(problem, threads)

            def call():
                if problem.training and started[-1].busy:
                    started[-1].processes[0].kill()
                return prepared.call()

            return replace(prepared, call=call)

    monkeypatch.setattr(contention, "Neighbours", Watched)
    monkeypatch.setattr(contention, "Layer", Killer)
    path = tmp_path / "found.json"
    arguments = ["--quick", "--rows", "contention", "--json", str(path)]
    assert features_cli.main("layers", arguments) == 1
    found = records.read(path)
    assert [(r.feature, r.provider, r.error) for r in found.records] == [
        ("contention/train", name, "NeighbourEnded: a neighbour ended with exit code -9")
        for name in ("gru_fast.cpu", "nn.GRU")
    ]
    figs = [f for f in found.figures if f["name"] == "contention"]
    assert {(f["suite"], f["provider"]) for f in figs} == {
        ("infer", "gru_fast.cpu"), ("infer", "nn.GRU"),
    }  # fmt: skip
    assert {p.returncode is None for others in started for p in others.processes} == {False}


class Told:
    """In the place of the neighbours: knows what they would do."""

    processes = ()

    def __init__(self):
        self.busy = False

    def set(self, busy):
        self.busy = busy


class Wrong(providers_torch.TorchGRU):
    """nn.GRU with other weights."""

    is_baseline = False

    def __init__(self, device):
        self.name = "gru_fast.wrong"

    def prepare(self, problem, threads):
        return super().prepare(replace(problem, seed=problem.seed + 1), threads)


def contended(suite: str) -> "problem.Problem":
    return problem.Problem(
        contention.QUICK[0], suite, "float32", "cpu", feature=f"contention/{suite}"
    )


TAKES = {(1, False): 8.0, (1, True): 20.0, (2, False): 4.0, (2, True): 14.0}


def test_figures_are_of_the_threads_and_neighbours_that_they_name(monkeypatch, two_threads):
    others = Told()

    def clock(call, count):
        call()
        return TAKES[torch.get_num_threads(), others.busy]

    monkeypatch.setattr(timing, "cpu_clock", clock)
    setting = runner.Setting(two_threads, timing.DRY, footprint=False)
    ways = [providers_gru_fast.Layer("reference"), providers_torch.TorchGRU("cpu")]
    with seen_in_forward(lambda m: (type(m), torch.get_num_threads(), others.busy)) as seen:
        found = contention.measure(contended("infer"), ways, others, setting)
    assert set(seen) == {(kind, *state) for kind in (GRU, torch.nn.GRU) for state in TAKES}
    assert not found.failed and not found.notes
    assert [
        (f["provider"], f["threads"], f["value"], f["alone"], f["alone_ms"]) for f in found.figures
    ] == [
        (way, *rest)
        for way in ("gru_fast.reference", "nn.GRU")
        for rest in ((1, 2.5, 1.0, 8000.0), (2, 1.75, 0.5, 4000.0))
    ]


def test_contention_without_those_that_are_wrong_or_not_here():
    ways = [Wrong("cpu"), providers_gru_fast.Layer("cudnn"), providers_torch.TorchGRU("cpu")]
    setting = runner.Setting(1, timing.DRY, footprint=False)
    found = contention.measure(contended("train"), ways, Told(), setting)
    assert [f["provider"] for f in found.figures] == ["nn.GRU"]
    (record,) = found.failed
    assert (record.provider, record.parity, record.median_s) == ("gru_fast.wrong", "wrong", None)
    assert "error" in record.error and record.feature == "contention/train"
    (note,) = found.notes
    assert note.startswith("gru_fast.cudnn on train")


def test_the_command_goes_on_after_a_red_gate(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(contention, "Layer", Wrong)
    path = tmp_path / "found.json"
    arguments = ["--quick", "--rows", "contention", "--json", str(path)]
    assert features_cli.main("layers", arguments) == 1
    assert "no figure: gru_fast.wrong contention/infer: output: error" in capsys.readouterr().err
    found = records.read(path)
    assert {f["provider"] for f in found.figures} == {"nn.GRU"}
    assert [r.feature for r in found.records] == ["contention/train", "contention/infer"]


def test_blocks_with_something_to_do_before_them():
    log = []
    calls = {name: lambda name=name: log.append(name) for name in "ab"}

    def clock(call, count):
        call()
        return 1.0

    effort = timing.Effort(block_s=0.0, budget_s=0.0, least=3, most=3)
    timing.interleave(calls, clock, effort, lambda name: log.append(f"before {name}"))
    assert log[:4] == ["before a", "a", "before b", "b"]
    blocks = [log[i : i + 3] for i in range(4, len(log), 3)]
    assert len(blocks) == 6 and all(b == [f"before {b[1]}", b[1], b[1]] for b in blocks)


def test_a_pause_after_each_block_of_those_that_spin(monkeypatch):
    log = []
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: log.append(seconds))
    calls = {name: lambda name=name: None for name in "ab"}

    def clock(call, count):
        log.append("a" if call is calls["a"] else "b")
        return 1.0

    effort = timing.Effort(block_s=0.0, budget_s=0.0, least=3, most=3)
    timing.interleave(calls, clock, effort, pauses={"b": 0.06})
    assert len(log) == 12 and log.count(0.06) == 4
    assert all((after == 0.06) == (before == "b") for before, after in pairwise(log))


@pytest.mark.parametrize(("threads", "pauses"), [(1, {}), (2, {"gru_fast.reference": 0.25})])
def test_threads_that_spin_are_waited_for(monkeypatch, threads, pauses, two_threads):
    class Spinning(providers_gru_fast.Layer):
        spins_s = 0.25

    ways = [Spinning("reference"), providers_torch.TorchGRU("cpu")]
    setting = runner.Setting(threads, timing.DRY, footprint=False)
    assert runner.admit(contended("infer"), ways, setting).pauses == pauses
    assert load("benchmarks.providers_onnx").OnnxRuntime.spins_s > 0
