# SPDX-License-Identifier: Apache-2.0
"""The specification of the sampler in plain PyTorch: the random stream and how a token is drawn.

A seed means the same random numbers for ever: these rules do not change. The random number of a
token depends on (seed, index of the sequence in the call, position of the token in its sequence)
alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PHILOX_ROUNDS = 10
_PHILOX_M = (0xD2511F53, 0xCD9E8D57)
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)
_LOW32 = 0xFFFFFFFF


def philox(seed: int, position: Tensor, stream: Tensor) -> Tensor:
    """The first output word of Philox4x32-10, int64 in [0, 2**32), for every (position, stream).

    The key is the seed and the counter is (position, stream), each split into its low and high 32
    bits. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

    Args:
        seed: any integer; its low 64 bits are used.
        position: int64, the absolute index of a token in its sequence.
        stream: int64, the index of the sequence in the call; broadcast against position.
    """
    counter = [position & _LOW32, position >> 32 & _LOW32, stream & _LOW32, stream >> 32 & _LOW32]
    return philox_block(counter, (seed & _LOW32, seed >> 32 & _LOW32))[0]


def philox_block(counter: Sequence[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Philox4x32-10: four words from a counter of four and a key of two, int64 in [0, 2**32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        # The product of two 32-bit words wraps in int64; its bits are the unsigned product's.
        p0, p1 = c0 * _PHILOX_M[0], c2 * _PHILOX_M[1]
        c0, c1, c2, c3 = (
            (p1 >> 32 & _LOW32) ^ c1 ^ k0,
            p1 & _LOW32,
            (p0 >> 32 & _LOW32) ^ c3 ^ k1,
            p0 & _LOW32,
        )
        k0, k1 = (k0 + _PHILOX_W[0]) & _LOW32, (k1 + _PHILOX_W[1]) & _LOW32
    return [c0, c1, c2, c3]


def uniform(seed: int, position: Tensor, stream: Tensor) -> Tensor:
    """Float32 uniforms in [0, 1), multiples of 2**-24: the top 24 bits of `philox`."""
    return (philox(seed, position, stream) >> 8).to(torch.float32) * 2.0**-24


def seed_from_generator(generator: torch.Generator | None = None) -> int:
    """One int64 draw from a torch generator (None: the default one), which advances by it.

    Raises:
        TypeError: it is no generator.
    """
    if not (generator is None or isinstance(generator, torch.Generator)):
        raise TypeError(f"generator: expected a torch.Generator or None, got {generator!r}")
    device = None if generator is None else generator.device
    return int(torch.empty((), dtype=torch.int64, device=device).random_(generator=generator))


def _checked_logits(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Logits, after their division by the temperature if it is not 1, that allow a draw."""
    top = logits.amax(-1)
    if not bool(torch.isfinite(top).all()):
        name = "logits" if temperature == 1 else f"logits / temperature {temperature}"
        raise ValueError(
            f"{name}: expected no NaN or +inf and at least one finite value in every row, "
            f"got a row with maximum {top[~torch.isfinite(top)][0].item()}"
        )
    return logits


def greedy(logits: Tensor) -> Tensor:
    """The index of the largest logit, (...) int64 from (..., V); the lowest index wins a tie.

    Raises:
        ValueError: a row holds NaN or +inf, or nothing above -inf.
    """
    top = _checked_logits(logits).amax(-1, keepdim=True)
    ids = torch.arange(logits.shape[-1], device=logits.device)
    return torch.where(logits == top, ids, logits.shape[-1]).amin(-1)


def draw(
    logits: Tensor,
    u: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """Tokens drawn by inversion of the cumulative distribution, (...) int64.

    Order: temperature, top_k, top_p, min_p, draw. Candidates rank by (-logit, id), so ties go to
    the lower id. top_p keeps the shortest prefix of that ranking whose share reaches p, and at
    least one token; min_p keeps tokens at least min_p times as likely as the likeliest. Weights are
    exp(l - max) in float32, their running sum in order of token id is in float64, and the token is
    the first whose sum exceeds u * total.

    Args:
        logits: (..., V), any floating dtype; computed in float32.
        u: (...) uniforms in [0, 1).
        temperature: > 0.
        top_k: >= 1, or None for no limit.
        top_p: in (0, 1], or None.
        min_p: in [0, 1], or None.

    Raises:
        ValueError: an argument is outside its range, or a row of logits holds NaN or +inf, or
            nothing above -inf, also after the division by the temperature.
    """
    if not temperature > 0:
        raise ValueError(f"temperature: expected a value > 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected an integer >= 1 or None, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected 0 < top_p <= 1 or None, got {top_p}")
    if min_p is not None and not 0 <= min_p <= 1:
        raise ValueError(f"min_p: expected 0 <= min_p <= 1 or None, got {min_p}")
    scaled = _checked_logits(logits.to(torch.float32) / temperature, temperature)
    order = torch.sort(scaled, dim=-1, descending=True, stable=True).indices
    weights = torch.exp(scaled - scaled.amax(-1, keepdim=True)).gather(-1, order)
    if top_k is not None:
        rank = torch.arange(weights.shape[-1], device=weights.device)
        weights = torch.where(rank < top_k, weights, 0.0)
    if top_p is not None:
        share = weights.to(torch.float64).cumsum(-1)
        below = torch.cat([torch.zeros_like(share[..., :1]), share[..., :-1]], -1)
        keep = below < top_p * share[..., -1:]
        weights = torch.where(keep, weights, 0.0)
    if min_p is not None:
        weights = torch.where(weights >= min_p, weights, 0.0)
    by_id = torch.zeros_like(weights).scatter(-1, order, weights)
    cdf = by_id.to(torch.float64).cumsum(-1)
    reached = cdf > u.to(torch.float64)[..., None] * cdf[..., -1:]
    ids = torch.arange(by_id.shape[-1], device=by_id.device)
    last_kept = torch.where(by_id > 0, ids, -1).amax(-1)
    first = torch.where(reached, ids, by_id.shape[-1]).amin(-1)
    return torch.minimum(first, last_kept)


def log_prob(logits: Tensor, tokens: Tensor) -> Tensor:
    """Natural logarithm of softmax(logits) at the tokens: temperature 1 and no filter.

    Args:
        logits: (..., V), any floating dtype; computed in float32 at least.
        tokens: (...) int64.

    Returns:
        (...) float32, or float64 for float64 logits.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_probs = torch.log_softmax(logits.to(dtype), -1)
    return log_probs.gather(-1, tokens[..., None]).squeeze(-1)
