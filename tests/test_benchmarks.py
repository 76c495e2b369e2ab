# SPDX-License-Identifier: Apache-2.0
"""The benchmark tool: its gate, statistics, records, and whole runs on tiny sizes."""

import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from gru_fast import reference
from repository_tools import ROOT, load, run

cases = load("benchmarks.cases")
cli = load("benchmarks.cli")
machine = load("benchmarks.machine")
parity = load("benchmarks.parity")
problem_module = load("benchmarks.problem")
program = load("benchmarks.program")
providers = load("benchmarks.providers")
providers_gru_fast = load("benchmarks.providers_gru_fast")
providers_kernels = load("benchmarks.providers_kernels")
providers_torch = load("benchmarks.providers_torch")
records = load("benchmarks.records")
report = load("benchmarks.report")
runner = load("benchmarks.runner")
timing = load("benchmarks.timing")

OWN_PROCESS = ("jax.lax.scan", "keras.torch")
"""JAX starts threads that forbid a fork, Keras reads its backend from the environment."""

SETTING = runner.Setting(1, timing.DRY, footprint=False)


def small(suite: str, dtype: str = "float32", **sizes):
    case = cases.Case(**{"I": 5, "H": 7, "B": 3, "T": 6, **sizes})
    return problem_module.Problem(case, suite, dtype, "cpu")


class TestCases:
    def test_shapes_and_presets(self):
        assert cases.parse("H64-B1-T256") == [cases.Case(I=64, H=64, B=1, T=256)]
        assert cases.parse("I3-H5-B2-T9-R0.25")[0] == cases.Case(3, 5, 2, 9, resets=0.25)
        assert cases.parse("table,H64-B1-T256") == cases.TABLE

    def test_a_shape_prints_as_it_is_parsed(self):
        for case in [*cases.TABLE, *cases.RL, cases.Case(3, 5, 2, 9)]:
            assert cases.parse(str(case)) == [case]

    @pytest.mark.parametrize(
        "text",
        [
            "nope",
            "H64-B1",
            "H64-B1-T0",
            "H64-B1-T2-R1",
            "H8.5-B1-T4",
            "H8-B1-T4-R0.1.2",
            "H8-H9-B1-T4",
            "",
        ],
    )
    def test_others_are_refused(self, text):
        with pytest.raises(ValueError, match=r"^(shapes|sizes|resets): expected"):
            cases.parse(text)


