# SPDX-License-Identifier: Apache-2.0
"""Commands of `gru-fast`, called in this process, and a corpus and folders for them."""

from pathlib import Path

import torch
from click.testing import CliRunner

from gru_fast.cli import cli

TINY = ["--hidden", "24", "--batch", "32", "--steps", "60", "--lr", "0.02"]
CONSONANTS, VOWELS = "bdkmt", "aeiou"


def call(*arguments, code=0):
    result = CliRunner().invoke(cli, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def refused(*arguments):
    """The one line on stderr of a command that exits with code 2."""
    result = call(*arguments, code=2)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()[-1:]
    assert "Traceback" not in result.stderr
    return line


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


def copied(run: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in run.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder
