# SPDX-License-Identifier: Apache-2.0
"""What the commands of `gru-fast` have in common: options, and errors as one line."""

from __future__ import annotations

import errno
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import click

from gru_fast.errors import InputError

__all__ = [
    "SEED",
    "Commands",
    "Count",
    "Finite",
    "beside_option",
    "refusing_values",
    "run_argument",
    "say",
]


class Count(click.IntRange):
    """A range of numbers below 2**31: sizes and steps of a training, and threads."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse larger ones, which help texts need not mention."""
        number = super().convert(value, param, ctx)
        if number >= 2**31:
            self.fail(f"{value} is not below 2**31.", param, ctx)
        return number


class Finite(click.FloatRange):
    """A range that neither NaN nor infinity is in."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse them as what is no number."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


class Commands(click.Group):
    """Turns what is the user's to mend into one line on stderr and exit code 2."""

    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        """Read the options of all commands, of which --help prints by itself."""
        with _one_line():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        with _one_line():
            return super().invoke(ctx)


@contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
        return
    except InputError as error:
        message = " ".join(str(error).split("\n"))
    except OSError as error:
        if error.errno == errno.EPIPE:  # a reader that has seen enough: click's to handle
            raise
        message = str(error.strerror or error)
    except UnicodeEncodeError as error:  # only stdout is strict
        text = error.object[error.start : error.end]
        message = f"stdout is {error.encoding}, without {text!a}; try PYTHONIOENCODING=utf-8"
    except KeyboardInterrupt:  # which click makes a 1
        click.echo("\nAborted!", err=True)
        raise click.exceptions.Exit(130) from None
    except (MemoryError, RuntimeError) as error:
        message = str(error).split("\n")[0]
        # torch has no exception of its own for a CPU that is out of memory.
        if not isinstance(error, MemoryError) and "can't allocate memory" not in message:
            raise
        message = f"not enough memory: {message}"
    click.echo(f"gru-fast: {message}", err=True)
    raise click.exceptions.Exit(2)


SEED = click.IntRange(-(2**63), 2**64 - 1)  # what torch.manual_seed takes
run_argument = click.argument("run", type=click.Path())
beside_option = click.option(
    "--beside-torch", is_flag=True, help="Then time the same network on torch.nn.GRU: one line."
)


def say(text: str) -> None:
    """Tell on stderr: stdout has results only."""
    click.echo(text, err=True)


@contextmanager
def refusing_values(flags: Mapping[str, str] | None = None) -> Iterator[None]:
    """Make an `InputError` of what the draw says about options, or logits, that it cannot use.

    Args:
        flags: What the message says of options to what the command line calls them.
    """
    try:
        yield
    except ValueError as error:
        message = str(error)
        for name, flag in (flags or {}).items():
            message = message.replace(name, flag)
        raise InputError(message) from None
