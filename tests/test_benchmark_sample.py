# SPDX-License-Identifier: Apache-2.0
"""The `sample` suite of the benchmarks: its gate, its providers, its records."""

import json

import pytest
import torch

from repository_tools import load

sample = load("benchmarks.sample")
records = load("benchmarks.records")


@pytest.fixture
def model():
    return sample.GRULanguageModel(20, 24, 24)


@pytest.mark.parametrize("B", (1, 3))
def test_every_provider_passes_the_gate(model, B):
    found = sample.providers()
    assert next(iter(found)) == ("nn.GRU.loop", "float32")
    assert {dtype for name, dtype in found if name == "gru_fast.sampler"} == set(sample.BYTES)
    for (name, dtype), (_, prepare) in found.items():
        draw = prepare(model, B)
        assert sample.gate(draw, model, dtype) is None, name
        tokens = draw(7, False)
        assert tokens.shape == (B, 7) and tokens.dtype == torch.int64
        assert not torch.equal(draw(60, False)[0], draw(60, True)[0])


def test_the_gate_sees_a_sampler_of_another_model(model):
    draw = sample.nn_gru_loop(sample.GRULanguageModel(20, 24, 24), 2)
    assert "below the largest logit" in sample.gate(draw, model, "float32")


def test_records_are_of_the_common_form(tmp_path, monkeypatch):
    monkeypatch.setattr(sample.timing, "QUICK", sample.timing.DRY)
    monkeypatch.setattr(sample.probe, "measure_all", lambda *_: {})
    file = tmp_path / "sample.json"
    shape = ["--shapes", "H16-B2-T9-V20", "--threads", "1"]
    assert sample.main("sample", ["--quick", *shape, "--json", str(file)]) == 0
    written = records.read(file).records
    assert {r.suite for r in written} == {"sample"} and all(r.parity == "ok" for r in written)
    assert all(r.ratio_to_torch is not None and r.median_s > 0 for r in written)
    assert len(json.loads(file.read_text())["records"]) == len(sample.providers())


def test_bad_arguments(capsys):
    assert sample.main("sample", ["--shapes", "H16-B2-T9"]) == 2
    assert "V >= 1" in capsys.readouterr().err
