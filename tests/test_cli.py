# SPDX-License-Identifier: Apache-2.0
"""The command line end to end, tiny."""

import errno
import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from cli_calls import CONSONANTS, TINY, VOWELS, call, copied, refused
from gru_fast import GRULanguageModel
from gru_fast.checkpoint import claimed, load_run
from gru_fast.tokenizers import CharacterTokenizer
from gru_fast.trace import gate_values, plot_gates

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("cell", ["reset_after", "reset_before", "no_reset"])
def test_train_and_sample_lines(cell, names_file, tmp_path):
    trained = call(
        "train", names_file, "--lines", *TINY, "--cell", cell, "--out", tmp_path / "run",
        "--beside-torch",
    )  # fmt: skip
    assert trained.stdout == ""
    assert "300 different lines, 15 of them held out, vocabulary 11\n" in trained.stderr
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
    known = set(names_file.read_text().split())
    share = sum(bool(n) and n not in known for n in names) / 200
    assert f"{share:.0%} of 200 sampled lines are not in {names_file}" in result.stderr
    assert len(re.findall("sampling (64|1) at a time", result.stderr)) == 2


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


def test_score_of_lines_is_the_mean_over_all_tokens(names_run, tmp_path):
    file = tmp_path / "f.txt"
    file.write_text("bada\r\n\n ke \nbada\n")
    loaded = load_run(names_run)
    rows = [[*loaded.tokenizer.encode(w), 0] for w in ("bada", "ke", "bada")]
    expected = -sum(loaded.model.score([row]).sum().item() for row in rows) / 13
    scored = call("score", names_run, file).stdout
    assert scored.endswith("13 characters\n")
    nats, perplexity = (float(n) for n in re.findall(r"\d+\.\d+", scored))
    assert nats == pytest.approx(expected, abs=1e-4)
    assert perplexity == pytest.approx(math.exp(expected), rel=1e-3)


def test_trace_shows_truth_and_draws(names_run):
    lines = call("trace", names_run, "bada", "--seed", 2).stdout.splitlines()
    assert "TRUE" in lines[0] and "DRAWN" in lines[0]
    left, right = zip(*(line.split("  |  ") if "  |  " in line else (line, "") for line in lines),
                      strict=True)  # fmt: skip
    cells = [re.split(r" {2,}", row.strip()) for row in left[2:]]
    assert [c[0] for c in cells] == list("12345")
    assert [c[1] for c in cells] == ["0 vector", *"bada"]
    assert [c[-1].split()[0] for c in cells] == [*"bada", "EOS"]
    drawn = [re.split(r" {2,}", row.strip()) for row in right[2:] if row.strip()]
    assert [c[1] for c in drawn[1:]] == [c[-1].split()[0] for c in drawn[:-1]]
    sample = call("sample", names_run, "--seed", 2).stdout.strip()
    shown = "".join(c[-1].split()[0] for c in drawn if not c[-1].startswith("EOS"))
    assert sample.startswith(shown) and shown


def test_trace_shows_the_probabilities_of_the_draws(names_run):
    """The tempered ones where tokens are drawn; where none are, those that the loss is made of."""
    model = load_run(names_run).model
    logits = model(torch.tensor([[model.start]]))[0][0, 0]
    row = call("trace", names_run, "bada", "--temperature", 0.5).stdout.splitlines()[2]
    for side, temperature in zip(row.split("  |  "), (1, 0.5), strict=True):
        likeliest = float(re.search(r"\d\.\d\d", side)[0])
        expected = (logits / temperature).softmax(-1).max().item()
        assert likeliest == pytest.approx(expected, abs=0.0051)


def test_gates_are_drawn(names_run, tmp_path):
    pytest.importorskip("matplotlib")
    call("gates", names_run, "bada", "--out", tmp_path / "g.png")
    assert (tmp_path / "g.png").read_bytes()[:4] == b"\x89PNG"
    message = refused("gates", names_run, "#", "--out", tmp_path / "g.png")
    assert "'#'" in message and "expected a path of an image" not in message


