# SPDX-License-Identifier: Apache-2.0
"""The command line and what is around it: pipes and streams of any kind."""

import os
import signal
import subprocess
import sys
import threading

import pytest
from click.testing import CliRunner

from cli_calls import call
from gru_fast import ops
from gru_fast.checkpoint import claimed
from gru_fast.cli import cli
from torch_threads import torch_threads

TEXT = "\n".join(["änne", "bert", "cäsar", "łucja"])


@pytest.fixture(autouse=True)
def threads():
    with torch_threads(1):
        yield


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def train(corpus, out, *options):
    return call("train", corpus, "--lines", "--hidden", 4, "--steps", 1, "--out", out, *options)


def test_what_a_pipe_holds_later_is_not_the_corpus(tmp_path):
    pipe, out = tmp_path / "pipe", tmp_path / "run"
    os.mkfifo(pipe)

    def written(content):
        writer = threading.Thread(target=pipe.write_bytes, args=(content,), daemon=True)
        writer.start()
        return writer

    written(TEXT.encode())
    train(pipe, out)
    writer = written(b"somebody else's")
    assert call("sample", out, "--novel", code=2).stderr == (
        f"gru-fast: --novel: {pipe} cannot be read any more; leave --novel out\n"
    )
    assert pipe.read_bytes() == b"somebody else's"
    writer.join()


def test_stderr_may_be_closed(corpus, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "gru_fast", "train", corpus, "--lines", "--out", out]
    closed = ["sh", "-c", 'exec "$@" 2>&-', "sh", *command, "--hidden", "4", "--steps", "1"]
    assert subprocess.run(closed, check=False).returncode == 0
    call("sample", out, "--length", 1)


def test_an_encoding_of_stdout_without_the_characters(corpus, tmp_path):
    out = tmp_path / "run"
    train(corpus, out)
    result = CliRunner(charset="latin-1").invoke(cli, ["trace", str(out), "ł"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        r"gru-fast: stdout is latin-1, without '\u0142'; try PYTHONIOENCODING=utf-8" + "\n"
    )


def test_the_exit_code_of_a_second_interrupt(corpus, tmp_path, monkeypatch):
    def interrupted(*arguments, should_stop, **options):
        signal.raise_signal(signal.SIGINT)
        assert should_stop()
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("gru_fast.cli_train.train", interrupted)
    # A shell has what it runs in the background ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        result = call(
            "train", corpus, "--lines", "--hidden", 4, "--out", tmp_path / "run", code=130
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.stderr.endswith("\nAborted!\n")


def test_one_process_at_a_time_trains_in_a_folder(corpus, tmp_path):
    out = tmp_path / "run"
    train(corpus, out)
    with claimed(out):
        result = call("train", "--resume", "--out", out, "--steps", 3, code=2)
        call("sample", out, "--length", 1)
    assert result.stderr.splitlines()[-1] == f"gru-fast: {out}: another process is training there"
    call("train", "--resume", "--out", out, "--steps", 2)


def test_running_text_does_not_end_where_eos_is_drawn(tmp_path):
    """Which a model does that was trained little: here it is as likely as a and b."""
    corpus, out = tmp_path / "text.txt", tmp_path / "run"
    corpus.write_text("ab" * 40)
    call("train", corpus, "--text", "--hidden", 4, "--steps", 1, "--lr", 1e-9, "--out", out)
    text = call("sample", out, "--length", 90, "--seed", 1).stdout
    assert 40 < len(text.strip()) < 80 and set(text) == set("ab\n")


@pytest.mark.skipif(not ops.HAS_CPU_KERNELS, reason="gru_fast was built without its CPU kernels")
def test_an_instruction_set_that_is_none():
    program = [sys.executable, "-m", "gru_fast", "doctor"]
    environment = os.environ | {"GRU_FAST_CPU_ISA": "sse9"}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "GRU_FAST_CPU_ISA: expected an instruction set that this CPU can run" in done.stderr


@pytest.mark.parametrize("option", ["--hidden", "--batch", "--steps", "--embedding", "--layers"])
def test_numbers_that_nothing_could_hold(tmp_path, option):
    for number in (2**31, 10**400):
        result = call("train", "builtin:names", "--out", tmp_path / "run", option, number, code=2)
        assert f"'{option}': {number} is not below 2**31." in result.stderr
    assert "[x>=1]" in call("train", "--help").stdout
    assert "is not below 2**31" in call("--threads", 10**20, "doctor", code=2).stderr
    assert not (tmp_path / "run").exists()
