# SPDX-License-Identifier: Apache-2.0
"""The values of the gates as users see them, from the workspace that the kernels save."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gru_fast.reference import SLOTS

__all__ = ["Gates"]


class Gates(NamedTuple):
    """Gates of every step, of each layer and direction; 0 where a row is padding.

    Each is (L*D, T, B, H), (L*D, B, T, H) with `batch_first`, or (L*D, T, H) for an unbatched
    input; layers and directions in the order of `h_n`. They are differentiable.

    Attributes:
        r: reset gate, in (0, 1); None for `cell="no_reset"`, which has none.
        z: update gate, in (0, 1): the share of the state before that is kept.
        n: candidate, in (-1, 1).
    """

    r: Tensor | None
    z: Tensor
    n: Tensor


def arranged(gates: Gates, function: Callable[[Tensor], Tensor]) -> Gates:
    """Each gate by a function."""
    r = None if gates.r is None else function(gates.r)
    return Gates(r, function(gates.z), function(gates.n))


def from_workspaces(workspaces: Sequence[Tensor], cell: str) -> Gates:
    """Gates (L*D, T, B, H) from the workspaces (T, B, G, S*H) of the layers; views where one.

    The slots are those of `gru_fast.reference`: q, r, z, n | r, z, n | z, n.
    """
    slots = [w.movedim(2, 0).chunk(SLOTS[cell], -1) for w in workspaces]
    joined = [s[0] if len(slots) == 1 else torch.cat(s) for s in zip(*slots, strict=True)]
    return Gates(None if cell == "no_reset" else joined[-3], joined[-2], joined[-1])
