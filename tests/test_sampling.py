# SPDX-License-Identifier: Apache-2.0
"""`generate` and `score`: one network, two ways to feed it."""

import io
from functools import partial

import numpy as np
import pytest
import torch

from gru_fast import GRULanguageModel, Sampler, native_sampling, ops, sampling
from gru_fast.reference_sampling import draw, greedy, seed_from_generator, uniform
from gru_fast.sampling import PADDING, SamplingOptions, generate

V = 6
PROMPTS = [[1, 2, 5], [3], [], [4, 4]]

needs_kernels = pytest.mark.skipif(not ops.HAS_CPU_KERNELS, reason="no compiled kernels")


@pytest.fixture
def model():
    """Sharp enough that a wrong input shows."""
    lm = GRULanguageModel(V, 4, 11, 2)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.mul_(3)
    return lm


def detailed(model, *args, **options):
    return model.generate(*args, return_dict_in_generate=True, **options)


@pytest.mark.parametrize("cell", ["reset_after", "reset_before", "no_reset"])
@pytest.mark.parametrize("embedding_size", [None, 4])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5, "top_k": 3}, {"do_sample": False}, {"top_p": 0.7}], ids=str
)
def test_score_gives_back_the_samplers_own_log_probabilities(cell, embedding_size, options):
    lm = GRULanguageModel(V, embedding_size, 11, 2, cell=cell, dropout=0.5)
    out = detailed(
        lm, PROMPTS, max_new_tokens=12, num_return_sequences=5, eos_token_id=0, seed=1, **options
    )
    scores = lm.score(out.sequences, prompt_lengths=out.prompt_lengths)
    torch.testing.assert_close(scores, out.log_probs, rtol=0, atol=1e-5)
    assert out.log_probs.shape == out.sequences.shape
    assert out.prompt_lengths.tolist() == [3] * 5 + [1] * 5 + [0] * 5 + [2] * 5
    for row, log_probs, P in zip(
        out.sequences.tolist(), out.log_probs.tolist(), out.prompt_lengths.tolist(), strict=True
    ):
        assert row[:P] in PROMPTS and log_probs[:P] == [0.0] * P
        new = row[P:]
        end = new.index(0) + 1 if 0 in new else 12
        assert PADDING not in new[:end] and set(new[end:]) <= {PADDING}
        assert all(v < 0 for v in log_probs[P : P + end])
        assert not any(log_probs[P + end :])
    whole = lm.score(out.sequences)
    assert (whole[out.sequences == PADDING] == 0).all()
    assert (whole[out.sequences != PADDING] < 0).all()


def test_every_token_is_the_draw_from_its_own_prefix(model):
    """Against the rules written out: forward over the whole prefix, one draw, no state kept."""
    out = detailed(
        model, PROMPTS, max_new_tokens=8, eos_token_id=0, seed=7, temperature=0.8, top_p=0.9
    )
    for i, prompt in enumerate(PROMPTS):
        row = list(prompt)
        for _ in range(8):
            inputs = torch.tensor([[V, *row]])
            logits = model(inputs)[0][0, -1]
            u = uniform(7, torch.tensor(len(row)), torch.tensor(i))
            row.append(int(draw(logits, u, temperature=0.8, top_p=0.9)))
            hidden = model(inputs)[1]
            if row[-1] == 0:
                break
        assert [t for t in out.sequences[i].tolist() if t != PADDING] == row
        torch.testing.assert_close(out.hidden[:, i], hidden[:, 0])


def test_greedy_takes_the_most_likely(model):
    tokens = model.generate([2], max_new_tokens=6, do_sample=False)[0].tolist()
    for t in range(1, 7):
        logits = model(torch.tensor([[V, *tokens[:t]]]))[0][0, -1]
        assert tokens[t] == int(greedy(logits)) == int(logits.argmax())


