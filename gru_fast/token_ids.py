# SPDX-License-Identifier: Apache-2.0
"""Token ids as callers give them: checked, and one padded tensor."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from gru_fast.checks import check_integers

__all__ = ["PADDING", "TokenIds", "checked_integer", "padded"]

PADDING = -100
"""What stands after the end of a row of tokens; `torch.nn.functional.cross_entropy` ignores it."""

TokenIds = Tensor | Sequence[int] | Sequence[Sequence[int]]
"""(L,) or (N, L) integers, or lists of any lengths."""


def padded(
    input_ids: TokenIds | None, vocab_size: int, device: torch.device, name: str = "input_ids"
) -> tuple[Tensor, Tensor]:
    """(N, P) int64 on the device with PADDING on the right only, and the (N,) lengths.

    Raises:
        TypeError: They are not integers, which bools are not here, or rows and integers are mixed.
        ValueError: An id is outside 0 ... vocab_size - 1, or padding stands before ids.
    """
    if input_ids is None:
        return (
            torch.empty(1, 0, dtype=torch.int64, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
        )
    if isinstance(input_ids, Tensor):
        check_integers(name, input_ids)
        ids = input_ids if input_ids.dim() != 1 else input_ids[None]
    elif not isinstance(input_ids, Iterable):
        raise TypeError(f"{name}: expected integers, got {input_ids!r}")
    else:
        # What a loop over a tensor gives are tensors without a dimension.
        given: list[Any] = [
            _checked_id(name, i) if getattr(i, "ndim", 1) == 0 else i for i in input_ids
        ]
        nested = [row for row in given if not isinstance(row, numbers.Integral)]
        if nested and len(nested) < len(given):
            raise TypeError(f"{name}: expected integers or sequences of integers, got both")
        lists = nested if nested or not given else [given]
        rows = [_ids_tensor(name, row) for row in lists]
        ids = torch.empty(0, 0, dtype=torch.int64, device="cpu")
        if rows:
            ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PADDING)
    if ids.dim() != 2:
        raise ValueError(f"{name}: expected 1 or 2 dimensions, got {ids.dim()}")
    unsigned = ids.dtype == torch.uint64
    ids = ids.to(device, torch.int64)
    if unsigned and (ids < 0).any():
        _refuse_id(name, vocab_size, int(ids[ids < 0][0]) + 2**64)
    real = ids != PADDING
    lengths = real.sum(1)
    bad = real & ((ids < 0) | (ids >= vocab_size))
    if bad.any():
        _refuse_id(name, vocab_size, int(ids[bad][0]))
    if (real != (torch.arange(ids.shape[1], device=device) < lengths[:, None])).any():
        raise ValueError(f"{name}: expected padding ({PADDING}) on the right, got it before ids")
    return ids, lengths


def _refuse_id(name: str, vocab_size: int, given: int) -> NoReturn:
    raise ValueError(
        f"{name}: expected 0 <= id < vocab_size = {vocab_size}, or {PADDING} after the end of a "
        f"row, got {given}"
    )


def _ids_tensor(name: str, row: Any) -> Tensor:
    if not isinstance(row, Iterable):
        checked_integer(name, row)
    ids = [_checked_id(name, i) for i in row]
    if ids and max(map(abs, ids)) >= 2**63:  # what a tensor cannot hold
        raise ValueError(f"{name}: expected 0 <= id < vocab_size, got {max(ids, key=abs)}")
    return torch.tensor(ids, dtype=torch.int64, device="cpu")


def _checked_id(name: str, value: Any) -> int:
    """`checked_integer` without bools, which are integers to Python."""
    if type(value) is int:
        return value
    if isinstance(value, bool) or getattr(value, "dtype", None) is torch.bool:
        raise TypeError(f"{name}: expected integers, got {value!r}")
    return checked_integer(name, value)


def checked_integer(name: str, value: Any) -> int:
    """Return what is an integer as an int, or raise a TypeError."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {value!r}") from None
