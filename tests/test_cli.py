# SPDX-License-Identifier: Apache-2.0
"""The command line end to end, tiny."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cli_calls import call
from torch_threads import torch_threads

TINY = ["--hidden", "24", "--batch", "32", "--steps", "60", "--lr", "0.02"]
CONSONANTS, VOWELS = "bdkmt", "aeiou"


@pytest.fixture(autouse=True)
def threads():
    with torch_threads(1):
        yield


def write_names(path):
    """Names with a pattern: consonant and vowel in turn."""
    generator = torch.Generator().manual_seed(0)
    names = set()
    while len(names) < 300:
        length = int(torch.randint(2, 5, (), generator=generator))
        picks = torch.randint(5, (length, 2), generator=generator).tolist()
        names.add("".join(CONSONANTS[c] + VOWELS[v] for c, v in picks))
    path.write_text("\n".join(["", *sorted(names), " ", *sorted(names)[:3]]) + "\n")
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_names(tmp_path_factory.mktemp("corpus") / "names.txt")


def refused(*arguments):
    """The one line on stderr of a command that exits with code 2."""
    result = call(*arguments, code=2)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()[-1:]
    assert "Traceback" not in result.stderr
    return line


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "names"
    call("train", corpus, "--lines", *TINY, "--out", out)
    return out


@pytest.mark.parametrize("cell", ["reset_after", "reset_before", "no_reset"])
def test_train_and_sample_lines(cell, corpus, tmp_path):
    trained = call(
        "train", corpus, "--lines", *TINY, "--cell", cell, "--out", tmp_path / "run",
        "--beside-torch",
    )  # fmt: skip
    assert trained.stdout == ""
    assert "300 different lines, 15 of them held out, vocabulary 11" in trained.stderr
    losses = re.search(r"held-out loss ([\d.]+) -> ([\d.]+) nats per character", trained.stderr)
    assert float(losses[2]) < 0.7 * float(losses[1])
    compared = re.findall(r"training, batch 32: [\d,]+ tokens/s, torch.nn.GRU", trained.stderr)
    assert len(compared) == (cell == "reset_after")
    assert ("torch.nn.GRU has no cell=" in trained.stderr) == (cell != "reset_after")

    result = call("sample", tmp_path / "run", "--num", 200, "--seed", 3, "--beside-torch")
    names = result.stdout.split("\n")[:-1]
    assert len(names) == 200 and set("".join(names)) <= set(CONSONANTS + VOWELS)
    pattern = sum(bool(re.fullmatch(f"([{CONSONANTS}][{VOWELS}])+", n)) for n in names)
    assert pattern > 100, "what was learnt is not what is sampled"
    known = set(corpus.read_text().split())
    share = sum(bool(n) and n not in known for n in names) / 200
    assert f"{share:.0%} of 200 sampled lines are not in {corpus}" in result.stderr
    assert len(re.findall("sampling (64|1) at a time", result.stderr)) == 2


def test_sampling_options(run, corpus):
    first = call("sample", run, "--num", 5, "--seed", 7)
    assert call("sample", run, "--num", 5, "--seed", 7).stdout == first.stdout
    assert call("sample", run, "--num", 5, "--seed", 8).stdout != first.stdout
    assert call("sample", run, "--num", 3, "--seed", 7).stdout == "".join(
        first.stdout.splitlines(keepends=True)[:3]
    )
    prompted = call("sample", run, "--num", 5, "--prompt", "ba", "--temperature", 0.5, "--top-p",
                    0.9, "--min-p", 0.01, "--top-k", 4, "--length", 3)  # fmt: skip
    assert all(re.fullmatch("ba[a-z]{0,3}", line) for line in prompted.stdout.splitlines())
    greedy = call("sample", run, "--num", 2, "--greedy").stdout.splitlines()
    assert greedy[0] == greedy[1]
    known = set(corpus.read_text().split())
    novel = call("sample", run, "--num", 20, "--novel", "--seed", 1)
    lines = novel.stdout.splitlines()
    assert len(lines) == 20 and not known & set(lines) and "of 1,000 sampled" in novel.stderr


def test_novel_needs_the_corpus_as_it_was(tmp_path):
    text, out = write_names(tmp_path / "names.txt"), tmp_path / "run"
    call("train", text, "--lines", "--hidden", 4, "--embedding", 4, "--steps", 1, "--out", out)
    text.write_text("another\ncorpus\n")
    message = f"gru-fast: --novel: {text} has changed since the training; leave --novel out"
    assert refused("sample", out, "--novel") == message
    text.unlink()
    message = f"gru-fast: --novel: {text} cannot be read any more; leave --novel out"
    assert refused("sample", out, "--novel") == message
    assert call("sample", out, "--length", 1, "--num", 2).stdout.count("\n") == 2


def test_running_text_and_words(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat\nthe dog sat on the log\n" * 40)
    trained = call("train", text, "--text", "--words", *TINY, "--batch", "4", "--chunk", 8,
                   "--embedding", 24, "--tie", "--layers", 2, "--out",
                   tmp_path / "run")  # fmt: skip
    assert "480 words, vocabulary 8" in trained.stderr
    sampled = call("sample", tmp_path / "run", "--prompt", "the cat", "--length", 6, "--greedy")
    assert re.fullmatch("the cat sat on the (mat|log) the (cat|dog)\n", sampled.stdout)
    assert sampled.stderr == ""
    scored = call("score", tmp_path / "run", text)
    match = re.fullmatch(r"([\d.]+) nats per word, perplexity ([\d.]+), 480 words\n", scored.stdout)
    assert float(match[1]) < 0.6 and float(match[2]) < 1.8
    assert "0 vector" in call("trace", tmp_path / "run", "the dog").stdout
    assert "is a running text" in refused("sample", tmp_path / "run", "--novel")
    assert (
        "has 60 of 61 steps"
        in call("train", "--out", tmp_path / "run", "--resume", "--steps", 61).stderr
    )  # words, embedding and layers are the run's


def test_score_of_lines_is_the_mean_over_all_tokens(run, tmp_path):
    from gru_fast.checkpoint import load_run

    file = tmp_path / "f.txt"
    file.write_text("bada\r\n\n ke \nbada\n")
    loaded = load_run(run)
    rows = [[*loaded.tokenizer.encode(w), 0] for w in ("bada", "ke", "bada")]
    expected = -sum(loaded.model.score([row]).sum().item() for row in rows) / 13
    scored = call("score", run, file).stdout
    assert scored.endswith("13 characters\n")
    assert float(scored.split()[0]) == pytest.approx(expected, abs=1e-4)


def test_trace_shows_truth_and_draws(run):
    lines = call("trace", run, "bada", "--seed", 2).stdout.splitlines()
    assert "TRUE" in lines[0] and "DRAWN" in lines[0]
    left, right = zip(*(line.split("  |  ") if "  |  " in line else (line, "") for line in lines),
                      strict=True)  # fmt: skip
    cells = [re.split(r" {2,}", row.strip()) for row in left[2:]]
    assert [c[0] for c in cells] == list("12345")
    assert [c[1] for c in cells] == ["0 vector", *"bada"]
    assert [c[-1].split()[0] for c in cells] == [*"bada", "EOS"]
    drawn = [re.split(r" {2,}", row.strip()) for row in right[2:] if row.strip()]
    assert [c[1] for c in drawn[1:]] == [c[-1].split()[0] for c in drawn[:-1]]
    sample = call("sample", run, "--seed", 2).stdout.strip()
    shown = "".join(c[-1].split()[0] for c in drawn if not c[-1].startswith("EOS"))
    assert sample.startswith(shown) and shown


def test_gates_are_drawn(run, tmp_path):
    pytest.importorskip("matplotlib")
    call("gates", run, "bada", "--out", tmp_path / "g.png")
    assert (tmp_path / "g.png").read_bytes()[:4] == b"\x89PNG"
    assert "expected a path of an image" in refused("gates", run, "b", "--out", tmp_path / "g.x")
    message = refused("gates", run, "#", "--out", tmp_path / "g.png")
    assert "'#'" in message and "expected a path of an image" not in message


def test_gates_of_texts_that_look_like_formulas(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "sums").write_text("$a_{$ b\nb $a_{$ b\n$a_{$\n")
    tiny = ["--lines", "--words", "--hidden", 4, "--steps", 1, "--out", tmp_path / "run"]
    call("train", tmp_path / "sums", *tiny)
    call("gates", tmp_path / "run", "$a_{$ b", "--out", tmp_path / "g.svg")
    assert "$a_{$" in (tmp_path / "g.svg").read_text()


def test_gate_values_are_those_of_the_layers():
    from gru_fast import GRULanguageModel
    from gru_fast.trace import gate_values

    for cell in ("reset_after", "reset_before", "no_reset"):
        model = GRULanguageModel(5, 3, 7, 2, cell=cell)
        tokens = torch.tensor([1, 4, 2])
        layers = gate_values(model, tokens)
        assert set(layers[1]) == {"z", "n"} | ({"r"} if cell != "no_reset" else set())
        h = torch.zeros(7)
        for z, n in zip(layers[1]["z"], layers[1]["n"], strict=True):
            h = (1 - z) * n + z * h
        expected = model.run(torch.tensor([[model.start, 1, 4, 2]]))[1][1, 0]
        torch.testing.assert_close(h, expected)


def test_doctor_refuses_an_installation_with_other_numbers(monkeypatch):
    monkeypatch.setattr("gru_fast.cli._self_test", lambda: (float("nan"), 1.0))
    result = call("doctor", code=2)
    assert "gru-fast: the self-test failed: the numbers differ" in result.stderr


def test_doctor():
    text = call("doctor").stdout
    assert "self-test" in text and "backend reference" in text and torch.__version__ in text


def test_killed_and_resumed_training_has_the_same_bits(corpus, tmp_path):
    arguments = ["train", str(corpus), "--lines", *TINY, "--dropout", "0.2", "--steps", "300",
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


def test_resume_needs_the_same_command(run, corpus, tmp_path):
    same = ["train", corpus, "--lines", *TINY, "--out", run]
    assert "is there already; --resume goes on" in refused(*same)
    assert "Missing argument 'CORPUS'" in refused("train", "--out", tmp_path / "run")
    assert "training lr = 0.02, now it is 0.5" in refused(*same, "--lr", 0.5, "--resume")
    assert "model cell = reset_after, now" in refused(*same, "--cell", "no_reset", "--resume")
    other = write_names(tmp_path / "names.txt")
    other.write_text(other.read_text() + "bobo\n")
    message = refused("train", other, "--lines", *TINY, "--out", run, "--resume")
    assert "corpus" in message
    assert "config.json: No such file" in refused(*same[:-1], tmp_path, "--resume")
    assert "has 60 of 60 steps; a larger --steps goes on" in call(*same, "--resume").stderr


def copied(run: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in run.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_a_run_that_has_ended_goes_on_with_more_steps(run, corpus, tmp_path):
    longer, again = copied(run, tmp_path / "longer"), copied(run, tmp_path / "again")
    moved = tmp_path / "moved.txt"
    moved.write_bytes(corpus.read_bytes())
    told = call("train", "--out", longer, "--resume", "--steps", 90).stderr
    assert "has 60 of 90 steps, before it was 60" in told and "held-out loss" in told
    same = ["train", moved, "--lines", *TINY, "--steps", 90, "--out", again, "--resume"]
    call(*same)
    before, *after = (load_file(d / "checkpoint.safetensors") for d in (run, longer, again))
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


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [("model", "hidden_size", "x"), ("training", "lr", None), ("corpus", "mode", 3)],
)
def test_options_of_a_run_are_checked_as_if_they_were_given(part, name, value, run, tmp_path):
    broken = copied(run, tmp_path / "run")
    config = json.loads((broken / "config.json").read_text())
    config[part][name] = value
    (broken / "config.json").write_text(json.dumps(config))
    refused("train", "--out", broken, "--resume")
    del config[part]
    (broken / "config.json").write_text(json.dumps(config))
    assert "config.json is damaged" in refused("train", "--out", broken, "--resume")


def test_bad_corpora(tmp_path):
    out = ["--out", tmp_path / "run"]
    missing = tmp_path / "none.txt"
    assert refused("train", missing, "--lines", *out) == (
        f"gru-fast: {missing}: No such file or directory; expected a text file"
    )
    (tmp_path / "empty").write_text(" \n")
    assert "is empty; expected some text" in refused("train", tmp_path / "empty", "--lines", *out)
    (tmp_path / "latin").write_bytes("naïve".encode("latin-1"))
    message = refused("train", tmp_path / "latin", "--text", *out)
    assert "is not UTF-8 text (byte 2); convert it" in message
    (tmp_path / "one").write_text("one\n")
    assert "at least 2 different lines" in refused("train", tmp_path / "one", "--lines", *out)
    assert "say --lines" in refused("train", tmp_path / "one", *out)
    for mode in ([], ["--text"]):
        assert "expected one of builtin:names" in refused("train", "builtin:x", *mode, *out)
    assert "tie_weights: expected" in refused("train", "builtin:names", "--tie", *out)
    message = refused("train", "builtin:names", "--device", "nowhere", *out)
    assert message.startswith("gru-fast: --device nowhere: Expected one of cpu, cuda")
    message = refused("train", "builtin:names", "--device", "meta", *out)
    assert message == "gru-fast: --device meta: Tensor.item() cannot be called on meta tensors"
    assert "Is a directory" in refused("train", tmp_path, "--lines", *out)
    assert not (tmp_path / "run").exists()


def test_bad_prompts_and_options(run):
    message = "gru-fast: characters that the vocabulary of 10 does not have: 'x', 'Q'; leave them"
    for arguments in (["sample", run, "--prompt", "xQ"], ["trace", run, "xQ"]):
        assert refused(*arguments).startswith(message)
    assert "not in the range" in refused("sample", run, "--temperature", 0)
    assert "No such option" in refused("sample", run, "--what")
    for option in ("--temperature", "--top-p", "--min-p"):
        assert "is not a finite number" in refused("sample", run, option, "nan")
    for command, option, value in (
        ("train", "--lr", "nan"), ("train", "--clip", "inf"), ("train", "--dropout", "nan"),
        ("trace", "--temperature", "inf"),
    ):  # fmt: skip
        assert "is not a finite number" in refused(command, run, option, value)
    assert "not in the range" in refused("train", run, "--seed", 2**64)


def test_values_beyond_what_can_be_computed(run):
    for command in (["sample", run, "--length", 2**45], ["sample", run, "--num", 2**45]):
        assert refused(*command).startswith("gru-fast: not enough memory: ")
    assert "max_new_tokens: expected >= 0 and < 2**48" in refused("sample", run, "--length", 2**64)
    assert "temperature: expected a float32" in refused("sample", run, "--temperature", 1e39)
    for command in (["sample", run], ["trace", run, "bada"]):
        assert "logits / temperature 1e-44: expected" in refused(*command, "--temperature", 1e-44)
    every = call("sample", run, "--seed", 1).stdout
    assert call("sample", run, "--seed", 1, "--top-k", 2**64).stdout == every


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
def test_a_full_disk_behind_stdout(run):
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "gru_fast", "sample", str(run)],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == "gru-fast: No space left on device"


def test_folders_of_any_name(corpus, tmp_path, monkeypatch):
    """Bytes that are not UTF-8, and more of them than a name may have."""
    monkeypatch.chdir(tmp_path)
    odd = os.fsdecode(b"\xe9.txt")
    (tmp_path / odd).write_bytes(corpus.read_bytes())
    tiny = ["--lines", "--hidden", 4, "--steps", 2]
    call("train", odd, *tiny, "--out", os.fsdecode(b"\xe9"))
    call("train", "--out", os.fsdecode(b"\xe9"), "--resume", "--steps", 3)
    call("sample", os.fsdecode(b"\xe9"), "--novel")
    long = "x" * 300
    assert "File name too long; cannot make that folder" in refused(
        "train", corpus, *tiny, "--out", long
    )
    assert "is not a folder" in refused("sample", long)


def test_a_run_that_cannot_be_written_is_begun_again(corpus, tmp_path, monkeypatch):
    out = tmp_path / "run"
    command = ["train", corpus, "--lines", "--hidden", 4, "--steps", 2, "--out", out]

    def no_space(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for failing, left in (("pathlib.Path.write_text", set()), ("os.fsync", {"vocabulary.json"})):
        with monkeypatch.context() as patched:
            patched.setattr(failing, no_space)
            message = refused(*command)
        assert message.endswith("No space left on device; cannot write there")
        assert {path.name for path in out.iterdir()} == left
    assert "expected a run of gru-fast train" in refused("train", "--out", out, "--resume")
    call(*command)
    call("sample", out)
    (out / "checkpoint.safetensors").unlink()
    assert refused("sample", out) == (
        f"gru-fast: {out / 'checkpoint.safetensors'}: No such file or directory; expected a "
        "checkpoint"
    )


def test_weights_that_are_not_finite_are_not_kept(corpus, tmp_path):
    """The gradient of step 2 overflows: step 1 stays what can be sampled."""
    out = tmp_path / "run"
    tiny = ["--lines", "--hidden", 4, "--embedding", 4, "--steps", 2, "--save-every", 0]
    assert refused("train", corpus, *tiny, "--lr", 1e30, "--out", out) == (
        "gru-fast: the gradient's norm is inf at step 2; use a learning rate below 1e+30"
    )
    tensors = load_file(out / "checkpoint.safetensors")
    assert len(tensors["losses"]) == 1 and all(t.isfinite().all() for t in tensors.values())
    assert "not in the range" in refused("train", corpus, *tiny, "--lr", 1e31, "--out", out)


@pytest.mark.parametrize("file", ["config.json", "vocabulary.json", "checkpoint.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "other"])
def test_broken_runs(file, damage, run, tmp_path):
    folder = copied(run, tmp_path / "run")
    path = folder / file
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif file == "checkpoint.safetensors":
        path.write_bytes(content[:20] + b"\xff" * 20 + content[40:])
    else:
        values = json.loads(content)
        values["tokens"] = values["tokens"][:-1] if file == "vocabulary.json" else {}
        values["model"] = {"vocab_size": "x"}
        path.write_text(json.dumps(values))
    assert refused("sample", folder).startswith("gru-fast: ")
    assert "is not a folder" in refused("sample", tmp_path / "none")


def test_a_seed_means_the_same_model(corpus, tmp_path):
    few = ["--lines", "--hidden", 4, "--embedding", 4, "--steps", 1]
    made = []
    for count, seed in enumerate((5, 5, 6)):
        torch.manual_seed(count)
        call("train", corpus, *few, "--seed", seed, "--out", tmp_path / str(count))
        made.append((tmp_path / str(count) / "checkpoint.safetensors").read_bytes())
    assert made[0] == made[1] != made[2]


def test_a_run_of_another_format(run, tmp_path):
    path = copied(run, tmp_path / "run") / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 7}))
    assert refused("sample", path.parent) == f"gru-fast: {path}: expected format 1, got 7"


def test_missing_extra_is_named():
    code = (
        "import sys; sys.modules['click'] = sys.modules['safetensors'] = None\n"
        "import gru_fast.__main__ as m; m.main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == "gru-fast needs click, safetensors: pip install 'gru_fast[train]'\n"


def test_builtin_corpora():
    from gru_fast.corpus import read_text, split_lines

    names = split_lines(read_text("builtin:names"))
    assert len(names) > 80_000 and {"mary", "james", "smith"} <= set(names)
    assert set("".join(names)) == set("abcdefghijklmnopqrstuvwxyz")
    topics = read_text("builtin:python")
    assert len(topics) > 400_000 and "lambda" in topics
