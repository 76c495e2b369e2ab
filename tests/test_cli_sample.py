# SPDX-License-Identifier: Apache-2.0
"""The command line: what is sampled, and which of it is novel."""

import re

import pytest

from cli_calls import call, refused, write_names
from gru_fast import GRULanguageModel

pytestmark = pytest.mark.usefixtures("one_thread")


def test_sampling_options(names_run, names_file):
    first = call("sample", names_run, "--num", 5, "--seed", 7)
    assert call("sample", names_run, "--num", 5, "--seed", 7).stdout == first.stdout
    assert call("sample", names_run, "--num", 5, "--seed", 8).stdout != first.stdout
    assert call("sample", names_run, "--num", 3, "--seed", 7).stdout == "".join(
        first.stdout.splitlines(keepends=True)[:3]
    )
    prompted = call("sample", names_run, "--num", 5, "--prompt", "ba", "--temperature", 0.5,
                    "--top-p", 0.9, "--min-p", 0.01, "--top-k", 4, "--length", 3)  # fmt: skip
    assert all(re.fullmatch("ba[a-z]{0,3}", line) for line in prompted.stdout.splitlines())
    greedy = call("sample", names_run, "--num", 2, "--greedy").stdout.splitlines()
    assert greedy[0] == greedy[1]
    known = set(names_file.read_text().split())
    novel = call("sample", names_run, "--num", 20, "--novel", "--seed", 1)
    lines = novel.stdout.splitlines()
    assert len(lines) == 20 and not known & set(lines) and "of 1,000 sampled" in novel.stderr


@pytest.mark.parametrize(("length", "enough"), [(100, True), (3, False)])
def test_novel_lines_are_the_first_of_a_seed_that_end(
    length, enough, names_run, names_file, monkeypatch
):
    """Among the 320 that are drawn at most too few are shorter than 3; a cut one is no line."""
    monkeypatch.setattr("gru_fast.cli_sample._NOVELTY_ROWS", 20)
    every = call("sample", names_run, "--num", 320, "--seed", 1).stdout.split("\n")[:-1]
    known = set(names_file.read_text().split())
    novel = [name for name in every if name and name not in known and len(name) < length]
    result = call("sample", names_run, "--num", 20, "--novel", "--seed", 1, "--length", length)
    assert result.stdout.split("\n")[:-1] == novel[:20]
    if enough:
        assert "of 80 sampled lines are not in" in result.stderr and "only" not in result.stderr
    else:
        cut = sum(len(name) >= length for name in every)
        share = f"{len(novel) / 320:.0%} of 320 sampled lines are not in {names_file}"
        assert f"{share}; {cut} were cut at 3 characters\n" in result.stderr
        assert result.stderr.endswith(f"only {len(novel)} of 20 novel lines were found\n")


def test_tokens_that_are_drawn_at_most(names_run, tmp_path, monkeypatch):
    (tmp_path / "text").write_text("ab" * 20)
    call("train", tmp_path / "text", "--text", "--hidden", 4, "--steps", 1, "--out", tmp_path / "r")
    asked = []
    original = GRULanguageModel.generate

    def generate(model, *arguments, max_new_tokens, **options):
        asked.append(max_new_tokens)
        return original(model, *arguments, max_new_tokens=max_new_tokens, **options)

    monkeypatch.setattr(GRULanguageModel, "generate", generate)
    for arguments in ((names_run,), (tmp_path / "r",), (tmp_path / "r", "--length", 7)):
        call("sample", *arguments)
    assert asked == [100, 500, 7]


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