def test_gates_are_written_where_it_was_said_or_not_at_all(names_run, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    for out in ("g", "g.x", "", ".", ".png", tmp_path):
        message = refused("gates", "no-run", "b", "--out", out)
        assert "expected a path of an image, such as x.png; it may end with" in message
        assert ".pdf, " in message and ".svg" in message
    message = refused("gates", "no-run", "b", "--out", "folder.png")
    assert message.startswith("gru-fast: folder.png is a folder; expected")
    assert os.listdir(tmp_path) == ["folder.png"] and not os.listdir("folder.png")
    call("gates", names_run, "b", "--out", "g.PNG")
    assert sorted(os.listdir(tmp_path)) == ["folder.png", "g.PNG"]
    message = refused("gates", names_run, "b", "--out", "none/g.png")
    assert message == "gru-fast: none/g.png: No such file or directory; cannot write there"
    if os.path.exists("/dev/full"):
        os.symlink("/dev/full", "full.png")
        message = refused("gates", names_run, "b", "--out", "full.png")
        assert message == "gru-fast: full.png: No space left on device; cannot write there"


def test_gates_of_texts_that_look_like_formulas(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "sums").write_text("$a_{$ b\nb $a_{$ b\n$a_{$\n")
    tiny = ["--lines", "--words", "--hidden", 4, "--steps", 1, "--out", tmp_path / "run"]
    call("train", tmp_path / "sums", *tiny)
    call("gates", tmp_path / "run", "$a_{$ b", "--out", tmp_path / "g.svg")
    assert "$a_{$" in (tmp_path / "g.svg").read_text()


@pytest.mark.parametrize("cell", ["reset_after", "reset_before", "no_reset"])
@pytest.mark.parametrize("embedding", [None, 3])
def test_gate_values_are_those_of_the_layers(embedding, cell):
    model = GRULanguageModel(5, embedding, 7, 2, cell=cell)
    gates = gate_values(model, torch.tensor([1, 4, 2]))
    assert (gates.r is None) == (cell == "no_reset") and gates.z.shape == (2, 4, 7)
    h = torch.zeros(2, 7)
    for z, n in zip(gates.z.unbind(1), gates.n.unbind(1), strict=True):
        h = (1 - z) * n + z * h
    expected = model.run(torch.tensor([[model.start, 1, 4, 2]]))[1][:, 0]
    torch.testing.assert_close(h, expected)


def test_what_is_plotted_of_the_gates():
    """By units that are sorted: those of r, and of 1 - z."""
    pytest.importorskip("matplotlib")
    model = GRULanguageModel(4, None, 7, 2)
    gates = gate_values(model, torch.tensor([2, 1]))
    panels = plot_gates(model, CharacterTokenizer("abc"), "ba").axes[:4]
    kinds = ("reset gate r", "update gate 1 - z")
    titles = [f"layer {k}: {kind}" for k in (1, 2) for kind in kinds]
    assert [panel.get_title() for panel in panels] == titles
    for panel, values in zip(
        panels, (gates.r[0], 1 - gates.z[0], gates.r[1], 1 - gates.z[1]), strict=True
    ):
        shown = torch.from_numpy(panel.images[0].get_array().data)
        torch.testing.assert_close(shown, values[:, values.mean(0).argsort()].T)


def test_defaults_of_a_training(names_file, tmp_path):
    for kind, batch, *cut_at in (("--lines", 128, "--max-length", 6), ("--text", 32)):
        out = tmp_path / kind
        options = [kind, "--hidden", 4, "--steps", 1, *cut_at, "--out", out]
        told = call("train", names_file, *options).stderr
        assert json.loads((out / "config.json").read_text())["training"]["batch"] == batch
        if kind == "--lines":
            cut = sum(len(name) >= 6 for name in set(names_file.read_text().split()))
            assert 0 < cut < 300 and f", {cut} cut at 6 characters\n" in told


def test_options_that_would_have_no_meaning_are_refused(names_file, names_run, tmp_path):
    out = ["--out", tmp_path / "run"]
    for given in (["--lines", "--text"], ["--text", "--lines"]):
        message = refused("train", names_file, *given, *out)
        assert message == "Error: --lines, --text: expected one of them, got both"
    chunk = "Error: --chunk is for --text only, and this is --lines"
    assert refused("train", names_file, "--lines", "--chunk", 8, *out) == chunk
    assert refused("train", "builtin:names", "--chunk", 128, *out) == chunk
    assert refused("train", "--resume", "--out", names_run, "--chunk", 128) == chunk
    message = refused("train", "builtin:python", "--max-length", 256, *out)
    assert message == "Error: --max-length is for --lines only, and this is --text"
    assert not (tmp_path / "run").exists()


def test_doctor_refuses_an_installation_with_other_numbers(monkeypatch):
    monkeypatch.setattr("gru_fast.cli._self_test", lambda: (float("nan"), 1.0))
    result = call("doctor", code=2)
    assert "gru-fast: the self-test failed: the numbers differ" in result.stderr


def test_doctor():
    text = call("doctor").stdout
    assert "self-test" in text and "backend reference" in text and torch.__version__ in text


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
    tie = ["train", "builtin:names", "--tie", "--hidden", 8]
    message = "gru-fast: --tie: expected --embedding 8, the size of --hidden, got "
    assert refused(*tie, *out) == message + "none"
    assert refused(*tie, "--embedding", 4, *out) == message + "4"
    message = refused("train", "builtin:names", "--device", "nowhere", *out)
    assert message.startswith("gru-fast: --device nowhere: Expected one of cpu, cuda")
    message = refused("train", "builtin:names", "--device", "meta", *out)
    assert message == "gru-fast: --device meta: Tensor.item() cannot be called on meta tensors"
    assert "Is a directory" in refused("train", tmp_path, "--lines", *out)
    assert not (tmp_path / "run").exists()


def test_bad_prompts_and_options(names_run):
    message = "gru-fast: characters that the vocabulary of 10 does not have: 'x', 'Q'; leave them"
    for arguments in (["sample", names_run, "--prompt", "xQ"], ["trace", names_run, "xQ"]):
        assert refused(*arguments).startswith(message)
    assert "not in the range" in refused("sample", names_run, "--temperature", 0)
    assert "No such option" in refused("sample", names_run, "--what")
    for option in ("--temperature", "--top-p", "--min-p"):
        assert "is not a finite number" in refused("sample", names_run, option, "nan")
    for command, option, value in (
        ("train", "--lr", "nan"), ("train", "--clip", "inf"), ("train", "--dropout", "nan"),
        ("trace", "--temperature", "inf"),
    ):  # fmt: skip
        assert "is not a finite number" in refused(command, names_run, option, value)
    assert "not in the range" in refused("train", names_run, "--seed", 2**64)


def test_values_beyond_what_can_be_computed(names_run):
    too_many = refused("sample", names_run, "--num", 2**45)
    assert too_many.startswith("gru-fast: not enough memory: ")
    # A name ends long before.
    longest = call("sample", names_run, "--length", 2**45, "--seed", 0).stdout
    assert longest == call("sample", names_run, "--length", 1000, "--seed", 0).stdout
    assert refused("sample", names_run, "--length", 2**64) == (
        f"gru-fast: --length: expected >= 0 and < 2**48, got {2**64}"
    )
    assert refused("sample", names_run, "--num", 2**64) == (
        f"gru-fast: --num: expected >= 1 and < 2**48, got {2**64}"
    )
    for given in (1e-50, 1e39):
        assert refused("sample", names_run, "--temperature", given) == (
            f"gru-fast: --temperature: expected a float32 value > 0, got {given} "
            "(--greedy takes the most likely token)"
        )
    for given in (1e-50, 1e300):
        assert refused("trace", names_run, "bada", "--temperature", given) == (
            f"gru-fast: --temperature: expected a float32 value > 0, got {given}"
        )
    for command in (["sample", names_run], ["trace", names_run, "bada"]):
        assert "logits / temperature 1e-44: expected" in refused(*command, "--temperature", 1e-44)
    every = call("sample", names_run, "--seed", 1).stdout
    assert call("sample", names_run, "--seed", 1, "--top-k", 2**64).stdout == every


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
def test_a_full_disk_behind_stdout(names_run):
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "gru_fast", "sample", str(names_run)],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == "gru-fast: No space left on device"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"]], ids=str)
def test_a_full_disk_behind_a_help_text(arguments):
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "gru_fast", *arguments],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[0] == "gru-fast: No space left on device"