def test_a_seed_gives_the_same_tokens_whatever_stands_beside(model):
    many = model.generate(PROMPTS, max_new_tokens=9, seed=5)
    assert torch.equal(model.generate(PROMPTS, max_new_tokens=9, seed=5), many)
    assert torch.equal(model.generate(PROMPTS[:2], max_new_tokens=9, seed=5), many[:2])
    assert torch.equal(model.generate(PROMPTS, max_new_tokens=4, seed=5)[2, :4], many[2, :4])
    assert not torch.equal(model.generate(PROMPTS, max_new_tokens=9, seed=6), many)
    empty = model.generate(max_new_tokens=100, num_return_sequences=3, seed=5)
    assert torch.equal(model.generate(max_new_tokens=100, seed=5), empty[:1])
    assert len(set(map(tuple, empty.tolist()))) == 3


def test_generators(model):
    calls = [
        model.generate(max_new_tokens=20, generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    ]
    seed = seed_from_generator(torch.Generator().manual_seed(3))
    assert torch.equal(calls[0], calls[1])
    assert torch.equal(calls[0], model.generate(max_new_tokens=20, seed=seed))
    torch.manual_seed(4)
    first = [model.generate(max_new_tokens=20) for _ in range(2)]
    torch.manual_seed(4)
    again = [model.generate(max_new_tokens=20) for _ in range(2)]
    assert torch.equal(torch.cat(first), torch.cat(again)) and not torch.equal(*first)
    state = torch.get_rng_state()
    model.generate(max_new_tokens=3, do_sample=False)
    model.generate(max_new_tokens=3, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_forms_of_prompts(model):
    expected = model.generate([[1, 2], [3]], max_new_tokens=5, seed=0)
    padded = torch.tensor([[1, 2], [3, PADDING]])
    wide = torch.tensor([[1, 2, PADDING], [3, PADDING, PADDING]], dtype=torch.int32)
    assert torch.equal(model.generate(padded, max_new_tokens=5, seed=0), expected)
    assert torch.equal(model.generate(wide, max_new_tokens=5, seed=0), expected)
    one = model.generate([1, 2], max_new_tokens=5, seed=0)
    assert torch.equal(one, expected[:1])
    assert torch.equal(model.generate(torch.tensor([1, 2]), max_new_tokens=5, seed=0), one)
    assert model.generate([1, 2], max_new_tokens=0).tolist() == [[1, 2]]
    nothing = detailed(model, max_new_tokens=0, num_return_sequences=2)
    assert nothing.sequences.shape == nothing.log_probs.shape == (2, 0)
    none = detailed(model, torch.empty(0, 3, dtype=torch.long), max_new_tokens=2)
    assert len(none.sequences) == 0 and none.hidden.shape == (2, 0, 11)
    assert model.score([]).shape == (0, 0) and model.score([[], [1]]).shape == (2, 1)


def test_training_mode_and_gradients_are_left_alone():
    lm = GRULanguageModel(V, None, 8, dropout=0.9)
    out = detailed(lm, max_new_tokens=30, seed=0)
    assert lm.training and not out.log_probs.requires_grad and not out.hidden.is_inference()
    assert torch.equal(lm.eval().generate(max_new_tokens=30, seed=0), out.sequences)
    lm.train()
    logits, _ = lm(out.sequences[:, -1:], out.hidden)
    logits.sum().backward()


def test_streamer_sees_every_token(model):
    class Collect:
        def __init__(self):
            self.values, self.ended = [], 0

        def put(self, value):
            assert not self.ended
            self.values.append(value.clone())

        def end(self):
            self.ended += 1

    streamer = Collect()
    options = {"max_new_tokens": 7, "seed": 3, "eos_token_id": 0}
    sequences = model.generate([[5], [1]], streamer=streamer, **options)
    assert streamer.ended == 1 and streamer.values[0].tolist() == [[5], [1]]
    seen = torch.cat([streamer.values[0], *(v[:, None] for v in streamer.values[1:])], 1)
    assert torch.equal(seen, sequences)


@needs_kernels
@pytest.mark.parametrize("most", [1, 7, 40, 400])
@pytest.mark.parametrize("prompts", [None, [[5, 1], [], [2]]], ids=str)
def test_calls_that_make_room_for_less_draw_the_same(model, monkeypatch, prompts, most):
    """Of all rows together, and so for fewer steps a call; rows end in any of them."""
    options = {"max_new_tokens": 60, "num_return_sequences": 4, "seed": 3, "eos_token_id": 0}
    whole = detailed(model, prompts, **options)
    ends = (whole.sequences == 0).int().argmax(1)
    assert len(ends.unique()) > 2
    monkeypatch.setattr(native_sampling, "_MOST_AT_ONCE", most)
    for again in (
        detailed(model, prompts, **options),
        detailed(Sampler(model), prompts, **options),
    ):
        for name in ("sequences", "log_probs", "hidden", "prompt_lengths"):
            assert torch.equal(getattr(again, name), getattr(whole, name))


@pytest.mark.parametrize("steps", [2**34, 2**47])
def test_a_limit_may_be_far_beyond_the_end(model, steps):
    with torch.no_grad():
        model.head.bias[0] = 100
    options = {"max_new_tokens": steps, "seed": 0, "eos_token_id": 0, "num_return_sequences": 2}
    calls = [model.generate, partial(sampling.generate, model, loop=sampling.generate_loop)]
    if ops.HAS_CPU_KERNELS:
        calls += [partial(sampling.generate, model, loop=sampling.mixed_loop)]
        calls += [Sampler(model).generate]
    for call in calls:
        assert call(**options).tolist() == [[0], [0]]
        assert call([[3, 1]], **options).tolist() == [[3, 1, 0]] * 2


@pytest.mark.parametrize("ids", [[1, 2], [[1, 2], [3, 4]]])
@pytest.mark.parametrize("repeats", [1, 2])
def test_a_streamer_gets_prompts_of_its_own(model, ids, repeats):
    class Overwrite:
        def put(self, value):
            value.fill_(0)

        def end(self):
            pass

    input_ids = torch.tensor(ids)
    options = {"max_new_tokens": 3, "num_return_sequences": repeats, "seed": 3}
    expected = model.generate(ids, **options)
    found = model.generate(input_ids, streamer=Overwrite(), loop=None, **options)
    assert input_ids.tolist() == ids
    assert torch.equal(found[:, :2], expected[:, :2])


@pytest.mark.parametrize("eos", [None, 0])
@pytest.mark.parametrize("loop", ["native", "reference"])
def test_a_streamer_gets_tokens_of_its_own(model, loop, eos):
    class Overwrite:
        def put(self, value):
            value.fill_(1)

        def end(self):
            pass

    model.gru.backend = "auto" if loop == "native" else loop
    options = {"max_new_tokens": 9, "num_return_sequences": 3, "eos_token_id": eos, "seed": 3}
    expected = detailed(model, [2], **options)
    found = detailed(model, [2], streamer=Overwrite(), **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.log_probs, expected.log_probs)


@pytest.mark.parametrize("streamer", [3, io.StringIO(), print])
def test_what_is_no_streamer(model, streamer):
    """Before anything is drawn."""
    state = torch.get_rng_state()
    with pytest.raises(TypeError, match=r"^streamer: expected an object with put\(\) and end\(\)"):
        model.generate(max_new_tokens=2, streamer=streamer)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("eos", [None, 0])
def test_without_rows_nothing_is_drawn_by_any_loop(model, eos):
    class Keep(list):
        put = list.append

        def end(self):
            pass

    loops = [sampling.generate_loop]
    if ops.HAS_CPU_KERNELS:
        loops += [sampling.mixed_loop, sampling.native_loop]
    for loop in loops:
        for steps in (0, 4):
            streamer = Keep()
            out = generate(
                model, torch.zeros(0, 3, dtype=torch.int64), max_new_tokens=steps, loop=loop,
                eos_token_id=eos, streamer=streamer, return_dict_in_generate=True,
            )  # fmt: skip
            assert out.sequences.shape == out.log_probs.shape == (0, 3)
            assert out.log_probs.dtype == torch.float32 and out.hidden.shape == (2, 0, 11)
            assert [tuple(value.shape) for value in streamer] == [(0, 3)]


def test_dtypes(model):
    reference = detailed(model, max_new_tokens=9, seed=1)
    assert reference.log_probs.dtype == torch.float32
    assert detailed(model.double(), max_new_tokens=9, seed=1).log_probs.dtype == torch.float64
    half = detailed(model.bfloat16(), max_new_tokens=9, seed=1)
    assert half.log_probs.dtype == torch.float32
    scores = model.score(half.sequences)
    torch.testing.assert_close(scores, half.log_probs, rtol=0, atol=0.2)


def test_one_place_chooses_the_loop(model, monkeypatch):
    calls = []

    def loop(*args):
        calls.append(args)
        return sampling.generate_loop(*args)

    monkeypatch.setattr(sampling, "choose_loop", lambda model: loop)
    model.generate(PROMPTS, max_new_tokens=3, num_return_sequences=2, seed=2**64 + 9, top_k=4)
    ((got, prompts, lengths, options, on_tokens),) = calls
    assert got is model and on_tokens is None
    assert prompts.shape == (8, 3) and lengths.tolist() == [3, 3, 1, 1, 0, 0, 2, 2]
    expected = SamplingOptions(3, True, 1.0, 4, None, None, None, 2**64 + 9, log_probs=False)
    assert options == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens: expected >= 0 and < 2.*48, got -1"),
        ({"temperature": 0.0}, "temperature: expected .*> 0, got 0.0.*do_sample=False"),
        ({"temperature": float("nan")}, "temperature: expected"),
        ({"temperature": 1e-46}, "temperature: expected a float32 value > 0, got 1e-46"),
        ({"temperature": 1e39}, "temperature: expected a float32 value > 0, got 1e"),
        ({"max_new_tokens": 2**64}, "max_new_tokens: expected .*, got 18446744073709551616"),
        ({"top_k": 0}, "top_k: expected an integer >= 1 or None, got 0"),
        ({"top_p": 0.0}, "top_p: expected"),
        ({"min_p": 1.1}, "min_p: expected"),
        ({"num_return_sequences": 0}, "num_return_sequences: expected >= 1 and < 2.*48, got 0"),
        ({"eos_token_id": V}, f"eos_token_id: expected 0 <= id < vocab_size = {V}, got {V}"),
        pytest.param(
            {"seed": 1, "generator": torch.Generator()}, "seed, generator: .*got both", id="both"
        ),
        ({"input_ids": [[1], [V]]}, f"input_ids: expected 0 <= id < vocab_size = {V}.*got {V}"),
        ({"input_ids": [[2**70]]}, "input_ids: expected 0 <= id < vocab_size, got 11805"),
        ({"num_return_sequences": 2**70}, "num_return_sequences: expected .*, got 1180"),
        ({"input_ids": torch.tensor([2**63 + 5], dtype=torch.uint64)}, f"got {2**63 + 5}$"),
        ({"input_ids": torch.tensor([2**64 - 100], dtype=torch.uint64)}, f"got {2**64 - 100}$"),
        ({"input_ids": [-1]}, "input_ids: expected 0 <= id.*got -1"),
        ({"input_ids": [[PADDING, 1]]}, "input_ids: expected padding .* on the right"),
        ({"input_ids": torch.zeros(1, 1, 1).long()}, "input_ids: expected 1 or 2 dimensions"),
    ],
    ids=str,
)
def test_bad_values(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**{"max_new_tokens": 2, **options})