class TestStatistics:
    def test_summary_is_numpys(self):
        samples = np.random.default_rng(0).exponential(size=23)
        found = timing.summary(samples.tolist())
        assert found.median_s == pytest.approx(np.median(samples))
        assert found.p20_s == pytest.approx(np.quantile(samples, 0.2))
        assert found.p80_s == pytest.approx(np.quantile(samples, 0.8))
        assert found.rounds == 23

    def test_summary_by_hand(self):
        assert timing.summary([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == timing.Summary(3.5, 2.0, 5.0, 6)

    def test_ratio_is_the_median_over_rounds(self):
        """Not the ratio of medians: a round that was slow for all does not count."""
        assert timing.ratio([2.0, 30.0, 4.0], [1.0, 10.0, 4.0]) == 2.0

    def test_blocks_grow_to_the_wanted_length(self):
        seen = []

        def clock(call, calls):
            seen.append(calls)
            return 1e-3

        assert timing.calls_per_block(lambda: None, clock, 0.0) == 1
        assert timing.calls_per_block(lambda: None, clock, 0.05) >= 50
        assert seen[1] == 1 and seen[-1] <= 100

    def test_every_round_times_everyone_after_an_untimed_call(self):
        log = []
        calls = {name: lambda name=name: log.append(name) for name in "abc"}

        def clock(call, count):
            log.append("timed")
            call()
            return 1.0

        effort = timing.Effort(block_s=0.0, budget_s=0.0, least=4, most=9)
        samples = timing.interleave(calls, clock, effort)
        assert {name: len(seconds) for name, seconds in samples.items()} == dict.fromkeys("abc", 4)
        rounds = log[6:]  # two entries each were for the number of calls
        blocks = [rounds[i : i + 3] for i in range(0, len(rounds), 3)]
        assert all(block == [block[0], "timed", block[0]] for block in blocks)
        orders = ["".join(block[0] for block in blocks[i : i + 3]) for i in range(0, 12, 3)]
        assert all(sorted(order) == list("abc") for order in orders)
        assert len(set(orders)) > 1


class TestGate:
    truth = torch.linspace(-2, 2, 50, dtype=torch.float64)

    def judge(self, ours, theirs=None, dtype="float32"):
        given = {"y": self.truth.float() if theirs is None else theirs}
        return parity.judge([{"y": ours}], [given], [{"y": self.truth}], dtype)

    def test_rounding_passes(self):
        assert self.judge(self.truth.float()) is None

    def test_twice_the_error_passes_and_more_does_not(self):
        theirs = self.truth + 1e-4
        assert self.judge(self.truth + 2e-4, theirs) is None
        assert "error" in self.judge(self.truth + 2.1e-4, theirs)

    def test_nan_missing_and_another_shape_fail(self):
        broken = self.truth.clone()
        broken[3] = torch.nan
        assert self.judge(broken) is not None
        assert self.judge(self.truth[1:]) is not None
        assert "missing" in parity.judge([{}], [{"y": self.truth}], [{"y": self.truth}], "float32")

    def test_a_broken_yardstick_excuses_nobody(self):
        assert self.judge(self.truth + 1.0, self.truth + 1.0) is not None

    def test_errors_are_averaged_over_draws(self):
        ours, theirs = [self.truth, self.truth + 3e-4], [self.truth + 1e-4] * 2
        results = [[{"y": y} for y in ys] for ys in (ours, theirs, [self.truth] * 2)]
        assert parity.judge(*results, "float32") is None

    @pytest.mark.parametrize("suite", cases.SUITES)
    def test_every_provider_is_right(self, suite):
        """JAX and Keras take part in `test_quick_run`, in a process of its own."""
        chosen = [p for p in providers.all_providers("cpu") if p.name not in OWN_PROCESS]
        T = 1 if suite == "step" else 6
        found, _ = runner.run_problem(small(suite, T=T), providers.choose(chosen, None), SETTING)
        assert len(found) >= 4
        for r in found:
            assert (r.parity, r.error) == ("none" if r.provider == "nn.LSTM" else "ok", None)
            assert r.median_s is not None and r.suite == suite

    @pytest.mark.slow
    @pytest.mark.parametrize("suite", ["infer", "train"])
    def test_nn_gru_compiled_is_right(self, suite, monkeypatch):
        monkeypatch.setenv(providers_torch.COMPILER_CACHE, "is what it was after the test")
        compiled = providers_torch.CompiledGRU("cpu")
        assert compiled not in providers.choose([compiled, providers_torch.TorchGRU("cpu")], None)
        (found,), _ = runner.run_problem(small(suite, T=3), [compiled], SETTING)
        assert (found.parity, found.error) == ("ok", None)
        assert "about a second" in compiled.why_not(small(suite, T=100))

    @pytest.mark.parametrize("suite", ["train", "infer"])
    def test_providers_with_resets_are_right(self, suite):
        problem = small(suite, resets=0.4)
        chosen = providers.choose(providers.all_providers("cpu"), None)
        found, notes = runner.run_problem(problem, chosen, SETTING)
        assert all(record.parity == "ok" for record in found)
        assert {r.baseline for r in found} == {"nn.GRU.split_pad"}
        assert any("nn.GRU has no resets" in note for note in notes)

    def test_the_gate_is_shorter_where_the_reference_would_not_fit(self):
        problem = replace(small("infer", H=1024, I=4, B=512, T=64), seed=3)
        (draw,) = problem.for_gate()
        assert draw.case.T == problem_module.GATE_ELEMENTS // (1024 * 512)
        assert len(small("infer").for_gate()) == problem_module.GATE_DRAWS

    @pytest.mark.skipif(machine.processors() == 1, reason="one processor")
    def test_how_far_apart_the_cores_were(self, two_threads):
        chosen = providers.choose(providers.all_providers("cpu"), "gru_fast.cpu")
        for threads in (1, 2):
            setting = runner.Setting(threads, timing.DRY, footprint=False)
            found, _ = runner.run_problem(small("infer"), chosen, setting)
            assert [r.exchange_s is not None for r in found] == [threads == 2] * 2

    def test_a_broken_provider_gets_no_number(self):
        class Swapped(providers_gru_fast.Layer):
            """The rows of r and z the wrong way round."""

            def prepare(self, problem, threads):
                wrong = replace(problem)
                tensors = dict(problem.tensors)
                for name in problem_module.WEIGHTS:
                    r, z, n = tensors[name].chunk(3)
                    tensors[name] = torch.cat([z, r, n])
                wrong.__dict__["tensors"] = tensors
                return super().prepare(wrong, threads)

        swapped = Swapped("reference")
        swapped.name = "swapped"
        (right, broken), _ = runner.run_problem(
            small("train"), [providers_torch.TorchGRU("cpu"), swapped], SETTING
        )
        assert (right.parity, broken.parity) == ("ok", "wrong")
        assert right.median_s is not None and "output" in broken.error
        assert all(getattr(broken, name) is None for name in records.NUMBERS)
        records.validate_record(asdict(broken))
        assert "WRONG" in report.row(broken)

    @pytest.mark.parametrize("operator", ["layer", "layer_backward"])
    def test_a_broken_kernel_gets_no_number(self, operator):
        """The operator itself computes something else: each of its users is found out."""

        def layer(*arguments):
            without_bias = [*arguments[:5], None, *arguments[6:]]
            return tuple(t.contiguous() for t in reference.layer(*without_bias))

        def layer_backward(*arguments):
            gradients = [t.contiguous() for t in reference.layer_backward(*arguments)]
            gradients[3] = gradients[3] * 1.001
            return tuple(gradients)

        broken = {"layer": layer, "layer_backward": layer_backward}[operator]
        gate = runner.Gate(small("train"), 1)
        ours = providers_gru_fast.Layer("auto")
        assert gate.verdict(ours) is None
        with providers_kernels.served_by({operator: broken}):
            verdict = gate.verdict(ours)
        assert ("output" if operator == "layer" else "grad_weight_hh_l0") in verdict
        assert gate.verdict(ours) is None

    def test_a_provider_that_raises_does_not_stop_the_others(self):
        class Failing(providers_torch.CellLoop):
            name = "failing"

            def prepare(self, problem, threads):
                raise RuntimeError("no such thing\nsecond line")

        found, _ = runner.run_problem(
            small("infer"), [Failing(), providers_torch.TorchGRU("cpu")], SETTING
        )
        assert found[0].error == "RuntimeError: no such thing"
        assert (found[0].parity, found[0].median_s) == ("none", None)
        assert found[1].median_s is not None

    def test_episodes(self):
        starts = torch.tensor([[1, 1], [0, 1], [1, 0]], dtype=torch.bool)
        row, step, lengths, last, first = providers_torch.episodes(starts)
        assert row.tolist() == [[0, 2], [0, 3], [1, 3]]
        assert step.tolist() == [[0, 0], [1, 0], [0, 1]]
        assert lengths.tolist() == [2, 1, 1, 2]
        assert (first.tolist(), last.tolist()) == ([0, 2], [1, 3])


def a_record(**changes) -> dict:
    sizes = asdict(cases.Case(1, 2, 3, 4))
    numbers = {"median_s": 2.0, "p20_s": 1.0, "p80_s": 3.0, "rounds": 7, "ratio_to_torch": 1.5}
    record = records.Record("train", "nn.GRU", "2", "cpu", "float32", 1, sizes, "ok", **numbers)
    return {**asdict(record), **changes}


class TestRecords:
    def test_a_file_comes_back_as_it_was(self, tmp_path):
        machine = {"cpu": "x", "versions": {}, "commit": None, "gpu": None}
        figure = {"name": "copy", "value": 1.0, "unit": "B/s"}
        record = records.Record(**a_record())
        results = records.Results(machine, [record], [figure], ["a note"], {"row": "done"})
        results.write(tmp_path / "r.json")
        assert records.read(tmp_path / "r.json") == results
        assert [path.name for path in tmp_path.iterdir()] == ["r.json"]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"suite": None}, "suite: expected str"),
            ({"threads": 1.5}, "threads: expected int"),
            ({"threads": True}, "threads: expected int"),
            ({"median_s": "fast"}, "median_s: expected float"),
            ({"median_s": float("nan")}, "median_s: expected a number"),
            ({"parity": "fine"}, "parity: expected one of"),
            ({"parity": "wrong"}, "beside parity 'wrong'"),
            ({"error": "it broke"}, "beside parity 'ok' or an error"),
            ({"case": {"H": 1}}, "case: sizes missing"),
            ({"p20_s": None}, "a median without"),
            ({"rounds": None}, "a median without"),
            ({"p80_s": 1.5}, "expected 0 < p20_s <= median_s <= p80_s"),
            ({"dry": True}, "in a dry run"),
            ({"speed": 3}, "unknown"),
        ],
    )
    def test_broken_records_are_refused(self, changes, message):
        records.validate_record(a_record())
        with pytest.raises(ValueError, match=message):
            records.validate_record(a_record(**changes))

    def test_a_missing_field_is_named(self):
        record = a_record()
        del record["provider"]
        with pytest.raises(ValueError, match="provider is missing"):
            records.validate_record(record)

    @pytest.mark.parametrize(
        "change", [{"schema": 0}, {"machine": {}}, {"records": {}}, {"figures": [{}]}, {"more": 1}]
    )
    def test_broken_files_are_refused(self, change):
        good = records.Results({"cpu": "x", "versions": {}, "commit": None}).as_dict()
        records.validate(good)
        with pytest.raises(ValueError, match=r"expected|missing"):
            records.validate({**good, **change})
        with pytest.raises(ValueError, match="file: expected an object, got list"):
            records.validate([good])

    def test_what_is_committed_is_valid(self):
        for path in (ROOT / "benchmarks" / "results").rglob("*.json"):
            records.read(path)


