# SPDX-License-Identifier: Apache-2.0
"""`generate` on the Triton kernels under the interpreter; run by test_triton_interpreter.py.

Each test is named after the form it runs, or is of the "draw".
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from cases import CELLS
from gru_fast import GRULanguageModel, gpu_sampling, kernels, reference_sampling, sampling
from gru_fast.kernels import generation, problem, tiling
from gru_fast.kernels.draw import draw, random_bits
from gru_fast.kernels.generation import Rules
from gru_fast.kernels.tiling import Config
from gru_fast.token_ids import padded
from test_native_draw import OPTIONS, SEED, chi_square, logits_of
from triton_support import interpreter
from triton_support.mutants import GENERATE_MUTANTS, installed

interpreter.install_numerics()
interpreter.install_bounds()

pytestmark = pytest.mark.filterwarnings(
    "ignore:Conversion of an array with ndim > 0", "ignore:overflow encountered in divide"
)

FORMS = tuple(kernels.FORMS)
QUICK_FORMS = [*FORMS[:-1], pytest.param("step", marks=pytest.mark.slow)]
"""`step` has many launches, which the interpreter is slow at."""
driver = sys.modules["gru_fast.kernels.generate"]


@pytest.fixture(autouse=True)
def exact_products(poisoned_memory: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem, "dot_precision", lambda tensor: "ieee")


@triton.jit
def _bits(position_ptr, stream_ptr, out_ptr, low, high, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    stream = tl.load(stream_ptr + at, mask=mask, other=0)
    position = tl.load(position_ptr + at, mask=mask, other=0)
    tl.store(out_ptr + at, random_bits(low, high, position, stream), mask=mask)


@triton.jit
def _draw(
    logits_ptr, bits_ptr, tokens_ptr, log_probs_ptr, good_ptr, B, V, eos, seed_low, seed_high,
    temperature, top_k, top_p, min_p, id_bits, BLOCK_B: tl.constexpr, BLOCK_V: tl.constexpr,
    SAMPLE: tl.constexpr, SHAPED: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr,
    IN_MEMORY: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, BLOCK_B)
    row = tl.program_id(0) * BLOCK_B + lane
    ids = tl.arange(0, BLOCK_V)
    in_rows = row < B
    bits = tl.load(bits_ptr + row, mask=in_rows, other=0)
    at = logits_ptr + row[None, :] * V + ids[:, None]
    mask = (ids[:, None] < V) & in_rows[None, :]
    tile = tl.load(at, mask=mask, other=-float("inf"))
    source = None
    if IN_MEMORY:
        source = logits_ptr + tl.program_id(0) * BLOCK_B * V
    token, log_prob, good = draw(
        tile, source, lane, in_rows, V, bits, temperature, top_k, top_p, min_p, id_bits, BLOCK_V,
        SAMPLE, SHAPED, TOP_K, TOP_P,
    )  # fmt: skip
    tl.store(tokens_ptr + row, token.to(tl.int64), mask=in_rows)
    tl.store(log_probs_ptr + row, log_prob, mask=in_rows)
    tl.store(good_ptr + row, good.to(tl.int8), mask=in_rows)


def drawn(logits: Tensor, bits: Tensor, in_memory: bool, rows: int = 512, **options):
    """Tokens, log-probabilities and whether a draw was allowed."""
    n, V = logits.shape
    block = 16 if in_memory else triton.next_power_of_2(max(V, 16))
    ids = triton.cdiv(V, block) * block
    out = torch.empty(n, dtype=torch.int64), torch.empty(n), torch.empty(n, dtype=torch.int8)
    _draw[(triton.cdiv(n, rows),)](
        logits, bits, *out, n, V, **Rules(**options).arguments(V), id_bits=(ids - 1).bit_length(),
        BLOCK_B=rows, BLOCK_V=block, IN_MEMORY=in_memory,
    )  # fmt: skip
    return out


class TestDraw:
    def test_random_bits_are_philoxs(self):
        n = 1000
        position = torch.cat([torch.arange(n - 2), torch.tensor([2**31 - 1, 2**30])])
        stream = torch.randint(0, 2**31 - 1, (n,))
        for seed in (0, 1, -1, SEED, 2**64 - 1, 2**40 + 5, -(2**63)):
            out = torch.empty(n, dtype=torch.int64)
            words = Rules(seed=seed).arguments(9)
            _bits[(8,)](
                position.int(), stream.int(), out, words["seed_low"], words["seed_high"], n, 128
            )
            assert torch.equal(out, reference_sampling.philox(seed, position, stream) >> 8)

    @pytest.mark.parametrize(
        "in_memory", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["tile", "memory"]
    )
    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_every_draw_is_the_references(self, options, in_memory):
        n = 256 if in_memory else 1024
        for V in (1, 17, 65):
            logits = logits_of(n, V)
            position, stream = torch.arange(n), torch.arange(n) * 7919
            expected = reference_sampling.draw(
                logits, reference_sampling.uniform(SEED, position, stream), **options
            )
            bits = reference_sampling.philox(SEED, position, stream) >> 8
            tokens, log_probs, good = drawn(logits, bits, in_memory, **options)
            assert bool(good.all()) and torch.equal(tokens, expected)
            exact = torch.log_softmax(logits.double(), -1).gather(1, tokens[:, None])[:, 0]
            torch.testing.assert_close(log_probs.double(), exact, rtol=1e-6, atol=2e-6)

    @pytest.mark.parametrize("in_memory", [False, True], ids=["tile", "memory"])
    def test_greedy(self, in_memory):
        for V in (1, 16, 65):
            logits = logits_of(500, V)
            tokens, log_probs, _ = drawn(
                logits, torch.zeros(500).long(), in_memory, do_sample=False, top_k=2
            )
            assert torch.equal(tokens, reference_sampling.greedy(logits))
            exact = torch.log_softmax(logits.double(), -1).gather(1, tokens[:, None])[:, 0]
            torch.testing.assert_close(log_probs.double(), exact, rtol=1e-6, atol=2e-6)

    @pytest.mark.parametrize("in_memory", [False, True], ids=["tile", "memory"])
    def test_logits_that_allow_no_draw(self, in_memory):
        logits = torch.zeros(5, 20)
        logits[0, 3] = torch.nan
        logits[1, 19] = torch.inf
        logits[2] = -torch.inf
        logits[3, 1:] = -torch.inf
        bits = torch.full((5,), 2**24 - 1)
        for options in ({}, {"do_sample": False}, {"top_k": 3}, {"top_p": 0.5}):
            tokens, _, good = drawn(logits, bits, in_memory, rows=16, **options)
            assert good.tolist() == [0, 0, 0, 1, 1] and tokens[3] == 0
            assert bool((tokens < 20).all()) and bool((tokens >= 0).all())
        huge = torch.full((1, 3), 1e30)
        assert drawn(huge, bits[:1], in_memory, rows=16, temperature=1e-10)[2].item() == 0

    def test_shares_that_meet_an_edge(self):
        """Ten equal weights: top_p = 0.9 keeps nine of them, as the rules do in float64."""
        bits = torch.arange(64) * 2**18
        for V, shares in ((10, (0.1, 0.3, 0.5, 0.7, 0.9, 1 / 3)), (50, (0.14, 0.3, 0.56))):
            logits = torch.zeros(64, V)
            for p in shares:
                expected = reference_sampling.draw(logits, bits.float() * 2.0**-24, top_p=p)
                assert torch.equal(drawn(logits, bits, False, rows=64, top_p=p)[0], expected)

    def test_edges_between_two_tokens(self):
        """To four of the 2**24 random numbers."""
        for gap in (0.3, 1.0, 2.5):
            edge = round(2**24 / (1 + math.exp(-gap)))
            logits = torch.tensor([[0.0, -gap]] * 2)
            tokens, _, _ = drawn(logits, torch.tensor([edge - 4, edge + 4]), False, rows=16)
            assert tokens.tolist() == [0, 1]

    def test_logits_in_parts(self):
        """The rest of the options that way is slow."""
        logits, position, stream = logits_of(32, 40), torch.arange(32), torch.arange(32)
        for options in ({}, {"top_k": 9, "top_p": 0.8}):
            u = reference_sampling.uniform(SEED, position, stream)
            bits = reference_sampling.philox(SEED, position, stream) >> 8
            tokens, _, _ = drawn(logits, bits, True, rows=32, **options)
            assert torch.equal(tokens, reference_sampling.draw(logits, u, **options))

    @pytest.mark.parametrize(
        "options", [{}, {"temperature": 2.0}, {"top_k": 6}, {"top_p": 0.7}], ids=str
    )
    def test_frequencies_are_those_of_the_softmax(self, options):
        V, n = 24, 40_960
        logits = torch.randn(V, dtype=torch.float64)
        p = torch.softmax(logits.float().double() / options.get("temperature", 1.0), 0)
        order = p.argsort(descending=True)
        if "top_k" in options:
            p[order[options["top_k"] :]] = 0
        if "top_p" in options:
            ranked = p[order]
            p[order[ranked.cumsum(0) - ranked >= options["top_p"]]] = 0
        p /= p.sum()
        bits = reference_sampling.philox(3, torch.arange(n) % 400, torch.arange(n) // 400) >> 8
        tokens, _, _ = drawn(
            logits.float().expand(n, V).contiguous(), bits, False, rows=8192, **options
        )
        assert abs(chi_square(torch.bincount(tokens, minlength=V).double(), p)) < 4


def language_model(cell=CELLS[0], layers=1, hidden=41, vocabulary=11, **options):
    """Sharp enough that a wrong input shows; a hidden size that is padded, and fills no tile."""
    torch.manual_seed(1)
    model = GRULanguageModel(vocabulary, None, hidden, layers, cell=cell, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model


@contextmanager
def tiles(
    form: str,
    rows: int = 16,
    seed: int = 0,
    launch: int = 24,
    resident: bool = True,
    limit: int = 10**6,
) -> Iterator[None]:
    """Small tiles, so that a call has several, and launches of so many positions.

    seed, limit: of the schedule that programs of `grid` are interleaved by.
    resident: whether `grid` keeps the weights on chip.
    """

    def config(form, device, model):
        if form == "cta":
            return Config(rows, max(16, triton.next_power_of_2(model.sizes.H)), 0, 4)
        return Config(rows, 32, 32, 4, 1, resident)

    interleaved = interpreter.concurrent_grid(seed, limit) if form == "grid" else nullcontext()
    with interleaved, mock.patch.multiple(driver, config_of=config, LAUNCH=launch, QUEUED=launch):
        yield


def triton_loop(form: str, model, prompts, lengths, options, on_tokens=None):
    """`sampling.triton_loop` of one form."""
    with mock.patch.object(gpu_sampling, "generate", partial(gpu_sampling.generate, form=form)):
        return sampling.triton_loop(model, prompts, lengths, options, on_tokens)


def outputs(form: str, model, prompts, **options):
    loop = partial(triton_loop, form)
    return sampling.generate(model, prompts, return_dict_in_generate=True, loop=loop, **options)


PROMPTS = [[1, 2, 5, 4], [3], [], [4, 4], [7, 0, 9]]


def compare(form: str, model, prompts=PROMPTS, schedule=None, **options) -> Tensor:
    """The same call on the kernel and on the CPU: the same tokens, numbers within rounding."""
    with tiles(form, **(schedule or {})):
        mine = outputs(form, model, prompts, **options)
    theirs = model.generate(prompts, return_dict_in_generate=True, **options)
    assert torch.equal(mine.sequences, theirs.sequences)
    torch.testing.assert_close(mine.log_probs, theirs.log_probs, rtol=0, atol=5e-6)
    torch.testing.assert_close(mine.hidden, theirs.hidden, rtol=0, atol=5e-6)
    return mine.sequences


@pytest.mark.parametrize("form", QUICK_FORMS)
class TestGenerate:
    @pytest.mark.parametrize("cell", CELLS)
    @pytest.mark.parametrize("layers", [pytest.param(1, marks=pytest.mark.slow), 2])
    def test_tokens_are_those_of_the_cpu(self, form, cell, layers):
        tokens = compare(
            form, language_model(cell, layers), max_new_tokens=7, eos_token_id=3, seed=-5,
            schedule={"launch": 3},
        )  # fmt: skip
        ends = (tokens == 3).any(1)
        assert bool(ends.any()) and not bool(ends.all())

    def test_every_filter(self, form):
        options = {"temperature": 0.7, "top_k": 4, "top_p": 0.8, "min_p": 0.1}
        compare(form, language_model(), [[1], []], max_new_tokens=2, seed=2, **options)

    def test_greedy_without_biases(self, form):
        compare(form, language_model(bias=False, layers=2), max_new_tokens=5, do_sample=False)

    def test_early_end(self, form):
        """Rows end one after the other, and a tile with them."""
        model = language_model(vocabulary=3)
        tokens = compare(
            form, model, [[], [1], [2, 2]], max_new_tokens=200, num_return_sequences=6,
            eos_token_id=0, seed=3, schedule={"launch": 6},
        )  # fmt: skip
        assert tokens.shape[1] < 30

    def test_bad_logits_are_an_error(self, form):
        model = language_model()
        with torch.no_grad():
            model.head.bias[4] = torch.nan
        with tiles(form), pytest.raises(ValueError, match=r"logits: expected no NaN.*sequence 0"):
            outputs(form, model, PROMPTS, max_new_tokens=2, seed=0)
        # Interpreters before 3.9 compute with a temperature below 2**-126 in float64.
        model = language_model()
        with torch.no_grad():
            model.head.bias[4] = 100
        overflow = pytest.raises(ValueError, match=r"^logits / temperature 2e-38: expected no NaN")
        with tiles(form), overflow:
            outputs(form, model, PROMPTS, max_new_tokens=2, seed=0, temperature=2e-38)

    def test_ids_outside_are_an_error(self, form):
        model = language_model()
        prompts, lengths = torch.tensor([[1, 2], [1, 11], [-1, 3]]), torch.tensor([2, 2, 0])
        options = sampling.SamplingOptions(2)
        for row, wrong in ((1, 11), (1, -7), (1, 2**40)):
            prompts[1, 1] = wrong
            with tiles(form), pytest.raises(ValueError, match=f"prompts: .* V = 11.*row {row}"):
                triton_loop(form, model, prompts, lengths, options)

    def test_streamer_sees_every_token(self, form, monkeypatch):
        monkeypatch.setattr(driver, "STREAMED", 2)
        model = language_model()
        seen: list[Tensor] = []
        options = sampling.SamplingOptions(7, eos_token_id=3, seed=4)
        prompts, lengths = padded(PROMPTS, model.vocab_size, model.head.weight.device)
        with tiles(form):
            tokens, _, _ = triton_loop(form, model, prompts, lengths, options, seen.append)
        theirs: list[Tensor] = []
        sampling.generate_loop(model, prompts, lengths, options, theirs.append)
        assert torch.equal(torch.stack(seen), torch.stack(theirs))
        assert torch.equal(torch.stack(seen, 1), tokens[:, : len(seen)])


class TestCta:
    @pytest.mark.parametrize(
        "rows",
        [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 8],
    )
    def test_tiles_do_not_show(self, rows):
        model = language_model(layers=2)
        options = {"max_new_tokens": 6, "seed": 1, "eos_token_id": 2, "num_return_sequences": 3}
        with tiles("cta", 16):
            expected = outputs("cta", model, PROMPTS, **options)
        with tiles("cta", rows, launch=3):
            found = outputs("cta", model, PROMPTS, **options)
        assert torch.equal(found.sequences, expected.sequences)

    def test_thousands_of_free_running_tokens(self):
        """Not one of them differs from the CPU's."""
        model = language_model(hidden=24, vocabulary=29)
        compare(
            "cta", model, [[]], max_new_tokens=60, num_return_sequences=96, seed=8,
            schedule={"rows": 128},
        )  # fmt: skip

    def test_thousands_of_prefixes(self):
        """One draw after each of 3000 prefixes that were given."""
        model = language_model(hidden=24, vocabulary=29)
        prompts = torch.randint(0, 29, (3000, 5))
        compare("cta", model, prompts, max_new_tokens=1, seed=9, schedule={"rows": 512})

    def test_bfloat16(self):
        """Another rounding of products: most tokens after given prefixes, all within its error."""
        model = language_model(hidden=24, vocabulary=29)
        prompts = torch.randint(0, 29, (1000, 5))
        exact = model.generate(prompts, max_new_tokens=1, seed=9)
        rounded = language_model(hidden=24, vocabulary=29).bfloat16()
        with tiles("cta", 512):
            found = outputs("cta", rounded, prompts, max_new_tokens=1, seed=9)
        assert found.hidden.dtype == torch.bfloat16
        flips = (found.sequences[:, -1] != exact[:, -1]).float().mean()
        assert 0 < float(flips) < 0.05

    def test_forms_by_name(self):
        model = language_model()
        with pytest.raises(ValueError, match=r"form: expected one of .*'nonsense'"):
            outputs("nonsense", model, PROMPTS, max_new_tokens=1)
        large = language_model(hidden=300)
        with pytest.raises(
            RuntimeError, match=r"form='cta': no compiled tiles for 1 layer .* of H=300"
        ):
            outputs("cta", large, PROMPTS, max_new_tokens=1)