def test_folders_of_any_name(names_file, tmp_path, monkeypatch):
    """Bytes that are not UTF-8, and more of them than a name may have."""
    monkeypatch.chdir(tmp_path)
    odd = os.fsdecode(b"\xe9.txt")
    (tmp_path / odd).write_bytes(names_file.read_bytes())
    tiny = ["--lines", "--hidden", 4, "--steps", 2]
    call("train", odd, *tiny, "--out", os.fsdecode(b"\xe9"))
    call("train", "--out", os.fsdecode(b"\xe9"), "--resume", "--steps", 3)
    call("sample", os.fsdecode(b"\xe9"), "--novel")
    long = "x" * 300
    assert "File name too long; cannot make that folder" in refused(
        "train", names_file, *tiny, "--out", long
    )
    assert "is not a folder" in refused("sample", long)


def test_a_run_that_cannot_be_written_is_begun_again(names_file, tmp_path, monkeypatch):
    out = tmp_path / "run"
    command = ["train", names_file, "--lines", "--hidden", 4, "--steps", 2, "--out", out]

    for written, left in enumerate((set(), {"vocabulary.json"})):
        room = iter(range(written))

        def fsync(descriptor, room=room):
            if next(room, None) is None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patched:
            patched.setattr("os.fsync", fsync)
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


