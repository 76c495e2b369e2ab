# SPDX-License-Identifier: Apache-2.0
"""Weights packed for the samplers of `csrc/`, and their generation loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from gru_fast import ops
from gru_fast.autocast import without_autocast
from gru_fast.gru import GRU

if TYPE_CHECKING:
    from gru_fast._C import PackedStack, Stream

WEIGHTS = ("float32", "bfloat16", "int8")
"""How packed weights are kept; states and logits are float32 throughout."""

PADDING = -100

_CHUNK_SECONDS = 0.002


class TokenModel(Protocol):
    """What packing needs of a language model: see `gru_fast.sampling.LanguageModel`."""

    vocab_size: int
    gru: GRU
    head: nn.Linear

    def token_table(self) -> Tensor:
        """(V + 1, N*H)."""


def why_not(gru: GRU, head: nn.Linear | None = None) -> str | None:
    """Why the native samplers cannot take these layers; None if they can."""
    if ops.NO_CPU_KERNELS is not None:
        return ops.NO_CPU_KERNELS
    if gru.bidirectional:
        return "bidirectional layers need the whole sequence before its first output"
    if gru.num_heads > 1:
        return f"its recurrent weights are dense, and the layers have num_heads={gru.num_heads}"
    if gru.learn_h0:
        return "it starts from zeros, and the layers have learn_h0=True"
    if head is not None and type(head) is not nn.Linear:
        return f"the head is a {type(head).__name__}, not an nn.Linear"
    tensors = [*gru._flat_weights, *([] if head is None else head.parameters())]
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return f"weights are on {tensor.device}"
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"weights are {tensor.dtype}: states and logits would only be float32"
    return None


def pack(
    gru: GRU,
    weights: str = "float32",
    *,
    table: Tensor | None = None,
    head: nn.Linear | None = None,
) -> PackedStack:
    """A snapshot of the layers, of the table before them and of the head behind them.

    Args:
        gru: One direction, any cell and number of layers. Its dropout is not used.
        weights: One of `WEIGHTS`. bfloat16 also rounds the states that enter a product; int8 has
            one scale for each row of weights, and states in 127 steps.
        table: (V + 1, N*H), what each token adds to the gates of the first layer, the last row
            being that of the zero vector. None: the input is a frame of `gru.input_size` features.
        head: From H to logits. None: the output is the last layer's state.

    Raises:
        RuntimeError: `why_not` has a reason.
        ValueError: `weights` is not in `WEIGHTS`, or int8 with NaN or infinity among the weights,
            or NaN in the table or the layers' biases: 8 bits have none, so it would pass for zero.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights: expected one of {', '.join(WEIGHTS)}, got {weights!r}")
    reason = why_not(gru, head)
    if reason is not None:
        raise RuntimeError(f"the native sampler cannot take this model: {reason}")
    flat, per = gru._flat_weights, 4 if gru.bias else 2
    layers = []
    for layer in range(gru.num_layers):
        weight_ih, weight_hh, *biases = flat[layer * per : (layer + 1) * per]
        biases = biases or [None, None]
        layers.append((_array(weight_ih), _array(weight_hh), *map(_array, biases)))
    head_weight, head_bias = (None, None) if head is None else (head.weight, head.bias)
    if weights == "int8":
        products = [*flat[0::per], *flat[1::per], *([] if head_weight is None else [head_weight])]
        if not all(bool(torch.isfinite(w).all()) for w in products):
            raise ValueError("weights: expected finite values for int8, got NaN or infinity")
        summands = [*flat[2::per], *flat[3::per]] if gru.bias else []
        if any(bool(w.isnan().any()) for w in [*summands, *([] if table is None else [table])]):
            raise ValueError("weights: expected no NaN in tables and biases for int8, got NaN")
    from gru_fast import _C

    return _C.PackedStack(
        gru.cell, weights, _array(table), layers, _array(head_weight), _array(head_bias)
    )


def stream(stack: PackedStack) -> Stream:
    """A stream at the zero state."""
    from gru_fast import _C

    return _C.Stream(stack)


def pack_model(model: TokenModel, weights: str = "float32") -> PackedStack:
    """`pack` for a language model."""
    with torch.no_grad(), without_autocast("cpu"):
        return pack(model.gru, weights, table=model.token_table(), head=model.head)


def _array(tensor: Tensor | None) -> Any:
    if tensor is None:
        return None
    return tensor.detach().to("cpu", torch.float32).contiguous().numpy()


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
    """Runs the whole loop in one native call, or in several short ones for `on_tokens`.

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
    if on_tokens is None:
        tokens, _, chances, hidden = draw(rows, 0, max_new_tokens, None)
        return torch.from_numpy(tokens), torch.from_numpy(chances), torch.from_numpy(hidden)
    pieces: list[Any] = []
    of_pieces: list[Any] = []
    state: Any = None
    done, limit = 0, 1
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
        for column in pieces[-1].T:
            on_tokens(torch.from_numpy(column.copy()))
        last = tokens[np.arange(len(rows)), made - 1]
        alive = (made == limit) & ~np.isin(last, eos)
        rows, state = rows[alive], np.ascontiguousarray(state[:, alive])
        inputs, begin = last[alive].astype(np.int32), np.arange(len(rows) + 1)
        done += limit
        limit = 2 * limit if taken < _CHUNK_SECONDS / 2 else max(1, limit // 2)
    return (
        torch.from_numpy(np.concatenate(pieces, 1)),
        torch.from_numpy(np.concatenate(of_pieces, 1)),
        torch.from_numpy(hidden),
    )
