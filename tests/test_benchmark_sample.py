# SPDX-License-Identifier: Apache-2.0
"""The `sample` suite of the benchmarks: its gate, its providers, its records."""

import json
from copy import deepcopy

import pytest
import torch

from gru_fast import GRULanguageModel, reference_sampling
from repository_tools import load
from torch_threads import torch_threads

cli = load("benchmarks.sample.cli")
facts = load("benchmarks.sample.facts")
gates = load("benchmarks.sample.gate")
probe = load("benchmarks.probe")
providers = load("benchmarks.sample.providers")
suite = load("benchmarks.sample.suite")
records = load("benchmarks.records")
timing = load("benchmarks.timing")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return gates.sharpened(GRULanguageModel(65, 64, 64))


@pytest.mark.parametrize("B", (1, 3))
def test_every_provider_passes_the_gate(model, B):
    found = providers.providers()
    assert next(iter(found)) == (providers.BASELINE, "float32")
    assert {name for name, _ in found} >= {"nn.GRUCell.loop", "gru_fast.loop", "gru_fast.generate"}
    assert {dtype for name, dtype in found if name == "gru_fast.sampler"} == set(suite.BYTES)
    gate = gates.Gate(model, B)
    for (name, dtype), (_, prepare) in found.items():
        draw = prepare(model, B)
        assert gate.verdict(draw, dtype, name.startswith("gru_fast.")) is None, (name, dtype)
        tokens = draw(7, False)
        assert tokens.shape == (B, 7) and tokens.dtype == torch.int64
        assert not torch.equal(draw(60, False)[0], draw(60, True)[0])


def test_the_gates_model_has_logits_some_nats_apart_and_a_prompt_for_each_row(model):
    gate = gates.Gate(model, 64)
    assert len(set(map(tuple, gate.prompts.tolist()))) == 64
    logits = model(model.teacher_forcing(gate.prompts))[0]
    assert logits.std() > 2


def a_sampler(model, B, state=None, pick=None):
    """By the rules of the reference.

    Args:
        model: that it draws from.
        B: sequences.
        state: from the state to the one that is used.
        pick: from time step, logits, token and uniforms to the token that is taken.
    """
    rows = torch.arange(B)

    @torch.no_grad()
    def draw(T, greedy, prompts=None):
        inputs = torch.full((B, 1), model.start)
        if prompts is not None:
            inputs = torch.cat([inputs, prompts], 1)
        hidden, tokens = None, []
        for t in range(T):
            hidden = model.run(inputs, hidden)[1]
            if state is not None:
                hidden = state(hidden)
            logits = model.head(hidden[-1])
            u = reference_sampling.uniform(gates.SEED, torch.full((B,), t), rows)
            token = logits.argmax(-1) if greedy else reference_sampling.draw(logits, u)
            if pick is not None:
                token = pick(t, logits, token, u, greedy)
            tokens.append(token)
            inputs = token[:, None]
        return torch.stack(tokens, 1)

    return draw


def changed(model, change):
    copy = deepcopy(model)
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            change(name, parameter)
    return copy


def without_recurrence(name, parameter):
    if "weight_hh" in name:
        parameter.zero_()


def without_biases(name, parameter):
    if "bias" in name:
        parameter.zero_()


