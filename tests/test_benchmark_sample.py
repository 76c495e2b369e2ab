# SPDX-License-Identifier: Apache-2.0
"""The `sample` suite of the benchmarks: its gate, its providers, its records."""

import json

import pytest
import torch

from gru_fast import GRULanguageModel
from repository_tools import load
from torch_threads import torch_threads

cli = load("benchmarks.sample.cli")
facts = load("benchmarks.sample.facts")
providers = load("benchmarks.sample.providers")
suite = load("benchmarks.sample.suite")
records = load("benchmarks.records")
timing = load("benchmarks.timing")


@pytest.fixture
def model():
    return GRULanguageModel(20, 24, 24)


@pytest.mark.parametrize("B", (1, 3))
def test_every_provider_passes_the_gate(model, B):
    found = providers.providers()
    assert next(iter(found)) == ("nn.GRU.loop", "float32")
    assert {dtype for name, dtype in found if name == "gru_fast.sampler"} == set(suite.BYTES)
    for (name, dtype), (_, prepare) in found.items():
        draw = prepare(model, B)
        assert suite.gate(draw, model, dtype) is None, name
        tokens = draw(7, False)
        assert tokens.shape == (B, 7) and tokens.dtype == torch.int64
        assert not torch.equal(draw(60, False)[0], draw(60, True)[0])


def test_the_gate_sees_a_sampler_of_another_model(model):
    draw = providers.nn_gru_loop(GRULanguageModel(20, 24, 24), 2)
    assert "below the largest logit" in suite.gate(draw, model, "float32")


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
        "nn.GRU.loop": 6, "gru_fast.loop": 60, "gru_fast.generate": 60,
    }  # fmt: skip
    assert {r.provider: r.median_s for r in found} == {
        "nn.GRU.loop": 10.0, "gru_fast.loop": 1.0, "gru_fast.generate": 1.0,
    }  # fmt: skip
    assert {r.provider: r.ratio_to_torch for r in found}["gru_fast.generate"] == 10.0
