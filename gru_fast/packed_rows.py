# SPDX-License-Identifier: Apache-2.0
"""Between the rows of a `PackedSequence` and (T, B) with padding."""

import torch
from torch import Tensor


class PackedRows:
    """Where the rows of a packed sequence lie in (T, B)."""

    def __init__(self, batch_sizes: Tensor) -> None:
        """Take the (T,) batch sizes, which fall."""
        rows = torch.arange(int(batch_sizes[0]))
        self._is_row = rows < batch_sizes.unsqueeze(1)
        self._places = self._is_row.flatten().nonzero().squeeze(1)

    @property
    def lengths(self) -> Tensor:
        """(B,) int64."""
        return self._is_row.sum(0)

    def pad(self, rows: Tensor) -> Tensor:
        """(rows, ...) as (T, B, ...), zero elsewhere."""
        T, B = self._is_row.shape
        padded = rows.new_zeros(T * B, *rows.shape[1:])
        return padded.index_copy(0, self._places, rows).view(T, B, *rows.shape[1:])

    def pack(self, padded: Tensor) -> Tensor:
        """(T, B, ...) as (rows, ...)."""
        return padded.flatten(0, 1).index_select(0, self._places)
