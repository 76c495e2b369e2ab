# SPDX-License-Identifier: Apache-2.0
"""The native generation loop: what it draws, and that nothing but the sequence itself matters."""

import os
import signal
import threading
from collections.abc import Iterator
from importlib import resources
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gru_fast import GRULanguageModel, Sampler, packed, sampling
from gru_fast.sampling import PADDING, generate_loop

_C = pytest.importorskip("gru_fast._C", reason="gru_fast was built without its CPU kernels")

CELLS = ("reset_after", "reset_before", "no_reset")


def language_model(vocabulary=11, hidden=19, layers=1, cell="reset_after", **options):
    """Sharper than a new model, so that a wrong state shows in the tokens."""
    lm = GRULanguageModel(vocabulary, 7, hidden, layers, cell=cell, **options)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.mul_(2)
    return lm


def ragged(n, vocabulary, longest):
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(0, longest + 1, (n,), generator=generator).tolist()
    return [torch.randint(vocabulary, (k,), generator=generator).tolist() for k in lengths]


def detailed(model, *args, **options):
    return model.generate(*args, return_dict_in_generate=True, **options)


def by_loop(lm, prompts, **options):
    """The same call through the loop of PyTorch operations."""
    return sampling.generate(
        lm, prompts, loop=generate_loop, return_dict_in_generate=True, **options
    )


def assert_same(a, b):
    assert torch.equal(a.sequences, b.sequences)
    assert torch.equal(a.log_probs, b.log_probs)
    assert torch.equal(a.hidden, b.hidden)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("layers", (1, 3))
def test_tokens_are_those_of_the_loop(sampler_isa, cell, layers, poisoned_memory):
    lm = language_model(layers=layers, cell=cell)
    prompts = ragged(9, 11, 5)
    for options in ({}, {"temperature": 0.7, "top_k": 6, "top_p": 0.9}, {"do_sample": False}):
        arguments = {"max_new_tokens": 30, "eos_token_id": 0, "seed": 2**40 + 11, **options}
        ours = detailed(Sampler(lm), prompts, **arguments)
        theirs = by_loop(lm, prompts, **arguments)
        assert torch.equal(ours.sequences, theirs.sequences)
        torch.testing.assert_close(ours.log_probs, theirs.log_probs, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.hidden, theirs.hidden, rtol=0, atol=1e-5)


# On AVX-512 a row takes tiles of 16 units in pairs: one, three and one left over, none.
@pytest.mark.parametrize(
    "shape", ({}, {"hidden": 100}, {"bias": False, "hidden": 300, "layers": 2}), ids=str
)
def test_without_sampling_the_state_is_bitwise_that_of_the_layers(sampler_isa, shape):
    """Teacher forcing over what was generated ends in the state that generation ended in."""
    lm = language_model(**shape)
    out = detailed(lm, [[1, 2, 3], [4]], max_new_tokens=9, seed=2)
    for row, length in enumerate((12, 10)):
        tokens = out.sequences[row : row + 1, :length]
        with torch.no_grad():
            _, hidden = lm.run(lm.teacher_forcing(tokens), table=lm.token_table())
        assert torch.equal(hidden[:, 0], out.hidden[:, row])


def test_generate_uses_the_native_loop_and_leaves_the_rest_to_the_other(monkeypatch):
    assert sampling.choose_loop(language_model()) is sampling.native_loop
    assert sampling.choose_loop(language_model().double()) is sampling.mixed_loop
    for other in (language_model(backend="reference"), language_model().to("meta")):
        assert sampling.choose_loop(other) is generate_loop
    before = _C.launches()
    language_model().generate(max_new_tokens=50, seed=0)
    assert _C.launches() == before + 1
    monkeypatch.setattr(packed.ops, "NO_CPU_KERNELS", "no kernels here")
    monkeypatch.setattr(packed.ops, "HAS_CPU_KERNELS", False)
    assert sampling.choose_loop(language_model()) is generate_loop
    with pytest.raises(RuntimeError, match="no kernels here"):
        Sampler(language_model())


