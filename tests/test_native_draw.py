# SPDX-License-Identifier: Apache-2.0
"""The C++ draw against the rules of reference_sampling, on every instruction set."""

import pytest
import torch

from gru_fast import reference_sampling

_C = pytest.importorskip("gru_fast._C", reason="gru_fast was built without its CPU kernels")

SEED = 0x1234567890ABCDEF
OPTIONS = [
    {},
    {"temperature": 0.6},
    {"temperature": 30.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 10**6},
    {"top_p": 1e-6},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 5, "min_p": 1.0},
    {"temperature": 2.0, "top_k": 10, "top_p": 0.9, "min_p": 0.05},
]


def draw(logits, position, stream, seed=SEED, **options):
    tokens, log_probs = _C.draw(logits.numpy(), seed, position.numpy(), stream.numpy(), **options)
    return torch.from_numpy(tokens), torch.from_numpy(log_probs)


def counters(n):
    """Positions and streams on both sides of 2**32."""
    return torch.arange(n) * 7919 + 2**32 - 5 * n, torch.arange(n) + 2**33 - n // 2


def logits_of(n, V):
    """Ties, masked tokens and zeros of both signs among ordinary logits."""
    logits = torch.randn(n, V) * 3
    logits[: n // 4] = logits[: n // 4].round()
    logits[: n // 8] *= torch.where(torch.rand(n // 8, V) < 0.5, -1.0, 1.0)
    masked = torch.rand(n, V) < 0.2
    masked[:, 0] = False
    return logits.masked_fill(masked, -torch.inf)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_draw_is_the_references(isa, options):
    """At most one draw in ten thousand lies within rounding of an edge of the distribution."""
    flips = total = 0
    for V in (1, 2, 15, 16, 17, 65, 300):
        n = 2000
        logits = logits_of(n, V)
        position, stream = counters(n)
        u = reference_sampling.uniform(SEED, position, stream)
        expected = reference_sampling.draw(logits, u, **options)
        tokens, _ = draw(logits, position, stream, **options)
        flips += int((tokens != expected).sum())
        total += n
    assert flips <= total * 1e-4


def test_greedy_and_log_probabilities(isa):
    for V in (1, 16, 65):
        logits = logits_of(500, V)
        position, stream = counters(500)
        for options in (
            {"do_sample": False}, {"temperature": 0.5, "top_p": 0.9}, {"temperature": 0.5},
            {"min_p": 0.2}, {},
        ):  # fmt: skip
            tokens, log_probs = draw(logits, position, stream, **options)
            if not options.get("do_sample", True):
                assert torch.equal(tokens, reference_sampling.greedy(logits))
            exact = torch.log_softmax(logits.double(), -1).gather(1, tokens[:, None])[:, 0]
            torch.testing.assert_close(log_probs.double(), exact, rtol=1e-6, atol=1e-6)


def test_sums_and_shares_that_meet_an_edge(isa):
    """Equal weights: what is reached exactly is not passed, and top_p = 0.9 of ten keeps nine."""
    logits = torch.zeros(2048).masked_fill(torch.arange(2048) % 2 == 1, -torch.inf)
    position, stream = torch.zeros(2**18).long(), torch.arange(2**18)
    u = reference_sampling.uniform(SEED, position, stream)
    edge = (u * 1024).frac() == 0
    assert int(edge.sum()) >= 10
    logits = logits.expand(int(edge.sum()), 2048).contiguous()
    expected = reference_sampling.draw(logits, u[edge])
    assert torch.equal(draw(logits, position[edge], stream[edge])[0], expected)
    logits, (position, stream) = torch.zeros(200, 10), counters(200)
    for p in (0.1, 0.3, 0.5, 0.7, 0.9, 1 / 3):
        expected = reference_sampling.draw(
            logits, reference_sampling.uniform(SEED, position, stream), top_p=p
        )
        assert torch.equal(draw(logits, position, stream, top_p=p)[0], expected)


def test_logits_that_allow_no_draw(isa):
    logits = torch.zeros(5, 20)
    logits[0, 3] = torch.nan
    logits[1, 19] = torch.inf
    logits[2] = -torch.inf
    logits[3, 1:] = -torch.inf
    position, stream = counters(5)
    for options in ({}, {"do_sample": False}, {"top_k": 3}, {"top_p": 0.5}):
        tokens, _ = draw(logits, position, stream, **options)
        assert tokens[:3].tolist() == [-1, -1, -1] and tokens[3] == 0 and tokens[4] >= 0
    huge = torch.full((1, 3), 1e30)
    assert draw(huge, position[:1], stream[:1], temperature=1e-10)[0].item() == -1


def chi_square(counts, probabilities):
    """Pearson's statistic over its degrees of freedom, in standard deviations from the mean."""
    kept = probabilities > 0
    assert int(counts[~kept].sum()) == 0
    expected = probabilities[kept] * counts.sum()
    statistic = float(((counts[kept] - expected) ** 2 / expected).sum())
    freedom = int(kept.sum()) - 1
    return (statistic - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.5}, {"temperature": 2.0}, {"top_k": 6}, {"top_p": 0.7},
     {"temperature": 1.5, "top_k": 12, "top_p": 0.8}],
    ids=str,
)  # fmt: skip
def test_frequencies_are_those_of_the_softmax(options):
    """Chi-square, at fixed seeds, against the distribution written out in float64."""
    V, n = 24, 200_000
    logits = torch.randn(V, dtype=torch.float64)
    p = torch.softmax(logits.float().double() / options.get("temperature", 1.0), 0)
    order = p.argsort(descending=True)
    if "top_k" in options:
        p[order[options["top_k"] :]] = 0
        p /= p.sum()
    if "top_p" in options:
        ranked = p[order]
        below = ranked.cumsum(0) - ranked
        p[order[below >= options["top_p"]]] = 0
        p /= p.sum()
    tokens, _ = draw(
        logits.float().expand(n, V).contiguous(), torch.arange(n) % 400, torch.arange(n) // 400,
        **options,
    )  # fmt: skip
    assert abs(chi_square(torch.bincount(tokens, minlength=V).double(), p)) < 4
