# SPDX-License-Identifier: Apache-2.0
"""What the benchmark tool measures with: clocks, processors, others' CPU time, memory."""

import gc
import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from repository_tools import load

cases = load("benchmarks.cases")
claims = load("benchmarks.claims")
cli = load("benchmarks.cli")
command = load("benchmarks.__main__")
contention = load("benchmarks.contention")
full_run = load("benchmarks.full_run")
machine = load("benchmarks.machine")
memory = load("benchmarks.memory")
problem_module = load("benchmarks.problem")
program = load("benchmarks.program")
providers_gru_fast = load("benchmarks.providers_gru_fast")
providers_torch = load("benchmarks.providers_torch")
records = load("benchmarks.records")
runner = load("benchmarks.runner")
timing = load("benchmarks.timing")

MIB = 2**20
NEEDS_PROC = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc")


def train(**sizes):
    case = cases.Case(**{"I": 5, "H": 7, "B": 3, "T": 6, **sizes})
    return problem_module.Problem(case, "train", "float32", "cpu")


@pytest.fixture
def one_processor():
    """This thread, and what it starts, may use one."""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("no affinity")
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


class TestProcessors:
    def test_those_that_it_may_use_count(self, one_processor):
        assert machine.processors() == machine.describe()["cpus"] == 1
        assert program.threads_of(None, quick=False) == [1]
        with pytest.raises(ValueError, match="may use 1 processors, got '1,2'"):
            program.threads_of("1,2", quick=False)
        assert "--threads 1 " in " ".join(full_run.PARTS["peers"].command(quick=False))

    def test_a_claim_of_more_threads_is_not_tried(self, one_processor):
        case = {"I": 1, "H": 1, "B": 1, "T": 1, "L": 1, "V": 0, "resets": 0.0}
        ours = records.Record("infer", "gru_fast.cpu", "1", "cpu", "float32", 2, case, median_s=1.0)
        claim = claims.Claim(ours, "nn.GRU", 1.0)
        (found,) = claims.verdicts([claim], [timing.DRY], 60.0, False, lambda line: None)
        assert found.word == "not run: too few processors"

    def test_scaling_runs_on_them(self, one_processor, tmp_path):
        path = tmp_path / "scaling.json"
        assert load("benchmarks.scaling").main("scaling", ["--quick", "--json", str(path)]) == 0
        assert {r.threads for r in records.read(path).records} == {1}

    def test_numbers_and_names_count_once(self):
        options = cli.parser().parse_args(
            ["infer", "--threads", "1,1", "--dtype", "float32,float32", "--shapes", "H8-B1-T2"]
        )
        assert len(cli.problems_of(options)) == 1


class TestOtherLoad:
    def test_by_hand(self, monkeypatch):
        """Of 4 processors for 10 s, all together had 16 s and this process 6 s."""
        seen = iter([(100.0, 50.0, 7.0), (116.0, 56.0, 17.0)])
        monkeypatch.setattr(machine.OtherLoad, "_read", lambda self: next(seen))
        monkeypatch.setattr(os, "cpu_count", lambda: 4)
        assert machine.OtherLoad().share() == pytest.approx(0.25)

    @NEEDS_PROC
    def test_what_a_neighbour_takes_is_in_it(self):
        with contention.neighbours(1) as others:
            pid = others.processes[0].pid
            load, start, before = machine.OtherLoad(), time.perf_counter(), machine.cpu_ticks(pid)
            others.set(True)
            while machine.cpu_ticks(pid) < before + 30:
                time.sleep(0.01)
            share, took = load.share(), time.perf_counter() - start
            ticks = machine.cpu_ticks(pid) - before
        taken = ticks / os.sysconf("SC_CLK_TCK") / (took * os.cpu_count())
        assert share > 0.7 * taken


class TestClock:
    def test_without_the_garbage_collector(self):
        seen = []

        def clock(call, count):
            seen.append(gc.isenabled())
            return 1.0

        assert gc.isenabled()
        timing.interleave({"a": lambda: None}, clock, replace(timing.DRY, least=2, most=2))
        assert seen == [False] * 3 and gc.isenabled()