@pytest.mark.parametrize("cell, layers, tokens", [("reset_after", 1, 4), ("reset_before", 2, 2)])
def test_step(cell, layers, tokens):
    """Few calls of the form whose other tests are slow."""
    model = language_model(cell, layers)
    compare("step", model, [[1], []], max_new_tokens=tokens, eos_token_id=3, seed=-5)


class TestGrid:
    @pytest.mark.slow
    @pytest.mark.parametrize("cell", CELLS)
    def test_schedules(self, cell):
        """Three programs a tile, weights streamed."""
        for seed in range(2):
            compare(
                "grid", language_model(cell, 2, hidden=75), [[1], []], max_new_tokens=3, seed=6,
                schedule={"seed": seed, "resident": False},
            )  # fmt: skip

    @pytest.mark.slow
    def test_logits_read_tile_by_tile(self):
        model = language_model(vocabulary=37)
        grid = sys.modules["gru_fast.kernels.generate_grid"]
        in_parts = mock.patch.object(generation, "MOST_DRAWN_FROM", 16)
        with in_parts, mock.patch.object(grid, "LOGITS_OF_WARP", 4):
            for options in ({}, {"top_k": 9, "top_p": 0.8}, {"do_sample": False}):
                compare("grid", model, [[1], []], max_new_tokens=2, seed=7, **options)

    def test_more_tiles_than_fit(self, monkeypatch):
        few = replace(tiling.assumed, processors=4)
        monkeypatch.setattr(tiling, "assumed", few)
        compare("grid", language_model(), max_new_tokens=3, seed=7, schedule={"rows": 2})

    @pytest.mark.parametrize("rows, copies", [(2, 1), (16, 4)])
    def test_uneven_shares(self, rows, copies):
        """Three programs draw for the rows of a tile and share four tiles of tokens."""
        prompts = [[1], [3], [4], [7], []]  # the last tile draws as soon as the first
        compare(
            "grid", language_model(hidden=75, vocabulary=100), prompts, max_new_tokens=2, seed=7,
            num_return_sequences=copies, schedule={"rows": rows, "seed": 1},
        )  # fmt: skip


def sometimes(mutant):
    """Few of those that are slow are quick enough for every run."""
    quick = ("head-does-not-wait", "waits-for-too-many")
    if mutant.module == "generate_cta" or mutant.name in quick:
        return mutant
    return pytest.param(mutant, marks=pytest.mark.slow)


class TestMutants:
    @pytest.mark.parametrize("mutant", list(map(sometimes, GENERATE_MUTANTS)), ids=str)
    def test_mutant_fails(self, mutant, tmp_path):
        form = (mutant.user or mutant.module).removeprefix("generate_")
        model = language_model(mutant.cell, 2)
        options = {"max_new_tokens": 6, "eos_token_id": 3, "seed": -5}
        schedule = {"rows": 4, "launch": 3, "limit": 20_000}
        with installed(mutant, tmp_path):
            if mutant.hangs:
                with pytest.raises(RuntimeError, match="no progress"):
                    compare(form, model, schedule={"limit": 3000}, **options)
            else:
                # Poison, or programs that draw other tokens and so wait for each other.
                with pytest.raises((AssertionError, RuntimeError, ValueError)):
                    for seed in range(8):
                        compare(form, model, schedule=schedule | {"seed": seed}, **options)
