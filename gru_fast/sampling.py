# SPDX-License-Identifier: Apache-2.0
"""Sampling from a language model and scoring sequences: `generate`, `score`.

The rules of the draw are those of `gru_fast.reference_sampling`. A sequence begins with the zero
vector x<1>, then its prompt is fed, then every token that is drawn.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from gru_fast import drawing, gpu_sampling, native_sampling, ops, packed, reference_sampling
from gru_fast.checks import check_integers
from gru_fast.sampled_model import LanguageModel, a_weight, why_not_layers
from gru_fast.token_ids import PADDING, TokenIds, checked_integer, padded

__all__ = [
    "PADDING",
    "GenerateOutput",
    "SamplingOptions",
    "Streamer",
    "generate",
    "generate_loop",
    "mixed_loop",
    "native_loop",
    "score",
    "triton_loop",
]

# The draw divides by the temperature in float32.
_SMALLEST, _LARGEST = 2.0**-149, (2 - 2.0**-23) * 2.0**127
_MOST_TOKENS = 2**48


class Streamer(Protocol):
    """Receives tokens while they are drawn, as in Hugging Face transformers."""

    def put(self, value: Tensor) -> None:
        """Take the padded prompts (N, P), then (N,) tokens a step, PADDING in ended rows."""

    def end(self) -> None:
        """Generation is over."""


@dataclass(frozen=True)
class SamplingOptions:
    """The options of one call of `generate`, checked.

    Attributes:
        max_new_tokens: Tokens to draw at most in each row, >= 0, < 2**48.
        do_sample: Draw; False takes the most likely token, the lowest id among equals.
        temperature: Logits are divided by it, > 0, within the range of float32.
        top_k: Keep the k most likely tokens, >= 1, or None.
        top_p: Keep the shortest prefix of the ranking whose share reaches p, in (0, 1], or None.
        min_p: Keep what is at least min_p times as likely as the likeliest, in [0, 1], or None.
        eos_token_id: A row ends with this token; None: with max_new_tokens only.
        seed: Key of the random stream; its low 64 bits count.
        log_probs: Whether they are wanted; a loop may return zeros instead where they are not.

    Raises:
        ValueError: A value is outside its range.
        TypeError: A number of tokens or an id is not an integer, or another value not a number.
    """

    max_new_tokens: int
    do_sample: bool = True
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    eos_token_id: int | None = None
    seed: int = 0
    log_probs: bool = True

    def __post_init__(self) -> None:
        """Check every value."""
        for name in ("max_new_tokens", "top_k", "eos_token_id", "seed"):
            value = getattr(self, name)
            optional = value is None and name in ("top_k", "eos_token_id")
            if type(value) is not int and not optional:
                object.__setattr__(self, name, checked_integer(name, value))
        for name in ("temperature", "top_p", "min_p"):
            value = getattr(self, name)
            optional = value is None and name != "temperature"
            if not isinstance(value, numbers.Real) and not optional:
                raise TypeError(f"{name}: expected a number, got {value!r}")
        if not isinstance(self.do_sample, int):
            raise TypeError(f"do_sample: expected a bool, got {self.do_sample!r}")
        if not 0 <= self.max_new_tokens < _MOST_TOKENS:
            raise ValueError(
                f"max_new_tokens: expected >= 0 and < 2**48, got {self.max_new_tokens}"
            )
        if not _SMALLEST <= self.temperature <= _LARGEST:
            raise ValueError(
                f"temperature: expected a float32 value > 0, got {self.temperature} "
                "(do_sample=False takes the most likely token)"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k: expected an integer >= 1 or None, got {self.top_k}")
        if self.top_k is not None and self.top_k > _MOST_TOKENS:
            object.__setattr__(self, "top_k", _MOST_TOKENS)  # no vocabulary has so many
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected 0 < top_p <= 1 or None, got {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p: expected 0 <= min_p <= 1 or None, got {self.min_p}")


@dataclass(frozen=True)
class GenerateOutput:
    """What `generate(..., return_dict_in_generate=True)` returns.

    Attributes:
        sequences: (N, L) int64: the prompt, the drawn tokens with EOS, PADDING after the end.
        log_probs: (N, L): natural logarithm of the probability that the model itself (temperature
            1, nothing filtered out) gives to each drawn token; 0 at prompts and padding.
        hidden: (num_layers, N, H): the state that the last token of each row was drawn from.
        prompt_lengths: (N,) int64.
    """

    sequences: Tensor
    log_probs: Tensor
    hidden: Tensor
    prompt_lengths: Tensor


Loop = Callable[
    [LanguageModel, Tensor, Tensor, SamplingOptions, Callable[[Tensor], None] | None],
    tuple[Tensor, Tensor, Tensor],
]


def generate(
    model: LanguageModel,
    input_ids: TokenIds | None = None,
    *,
    max_new_tokens: int,
    num_return_sequences: int = 1,
    do_sample: bool = True,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    eos_token_id: int | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    streamer: Streamer | None = None,
    return_dict_in_generate: bool = False,
    loop: Loop | None = None,
) -> Tensor | GenerateOutput:
    """`GRULanguageModel.generate`, which documents it; `loop` replaces `choose_loop`."""
    if seed is not None and generator is not None:
        raise ValueError("seed, generator: expected one of them at most, got both")
    methods = [getattr(streamer, name, None) for name in ("put", "end")]
    if streamer is not None and not all(map(callable, methods)):
        raise TypeError(
            f"streamer: expected an object with put() and end(), got {type(streamer).__name__}"
        )
    repeats = checked_integer("num_return_sequences", num_return_sequences)
    if not 1 <= repeats < _MOST_TOKENS:
        raise ValueError(f"num_return_sequences: expected >= 1 and < 2**48, got {repeats}")
    if seed is None:
        seed = reference_sampling.seed_from_generator(generator) if do_sample else 0
    options = SamplingOptions(
        max_new_tokens, do_sample, temperature, top_k, top_p, min_p, eos_token_id, seed,
        log_probs=bool(return_dict_in_generate),
    )  # fmt: skip
    if options.eos_token_id is not None and not 0 <= options.eos_token_id < model.vocab_size:
        raise ValueError(
            f"eos_token_id: expected 0 <= id < vocab_size = {model.vocab_size}, "
            f"got {options.eos_token_id}"
        )
    prompts, lengths = padded(input_ids, model.vocab_size, a_weight(model).device)
    if repeats > 1:
        prompts = prompts.repeat_interleave(repeats, 0)
        lengths = lengths.repeat_interleave(repeats)
    if streamer is not None:
        # Theirs to keep and to change: `prompts` may be the caller's own ids.
        streamer.put(prompts.clone())
    if loop is None:
        loop = choose_loop(model)
    tokens, log_probs, hidden = loop(
        model, prompts, lengths, options, None if streamer is None else streamer.put
    )
    if streamer is not None:
        streamer.end()
    sequences = _append(prompts, lengths, tokens, PADDING)
    # Without prompts and EOS all rows are equally long.
    if sequences.numel() and (prompts.shape[1] or options.eos_token_id is not None):
        sequences = sequences[:, : int((sequences != PADDING).sum(1).max())]
    if not return_dict_in_generate:
        return sequences
    nothing = torch.zeros(prompts.shape, dtype=log_probs.dtype, device=prompts.device)
    return GenerateOutput(
        sequences,
        _append(nothing, lengths, log_probs, 0)[:, : sequences.shape[1]],
        hidden,
        lengths,
    )


def choose_loop(model: LanguageModel) -> Loop:
    """The function that runs a call of `generate`; all have the interface of `generate_loop`.

    Raises:
        RuntimeError: The model's `gru` is no layer of gru_fast.
    """
    backend = getattr(model.gru, "backend", None)
    if backend is None:
        raise RuntimeError(f"generate cannot take this model: {why_not_layers(model.gru)}")
    if backend in ("auto", "cpu") and packed.why_not_model(model) is None:
        return native_loop
    if backend in ("auto", "triton") and gpu_sampling.why_not(model) is None:
        return triton_loop
    if backend in ("auto", "cpu") and ops.HAS_CPU_KERNELS and a_weight(model).is_cpu:
        return mixed_loop
    return generate_loop


def triton_loop(
    model: LanguageModel,
    prompts: Tensor,
    prompt_lengths: Tensor,
    options: SamplingOptions,
    on_tokens: Callable[[Tensor], None] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`generate_loop` in few launches on a GPU; nothing to draw is left to `generate_loop`.

    Tokens that are to be seen while they are drawn come some steps at a time.
    """
    if options.max_new_tokens == 0 or len(prompts) == 0:
        return generate_loop(model, prompts, prompt_lengths, options, on_tokens)
    tokens, log_probs, hidden = gpu_sampling.generate(
        model,
        prompts,
        prompt_lengths,
        max_new_tokens=options.max_new_tokens,
        on_tokens=on_tokens,
        do_sample=options.do_sample,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        eos=options.eos_token_id,
        seed=options.seed,
    )
    return tokens, log_probs, hidden.to(model.head.weight.dtype)


