# SPDX-License-Identifier: Apache-2.0
"""What the commands of `gru-fast` have in common: types of options, and errors as one line."""

from __future__ import annotations

import errno
import math
from typing import Any

import click

from gru_fast.errors import InputError

__all__ = ["Commands", "Count", "Finite"]


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

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
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
            ctx.exit(130)
        except (MemoryError, RuntimeError) as error:
            message = str(error).split("\n")[0]
            # torch has no exception of its own for a CPU that is out of memory.
            if not isinstance(error, MemoryError) and "can't allocate memory" not in message:
                raise
            message = f"not enough memory: {message}"
        click.echo(f"gru-fast: {message}", err=True)
        ctx.exit(2)
