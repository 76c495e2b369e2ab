# SPDX-License-Identifier: Apache-2.0
"""Dropout of a stack of layers: between the layers, and on the state that enters the products."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence


class Dropout:
    """Dropout between layers, over time-major data as in nn.GRU."""

    def __init__(self, p: float) -> None:
        """Take the probability."""
        self.p = p

    def __call__(self, output: Tensor) -> Tensor:
        """The output of a layer, (T, B, D*H), as the input of the next.

        The random numbers are dealt out in the order of memory, which a composed layer may change.
        """
        # Not F.dropout, which raises a ValueError where nn.GRU raises a RuntimeError: p = 1.5.
        return torch.dropout(output.contiguous(), self.p, True)


class PackedDropout(Dropout):
    """The same over packed data: the random stream does not see the padding."""

    def __init__(self, p: float, lengths: Tensor) -> None:
        """Take the probability and the rows' lengths, which fall."""
        super().__init__(p)
        self.lengths = lengths

    def __call__(self, output: Tensor) -> Tensor:
        """As that of `Dropout`."""
        packed = pack_padded_sequence(output, self.lengths)
        dropped = PackedSequence(torch.dropout(packed.data, self.p, True), packed.batch_sizes)
        return pad_packed_sequence(dropped)[0]


def state_scale(
    p: float, shape: tuple[int, ...], like: Tensor, h_scale: Tensor | None = None
) -> Tensor:
    """The mask of variational recurrent dropout: one draw for a sequence, kept over its steps.

    Args:
        p: probability with which a unit is 0; the others are 1 / (1 - p).
        shape: of the state of all layers.
        like: tells dtype and device.
        h_scale: another scale, to be multiplied with.

    Source: Gal and Ghahramani 2016, arXiv:1512.05287, with one mask for all gates of a step.
    """
    mask = F.dropout(torch.ones(shape, dtype=like.dtype, device=like.device), p, True)
    return mask if h_scale is None else mask * h_scale
