# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks gpu`: its rows on a dry run, and who watches over them."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from repository_tools import ROOT, load, run
from versions import needs_triton_interpreter

cases = load("benchmarks.cases")
providers_kernels = load("benchmarks.providers_kernels")
records = load("benchmarks.records")
supervisor = load("benchmarks.gpu.supervisor")
worker = load("benchmarks.gpu.worker")


def a_plan(out, **changes):
    return supervisor.Plan(
        **{"out": out, "budget_s": 60, "row_limit_s": 60, "dry": True, **changes}
    )


class TestGpuProgram:
    @needs_triton_interpreter
    def test_a_cut_off_dry_run_is_resumed(self, tmp_path):
        """Killed in the middle, it goes on where it was and keeps what it had."""
        path = tmp_path / worker.RESULTS
        command = ("-m", "benchmarks", "gpu", "--dry", "--out", str(tmp_path))
        first = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE
        )
        while first.poll() is None and not (path.exists() and len(records.read(path).rows) >= 5):
            time.sleep(0.05)
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()
        before = records.read(path)
        assert before.rows

        refused = run(*command)
        assert refused.returncode == 2 and "--resume" in refused.stderr
        resumed = run(*command, "--resume")
        log = (tmp_path / "rows.log").read_text()
        assert resumed.returncode == 0, resumed.stdout + resumed.stderr + log
        after = records.read(path)
        assert set(after.rows.values()) == {"done"} and len(after.rows) > len(before.rows)
        assert after.records[: len(before.records)] == before.records
        assert after.figures[: len(before.figures)] == before.figures
        pairs = [(r.suite, r.provider, r.feature, str(r.case)) for r in after.records]
        assert len(pairs) == len(set(pairs))
        assert all(r.dry and r.ratio_to_torch is None for r in after.records)
        assert {r.parity for r in after.records if r.suite != "sample"} == {"ok"}
        drawn = {r.provider: r for r in after.records if r.suite == "sample"}
        assert all(r.median_s is not None for r in drawn.values()), drawn
        if providers_kernels.kernel_names()[0]:
            assert drawn["gru_fast.generate"].parity == "ok"
        assert {r.suite for r in after.records} == {"infer", "train", "sample", "features"}
        solved = [r for r in after.records if r.suite == "features"]
        assert "gru_fast.diagonal" in {r.provider for r in solved}
        assert {r.parity for r in solved} == {"ok"}
        ours = {r.provider for r in after.records if r.provider.startswith("gru_fast.triton.")}
        assert ours == {f"gru_fast.triton.{name}" for name in providers_kernels.kernel_names()[0]}

    def test_a_run_without_our_kernels_is_refused(self, tmp_path, capsys, monkeypatch):
        """--no-build where nothing is installed, or after a build that failed."""
        cli = load("benchmarks.gpu.cli")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(cli, "kernel_names", lambda: ([], "it is not there"))
        options = ["--out", str(tmp_path), "--no-build", "--note", "build: failed"]
        assert cli.main(options) == 2
        said = capsys.readouterr().err
        assert "it is not there (build: failed); install gru_fast first" in said
        assert not (tmp_path / worker.RESULTS).exists()

    def test_a_crash_costs_one_row(self, tmp_path):
        plan = a_plan(tmp_path)
        results = records.Results({"cpu": "x", "versions": {}, "commit": None, "gpu": None})
        results.write(tmp_path / worker.RESULTS)
        code = f"""if True:
            import json, os, pathlib
            out = pathlib.Path({str(tmp_path)!r})
            if "bad" not in json.loads((out / "{worker.RESULTS}").read_text())["rows"]:
                (out / "{worker.RUNNING}").write_text("bad")
                os._exit(7)
        """

        def start(plan, until):
            return subprocess.Popen([sys.executable, "-c", code])

        assert supervisor.drive(plan, time.time() + 60, start) == []
        rows = records.read(tmp_path / worker.RESULTS).rows
        assert rows == {"bad": "error: the process ended with code 7"}
        assert not (tmp_path / worker.RUNNING).exists()

    def test_a_worker_that_cannot_start_is_not_started_for_ever(self, tmp_path):
        results = records.Results({"cpu": "x", "versions": {}, "commit": None, "gpu": None})
        results.write(tmp_path / worker.RESULTS)

        def start(plan, until):
            return subprocess.Popen([sys.executable, "-c", "raise SystemExit(5)"])

        (note,) = supervisor.drive(a_plan(tmp_path), time.time() + 60, start)
        assert "code 5" in note

    @pytest.mark.parametrize(
        ("limit", "until", "reason"), [(0.2, 60, "no answer"), (60, -10, "cut")]
    )
    def test_a_hanging_row_is_killed(self, tmp_path, limit, until, reason):
        (tmp_path / worker.RUNNING).write_text("slow")
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        plan = a_plan(tmp_path, row_limit_s=limit)
        assert reason in supervisor.watch(process, plan, time.time() + until)
        assert process.returncode == -signal.SIGKILL

    def test_a_build_that_takes_too_long_leaves_time_for_one_without_cpu_kernels(
        self, tmp_path, monkeypatch
    ):
        script = '[ "$GRU_FAST_SKIP_CPU_KERNELS" = 1 ] || exec sleep 60'
        monkeypatch.setattr(supervisor, "BUILD", ["sh", "-c", script])
        note = supervisor.build(a_plan(tmp_path, budget_s=6))
        assert "build: not done after 2 s, build without CPU kernels: done" in note

    def test_rows_of_other_packages_may_compile_for_longer(self, tmp_path):
        (tmp_path / worker.RUNNING).write_text("peers/torchrl.triton/train/H128-B64-T512/tf32")
        command = [sys.executable, "-c", "import time; time.sleep(0.6)"]
        plan = a_plan(tmp_path, row_limit_s=0.2)
        plan = replace(plan, row_limit_s=20 / supervisor.PEERS_TIMES)
        assert supervisor.watch(subprocess.Popen(command), plan, time.time() + 60) is None

    def test_a_row_that_ends_between_two_looks(self, tmp_path, monkeypatch):
        """The file was there a moment ago."""
        monkeypatch.setattr(Path, "exists", lambda self: True)
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.3)"])
        assert supervisor.watch(process, a_plan(tmp_path), time.time() + 60) is None

    def test_retry_forgets_failures_only(self, tmp_path):
        machine = {"cpu": "x", "versions": {}, "commit": None, "gpu": None}
        about = ("train", "nn.GRU", "2", "cpu", "float32", 1, asdict(cases.Case(1, 2, 3, 4)), "ok")
        good = records.Record(*about, median_s=2.0, p20_s=1.0, p80_s=3.0, rounds=7)
        bad = records.Record(*about, error="broken")
        rows = {"a": "done", "b": "error: broken"}
        records.Results(machine, [good, bad], rows=rows).write(tmp_path / worker.RESULTS)
        kept = supervisor.prepare_results(a_plan(tmp_path), True, False, machine)
        assert kept.rows == rows and len(kept.records) == 2
        retried = supervisor.prepare_results(a_plan(tmp_path), True, True, machine)
        assert retried.rows == {"a": "done"} and retried.records == [good]

    def test_the_real_rows_are_listed_in_order(self):
        """Without a GPU they can be named, not run."""
        rows = [row.name for row in load("benchmarks.gpu.rows").gpu_rows()]
        assert len(rows) == len(set(rows))
        assert rows[0] == "micro/launches"
        grid = [name for name in rows if name.startswith("train/") and "-T512/" in name]
        assert len(grid) == 10 * 5 * 3 + 5 * 3
        assert "train/H256-B128-T128-R0.03/bfloat16" in rows
        assert "sample/H512-B8192-T512-L2-V256/bfloat16" in rows
        assert rows.index("train/H512-B64-T512/bfloat16") < rows.index("train/H192-B64-T512/tf32")

    def test_a_short_run_meets_every_kind_of_row(self):
        """The first fifty, which took four seconds each on the H200, are of everything."""
        rows = [row.name for row in load("benchmarks.gpu.rows").gpu_rows()][:50]
        assert {name.partition("/")[0] for name in rows} >= {"infer", "train", "step", "sample"}
        for dtype in ("bfloat16", "tf32", "float16"):
            assert f"train/H512-B64-T512/{dtype}" in rows
        assert "train/H512-B1024-T512/bfloat16" in rows and "train/H192-B64-T512/tf32" in rows
        assert any("-R0.03" in name for name in rows)

    def test_precompilation_meets_each_kernel_once(self):
        """Calls that compile the same stand under one key, which one process takes."""
        keys = {key for row in load("benchmarks.gpu.rows").gpu_rows() for key in row.warm}
        for name in providers_kernels.kernel_names()[0]:
            assert f"{name}/H512/bfloat16/False" in keys

    def test_precompilation_meets_both_samplers_of_the_gate(self, monkeypatch):
        rows, drawn = load("benchmarks.gpu.rows"), []
        monkeypatch.setattr(rows, "kernel_names", lambda: (["any"], None))
        ours = lambda model, B: lambda T, greedy: drawn.append(greedy)  # noqa: E731
        monkeypatch.setattr(rows.samplers, "ours", ours)
        (row,) = (row for row in rows.dry_rows() if row.name.startswith("sample/"))
        for warm in row.warm.values():
            warm(worker.session_of(dry=True))
        assert sorted(drawn) == [False, True]

    @pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
    def test_tiles_are_refused_before_anything_is_measured(self, tmp_path, capsys, monkeypatch):
        tiles = load("benchmarks.gpu.tiles")
        (tmp_path / "file").touch()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        for out, message in (("file/out", "out: expected a folder"), ("new", "there is no GPU")):
            with pytest.raises(SystemExit, match="2"):
                tiles.main(["--out", str(tmp_path / out)])
            assert message in capsys.readouterr().err
        assert (tmp_path / "new").is_dir()

    def test_json_is_plain(self, tmp_path):
        with pytest.raises(ValueError, match="JSON"):
            records.write_json(tmp_path / "x.json", {"value": float("inf")})
        assert json.dumps({"case": cases.QUICK[0].as_dict()})