def with_another_reset_gate(name, parameter):
    if "weight_hh" in name:
        parameter[: len(parameter) // 3].zero_()


CHANGES = (without_recurrence, without_biases, with_another_reset_gate)


@pytest.mark.parametrize("B", (1, 64))
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_the_gate_sees_another_models_weights(model, B, change):
    """By far, with the limits of each dtype: on both runs, and by peers with their own chance."""
    gate, broken = gates.Gate(model, B), changed(model, change)
    for dtype in suite.BYTES:
        draw = providers.gru_fast_sampler(dtype, broken, B)
        assert gate.verdict(draw, dtype, seeded=True) is not None
        miss = gate._seeded(draw(gate.T, False), 5 * gates.MISS[dtype])
        assert "outside of its part" in miss
    for prepare in (providers.nn_gru_loop, providers.nn_gru_cell_loop):
        assert gate.verdict(prepare(broken, B), "float32", seeded=False) is not None


def mixed(hidden):
    return hidden.roll(1, 1)


def uniform(t, logits, token, u, greedy):
    return token if greedy else (u * logits.shape[-1]).long()


def by_least(t, logits, token, u, greedy):
    return token if greedy else reference_sampling.draw(-logits, u)


def too_hot(t, logits, token, u, greedy):
    return token if greedy else reference_sampling.draw(logits, u, temperature=1.5)


def one_row_uniform(t, logits, token, u, greedy):
    return torch.where(torch.arange(len(token)) == 5, uniform(t, logits, token, u, greedy), token)


def one_token_unlikely(t, logits, token, u, greedy):
    """One of thousands: the mean would not show it."""
    wrong = (torch.arange(len(token)) == 5) & (t == 9) & (not greedy)
    return torch.where(wrong, logits.argmin(-1), token)


def one_token_not_the_likeliest(t, logits, token, u, greedy):
    wrong = (torch.arange(len(token)) == 5) & (t == 9) & greedy
    return torch.where(wrong, logits.topk(9).indices[:, 8], token)


@pytest.mark.parametrize("seeded", (True, False), ids=("seeded", "own_chance"))
@pytest.mark.parametrize("pick", (uniform, by_least, too_hot, one_row_uniform))
def test_the_gate_sees_other_probabilities(model, pick, seeded):
    gate = gates.Gate(model, 64)
    assert gate.verdict(a_sampler(model, 64), "float32", seeded) is None
    for dtype in suite.BYTES:
        assert gate.verdict(a_sampler(model, 64, pick=pick), dtype, seeded) is not None


@pytest.mark.parametrize("dtype", suite.BYTES)
def test_the_gate_sees_a_single_wrong_token(model, dtype):
    gate = gates.Gate(model, 64)
    for pick, reason in (
        (one_token_unlikely, "outside of its part"),
        (one_token_not_the_likeliest, "below the largest logit"),
    ):
        assert reason in gate.verdict(a_sampler(model, 64, pick=pick), dtype, seeded=True)


@pytest.mark.parametrize("seeded", (True, False), ids=("seeded", "own_chance"))
def test_the_gate_sees_mixed_rows(model, seeded):
    gate, draw = gates.Gate(model, 64), a_sampler(model, 64, state=mixed)
    for dtype in suite.BYTES:
        assert "below the largest logit" in gate.verdict(draw, dtype, seeded)


def test_rows_that_are_mixed_in_the_timed_run_only(model):
    gate, draw = gates.Gate(model, 64), a_sampler(model, 64, state=mixed)
    tokens = draw(gate.T, False)
    assert "outside of its part" in gate._seeded(tokens, gates.MISS["int8"])
    assert "deviations off" in gate._likely(tokens)


def test_the_gate_sees_tokens_of_the_wrong_shape(model):
    gate, draw = gates.Gate(model, 2), a_sampler(model, 2)
    assert "shape" in gate.verdict(lambda *given: draw(*given)[:, :-1], "float32", seeded=True)


def test_the_time_at_best_is_that_of_the_bytes_or_of_the_products():
    """W_hh of 3 * 8 * 8 and a head of 5 * 8 are 232 weights, read by both threads together."""
    peaks = probe.Peaks({"float32": 1e6}, {200: 4e6, 400: 2e6, 900: 1e6})
    one = suite.Case(8, 8, 1, 10, V=5)
    assert suite.bound(one, "float32", 1, peaks) == pytest.approx(10 * 928 / 1e6)
    assert suite.bound(one, "float32", 2, peaks) == pytest.approx(10 * 928 / 2e6)  # 464 bytes each
    assert suite.bound(one, "int8", 1, peaks) == pytest.approx(10 * 232 / 4e6)
    few = suite.Case(8, 8, 2, 10, V=5)
    assert suite.bound(few, "float32", 1, peaks) == pytest.approx(10 * 928 / 1e6)
    many = suite.Case(8, 8, 3, 10, V=5)
    assert suite.bound(many, "float32", 1, peaks) == pytest.approx(10 * 3 * 464 / 1e6)
    assert suite.bound(many, "int8", 1, peaks) is None


def test_records_are_of_the_common_form(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "QUICK", timing.DRY)
    monkeypatch.setattr(cli.program.probe, "measure_all", lambda *_: {})
    file = tmp_path / "sample.json"
    shape = ["--shapes", "H16-B2-T9-V20", "--threads", "1"]
    assert cli.main("sample", ["--quick", *shape, "--json", str(file)]) == 0
    written = records.read(file).records
    assert {r.suite for r in written} == {"sample"} and all(r.parity == "ok" for r in written)
    assert all(r.ratio_to_torch is not None and r.median_s > 0 for r in written)
    assert len(json.loads(file.read_text())["records"]) == len(providers.providers())


def test_bad_arguments(capsys):
    assert cli.main("sample", ["--shapes", "H16-B2-T9"]) == 2
    assert "V >= 1" in capsys.readouterr().err


def test_facts_have_a_value_and_a_unit(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "QUICK", timing.DRY)
    file = tmp_path / "facts.json"
    with torch_threads():
        arguments = ["--quick", "--shapes", "none", "--facts", "all", "--json", str(file)]
        assert cli.main("sample", arguments) == 0
    found = {}
    for figure in records.read(file).figures:
        found.setdefault(figure["name"], []).append(figure)
    assert {"stream.step", "stream.tail", "threads.streams", "interrupt", "prompt", "batching",
            "streamer", "nats_lost", "flips"} <= set(found)  # fmt: skip
    assert all(figure["value"] == figure["value"] for many in found.values() for figure in many)
    assert all(figure["value"] < 0.01 for figure in found["flips"])
    assert found["batching"][0]["shortest"] < found["batching"][0]["longest"]


def test_which_facts_are_taken():
    assert cli.facts_of(None, shapes_given=True) == []
    assert cli.facts_of(None, shapes_given=False) == list(facts.FACTS)
    assert cli.facts_of("none", shapes_given=False) == []
    with pytest.raises(ValueError, match=r"facts: expected a list of step, .* got 'speed'"):
        cli.facts_of("speed", shapes_given=False)


def test_a_loop_that_draws_fewer_tokens_is_scaled_to_all(monkeypatch):
    drawn = {}

    def a_second_each(calls, clock, effort, **_):
        drawn.update({key: call().shape[1] for key, call in calls.items()})
        return {key: [1.0] for key in calls}

    monkeypatch.setattr(timing, "interleave", a_second_each)
    case = suite.Case(8, 8, 2, 60, V=9)
    names = {"nn.GRU.loop", "gru_fast.loop", "gru_fast.generate"}
    found = suite.run_case(case, 1, timing.DRY, None, names, steady_tokens=6)
    assert {name.split()[0]: T for name, T in drawn.items()} == {
        "nn.GRU.loop": 6, "gru_fast.loop": 6, "gru_fast.generate": 60,
    }  # fmt: skip
    assert {r.provider: r.median_s for r in found} == {
        "nn.GRU.loop": 10.0, "gru_fast.loop": 10.0, "gru_fast.generate": 1.0,
    }  # fmt: skip
    assert {r.provider: r.ratio_to_torch for r in found}["gru_fast.generate"] == 10.0
