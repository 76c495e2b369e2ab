# SPDX-License-Identifier: Apache-2.0
"""The main job end to end, tiny: a falling loss, and names made of the corpus's letters."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("tqdm")

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def novel_names():
    spec = importlib.util.spec_from_file_location("novel_names", EXAMPLES / "novel_names.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def corpus(tmp_path):
    """Names with a pattern: consonant and vowel in turn."""
    generator = torch.Generator().manual_seed(0)
    names = set()
    while len(names) < 300:
        length = int(torch.randint(2, 5, (), generator=generator))
        picks = torch.randint(5, (length, 2), generator=generator).tolist()
        names.add("".join("bdkmt"[c] + "aeiou"[v] for c, v in picks))
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(["", *sorted(names), " ", *sorted(names)[:3]]) + "\n")
    return path


TINY = ["--hidden", "24", "--batch", "32", "--steps", "60", "--lr", "0.02", "--num", "7"]


@pytest.mark.parametrize("cell", ["reset_after", "reset_before", "no_reset"])
def test_names_from_a_file(novel_names, corpus, cell, capsys):
    result = novel_names.main(["--corpus", str(corpus), "--cell", cell, "--rounds", "1", *TINY])
    assert result["last_loss"] < 0.7 * result["first_loss"]
    assert len(result["names"]) == len(result["novel"]) == 1000
    assert set("".join(result["names"])) <= set("bdkmtaeiou")
    known = set(corpus.read_text().split())
    pairs = list(zip(result["names"], result["novel"], strict=True))
    assert {name for name, novel in pairs if not novel} <= known | {""}
    held_out = {name for name, novel in pairs if novel} & known
    assert len(held_out) <= 15
    pattern = sum(bool(re.fullmatch("([bdkmt][aeiou])+", n)) for n in result["names"])
    assert pattern > 500, "what was learnt is not what is sampled"
    text = capsys.readouterr()
    assert "train " in text.err and "held out " in text.err
    assert "300 names of 10 characters, 15 held out" in text.out
    assert f"{result['last_loss']:.3f} nats a character" in text.out
    printed = text.out.split("(marked *):\n")[1].splitlines()[:7]
    assert [p.strip(" *").lower() for p in printed] == result["names"][:7]
    compared = re.findall(r"^(\w[\w ]+?)  +([\d,]+) +([\d,]+) +([\d.]+)$", text.out, re.MULTILINE)
    assert len(compared) == (3 if cell == "reset_after" else 0)
    assert ("torch.nn.GRU has no cell=" in text.out) == (cell != "reset_after")


def test_a_seed_gives_the_same_names(novel_names, corpus):
    arguments = ["--corpus", str(corpus), "--rounds", "0", *TINY[:-6], "--steps", "3"]
    first = novel_names.main([*arguments, "--seed", "5"])
    assert novel_names.main([*arguments, "--seed", "5"]) == first
    assert novel_names.main([*arguments, "--seed", "6"])["names"] != first["names"]


def test_a_name_depends_on_its_number_only(novel_names):
    model = novel_names.NameModel(6, 8, "reset_after")
    many = model.sample(20, 1.0, seed=3)
    assert model.sample(5, 1.0, seed=3) == many[:5]


def test_training_feeds_zeros_and_then_the_true_characters(novel_names):
    model = novel_names.NameModel(4, 8, "reset_after")
    names = novel_names.encode(["ab", "c"], "abc")
    assert names.tolist() == [[1, 2, 0], [3, 0, novel_names.PADDING]]
    seen = []
    model.gru.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    loss = model.loss(names)
    a, b, c = torch.eye(4)[1:]
    zero = torch.zeros(4)
    x = seen[0].transpose(0, 1)
    assert torch.equal(x[0], torch.stack([zero, a, b]))
    assert torch.equal(x[1, :2], torch.stack([zero, c]))
    logits = model.head(model.gru(seen[0])[0]).transpose(0, 1).log_softmax(-1)
    rows = [logits[0, 0, 1], logits[0, 1, 2], logits[0, 2, 0], logits[1, 0, 3], logits[1, 1, 0]]
    torch.testing.assert_close(loss, -torch.stack(rows).mean())


def test_sampling_feeds_back_what_was_drawn(novel_names):
    model = novel_names.NameModel(6, 8, "reset_after")
    seen = []
    model.gru.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    rows = model.sample(3, 1.0, seed=0)
    assert torch.equal(seen[0], torch.zeros(1, 3, 6))
    for i, row in enumerate(rows):
        fed = [x[0, i].argmax().item() for x in seen[1 : len(row) + 1]]
        assert fed == row[: len(fed)]


def test_the_census_names_of_the_package(novel_names):
    pytest.importorskip("names")
    names = novel_names.read_names(None)
    assert len(names) > 80_000
    assert {"mary", "james", "smith"} <= set(names)
    assert set("".join(names)) == set("abcdefghijklmnopqrstuvwxyz")
