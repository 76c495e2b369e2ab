# SPDX-License-Identifier: Apache-2.0
"""Files that are replaced as a whole."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from gru_fast.errors import InputError

__all__ = ["NEW", "write_atomically"]

NEW = ".new"
"""What follows the name of a file while it is written; a kill may leave such a file."""


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Replace a file; whatever happens, it holds the old content or the new one.

    Raises:
        InputError: The file cannot be written.
    """
    target = Path(path)
    temporary = target.with_name(target.name + NEW)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()  # half a file would only fill a disk that may be full
        raise InputError(f"{target}: {error.strerror}; cannot write there") from None