@pytest.mark.parametrize("weights", packed.WEIGHTS)
class TestNothingButTheSequenceMatters:
    """Same bits whatever the batch size, the slot, the threads and how prompts are cut."""

    def test_batch_and_slot(self, sampler_isa, weights, poisoned_memory):
        sampler = Sampler(language_model(hidden=70, layers=2), weights, threads=1)
        prompts = ragged(150, 11, 4)
        arguments = {"max_new_tokens": 12, "eos_token_id": 0, "seed": 5}
        many = detailed(sampler, prompts, **arguments)
        # A row depends on its index, so those before it stay.
        for n in (1, 2, 3, 5, 6, 7, 65):
            some = detailed(sampler, prompts[:n], **arguments)
            width = some.sequences.shape[1]
            assert torch.equal(some.sequences, many.sequences[:n, :width])
            assert (many.sequences[:n, width:] == PADDING).all()
            assert torch.equal(some.log_probs, many.log_probs[:n, :width])
            assert torch.equal(some.hidden, many.hidden[:, :n])

    @pytest.mark.parametrize("cell", CELLS)
    @pytest.mark.parametrize("shape", ((65, 50, 1), (1000, 51, 2), (65, 300, 2)))
    def test_few_rows_or_many(self, sampler_isa, weights, cell, shape, poisoned_memory):
        """Without AVX-512 bfloat16 becomes float32 for 8 rows and for 10 or more."""
        sampler = Sampler(language_model(*shape, cell), weights, threads=1)
        arguments = {"max_new_tokens": 6, "seed": 5}
        many = detailed(sampler, num_return_sequences=64, **arguments)
        for n in (1, 4, 7, 8, 9, 14):
            some = detailed(sampler, num_return_sequences=n, **arguments)
            assert torch.equal(some.sequences, many.sequences[:n])
            assert torch.equal(some.log_probs, many.log_probs[:n])
            assert torch.equal(some.hidden, many.hidden[:, :n])

    @pytest.mark.parametrize("cell", CELLS)
    @pytest.mark.parametrize("rows", (1, 2, 70))
    def test_threads(self, sampler_isa, weights, cell, rows, two_threads):
        """One row splits the hidden units; the head is large enough to be split too."""
        lm = language_model(500, 200, 2, cell)
        prompts = ragged(rows, 500, 80)
        arguments = {"max_new_tokens": 40, "eos_token_id": 0, "seed": 5}
        one = detailed(Sampler(lm, weights, threads=1), prompts, **arguments)
        assert_same(detailed(Sampler(lm, weights, threads=2), prompts, **arguments), one)

    def test_prompt_or_drawn(self, sampler_isa, weights):
        """What was drawn, given as a prompt, leads to the same continuation."""
        sampler = Sampler(language_model(hidden=40, layers=2), weights)
        whole = detailed(sampler, max_new_tokens=150, seed=9)
        for cut in (1, 64, 65, 140):
            rest = detailed(sampler, whole.sequences[:, :cut], max_new_tokens=150 - cut, seed=9)
            assert torch.equal(rest.sequences, whole.sequences)
            assert torch.equal(rest.log_probs[:, cut:], whole.log_probs[:, cut:])
            assert torch.equal(rest.hidden, whole.hidden)


def test_threads_of_python_share_a_sampler():
    sampler = Sampler(language_model(layers=2), threads=1)
    prompts = ragged(20, 11, 9)
    expected = [sampler.generate(prompts, max_new_tokens=60, seed=s) for s in range(4)]
    results = [None] * 4

    def work(s):
        results[s] = [sampler.generate(prompts, max_new_tokens=60, seed=s) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(s,)) for s in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result, tokens in zip(results, expected, strict=True):
        assert all(torch.equal(r, tokens) for r in result)


def test_autocast_does_not_round_the_table():
    model = GRULanguageModel(11, 5, 8)
    call = {"max_new_tokens": 20, "seed": 1, "return_dict_in_generate": True}
    expected = model.generate(**call)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.generate(**call)
    assert torch.equal(found.log_probs, expected.log_probs)


def test_a_sampler_is_a_snapshot():
    lm = language_model()
    sampler = Sampler(lm)
    before = sampler.generate(max_new_tokens=40, seed=1)
    with torch.no_grad():
        lm.head.bias[4] += 20
    assert torch.equal(sampler.generate(max_new_tokens=40, seed=1), before)
    after = lm.generate(max_new_tokens=40, seed=1)
    assert not torch.equal(after, before)
    sampler.refresh()
    lm.to("meta")  # or to a GPU, for more training
    assert torch.equal(sampler.generate(max_new_tokens=40, seed=1), after)
    with pytest.raises(RuntimeError, match="weights are on meta"):
        sampler.refresh()
    assert torch.equal(sampler.generate(max_new_tokens=40, seed=1), after)


