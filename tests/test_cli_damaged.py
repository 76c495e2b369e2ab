# SPDX-License-Identifier: Apache-2.0
"""The command line and runs whose files are missing, damaged or of another run."""

import json

import pytest

from cli_calls import call, copied, refused

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
