# SPDX-License-Identifier: Apache-2.0
"""Where text comes from: a UTF-8 file, or one of two corpora that need no download."""

from __future__ import annotations

import hashlib
import importlib
from importlib import resources
from pathlib import Path

from gru_fast.errors import InputError

__all__ = ["BUILTIN", "digest", "read_text", "split_lines"]

BUILTIN = {
    "builtin:names": "names of the 1990 US census, one a line (PyPI package `names`)",
    "builtin:python": "help texts of Python's syntax, running text (`pydoc_data.topics`)",
}
"""The corpora that are not files."""


def read_text(source: str) -> str:
    """The text of a file, or of a name in `BUILTIN`.

    Raises:
        InputError: The file cannot be read, is not UTF-8 or holds nothing but white space; or the
            package of a builtin corpus is missing.
    """
    if source == "builtin:names":
        text = _names()
    elif source == "builtin:python":
        topics = importlib.import_module("pydoc_data.topics").topics
        text = "\n".join(topics[name] for name in sorted(topics))
    elif source.startswith("builtin:"):
        raise InputError(f"{source}: expected one of {', '.join(BUILTIN)}, or a file")
    else:
        try:
            text = Path(source).read_bytes().decode("utf-8-sig")
        except OSError as error:
            raise InputError(f"{source}: {error.strerror}; expected a text file") from None
        except UnicodeDecodeError as error:
            raise InputError(
                f"{source} is not UTF-8 text (byte {error.start}); convert it first, "
                "for example with iconv"
            ) from None
    if not text.strip():
        raise InputError(f"{source} is empty; expected some text")
    return text.replace("\r\n", "\n")


def _names() -> str:
    try:
        data = resources.files("names")
    except ModuleNotFoundError:
        raise InputError(
            "builtin:names needs the package `names`: pip install 'gru_fast[train]'"
        ) from None
    files = ("dist.all.last", "dist.female.first", "dist.male.first")
    lines = [line for file in files for line in (data / file).read_text("ascii").splitlines()]
    return "\n".join(sorted({line.split()[0].lower() for line in lines if line.strip()}))


def split_lines(text: str) -> list[str]:
    """The distinct lines of a text that are not blank, stripped, in alphabetical order."""
    return sorted({line.strip() for line in text.split("\n")} - {""})


def digest(text: str) -> str:
    """What tells two texts apart: SHA-256 in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()
