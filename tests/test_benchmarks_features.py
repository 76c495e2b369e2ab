# SPDX-License-Identifier: Apache-2.0
"""The `features` suite: each row's providers are right, and wrong ones get no number."""

from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from gru_fast import GRU
from repository_tools import load

cases = load("benchmarks.cases")
features = load("benchmarks.features")
features_cli = load("benchmarks.features.cli")
records = load("benchmarks.records")
row = load("benchmarks.features.row")
runner = load("benchmarks.runner")
timing = load("benchmarks.timing")

SETTING = runner.Setting(1, timing.DRY, footprint=False)
NAMES = ("weight_ih_l0", "weight_hh_l0")


@pytest.mark.parametrize("chosen", features.all_rows(), ids=lambda chosen: chosen.name)
def test_every_provider_of_every_row_is_right(chosen):
    (problem,) = chosen.problems(quick=True)
    found, notes = runner.run_problem(problem, chosen.providers, SETTING)
    assert {r.provider: (r.parity, r.error) for r in found} == {
        p.name: ("ok", None) for p in chosen.providers
    }, notes
    for record in found:
        records.validate_record(asdict(record))
        suite = "lm" if chosen.problem.suite == "lm" else "features"
        assert (record.suite, record.feature) == (suite, chosen.name)
        assert record.ratio_to_torch is not None
    assert features.find(chosen.name) is chosen
    assert str(chosen.problem.case) not in chosen.name


def a_row(more: float = 0.0) -> "row.Row":
    """A layer without biases, ours with weights that are off by a share `more`."""

    def draw(case, generator):
        def normal(*shape):
            return torch.randn(shape, generator=generator)

        return {
            "x": normal(case.T, case.B, case.I),
            "weight_ih_l0": normal(3 * case.H, case.I) * case.H**-0.5,
            "weight_hh_l0": normal(3 * case.H, case.H) * case.H**-0.5,
            "grad_y": normal(case.T, case.B, case.H),
        }

    def way(kind, factor=1.0):
        def prepare(tensors):
            H = tensors["grad_y"].shape[2]
            module = kind(tensors["x"].shape[2], H, bias=False, dtype=tensors["x"].dtype)
            weights = row.load(module, {n: t * factor for n, t in tensors.items()})
            x = tensors["x"]
            return row.training(lambda: {"y": module(x)[0]}, weights, {"y": tensors["grad_y"]})

        return prepare

    case = cases.Case(3, 5, 2, 4)
    problem = row.Drawn(
        case, "features", "float32", "cpu", feature="bias/none", draw=draw, exact=way(nn.GRU)
    )
    ways = [
        row.Named("nn.GRU", way(nn.GRU), baseline=True),
        row.Named("gru_fast.GRU", way(GRU, 1 + more)),
    ]
    return row.Row(problem, ways, quick=case)


def test_a_row_with_tensors_of_its_own():
    chosen = a_row()
    found, _ = runner.run_problem(chosen.problem, chosen.providers, SETTING)
    assert [(r.parity, r.feature, r.baseline) for r in found] == [("ok", "bias/none", "nn.GRU")] * 2
    assert set(chosen.problem.truth) == {"y", *(f"grad_{name}" for name in NAMES)}


def test_a_wrong_way_gets_no_number():
    chosen = a_row(more=1e-3)
    found, _ = runner.run_problem(chosen.problem, chosen.providers, SETTING)
    assert [r.parity for r in found] == ["ok", "wrong"]
    assert found[1].median_s is None and "error" in found[1].error


def test_a_row_needs_a_name_and_a_baseline():
    good = a_row()
    with pytest.raises(ValueError, match="feature="):
        row.Row(replace(good.problem, feature=None), good.providers, good.quick)
    with pytest.raises(ValueError, match="baseline"):
        row.Row(good.problem, good.providers[1:], good.quick)


def test_the_command_line(quick_results, capsys):
    name = "reset_mask/infer"
    found = records.read(quick_results / "cpu-features.json").records
    assert {r.feature for r in found} == {name} and all(r.peak_bytes is not None for r in found)
    assert features_cli.main("features", ["--rows", "nothing of this name"]) == 2
    assert "reset_mask/train" in capsys.readouterr().err
    assert features_cli.main("features", ["--threads", "0"]) == 2


def test_language_model_in_tokens_a_second(quick_results, capsys):
    found = records.read(quick_results / "cpu-lm.json").records
    chosen = features.find("lm/step")
    assert "tokens/s" in features_cli.text(chosen, found)
    assert {r.suite for r in found} == {"lm"} and {r.parity for r in found} == {"ok"}
    assert features_cli.main("lm", ["--rows", "reset_mask"]) == 2
    assert "lm/step" in capsys.readouterr().err
