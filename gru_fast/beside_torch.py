# SPDX-License-Identifier: Apache-2.0
"""The same language model on `torch.nn.GRU`, and both timed in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gru_fast.language_model import GRULanguageModel
from gru_fast.token_ids import PADDING

__all__ = ["TorchLanguageModel", "compare_sampling", "compare_training"]

_ROUNDS = 9
_SEQUENCES = 16


class TorchLanguageModel(nn.Module):
    """The network of a `GRULanguageModel`, written as one would on `torch.nn.GRU`.

    Args:
        model: Its weights are copied; its cell must be `reset_after`.

    Raises:
        ValueError: `torch.nn.GRU` has no such cell.
    """

    def __init__(self, model: GRULanguageModel) -> None:
        """See the class."""
        super().__init__()
        if model.gru.cell != "reset_after":
            raise ValueError(f"torch.nn.GRU has no cell={model.gru.cell!r} to compare with")
        gru, V = model.gru, model.vocab_size
        self.vocab_size = V
        self.embedding: nn.Embedding | None = None
        if model.embedding is not None:
            self.embedding = nn.Embedding(V, gru.input_size)
        self.gru = nn.GRU(gru.input_size, gru.hidden_size, gru.num_layers, gru.bias)
        self.head = nn.Linear(gru.hidden_size, V)
        self.to(model.head.weight)
        self.load_state_dict(model.state_dict())

    def _vectors(self, tokens: Tensor) -> Tensor:
        if self.embedding is not None:
            return torch.as_tensor(self.embedding(tokens))
        return F.one_hot(tokens, self.vocab_size).to(self.head.weight.dtype)

    def loss(self, tokens: Tensor) -> Tensor:
        """`GRULanguageModel.loss`."""
        y = tokens.T
        x = self.head.weight.new_zeros(*y.shape, self.gru.input_size)
        x[1:] = self._vectors(y[:-1].clamp(min=0))
        output, _ = self.gru(x)
        return F.cross_entropy(self.head(output).flatten(0, 1), y.flatten(), ignore_index=PADDING)

    @torch.inference_mode()
    def generate(
        self, *, max_new_tokens: int, num_return_sequences: int, eos_token_id: int | None, seed: int
    ) -> Tensor:
        """`GRULanguageModel.generate` from the empty prompt at temperature 1; other draws."""
        N, device = num_return_sequences, self.head.weight.device
        generator = torch.Generator(device).manual_seed(seed)
        x, hidden = self.head.weight.new_zeros(1, N, self.gru.input_size), None
        tokens = torch.full((N, max_new_tokens), PADDING, device=device)
        alive = torch.ones(N, dtype=torch.bool, device=device)
        for t in range(max_new_tokens):
            output, hidden = self.gru(x, hidden)
            probabilities = self.head(output[0]).softmax(-1)
            drawn = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
            tokens[:, t] = torch.where(alive, drawn, PADDING)
            if eos_token_id is not None:
                alive &= drawn != eos_token_id
                if not alive.any():
                    break
            x = self._vectors(drawn[None])
        return tokens


def compare_training(model: GRULanguageModel, tokens: Tensor) -> str:
    """One line: tokens/s of forward and backward over (B, T) tokens, ours and torch's."""

    def step(m: GRULanguageModel | TorchLanguageModel, turn: int) -> int:
        m.zero_grad()
        m.loss(tokens).backward()  # type: ignore[no-untyped-call]
        return int((tokens != PADDING).sum())

    return _compare(f"training, batch {len(tokens)}", model, step)


def compare_sampling(
    model: GRULanguageModel, rows: int, max_new_tokens: int, eos_token_id: int | None
) -> str:
    """One line: tokens/s of `rows` sequences sampled together, ours and torch's."""
    # How long a sequence gets before EOS is luck, and each model has its own: many even it out.
    calls = 1 if eos_token_id is None else max(1, _SEQUENCES // rows)

    def sample(m: GRULanguageModel | TorchLanguageModel, turn: int) -> int:
        drawn = 0
        for call in range(calls):
            tokens = m.generate(
                max_new_tokens=max_new_tokens, num_return_sequences=rows,
                eos_token_id=eos_token_id, seed=turn * calls + call,
            )  # fmt: skip
            drawn += int((tokens != PADDING).sum())
        return drawn

    return _compare(f"sampling {rows} at a time", model, sample)


def _compare(
    what: str,
    model: GRULanguageModel,
    run: Callable[[GRULanguageModel | TorchLanguageModel, int], int],
) -> str:
    """Both in turn, the median of the rounds after one to warm up."""
    try:
        pair = (model, TorchLanguageModel(model))
    except ValueError as error:
        return f"{what}: {error}"
    speeds: list[list[float]] = []
    for turn in range(_ROUNDS + 1):
        speeds.append([])
        for m in pair:
            start = time.perf_counter()
            tokens = run(m, turn)
            speeds[-1].append(tokens / (time.perf_counter() - start))
    ours, theirs = (statistics.median(column) for column in zip(*speeds[1:], strict=True))
    return (
        f"{what}: {ours:,.0f} tokens/s, torch.nn.GRU {theirs:,.0f}, ratio {ours / theirs:.2f} "
        f"(median of {_ROUNDS}, {torch.get_num_threads()} threads)"
    )