class TestMachine:
    def test_the_commit_and_whether_files_differ_from_it(self, tmp_path, monkeypatch):
        monkeypatch.setattr(machine, "ROOT", tmp_path)
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
        assert machine.git_commit() is None

        def git(*arguments: str) -> str:
            who = ("-c", "user.name=x", "-c", "user.email=x@localhost")
            command = ["git", *who, *arguments]
            run = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
            return run.stdout.strip()

        results = tmp_path / "benchmarks" / "results"
        results.mkdir(parents=True)
        for path in (tmp_path / "code", results / "figures"):
            path.write_text("first")
        git("init", "-q")
        git("add", "-A")
        git("commit", "-qm", "x")
        commit = git("rev-parse", "HEAD")[:12]
        (results / "figures").write_text("new")
        (tmp_path / "untracked").write_text("")
        assert machine.git_commit() == commit
        (tmp_path / "code").write_text("changed")
        assert machine.git_commit() == commit + "+"

    def test_without_proc_nobody_knows_what_others_take(self, monkeypatch):
        started = machine.OtherLoad()
        monkeypatch.setattr(machine.OtherLoad, "_read", lambda self: None)
        assert started.share() is None and machine.OtherLoad().share() is None
        monkeypatch.undo()
        if started._start is not None:
            assert 0 <= started.share() <= 1

    def test_threads(self, monkeypatch):
        monkeypatch.setattr(machine, "processors", lambda: 6)
        assert program.threads_of(None, quick=False) == [1, 6]
        assert program.threads_of(None, quick=True) == [1]
        assert program.threads_of("1,6", quick=True) == [1, 6]
        with pytest.raises(ValueError, match="may use 6 processors, got '7'"):
            program.threads_of("7", quick=False)
        for given in ("0", "1,-2", "two", ""):
            with pytest.raises(ValueError, match="expected a list of numbers from 1 on"):
                program.threads_of(given, quick=False)