def native_loop(
    model: LanguageModel,
    prompts: Tensor,
    prompt_lengths: Tensor,
    options: SamplingOptions,
    on_tokens: Callable[[Tensor], None] | None = None,
    *,
    stack: Any = None,
    threads: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`generate_loop` in one native call on the CPU, computed in float32.

    Tokens that are to be seen while they are drawn come in several calls.

    Args:
        model: As the other arguments, see `generate_loop`.
        prompts: See there.
        prompt_lengths: See there.
        options: See there.
        on_tokens: See there.
        stack: The packed weights; None: those of the model as it is now.
        threads: At most so many of torch's; 0: all of them.
    """
    steps, eos = options.max_new_tokens, options.eos_token_id
    tokens, log_probs, hidden = native_sampling.generate(
        packed.pack_model(model) if stack is None else stack,
        [row[:n] for row, n in zip(prompts.numpy(), prompt_lengths.tolist(), strict=True)],
        model.start,
        max_new_tokens=max(steps, 1),
        eos=[] if eos is None else [eos],
        seed=options.seed,
        do_sample=options.do_sample,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        threads=threads,
        log_probs=options.log_probs,
        on_tokens=on_tokens if steps else None,
    )
    # The state after a prompt is what its first token is drawn from, also where none is wanted.
    return tokens[:, :steps], log_probs[:, :steps], hidden.to(model.head.weight.dtype)


@torch.no_grad()
def generate_loop(
    model: LanguageModel,
    prompts: Tensor,
    prompt_lengths: Tensor,
    options: SamplingOptions,
    on_tokens: Callable[[Tensor], None] | None = None,
    *,
    draws: Callable[..., drawing.Draw] = drawing.by_reference,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sampler in PyTorch operations: one step of the model and one draw at a time.

    Row i draws its token number t with `uniform(seed, prompt_lengths[i] + t, i)`. Dropout is off.

    Args:
        model: The model.
        prompts: (N, P) int64, 0 <= id < V where it is not padding.
        prompt_lengths: (N,) int64, 0 <= length <= P.
        options: Checked options.
        on_tokens: Called with the (N,) tokens of each step.
        draws: What makes the draws of the call, with the arguments of `drawing.by_reference`.

    Returns:
        tokens: (N, S) int64, S <= max_new_tokens drawn steps, PADDING after EOS.
        log_probs: (N, S), `reference_sampling.log_prob` of the tokens, 0 after EOS.
        hidden: (num_layers, N, H), the state that the last token of each row was drawn from.

    Raises:
        ValueError: The model gave logits with NaN or +inf.
    """
    N = len(prompts)
    steps = options.max_new_tokens
    rows = torch.arange(N, device=prompts.device)
    fed = N * (prompts.shape[1] + 1 + steps)
    table = None
    if fed >= model.vocab_size and model.why_not_weights_alone() is None:
        table = model.token_table()
    start = prompts.new_full((N, 1), model.start)
    inputs = torch.cat([start, prompts.clamp(min=0)], 1)
    output, hidden = model.run(inputs, lengths=prompt_lengths + 1, table=table)
    last = output[prompt_lengths, rows]
    alive = torch.ones(N, dtype=torch.bool, device=prompts.device)
    going = True
    draw = draws(
        prompt_lengths, options.seed, do_sample=options.do_sample,
        temperature=options.temperature, top_k=options.top_k, top_p=options.top_p,
        min_p=options.min_p,
    )  # fmt: skip
    tokens: list[Tensor] = []
    log_probs: list[Tensor] = []
    for t in range(steps if N else 0):
        # Not hidden[-1], the same of plain layers: a hook or another `run` may change the output.
        logits = model.head(last)
        drawn, log_prob = draw(t, logits)
        if options.eos_token_id is None:
            tokens.append(drawn)
            log_probs.append(log_prob)
        else:
            tokens.append(torch.where(alive, drawn, PADDING))
            log_probs.append(torch.where(alive, log_prob, 0.0))
            alive = alive & (drawn != options.eos_token_id)
            going = bool(alive.any())
        if on_tokens is not None:
            on_tokens(tokens[-1].clone())
        if t + 1 == steps or not going:
            break
        output, after = model.run(drawn[:, None], hidden, table=table)
        last = output[0]
        if options.eos_token_id is not None:
            after = torch.where(alive[:, None], after, hidden)
        hidden = after
    if not tokens:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        return prompts.new_empty(N, 0), hidden.new_empty(N, 0, dtype=dtype), hidden
    return torch.stack(tokens, 1), torch.stack(log_probs, 1), hidden


mixed_loop: Loop = partial(generate_loop, draws=drawing.natively)
"""`generate_loop` with compiled draws, for models on the CPU that `native_loop` cannot take."""


@torch.no_grad()
def score(
    model: LanguageModel,
    sequences: TokenIds,
    *,
    prompt_lengths: Tensor | None = None,
) -> Tensor:
    """`GRULanguageModel.score`, which documents it."""
    tokens, lengths = padded(sequences, model.vocab_size, a_weight(model).device, "sequences")
    N, L = tokens.shape
    start = tokens.new_full((N, 1), model.start)
    inputs = torch.cat([start, tokens[:, :-1].clamp(min=0)], 1)[:, :L]
    output = model.run(inputs)[0]
    result = reference_sampling.log_prob(model.head(output), tokens.T.clamp(min=0)).T
    position = torch.arange(L, device=tokens.device)
    counted = position < lengths[:, None]
    if prompt_lengths is not None:
        if not isinstance(prompt_lengths, Tensor):
            raise TypeError(
                f"prompt_lengths should be a Tensor, got: {type(prompt_lengths).__name__}"
            )
        check_integers("prompt_lengths", prompt_lengths)
        if prompt_lengths.shape != (N,):
            raise ValueError(
                f"prompt_lengths: expected shape {(N,)}, got {tuple(prompt_lengths.shape)}"
            )
        counted = counted & (position >= prompt_lengths.to(tokens.device)[:, None])
    return torch.where(counted, result, 0.0)


def _append(prompts: Tensor, lengths: Tensor, new: Tensor, padding: int) -> Tensor:
    """Row i of `new` from column lengths[i] of row i of `prompts` on."""
    N, P = prompts.shape
    if P == 0:
        return new
    result = prompts.new_full((N, P + new.shape[1]), padding)
    result[:, :P] = prompts
    columns = lengths[:, None] + torch.arange(new.shape[1], device=prompts.device)
    return result.scatter_(1, columns, new)