@pytest.mark.parametrize("weights", packed.WEIGHTS)
def test_how_far_packed_weights_are_from_float32(sampler_isa, weights):
    """Log-probabilities of given tokens; the whole error is that of the weights."""
    lm = GRULanguageModel(30, 16, 128, 2)
    with torch.no_grad():
        lm.head.weight.mul_(8)
    tokens = torch.randint(30, (1, 200))
    stream = _C.Stream(packed.pack_model(lm, weights))
    inputs = lm.teacher_forcing(tokens)[0].numpy()
    logits = torch.from_numpy(stream.push(inputs))
    score = torch.log_softmax(logits.double(), -1).gather(1, tokens[0][:, None])[:, 0]
    exact = copy_double(lm).score(tokens)[0]
    mean = float((score - exact).abs().mean())
    assert mean < {"float32": 1e-5, "bfloat16": 0.02, "int8": 0.05}[weights]
    assert (weights == "float32") == (mean < 1e-5)


def copy_double(lm):
    other = GRULanguageModel(**lm.config).double()
    other.load_state_dict(lm.state_dict())
    return other


def test_int8_does_not_saturate(sampler_isa):
    """Weights and states at both ends of their range, summed over many k."""
    H = 520
    lm = GRULanguageModel(3, None, H, cell="no_reset")
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.zero_()
        # z = 0 and n = +-1: every state is at the end of its range after one step.
        lm.gru.bias_ih_l0[:H] = -50
        signs = torch.where(torch.arange(H) % 3 == 0, -1.0, 1.0)
        lm.gru.bias_ih_l0[H:] = 50 * signs
        lm.head.weight[0] = signs
        lm.head.weight[1] = -signs
    logits = _C.Stream(packed.pack_model(lm, "int8")).push([3, 0])
    assert logits[-1, 0] == pytest.approx(H, rel=1e-5)
    assert logits[-1, 1] == pytest.approx(-H, rel=1e-5)
    assert logits[-1, 2] == 0


def test_instruction_sets_agree_but_for_rounding():
    """int8 sums are exact on all of them; what differs is exp and the order of float32 sums."""
    lm = language_model(hidden=33, layers=2)
    stacks = {}
    before = _C.cpu_isa()
    for isa in _C.cpu_isas():
        _C.set_cpu_isa(isa)
        stacks[isa] = packed.pack_model(lm, "int8")
    _C.set_cpu_isa(before)
    outputs = [torch.from_numpy(_C.Stream(s).push([1, 2, 3])) for s in stacks.values()]
    for output in outputs:
        torch.testing.assert_close(output, outputs[0], rtol=0, atol=0.02)


class Collect:
    """A streamer that remembers how many native calls had been made at each token."""

    def __init__(self):
        self.values, self.launches = [], []

    def put(self, value):
        self.values.append(value.clone())
        self.launches.append(_C.launches())

    def end(self):
        self.values.append(None)


@pytest.mark.parametrize("weights", packed.WEIGHTS)
def test_a_streamer_gets_the_same_tokens_soon(weights):
    """In short native calls that go on where the last one ended, each row with its own stream."""
    lm = language_model(layers=2)
    with torch.no_grad():
        lm.head.bias[0] -= 2
    sampler, prompts = Sampler(lm, weights), ragged(7, 11, 5)
    for options in (
        {"max_new_tokens": 300, "eos_token_id": 0, "seed": 4},
        {"max_new_tokens": 1, "seed": 4},
        {"max_new_tokens": 77, "seed": 4, "temperature": 0.5, "top_k": 3},
    ):
        streamer, before = Collect(), _C.launches()
        out = detailed(sampler, prompts, streamer=streamer, **options)
        assert_same(out, detailed(sampler, prompts, **options))
        _, *steps, end = streamer.values
        drawn = torch.stack(steps, 1)
        assert end is None and drawn.shape[0] == 7
        for row, prompt in enumerate(prompts):
            sequence = out.sequences[row, len(prompt) :]
            assert torch.equal(drawn[row][: len(sequence)], sequence[: drawn.shape[1]])
            assert (drawn[row][len(sequence) :] == PADDING).all()
        # The prompts before any call, the first token after one.
        assert streamer.launches[:2] == [before, before + 1]
    if weights == "float32":
        streamer = Collect()
        lm.generate(max_new_tokens=9, seed=0, streamer=streamer)
        assert streamer.launches[-1] > streamer.launches[0]