class TestFootprint:
    @NEEDS_PROC
    def test_of_a_call_that_is_known(self):
        def call():
            time.sleep(0.1)
            passing = torch.ones(8 * MIB)  # 32 MiB
            kept = torch.ones(4 * MIB)
            del passing
            return kept

        found = memory.cpu_footprint(call)
        assert 0.1 <= found["cold_s"] < 5
        assert 46 * MIB < found["peak_bytes"] < 56 * MIB

    @NEEDS_PROC
    def test_of_a_layer_in_its_own_process(self):
        problem = replace(train(I=1, H=64, B=64, T=2048), suite="infer")
        found, missing = memory.in_fresh_process(problem, 1, ["gru_fast.cpu"])
        assert not missing
        output = 4 * 64 * 64 * 2048
        assert 0.95 < found["gru_fast.cpu"]["peak_bytes"] / output < 1.4

    def test_reaches_the_record(self, monkeypatch):
        told = {"nn.GRU": {"cold_s": 0.25, "peak_bytes": 4096}}
        monkeypatch.setattr(memory, "in_fresh_process", lambda *_: (told, ["a note"]))
        ways = [providers_torch.TorchGRU("cpu")]
        (found,), notes = runner.run_problem(train(), ways, runner.Setting(1, timing.DRY))
        assert (found.cold_s, found.peak_bytes) == (0.25, 4096) and notes == ["a note"]

    def test_who_fails_there_costs_nobody_else(self):
        """There the name is that of the cell, which takes one step."""

        class OnlyHere(providers_gru_fast.Layer):
            def __init__(self):
                super().__init__("cpu")
                self.name = "gru_fast.cpu.cell"

        ways = [OnlyHere(), providers_torch.TorchGRU("cpu")]
        found, (note,) = runner.run_problem(train(), ways, runner.Setting(1, timing.DRY))
        assert [r.error for r in found] == [None, None] and all(r.median_s for r in found)
        assert [r.cold_s is not None for r in found] == [False, True]
        what = "gru_fast.cpu.cell on train I5-H7-B3-T6: neither first call nor peak memory: "
        assert note.startswith(f"{what}RuntimeError: Mismatch in shape")

    def test_a_process_that_takes_too_long(self):
        found, (note,) = memory.in_fresh_process(train(), 1, ["nn.GRU"], timeout_s=0.01)
        assert found == {} and note.endswith(
            "neither first call nor peak memory: not done after 0.01 s"
        )

    def test_a_process_that_ends_keeps_what_came_before(self, monkeypatch):
        footprint = {"cold_s": 1.0, "peak_bytes": 2}
        said = f'noise\n{memory.ANSWER} ["first", {{"cold_s": 1.0, "peak_bytes": 2}}, null]\n'
        ended = subprocess.CompletedProcess([], -11, said.encode(), b"the end")
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: ended)
        found, (note,) = memory.in_fresh_process(train(), 1, ["first", "second"])
        assert found == {"first": footprint}
        assert note.startswith("second on ") and note.endswith("exit code -11 the end")


class TestWhereResultsGo:
    @pytest.mark.parametrize("kind", ["folder", "pipe", "link to a pipe"])
    def test_what_is_no_file_is_refused(self, kind, tmp_path, capsys):
        path = tmp_path / "x.json"
        if kind == "folder":
            path.mkdir()
        else:
            os.mkfifo(tmp_path / "pipe")
            path = tmp_path / "pipe" if kind == "pipe" else path
        if kind == "link to a pipe":
            path.symlink_to(tmp_path / "pipe")
        with pytest.raises(SystemExit, match="2"):
            cli.parser().parse_args(["train", "--json", str(path)])
        assert f"expected a new file or a regular one, got '{path}'" in capsys.readouterr().err
        assert path.exists() and not path.is_file()

    @pytest.mark.parametrize("there", [True, False])
    def test_a_link_is_followed(self, there, tmp_path):
        target, link = tmp_path / "target.json", tmp_path / "link.json"
        link.symlink_to(target)
        if there:
            target.write_text("old")
        assert program.new_file(str(link)) == target.resolve()
        records.write_json(program.new_file(str(link)), {"new": 1})
        assert link.is_symlink() and "new" in target.read_text()

    def test_in_a_file(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(program.argparse.ArgumentTypeError, match="in a folder to write in"):
            program.new_file(str(tmp_path / "file" / "x.json"))


def test_ctrl_c_is_no_traceback(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "complaint", lambda: None)
    monkeypatch.setattr(cli, "main", interrupted)
    assert command.main(["infer"]) == 128 + signal.SIGINT
    assert capsys.readouterr().err == "\ninterrupted\n"
