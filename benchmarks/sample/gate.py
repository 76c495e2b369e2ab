# SPDX-License-Identifier: Apache-2.0
"""Whether a sampler draws from its model: judged against the model in float64, token by token.

The logits that count for a token are those after the tokens before it, so that one rounding error
does not change what is expected of all later tokens. Two runs are judged: a greedy one, in which
each sequence has a prompt of its own, and one as it is timed.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from gru_fast import GRULanguageModel, reference_sampling

SEED = 0
"""Of the samplers that draw by the rules of `reference_sampling`."""
TOKENS, DRAWS, PROMPT = 48, 384, 4
"""Least tokens of a sequence, least tokens of all together, and tokens of a prompt."""

REGRET = {"float32": 1e-4, "tf32": 0.05, "bfloat16": 0.15, "float16": 0.05, "int8": 0.3}
"""How far below the largest logit the logit of a greedy token may be."""
MISS = {"float32": 1e-5, "tf32": 0.01, "bfloat16": 0.03, "float16": 0.01, "int8": 0.04}
"""How far a token's random number may be from its part of the cumulative distribution."""
DEVIATIONS = 7.0
"""By how many standard deviations the log-probabilities of a sequence may miss what is expected."""


class Draw(Protocol):
    """A sampler of B sequences."""

    def __call__(self, T: int, greedy: bool, prompts: Tensor | None = None) -> Tensor:
        """(B, T) tokens that follow the prompts (B, P), or the empty ones."""


def sharpened(model: GRULanguageModel) -> GRULanguageModel:
    """The model with probabilities that differ by nats, and biases and a past that matter to them.

    As it is initialised, all tokens are nearly equally likely, and hardly any weight shows.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "weight_hh" in name:
                parameter.mul_(3.0)
            if name == "head.weight":
                parameter.mul_(12.0)
            if "bias" in name:
                parameter.mul_(0.5 * model.gru.hidden_size**0.5)
    return model


class Gate:
    """Judges samplers of one model.

    Args:
        model: that they draw from.
        B: how many sequences they draw.
        rows: those that are judged, or None: all.
        draws: least tokens of all sequences together.
    """

    def __init__(
        self, model: GRULanguageModel, B: int, rows: Tensor | None = None, draws: int = DRAWS
    ) -> None:
        self.rows = torch.arange(B) if rows is None else rows
        self.T = max(TOKENS, -(-draws // B))
        self.exact = GRULanguageModel(**model.config).double()
        self.exact.load_state_dict(model.state_dict())
        chance = torch.Generator().manual_seed(0)
        self.prompts = torch.randint(model.vocab_size, (B, PROMPT), generator=chance)

    def verdict(self, draw: Draw, dtype: str, seeded: bool) -> str | None:
        """None, or what is wrong.

        Args:
            draw: the sampler.
            dtype: a key of `REGRET`.
            seeded: whether it draws by the rules of `reference_sampling`, with `SEED`.
        """
        greedy = draw(self.T, True, self.prompts).cpu()
        drawn = draw(self.T, False).cpu()
        for tokens in (greedy, drawn):
            if tokens.shape != (len(self.prompts), self.T):
                return (
                    f"tokens of shape {tuple(tokens.shape)}, expected {len(self.prompts), self.T}"
                )
        wrong = self._greedy(greedy[self.rows], REGRET[dtype])
        if wrong is not None:
            return wrong
        drawn = drawn[self.rows]
        return self._seeded(drawn, MISS[dtype]) if seeded else self._likely(drawn)

    def _logits(self, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            return self.exact(self.exact.teacher_forcing(tokens))[0]

    def _greedy(self, tokens: Tensor, limit: float) -> str | None:
        logits = self._logits(torch.cat([self.prompts[self.rows], tokens], 1))[:, PROMPT:]
        regret = float((logits.amax(-1) - _at(logits, tokens)).max())
        if regret <= limit:
            return None
        return f"a greedy token {regret:.3g} below the largest logit, expected {limit}"

    def _seeded(self, tokens: Tensor, limit: float) -> str | None:
        """A token's random number falls into the part of [0, 1) that is the token's."""
        p = self._logits(tokens).softmax(-1)
        end = _at(p.cumsum(-1), tokens)
        position = torch.arange(tokens.shape[1])
        u = reference_sampling.uniform(SEED, position, self.rows[:, None]).double()
        miss = float(torch.maximum(u - end, end - _at(p, tokens) - u).max())
        if miss <= limit:
            return None
        return f"a token whose random number is {miss:.3g} outside of its part, expected {limit}"

    def _likely(self, tokens: Tensor) -> str | None:
        """Whoever draws as the model says finds log p = -entropy on average, in every row."""
        log_p = self._logits(tokens).log_softmax(-1)
        p, found = log_p.exp(), _at(log_p, tokens)
        surprise = found - (p * log_p).sum(-1)
        variance = (p * log_p**2).sum(-1) - (p * log_p).sum(-1) ** 2
        of_rows = surprise.sum(1) / variance.sum(1).clamp(min=1e-12).sqrt()
        of_all = surprise.sum() / variance.sum().clamp(min=1e-12).sqrt()
        off = float(torch.cat([of_rows, of_all[None]]).abs().max())
        if off <= DEVIATIONS:
            return None
        return f"log-probabilities {off:.3g} deviations off, expected {DEVIATIONS:g} at most"


def _at(values: Tensor, tokens: Tensor) -> Tensor:
    """values (..., V) at the tokens (...)."""
    return values.gather(-1, tokens[..., None])[..., 0]
