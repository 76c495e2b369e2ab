# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back: by character, or by words between white space.

Id 0 is EOS. The other ids follow the tokens' code points, so the vocabulary depends on which tokens
a text has, not on their order. On disk it is a JSON file.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from gru_fast.errors import InputError
from gru_fast.files import write_atomically

__all__ = ["EOS", "UNKNOWN", "CharacterTokenizer", "Tokenizer", "WordTokenizer", "load_tokenizer"]

EOS = 0
"""The id of the end of a sequence."""

UNKNOWN = "<unknown>"
"""The word that stands for every word that is not in the vocabulary, if that has it."""

_EOS_TEXT = "<eos>"
_FORMAT = 1


class Tokenizer:
    """A vocabulary: `tokens[id]` is the text of an id, `tokens[0]` stands for EOS.

    Args:
        tokens: The texts of the ids from 1 on, each once.

    Raises:
        ValueError: A text twice, or an empty one.
    """

    kind: str

    def __init__(self, tokens: Iterable[str]) -> None:
        """See the class."""
        self.tokens = (_EOS_TEXT, *tokens)
        self._ids = {token: i for i, token in enumerate(self.tokens) if i != EOS}
        if len(self._ids) != len(self.tokens) - 1 or "" in self._ids:
            raise ValueError("tokens: expected different texts, none of them empty")

    def __len__(self) -> int:
        """The size of the vocabulary, EOS included."""
        return len(self.tokens)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without EOS.

        Raises:
            InputError: The text has tokens that the vocabulary has not.
        """
        unknown = self._ids.get(UNKNOWN)
        ids = [self._ids.get(token, unknown) for token in self._split(text)]
        if None in ids:
            missing = {token: None for token in self._split(text) if token not in self._ids}
            some = ", ".join(repr(token) for token in list(missing)[:5])
            more = ", ..." if len(missing) > 5 else ""
            raise InputError(
                f"{self.kind}s that the vocabulary of {len(self) - 1} does not have: {some}{more}; "
                "leave them out, or train on a text that has them"
            )
        return [i for i in ids if i is not None]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids up to the first EOS or padding.

        Raises:
            IndexError: An id is outside the vocabulary.
        """
        texts = []
        for i in ids:
            if i == EOS or i < 0:
                break
            texts.append(self.tokens[i])
        return self._join(texts)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the vocabulary as JSON; a file that was there is replaced as a whole.

        Raises:
            InputError: The file cannot be written.
        """
        content = {"format": _FORMAT, "kind": self.kind, "tokens": self.tokens}
        text = json.dumps(content, ensure_ascii=False, indent=0)
        write_atomically(path, (text + "\n").encode())

    def _split(self, text: str) -> Sequence[str]:
        raise NotImplementedError

    def _join(self, tokens: Iterable[str]) -> str:
        raise NotImplementedError


class CharacterTokenizer(Tokenizer):
    """One token for each character (Unicode code point)."""

    kind = "character"

    @classmethod
    def from_text(cls, text: str) -> CharacterTokenizer:
        """The vocabulary of all characters of a text."""
        return cls(sorted(set(text)))

    def _split(self, text: str) -> Sequence[str]:
        return text

    def _join(self, tokens: Iterable[str]) -> str:
        return "".join(tokens)


class WordTokenizer(Tokenizer):
    """One token for each run of characters between white space; decoded with single spaces."""

    kind = "word"

    @classmethod
    def from_text(cls, text: str, max_words: int | None = None) -> WordTokenizer:
        """The vocabulary of all words of a text.

        Args:
            text: The text.
            max_words: Keep this many of the most frequent words (in doubt those that sort first),
                and `UNKNOWN` for all others. None keeps all, and words that are not in the text
                are errors.

        Raises:
            ValueError: max_words is not positive.
        """
        if max_words is None:
            return cls(sorted(set(text.split())))
        if max_words < 1:
            raise ValueError(f"max_words: expected >= 1 or None, got {max_words}")
        counts = sorted(Counter(text.split()).items(), key=lambda item: (-item[1], item[0]))
        return cls(sorted({UNKNOWN, *(word for word, _ in counts[:max_words])}))

    def _split(self, text: str) -> Sequence[str]:
        return text.split()

    def _join(self, tokens: Iterable[str]) -> str:
        return " ".join(tokens)


_KINDS: dict[str, type[Tokenizer]] = {cls.kind: cls for cls in (CharacterTokenizer, WordTokenizer)}


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Read what `Tokenizer.save` wrote.

    Raises:
        InputError: The file is missing or is not such a vocabulary.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise InputError(
                f"{path}: expected format {_FORMAT} of a vocabulary, got {content['format']!r}"
            )
        tokens = content["tokens"]
        if tokens[0] != _EOS_TEXT or not all(isinstance(token, str) for token in tokens):
            raise ValueError("tokens that are not texts")
        return _KINDS[content["kind"]](tokens[1:])
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected a vocabulary file") from None
    except (ValueError, KeyError, TypeError, IndexError):
        raise InputError(f"{path} is not a vocabulary file of gru_fast") from None
