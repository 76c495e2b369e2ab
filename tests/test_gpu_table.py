# SPDX-License-Identifier: Apache-2.0
"""From a run's JSON to the table of measured sizes."""

from copy import deepcopy

import pytest

from gru_fast.kernels.measured import POINTS, Point
from repository_tools import ROOT, load_script

script = load_script("propose_gpu_table")
SOURCE = (ROOT / "kernels" / "measured.py").read_text()


def record(kernel="cta", ratio=1.5, **changes):
    found = {
        "suite": "train", "provider": f"gru_fast.triton.{kernel}", "dtype": "bfloat16",
        "case": {"I": 64, "H": 64, "B": 16, "T": 512, "L": 1, "V": 0, "resets": 0.0},
        "parity": "ok", "ratio_to_torch": ratio, "baseline": "cudnn", "dry": False,
    }  # fmt: skip
    return found | changes


def results(*records):
    return {"machine": {"gpu": {"name": "x", "capability": "9.0"}}, "records": list(records)}


def test_the_fastest_kernel_of_each_size():
    larger = {**record()["case"], "H": 512}
    found = script.propose(
        results(record(), record("grid", 1.7), record("step", 0.8, case=larger), record("step", 1))
    )
    assert found == [
        Point(90, "train", "bfloat16", 64, 16, 512, "grid", 1.7),
        Point(90, "train", "bfloat16", 512, 16, 512, "step", 0.8),
    ]


def test_the_two_16_bit_dtypes_stand_apart():
    found = script.propose(results(record(ratio=1.5), record("step", 0.7, dtype="float16")))
    assert found == [
        Point(90, "train", "bfloat16", 64, 16, 512, "cta", 1.5),
        Point(90, "train", "float16", 64, 16, 512, "step", 0.7),
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"dry": True}, {"parity": "wrong"}, {"parity": "none"}, {"ratio_to_torch": None},
        {"baseline": "cudnn.split_pad"}, {"provider": "cudnn"}, {"suite": "sample"},
        {"dtype": "float64"}, {"provider": "gru_fast.triton.cta.recompute"},
        {"case": {**record()["case"], "resets": 0.1}},
    ],
    ids=str,
)  # fmt: skip
def test_what_proves_nothing_is_left_out(changes):
    with pytest.raises(ValueError, match="got none"):
        script.propose(results(record() | changes))


def test_a_run_without_a_gpu_proposes_nothing():
    with pytest.raises(ValueError, match="expected a GPU"):
        script.propose({"machine": {"gpu": None}, "records": [record()]})


def test_the_table_is_rewritten_as_source():
    points = [
        Point(90, "train", "tf32", 64, 16, 512, "cta", 1.25),
        Point(80, "step", "float16", 1, 1, 1, "x", 2),
    ]
    once = script.rewritten(SOURCE, points)
    for text, expected in ((once, points), (script.rewritten(once, points[:1]), points[:1])):
        space = {"__name__": "gru_fast.kernels.measured", "__package__": "gru_fast.kernels"}
        exec(compile(text, "measured.py", "exec", dont_inherit=True), space)
        assert [vars(p) for p in space["POINTS"]] == [vars(p) for p in deepcopy(expected)]
    assert script.rewritten(once, list(POINTS)) == SOURCE
    assert "POINTS: tuple[Point, ...] = ()\n" in script.rewritten(once, [])
