# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks all`: the plan, and what a part that fails or dies leaves behind."""

import subprocess
import time

import pytest

from gru_fast import ops
from repository_tools import load

cli = load("benchmarks.cli")
figures = load("benchmarks.figures")
full_run = load("benchmarks.full_run")
gpu = load("benchmarks.gpu.cli")
records = load("benchmarks.records")

SMALL = "sweep --suites infer --dtype float32 --threads 1 --quick"
NEEDS_KERNELS = pytest.mark.skipif(not ops.HAS_CPU_KERNELS, reason="no compiled CPU kernels")


def test_every_file_of_a_cpu_that_the_report_shows_is_made():
    made = {f"cpu-{name}.json" for name in full_run.PARTS}
    assert made == {name for name in figures.CONTENTS if name.startswith("cpu-")}


@pytest.mark.parametrize("name", full_run.PARTS)
def test_the_suites_take_the_commands(name):
    suite, *_ = arguments = full_run.PARTS[name].command(quick=False)
    assert arguments != full_run.PARTS[name].command(quick=True)
    if suite in cli.cases.SUITES:
        options = cli.parser().parse_args(arguments)
        assert options.providers.split(",")[0].startswith("gru_fast.cpu")
        assert cli.problems_of(options)
    else:
        assert suite in cli.OTHERS


def test_the_plan_runs_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    assert full_run.main("all", ["--plan", "--only", "lm,sweep", "--out", str(out)]) == 0
    first, second, total = capsys.readouterr().out.splitlines()
    assert "benchmarks lm --json cpu-lm.json" in first and "cpu-sweep.json" in second
    assert "12 min" in total and not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--only", "lm,none"], "got 'none'"), ([], "out: expected a folder")],
)
def test_arguments_that_are_wrong(arguments, message, capsys):
    assert full_run.main("all", arguments) == 2
    assert message in capsys.readouterr().err


def test_a_file_in_place_of_the_folder(tmp_path, capsys):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "inner"):
        assert full_run.main("all", ["--out", str(out)]) == 2
        assert gpu.main(["--dry", "--out", str(out)]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert [f"out: expected a folder, got '{out}': " in line for line in lines] == [True, True]


@NEEDS_KERNELS
def test_a_part_that_fails_costs_no_other_file(monkeypatch, tmp_path, capfd):
    bad = full_run.Part("step --shapes nonsense", 1)
    monkeypatch.setattr(full_run, "PARTS", {"bad": bad, "good": full_run.Part(SMALL, 1)})
    (tmp_path / "cpu-bad.json").write_text("as before")
    assert full_run.main("all", ["--out", str(tmp_path)]) == 1
    found = records.read(tmp_path / "cpu-good.json")
    assert found.is_complete and found.machine["seconds"] > 0 and found.records
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cpu-bad.json", "cpu-good.json"]
    assert (tmp_path / "cpu-bad.json").read_text() == "as before"
    out = capfd.readouterr().out
    assert "nothing: exit code 2" in out and f"commit {found.machine['commit']}" in out
    assert f"--out {tmp_path} --only bad\n" in out


@NEEDS_KERNELS
def test_a_part_that_dies_leaves_what_it_has(monkeypatch, tmp_path):
    part = tmp_path / "cpu-cut.json.part"

    def killed(command, cwd):
        process = subprocess.Popen(command, cwd=cwd)
        while not part.exists() and process.poll() is None:
            time.sleep(0.001)
        process.kill()
        return subprocess.CompletedProcess(command, process.wait())

    monkeypatch.setattr(full_run, "PARTS", {"cut": full_run.Part("scaling --quick", 1)})
    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "run", killed)
        complete, text = full_run.make("cut", tmp_path, quick=False)
    assert not complete and text == f"cut off, exit code -9: {part.name}"
    assert [path.name for path in tmp_path.iterdir()] == [part.name]
    assert records.read(part).records and not records.read(part).is_complete