def test_a_streamer_may_stop_the_call():
    class Enough(Exception):
        pass

    class Stop(Collect):
        def put(self, value):
            super().put(value)
            if len(self.values) == 5:
                raise Enough

    streamer = Stop()
    with pytest.raises(Enough):
        Sampler(language_model()).generate(max_new_tokens=10**9, seed=0, streamer=streamer)
    assert len(streamer.values) == 5


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also in a process that was started to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_interrupt(two_threads, ctrl_c):
    """The signal ends a call that would run for minutes, on one thread and on two.

    How soon is measured by `python -m benchmarks sample --facts interrupt`.
    """
    lm = language_model(hidden=64)
    for threads, rows in ((1, 1), (2, 1), (2, 50)):
        sampler = Sampler(lm, threads=threads)
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            sampler.generate(max_new_tokens=30_000_000 // rows, num_return_sequences=rows, seed=0)
        timer.join()
    assert sampler.generate(max_new_tokens=3, seed=0).shape == (1, 3)


@pytest.mark.parametrize("weights", packed.WEIGHTS)
def test_the_state_before_the_first_token_is_the_snapshots(weights):
    lm = language_model(layers=2)
    sampler = Sampler(lm, weights)
    seen: list[torch.Tensor] = []
    streamer = SimpleNamespace(put=seen.append, end=lambda: None)
    one = detailed(sampler, [[1, 2], [3]], max_new_tokens=1)
    with torch.no_grad():
        lm.gru.weight_hh_l0.mul_(2)
    nothing = detailed(sampler, [[1, 2], [3]], max_new_tokens=0, streamer=streamer)
    assert torch.equal(nothing.hidden, one.hidden)
    assert nothing.sequences.tolist() == [[1, 2], [3, PADDING]]
    assert nothing.log_probs.tolist() == [[0, 0], [0, 0]] and len(seen) == 1


def test_a_temperature_that_logits_overflow_with_is_named():
    lm = language_model()
    for model in (lm, Sampler(lm), language_model().double()):
        with pytest.raises(ValueError, match=r"^logits / temperature 1e-40: expected no NaN"):
            model.generate(max_new_tokens=3, temperature=1e-40)
        greedy = model.generate(max_new_tokens=3, temperature=1e-40, do_sample=False)
        assert torch.equal(greedy, model.generate(max_new_tokens=3, do_sample=False))
    lm.head.bias.data[2] = torch.nan
    for model in (lm, lm.double()):
        with pytest.raises(ValueError, match=r"^logits: expected no NaN"):
            model.generate(max_new_tokens=3, temperature=0.5, do_sample=False)


def test_a_head_of_another_type_goes_through_the_loop():
    lm = language_model()
    lm.head = torch.nn.Sequential(lm.head)
    lm.head.weight = lm.head[0].weight
    assert packed.why_not(lm.gru, lm.head) == "the head is a Sequential, not an nn.Linear"
    assert sampling.choose_loop(lm) is sampling.mixed_loop
    assert lm.generate(max_new_tokens=3, seed=0).shape == (1, 3)


def test_logits_that_allow_no_draw():
    lm = language_model()
    with torch.no_grad():
        lm.head.bias[2] = torch.nan
    with pytest.raises(ValueError, match=r"logits: expected no NaN.*sequence 0"):
        Sampler(lm).generate(max_new_tokens=3, seed=0)
    with pytest.raises(ValueError, match="weights: expected finite values for int8"):
        lm.head.weight.data[0, 0] = torch.inf
        Sampler(lm, "int8")
    for broken in ("embedding.weight", "gru.bias_hh_l1"):
        lm = language_model(layers=2)
        lm.get_parameter(broken).data[-1] = torch.nan
        with pytest.raises(ValueError, match="logits: expected no NaN"):
            Sampler(lm).generate([[10]], max_new_tokens=3, seed=0)
        with pytest.raises(ValueError, match="weights: expected no NaN in tables and biases"):
            Sampler(lm, "int8")


def test_what_a_sampler_refuses():
    lm = language_model()
    with pytest.raises(ValueError, match=r"weights: expected one of float32, .* got 'int4'"):
        Sampler(lm, "int4")
    for threads, error in ((-1, ValueError), ("2", TypeError)):
        with pytest.raises(error, match="threads"):
            Sampler(lm, threads=threads)
    with pytest.raises(RuntimeError, match=r"weights are torch.float64"):
        Sampler(language_model().double())
    # No more than torch has: it would need memory for each.
    for many in (2**31 - 1, 2**70):
        assert Sampler(lm, threads=many).generate(max_new_tokens=2, seed=0).shape == (1, 2)
    sampler = Sampler(lm)
    with pytest.raises(ValueError, match="input_ids: expected 0 <= id"):
        sampler.generate([[11]], max_new_tokens=3)
    with pytest.raises(TypeError, match="expected an integer"):
        sampler.generate(max_new_tokens=2.5)


def test_native_arguments_never_reach_out_of_bounds():
    """The checks of the binding itself, below those of the public functions."""
    stack = packed.pack_model(language_model())
    good = {
        "inputs": np.array([11], np.int32), "input_begin": np.array([0, 1]),
        "position": np.array([0]), "stream": np.array([0]), "limit": np.array([2]),
        "eos": [], "seed": 0, "do_sample": True, "temperature": 1.0,
        "top_k": None, "top_p": None, "min_p": None, "h0": None, "log_probs": False, "threads": 1,
    }  # fmt: skip
    assert stack.generate(**good)[0].shape == (1, 2)
    for change in (
        {"inputs": np.array([12], np.int32)},
        {"inputs": np.array([-1], np.int32)},
        {"input_begin": np.array([0, 2])},
        {"input_begin": np.array([0, 0])},
        {"input_begin": np.array([-1, 1])},
        {"position": np.array([0, 1])},
        {"stream": np.array([0, 1])},
        {"limit": np.array([0])},
        {"h0": np.zeros((1, 1, 18), np.float32)},
        {"temperature": 0.0},
        {"temperature": float("nan")},
        # With these nothing was left to draw, and the token lay behind the last.
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": float("nan")},
        {"min_p": 1.5},
        {"top_k": 2, "min_p": float("nan")},
    ):
        with pytest.raises(ValueError, match="expected"):
            stack.generate(**{**good, **change})


def test_continuous_batching_gives_every_sequence_its_own_tokens():
    """More sequences than rows, which end at very different times."""
    lm = language_model()
    with torch.no_grad():
        lm.head.bias[0] -= 3
    sampler = Sampler(lm)
    out = detailed(sampler, num_return_sequences=700, max_new_tokens=200, eos_token_id=0, seed=4)
    lengths = (out.sequences != PADDING).sum(1)
    assert lengths.min() < 30 and lengths.max() == 200
    scores = lm.score(out.sequences)
    torch.testing.assert_close(scores, out.log_probs, rtol=0, atol=1e-5)
    loop = by_loop(lm, None, num_return_sequences=700, max_new_tokens=200, eos_token_id=0, seed=4)
    assert torch.equal(out.sequences, loop.sequences)


def test_logits_of_many_rows_are_drawn_from_in_parts():
    lm = language_model(3000, 8)
    arguments = {"num_return_sequences": 40, "max_new_tokens": 3, "seed": 1}
    ours = detailed(Sampler(lm, threads=1), **arguments)
    assert torch.equal(ours.sequences, by_loop(lm, None, **arguments).sequences)


@pytest.mark.slow
def test_narrow_weights_cost_little_on_a_trained_model(sampler_isa):
    """Nats per character of held-out names: int8 within 0.01 of float32, bfloat16 within 0.002."""
    pytest.importorskip("names")
    lines = resources.files("names").joinpath("dist.all.last").read_text("ascii").splitlines()
    names = sorted({line.split()[0].lower() for line in lines})
    rows = [torch.tensor([*(ord(c) - 96 for c in name), 0]) for name in names if name.isalpha()]
    data = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PADDING)
    data = data[torch.randperm(len(data))]
    lm = GRULanguageModel(27, 16, 96)
    optimiser = torch.optim.Adam(lm.parameters(), lr=1e-2)
    for _ in range(250):
        optimiser.zero_grad()
        lm.loss(data[torch.randint(400, len(data), (64,))]).backward()
        optimiser.step()
    held_out = data[:400]
    loss = {}
    for weights in packed.WEIGHTS:
        stream = _C.Stream(packed.pack_model(lm, weights))
        total = count = 0.0
        for row in held_out:
            tokens = row[row != PADDING]
            stream.reset()
            logits = torch.from_numpy(stream.push(lm.teacher_forcing(tokens[None])[0].numpy()))
            total += float(torch.nn.functional.cross_entropy(logits, tokens, reduction="sum"))
            count += len(tokens)
        loss[weights] = total / count
    assert loss["float32"] == pytest.approx(lm.loss(held_out).item(), abs=1e-5)
    assert loss["float32"] < 2.4
    assert loss["int8"] - loss["float32"] < 0.01
    assert loss["bfloat16"] - loss["float32"] < 0.002
