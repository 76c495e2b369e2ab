# SPDX-License-Identifier: Apache-2.0
"""Tokenizers and their vocabulary file."""

import json

import pytest

from gru_fast.errors import InputError
from gru_fast.sampling import PADDING
from gru_fast.tokenizers import EOS, UNKNOWN, CharacterTokenizer, WordTokenizer, load_tokenizer

TEXT = "d'oh, ein\nÜberfluß 😀\t"


def test_characters():
    tokenizer = CharacterTokenizer.from_text(TEXT)
    assert tokenizer.tokens == ("<eos>", *sorted(set(TEXT)))
    assert len(tokenizer) == len(set(TEXT)) + 1
    ids = tokenizer.encode(TEXT)
    assert min(ids) > EOS and tokenizer.decode(ids) == TEXT
    assert tokenizer.decode([*ids, EOS, *ids]) == TEXT
    assert tokenizer.decode([*ids, PADDING]) == TEXT
    reordered = CharacterTokenizer.from_text(TEXT[::-1] * 2)
    assert reordered.tokens == tokenizer.tokens


def test_words():
    text = "the cat the dog\nthe <eos>"
    tokenizer = WordTokenizer.from_text(text)
    assert tokenizer.tokens == ("<eos>", "<eos>", "cat", "dog", "the")
    assert tokenizer.decode(tokenizer.encode(text)) == "the cat the dog the <eos>"
    short = WordTokenizer.from_text("a b b c c", max_words=2)
    assert short.tokens == ("<eos>", UNKNOWN, "b", "c")
    assert short.decode(short.encode("c a x b")) == f"c {UNKNOWN} {UNKNOWN} b"
    assert WordTokenizer.from_text("b a", max_words=1).tokens == ("<eos>", UNKNOWN, "a")


def test_unknown_tokens_are_named():
    with pytest.raises(InputError, match=r"characters that .* of 3 does not have: 'x', '\\n'; "):
        CharacterTokenizer.from_text("abc").encode("axb\nx")
    with pytest.raises(InputError, match=r"words that .*: 'dog'; "):
        WordTokenizer.from_text("a cat").encode("a dog")


@pytest.mark.parametrize("cls", [CharacterTokenizer, WordTokenizer])
def test_vocabulary_file(cls, tmp_path):
    path = tmp_path / "vocabulary.json"
    tokenizer = cls.from_text(TEXT)
    tokenizer.save(path)
    again = load_tokenizer(path)
    assert type(again) is cls and again.tokens == tokenizer.tokens
    content = json.loads(path.read_bytes().decode())
    assert content["tokens"] == list(tokenizer.tokens) and "Ü" in path.read_text("utf-8")
    before = path.read_bytes()
    again.save(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", "\udcff", '{"format": 1, "kind": "x", "tokens": ["<eos>"]}',
     '{"format": 1, "kind": "word", "tokens": ["<eos>", 3]}',
     '{"format": 1, "kind": "word", "tokens": ["<eos>", "a", "a"]}',
     '{"format": 1, "kind": "word", "tokens": []}', '{"format": 2}'],
)  # fmt: skip
def test_bad_vocabulary_files(content, tmp_path):
    path = tmp_path / "vocabulary.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match="vocabulary"):
        load_tokenizer(path)


def test_missing_vocabulary_file(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        load_tokenizer(tmp_path / "none.json")


def test_tokens_have_to_differ():
    for tokens in (["a", "a"], [""]):
        with pytest.raises(ValueError, match="different texts"):
            CharacterTokenizer(tokens)
    with pytest.raises(ValueError, match="max_words: expected >= 1 or None, got 0"):
        WordTokenizer.from_text("a", max_words=0)