@pytest.mark.parametrize(
    "options",
    [{"max_new_tokens": 1.5}, {"top_k": 2.0}, {"input_ids": torch.zeros(2)}, {"input_ids": [1.0]},
     {"input_ids": [1, [2]]}, {"top": 3}, {"seed": "x"}, {"max_new_tokens": None},
     {"temperature": "1"}, {"temperature": None}, {"top_p": "1"}, {"do_sample": "no"},
     {"input_ids": [None]}, {"input_ids": 3}, {"input_ids": [torch.tensor(1.0)]},
     {"generator": 3}, {"input_ids": [True, False]}, {"input_ids": [[1], [True]]},
     {"input_ids": torch.tensor([True])}, {"input_ids": np.array([True])},
     {"input_ids": [torch.tensor(True)]}],
    ids=str,
)  # fmt: skip
def test_bad_types(model, options):
    names = "|".join(options)
    with pytest.raises(TypeError, match=f"({names}): expected|unexpected keyword|incompatible"):
        model.generate(**{"max_new_tokens": 2, **options})


def test_prompts_are_any_iterable_of_integers(model):
    options = {"max_new_tokens": 2, "seed": 1}
    expected = model.generate([1, 2], **options)
    for prompt in (
        iter([1, 2]),
        list(torch.tensor([1, 2])),
        list(np.array([1, 2])),
        np.array([1, 2]),
        (1, 2),
        range(1, 3),
    ):
        assert torch.equal(model.generate(prompt, **options), expected)
    with torch.device("meta"):  # where other tensors would be made does not matter
        assert torch.equal(model.generate([1, 2], **options), expected)


