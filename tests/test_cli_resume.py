# SPDX-License-Identifier: Apache-2.0
"""The command line: a training that was stopped, or has ended, goes on."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cli_calls import TINY, call, copied, refused, write_names

pytestmark = pytest.mark.usefixtures("one_thread")


def test_killed_and_resumed_training_has_the_same_bits(names_file, tmp_path):
    arguments = ["train", str(names_file), "--lines", *TINY, "--dropout", "0.2", "--steps", "300",
                 "--out"]  # fmt: skip
    command = [sys.executable, "-m", "gru_fast", "--threads", "1"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    call(*arguments, whole)
    for number in (signal.SIGKILL, signal.SIGINT):
        resume = ["--resume"] if broken.exists() else []
        before = steps(broken)
        process = subprocess.Popen(
            [*command, *arguments, str(broken), "--save-every", "0", *resume],
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,  # beside the sources, -m would find them before an installed package
        )
        deadline = time.monotonic() + 120
        while steps(broken) < before + 5 and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(number)
        _, errors = process.communicate()
        assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130)
        assert number == signal.SIGKILL or "--resume goes on" in errors
        assert before < steps(broken) < 300, "it was too late to interrupt anything"
    call("--threads", 1, "train", "--out", broken, "--resume")
    expected, found = (load_file(d / "checkpoint.safetensors") for d in (whole, broken))
    assert expected.keys() == found.keys() and len(expected["losses"]) == 300
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def steps(folder: Path) -> int:
    path = folder / "checkpoint.safetensors"
    return len(load_file(path)["losses"]) if path.exists() else 0


def test_resume_needs_the_same_command(names_run, names_file, tmp_path):
    same = ["train", names_file, "--lines", *TINY, "--out", names_run]
    assert "is there already; --resume goes on" in refused(*same)
    assert "Missing argument 'CORPUS'" in refused("train", "--out", tmp_path / "run")
    assert "training lr = 0.02, now it is 0.5" in refused(*same, "--lr", 0.5, "--resume")
    assert "model cell = reset_after, now" in refused(*same, "--cell", "no_reset", "--resume")
    other = write_names(tmp_path / "names.txt")
    other.write_text(other.read_text() + "bobo\n")
    message = refused("train", other, "--lines", *TINY, "--out", names_run, "--resume")
    assert message == (
        f"gru-fast: {other} is not the text that {names_run} was trained on; restore it, or train "
        "in another --out"
    )
    more = "; --resume can change --steps and --device only"
    message = refused("train", names_file, "--text", "--out", names_run, "--resume")
    assert message == f"gru-fast: {names_run} was trained with --lines, now it is --text{more}"
    message = refused("train", names_file, "--words", "--out", names_run, "--resume")
    assert message == (
        f"gru-fast: {names_run} was trained with tokens kind = character, now it is word{more}"
    )
    assert "config.json: No such file" in refused(*same[:-1], tmp_path, "--resume")
    assert "has 60 of 60 steps; a larger --steps goes on" in call(*same, "--resume").stderr


def test_a_run_that_has_ended_goes_on_with_more_steps(names_run, names_file, tmp_path):
    longer, again = copied(names_run, tmp_path / "longer"), copied(names_run, tmp_path / "again")
    moved = tmp_path / "moved.txt"
    moved.write_bytes(names_file.read_bytes())
    told = call("train", "--out", longer, "--resume", "--steps", 90).stderr
    assert "has 60 of 90 steps, before it was 60" in told and "held-out loss" in told
    assert " 60/90 [" in told and " 0/90 [" not in told, "steps of before counted as made now"
    same = ["train", moved, "--lines", *TINY, "--steps", 90, "--out", again, "--resume"]
    call(*same)
    before, *after = (load_file(d / "checkpoint.safetensors") for d in (names_run, longer, again))
    assert torch.equal(after[0]["losses"][:60], before["losses"])
    assert len(after[0]["losses"]) == 90 and after[0]["held_out"][-1][0] == 90
    assert after[0]["losses"][-20:].mean() < before["losses"][-20:].mean()
    assert all(torch.equal(after[0][name], after[1][name]) for name in after[0])
    config = json.loads((again / "config.json").read_text())
    assert config["training"]["steps"] == 90 and config["training"]["lr"] == 0.02
    assert config["changes"] == [{"after_step": 60, "steps": 60}]
    assert config["corpus"]["source"] == str(moved)
    assert "has 90 of 90 steps; a larger" in call("train", "--out", again, "--resume").stderr
    for steps_given in (60, 89):
        message = refused("train", "--out", again, "--resume", "--steps", steps_given)
        assert message.endswith(f"has 90 steps; --steps: expected more, got {steps_given}")
    assert json.loads((again / "config.json").read_text()) == config


def test_a_run_goes_on_where_it_was_begun(names_file, tmp_path, monkeypatch):
    out, begun_before, devices = tmp_path / "run", tmp_path / "before", []
    monkeypatch.setattr("gru_fast.cli_train._check_device", devices.append)
    few = ["--lines", "--hidden", 4, "--embedding", 4]
    call("train", names_file, *few, "--device", "cpu:0", "--steps", 1, "--out", out)
    told = call("train", "--resume", "--out", out, "--steps", 2).stderr
    assert devices == ["cpu:0", "cpu:0"] and "from here" not in told
    told = call("train", "--resume", "--out", out, "--steps", 3, "--device", "cpu").stderr
    assert "on cpu from here, before it was cpu:0: the bits may differ" in told
    call("train", "--resume", "--out", out, "--steps", 4)
    assert devices[2:] == ["cpu", "cpu"]
    config = json.loads((out / "config.json").read_text())
    assert {"after_step": 2, "device": "cpu:0"} in config["changes"]

    del config["training"]["device"]  # as in folders of before
    (copied(out, begun_before) / "config.json").write_text(json.dumps(config))
    told = call("train", "--resume", "--out", begun_before, "--steps", 5).stderr
    assert devices[-1] == "cpu" and "from here" not in told
    assert json.loads((begun_before / "config.json").read_text())["training"]["device"] == "cpu"


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [("model", "hidden_size", 0), ("training", "lr", -1.0), ("model", "cell", "x")],
)
def test_options_of_a_run_are_checked_as_if_they_were_given(part, name, value, names_run, tmp_path):
    broken = copied(names_run, tmp_path / "run")
    config = json.loads((broken / "config.json").read_text())
    config[part][name] = value
    (broken / "config.json").write_text(json.dumps(config))
    assert f"'--{name.split('_')[0]}'" in refused("train", "--out", broken, "--resume")
    del config[part]
    (broken / "config.json").write_text(json.dumps(config))
    assert "config.json is damaged" in refused("train", "--out", broken, "--resume")
