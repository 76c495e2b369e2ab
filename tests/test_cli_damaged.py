# SPDX-License-Identifier: Apache-2.0
"""The command line and runs whose files are missing, damaged or of another run."""

import json

import pytest
import torch

from cli_calls import call, copied, refused
from gru_fast.checkpoint import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("damage", ["missing", "cut", "folder"])
def test_a_vocabulary_that_is_lost_is_written_again(damage, names_run, tmp_path):
    run = copied(names_run, tmp_path / "run")
    path = run / "vocabulary.json"
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[:20])
    if damage == "folder":
        path.mkdir()
        message = refused("train", "--out", run, "--resume", "--steps", 61)
        assert message == f"gru-fast: {path}: Is a directory; cannot write there"
        return
    told = call("train", "--out", run, "--resume", "--steps", 61).stderr
    assert "; vocabulary.json was missing or damaged, it is written again\n" in told
    assert path.read_bytes() == content
    assert "written again" not in call("train", "--out", run, "--resume").stderr
    call("sample", run)


def test_a_vocabulary_of_another_corpus_is_refused(names_run, tmp_path):
    run = copied(names_run, tmp_path / "run")
    path, before = run / "vocabulary.json", (run / "config.json").read_bytes()
    values = json.loads(path.read_text())
    values["tokens"][1] = "X"
    path.write_text(json.dumps(values))
    message = refused("train", "--out", run, "--resume", "--steps", 61)
    assert message.startswith(f"gru-fast: {path} is not that of the corpus; restore it, or delete")
    assert (run / "config.json").read_bytes() == before


NOTHING = object()


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("corpus", "sha256", NOTHING),
        ("corpus", "source", ["names.txt"]),
        ("corpus", "mode", "x"),
        ("training", "steps", "60"),
        ("training", "lr", True),
        ("training", "device", 1),
        ("tokens", NOTHING, NOTHING),
        ("model", "hidden_size", None),
        ("changes", NOTHING, "x"),
        ("model", NOTHING, []),
    ],
    ids=lambda value: "" if value is NOTHING else str(value),
)
def test_a_damaged_config_is_called_that_by_every_command(part, name, value, names_run, tmp_path):
    run = copied(names_run, tmp_path / "run")
    path = run / "config.json"
    config = json.loads(path.read_text())
    holder, key = (config, part) if name is NOTHING else (config[part], name)
    holder[key] = value
    if value is NOTHING:
        del holder[key]
    path.write_text(json.dumps(config))
    expected = f"gru-fast: {path} is damaged; train again, or restore it"
    assert refused("sample", run) == expected
    assert refused("train", "--out", run, "--resume", "--steps", 61) == expected


@pytest.mark.parametrize("step", [None, "x", True, 1.5])
def test_a_checkpoint_without_its_step_is_damaged(step, names_run, tmp_path):
    run = copied(names_run, tmp_path / "run")
    path = run / "checkpoint.safetensors"
    tensors, _ = load_checkpoint(path)
    save_checkpoint(path, tensors, {} if step is None else {"step": step})
    for command in (["sample", run], ["train", "--out", run, "--resume"]):
        assert refused(*command).startswith(f"gru-fast: {path} is damaged, or no checkpoint")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("optimiser.exp_avg.head.weight", lambda t: t[:1].clone()),
        ("optimiser.exp_avg_sq.head.bias", lambda t: t[:, None]),
        ("optimiser.step.head.bias", lambda t: torch.ones(11)),
        ("losses", lambda t: t[:, None]),
        ("held_out", lambda t: t[0]),
    ],
)
def test_tensors_of_another_shape_do_not_fit(name, change, names_run, tmp_path):
    run = copied(names_run, tmp_path / "run")
    path = run / "checkpoint.safetensors"
    tensors, meta = load_checkpoint(path)
    save_checkpoint(path, {**tensors, name: change(tensors[name])}, meta)
    message = refused("train", "--out", run, "--resume", "--steps", 61)
    assert message == f"gru-fast: {path} does not fit this model; choose another folder"
