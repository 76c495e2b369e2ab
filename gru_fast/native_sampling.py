# SPDX-License-Identifier: Apache-2.0
"""`generate` on the CPU: the loop of the native sampler over packed weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gru_fast.token_ids import PADDING

if TYPE_CHECKING:
    from gru_fast._C import PackedStack

__all__ = ["generate"]

_CHUNK_SECONDS = 0.002
# Tokens for which a call makes room before it knows how many there will be: 128 MiB.
_MOST_AT_ONCE = 2**24


def generate(
    stack: PackedStack,
    prompts: Sequence[np.ndarray[Any, Any]],
    start: int,
    *,
    max_new_tokens: int,
    eos: Sequence[int],
    seed: int,
    do_sample: bool,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    threads: int = 0,
    log_probs: bool = True,
    on_tokens: Callable[[Tensor], None] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the whole loop in one native call, or in several.

    In short ones for `on_tokens`, in long ones where rows may end long before `max_new_tokens`, for
    which a single call would make room.

    Args:
        stack: With a table and a head.
        prompts: N arrays of token ids, each within the table.
        start: The row of the table that is fed before each prompt.
        max_new_tokens: >= 1.
        eos: Tokens that end a row.
        seed: Its low 64 bits key the random stream of `gru_fast.reference_sampling`.
        do_sample: As in `SamplingOptions`, and so are those that follow.
        temperature: > 0.
        top_k: >= 1 or None.
        top_p: In (0, 1] or None.
        min_p: In [0, 1] or None.
        threads: At most so many of torch's; 0: all of them.
        log_probs: False: they are not computed.
        on_tokens: Called with the (N,) tokens of each step, PADDING in ended rows, at most about
            two milliseconds, or one step, after they were drawn. The tokens are the same.

    Returns:
        tokens: (N, S) int64, S <= max_new_tokens, PADDING after a row's end.
        log_probs: (N, S) float32, of the softmax at temperature 1, 0 after a row's end and where
            they are not computed.
        hidden: (L, N, H) float32, the state that the last token of each row was drawn from.

    Raises:
        ValueError: An id is outside the table, or a row of logits holds NaN or +inf.
        KeyboardInterrupt: Within a tenth of a second of the signal.
    """
    N = len(prompts)
    lengths = np.fromiter((len(prompt) for prompt in prompts), np.int64, N)
    begin = np.zeros(N + 1, np.int64)
    (lengths + 1).cumsum(out=begin[1:])
    inputs = np.full(begin[-1], start, np.int32)
    if len(inputs) > N:
        fed = np.ones(len(inputs), bool)
        fed[begin[:-1]] = False
        inputs[fed] = np.concatenate(prompts)

    def draw(rows: Any, done: int, limit: int, h0: Any) -> tuple[Any, Any, Any, Any]:
        """The next tokens of some rows; PADDING and 0 behind those that ended."""
        tokens, made, chances, hidden = stack.generate(
            inputs=inputs, input_begin=begin, position=lengths[rows] + done, stream=rows,
            limit=np.full(len(rows), limit, np.int64), eos=list(eos), seed=seed & (1 << 64) - 1,
            do_sample=do_sample, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            h0=h0, log_probs=log_probs, threads=threads,
        )  # fmt: skip
        ends = made.tolist()
        steps = max(ends, default=0)
        tokens = np.ascontiguousarray(tokens[:, :steps])
        if chances is None:
            chances = np.zeros(tokens.shape, np.float32)
        chances = chances[:, :steps]
        if min(ends, default=0) < steps:
            over = np.arange(steps) >= made[:, None]
            tokens[over] = PADDING
            chances[over] = 0
        return tokens, made, chances, hidden

    rows = np.arange(N)
    hidden: Any = None
    if on_tokens is None and (not eos or N * max_new_tokens <= _MOST_AT_ONCE):
        tokens, _, chances, hidden = draw(rows, 0, max_new_tokens, None)
        return torch.from_numpy(tokens), torch.from_numpy(chances), torch.from_numpy(hidden)
    pieces: list[Any] = []
    of_pieces: list[Any] = []
    state: Any = None
    done, limit = 0, max(1, _MOST_AT_ONCE // N) if on_tokens is None else 1
    while done < max_new_tokens and (len(rows) or not pieces):
        began = time.perf_counter()
        limit = min(limit, max_new_tokens - done)
        tokens, made, chances, state = draw(rows, done, limit, state)
        taken = time.perf_counter() - began
        steps = tokens.shape[1]
        pieces.append(np.full((N, steps), PADDING, np.int64))
        of_pieces.append(np.zeros((N, steps), np.float32))
        pieces[-1][rows], of_pieces[-1][rows] = tokens, chances
        if hidden is None:
            hidden = state
        else:
            hidden[:, rows] = state
        if on_tokens is not None:
            for column in pieces[-1].T:
                on_tokens(torch.from_numpy(column.copy()))
        last = tokens[np.arange(len(rows)), made - 1]
        alive = (made == limit) & ~np.isin(last, eos)
        rows, state = rows[alive], np.ascontiguousarray(state[:, alive])
        inputs, begin = last[alive].astype(np.int32), np.arange(len(rows) + 1)
        done += limit
        if on_tokens is not None:
            limit = 2 * limit if taken < _CHUNK_SECONDS / 2 else max(1, limit // 2)
    return (
        torch.from_numpy(np.concatenate(pieces, 1)),
        torch.from_numpy(np.concatenate(of_pieces, 1)),
        torch.from_numpy(hidden),
    )
