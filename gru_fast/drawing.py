# SPDX-License-Identifier: Apache-2.0
"""The draws of a loop that has the logits of one step at a time, for N rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gru_fast import reference_sampling

__all__ = ["Draw", "by_reference", "natively"]

Draw = Callable[[int, Tensor], tuple[Tensor, Tensor]]
"""Takes t and the (N, V) logits of token number t, returns its ids (N,) and log_probs (N,)."""

_UNIFORMS_AT_ONCE = 64


def by_reference(first: Tensor, seed: int, *, do_sample: bool = True, **rules: Any) -> Draw:
    """Draws by `reference_sampling`, in PyTorch operations on any device.

    Args:
        first: (N,) int64, the position that each row's token number 0 has in its sequence.
        seed: Any integer.
        do_sample: False takes the most likely token.
        **rules: temperature, top_k, top_p and min_p of `reference_sampling.draw`.

    Raises:
        ValueError: From the draw: a row of logits holds NaN or +inf, or nothing above -inf.
    """
    rows = torch.arange(len(first), device=first.device)
    block, uniforms = -1, first

    def draw(t: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal block, uniforms
        if not do_sample:
            drawn = reference_sampling.greedy(logits)
        else:
            of_block, k = divmod(t, _UNIFORMS_AT_ONCE)
            if of_block != block:
                block = of_block
                ahead = torch.arange(t - k, t - k + _UNIFORMS_AT_ONCE, device=first.device)
                uniforms = reference_sampling.uniform(seed, first + ahead[:, None], rows)
            drawn = reference_sampling.draw(logits, uniforms[k], **rules)
        return drawn, reference_sampling.log_prob(logits, drawn)

    return draw


def natively(first: Tensor, seed: int, **rules: Any) -> Draw:
    """`by_reference` in one call of the compiled module a step, for logits on the CPU.

    The reference's operations take longer than the step of a small model. Tokens are the same, but
    for random numbers within rounding of an edge of the distribution.
    """
    from gru_fast import _C

    reference = by_reference(first, seed, **rules)
    positions, rows = first.numpy(), np.arange(len(first))
    key = seed & (1 << 64) - 1

    def draw(t: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        if logits.dim() != 2 or type(logits) is not Tensor or not logits.is_cpu:
            return reference(t, logits)  # a head may be anything
        given = logits.detach().float().contiguous().numpy()
        tokens, chances = _C.draw(given, key, positions + t, rows, **rules)
        if (tokens < 0).any():
            return reference(t, logits)  # which says why there is no draw
        drawn = torch.from_numpy(tokens)
        if logits.dtype == torch.float64:
            return drawn, reference_sampling.log_prob(logits, drawn)
        return drawn, torch.from_numpy(chances)

    return draw