def test_bad_logits_stop_it(model):
    with torch.no_grad():
        model.head.bias[2] = torch.nan
    with pytest.raises(ValueError, match="logits"):
        model.generate(max_new_tokens=2)


def test_the_sequence_with_bad_logits_is_named():
    """By its number in the call, also where a streamer is served after others have ended."""
    pytest.importorskip("gru_fast._C", reason="gru_fast was built without its CPU kernels")

    class Ignore:
        put = end = lambda *_: None

    # The state is the last token: 1 is followed by 0, the end, and 2 by 3, which is NaN.
    lm = GRULanguageModel(4, None, 4)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.zero_()
        lm.gru.bias_ih_l0[4:8] = -20
        lm.gru.weight_ih_l0[8:] = torch.eye(4)
        lm.gru.weight_ih_l0[:, 3] = torch.nan
        lm.head.weight[0, 1] = lm.head.weight[3, 2] = 1
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": 0}
    for streamer in (None, Ignore()):
        with pytest.raises(ValueError, match=r"others in sequence 2$"):
            lm.generate([[1], [1], [2]], streamer=streamer, **options)


def test_method_and_function_are_one(model):
    options = {"max_new_tokens": 5, "seed": 1}
    assert torch.equal(generate(model, [1], **options), model.generate([1], **options))
    with pytest.raises(ValueError, match=r"prompt_lengths: expected shape \(1,\), got \(2,\)"):
        model.score([1, 2], prompt_lengths=torch.tensor([1, 2]))
    with pytest.raises(TypeError, match="prompt_lengths should be a Tensor, got: list"):
        model.score([1, 2], prompt_lengths=[1])
    with pytest.raises(TypeError, match=r"prompt_lengths: expected integers, got torch\.float32"):
        model.score([1, 2], prompt_lengths=torch.tensor([1.0]))


@pytest.mark.parametrize(
    ("sequences", "error"),
    [([V], ValueError), ([2**70], ValueError), (torch.zeros(1, 1, 1).long(), ValueError),
     ([PADDING, 1], ValueError), (3, TypeError), ([1.0], TypeError), ([1, [2]], TypeError),
     (torch.zeros(2), TypeError)],
    ids=str,
)  # fmt: skip
def test_score_calls_its_parameter_by_its_name(model, sequences, error):
    with pytest.raises(error, match=r"^sequences: expected"):
        model.score(sequences)