def test_a_run_that_has_trained_nothing_is_begun_again(names_file, tmp_path, monkeypatch):
    out = tmp_path / "run"
    tiny = ["--lines", "--embedding", 4, "--steps", 2, "--out", out]
    message = refused("train", names_file, *tiny, "--hidden", 4, "--lr", 1e30)
    assert "inf at step 2" in message and not (out / "checkpoint.safetensors").exists()
    (out / "checkpoint.safetensors.new").write_bytes(b"left by a kill")

    def no_locks(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    # It may be a process's that has not come to its first checkpoint.
    with claimed(out):
        message = refused("train", names_file, *tiny, "--hidden", 5)
    assert message == f"gru-fast: {out}: another process is training there"
    with monkeypatch.context() as patched:
        patched.setattr("fcntl.flock", no_locks)
        assert "is there already; --resume goes" in refused("train", names_file, *tiny)
    assert json.loads((out / "config.json").read_text())["model"]["hidden_size"] == 4

    call("train", names_file, *tiny, "--hidden", 5)
    assert load_run(out).model.config["hidden_size"] == 5
    assert "is there already; --resume goes on" in refused("train", names_file, *tiny)
    (tmp_path / "file").write_text("x")
    tiny[-1] = tmp_path / "file"
    message = refused("train", names_file, *tiny)
    assert message == f"gru-fast: {tmp_path / 'file'} is a file; choose another --out"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("x")
    tiny[-1] = tmp_path / "other"
    assert "is there already; --resume goes on" in refused("train", names_file, *tiny)


def test_weights_that_are_not_finite_are_not_kept(names_file, tmp_path):
    """The gradient of step 2 overflows: step 1 stays what can be sampled."""
    out = tmp_path / "run"
    tiny = ["--lines", "--hidden", 4, "--embedding", 4, "--steps", 2, "--save-every", 0]
    assert refused("train", names_file, *tiny, "--lr", 1e30, "--out", out) == (
        "gru-fast: the gradient's norm is inf at step 2; use a learning rate below 1e+30"
    )
    tensors = load_file(out / "checkpoint.safetensors")
    assert len(tensors["losses"]) == 1 and all(t.isfinite().all() for t in tensors.values())
    assert "not in the range" in refused("train", names_file, *tiny, "--lr", 1e31, "--out", out)


@pytest.mark.parametrize("file", ["config.json", "vocabulary.json", "checkpoint.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "other"])
def test_broken_runs(file, damage, names_run, tmp_path):
    folder = copied(names_run, tmp_path / "run")
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


def test_a_seed_means_the_same_model(names_file, tmp_path):
    few = ["--lines", "--hidden", 4, "--embedding", 4, "--steps", 1]
    made = []
    for count, seed in enumerate((5, 5, 6)):
        torch.manual_seed(count)
        call("train", names_file, *few, "--seed", seed, "--out", tmp_path / str(count))
        made.append((tmp_path / str(count) / "checkpoint.safetensors").read_bytes())
    assert made[0] == made[1] != made[2]


def test_a_run_of_another_format(names_run, tmp_path):
    path = copied(names_run, tmp_path / "run") / "config.json"
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
