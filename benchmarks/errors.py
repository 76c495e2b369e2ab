# SPDX-License-Identifier: Apache-2.0
"""Errors of providers in a line."""


def describe_error(error: Exception) -> str:
    """Type and first line, with the next where the first only announces it."""
    lines = str(error).strip().splitlines() or [""]
    said = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
    return f"{type(error).__name__}: {said[:300]}"