class TestCommandLine:
    def test_quick_run(self, tmp_path):
        path = tmp_path / "quick.json"
        shapes = "I3-H8-B2-T4"
        arguments = ("train", "step", "--quick", "--shapes", shapes, "--json", str(path))
        done = run("-m", "benchmarks", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        found = records.read(path)
        assert {r.suite for r in found.records} == {"train", "step"}
        assert {r.parity for r in found.records if r.provider != "nn.LSTM"} == {"ok"}
        for name in OWN_PROCESS:
            installed = find_spec(name.partition(".")[0]) is not None
            assert installed == any(r.provider == name for r in found.records)
        assert all(r.case["T"] == (4 if r.suite == "train" else 1) for r in found.records)
        assert all(r.cold_s is not None and r.rounds >= 3 for r in found.records)
        assert {r.ratio_to_torch for r in found.records if r.provider == "nn.GRU"} == {1.0}
        assert all(r.share_of_bound == r.bound_s / r.median_s for r in found.records)
        assert "gru_fast.reference" in done.stdout and "train I3-H8-B2-T4" in done.stdout

    def test_who_was_asked_for_and_takes_no_part_is_named(self, capsys):
        arguments = ["train", "--quick", "--shapes", "H8-B1-T2", "--providers", "nn.GRUCell"]
        assert cli.main([*arguments[:-1], "gru_fast.cpu.cell"]) == 0
        assert "gru_fast.cpu.cell on train H8-B1-T2: a cell takes" in capsys.readouterr().out
        assert cli.main(arguments) == 0
        shown = capsys.readouterr().out
        assert " on train " not in shown and "ratio: the baseline" in shown

    def test_what_cannot_be_written_or_read_is_said_before_measuring(self, tmp_path, capsys):
        for option, path, message in (
            ("--json", tmp_path / "no folder" / "x.json", "a folder to write in"),
            ("--compare", tmp_path / "nothing.json", "No such file"),
            ("--compare", ROOT / "README.md", "README.md"),
        ):
            with pytest.raises(SystemExit, match="2"):
                cli.main(["train", option, str(path)])
            assert message in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["train", "--shapes", "nope"], "shapes: expected"),
            (["infer", "--dtype", "float8"], "got 'float8'"),
            (["infer", "--dtype", "tf32"], "tf32 needs --device cuda"),
            (["infer", "--threads", "0"], "threads: expected a list of numbers from 1"),
            (["infer", "--threads", "1,9999"], "processors, got '1,9999'"),
            (["infer", "--providers", "nobody"], "got 'nobody'"),
        ],
    )
    def test_bad_arguments(self, arguments, message, capsys):
        assert cli.main(arguments) == 2
        assert message in capsys.readouterr().err

    def test_providers_by_pattern(self):
        every = providers.all_providers("cpu")
        chosen = providers.choose(every, "*reference")
        assert [p.name for p in chosen] == ["nn.GRU", "nn.GRU.split_pad", "gru_fast.reference"]

    def test_the_kernels_of_another_checkout_are_not_measured(self, tmp_path):
        """Here the environment of this one runs the benchmarks of a copy."""
        for folder in ("benchmarks", "gru_fast"):
            leave = shutil.ignore_patterns("__pycache__", "results", "*.so")
            shutil.copytree(ROOT / folder, tmp_path / folder, ignore=leave)
        command = [sys.executable, "-m", "benchmarks", "infer", "--quick"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2, done.stdout
        assert f"the kernels measured would be those of {ROOT.resolve()}" in done.stderr
        assert f"run this from {tmp_path}" in done.stderr

    def test_a_plain_installation_is_told_the_command(self):
        """-S leaves out the .pth files, so nothing is editable; the packages are still there."""
        path = os.pathsep.join(filter(None, sys.path))
        done = run("-S", "-m", "benchmarks", "infer", env={**os.environ, "PYTHONPATH": path})
        assert done.returncode == 2
        assert "pip install --no-build-isolation -e" in done.stderr
