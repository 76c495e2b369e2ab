# SPDX-License-Identifier: Apache-2.0
"""The suites `sweep`, `scaling` and `import`, and what two runs are compared by."""

from dataclasses import asdict, replace

import pytest

from repository_tools import load

cases = load("benchmarks.cases")
compare = load("benchmarks.compare")
records = load("benchmarks.records")
scaling = load("benchmarks.scaling")
sweep = load("benchmarks.sweep")

MACHINE = {"cpu": "x", "isa": "y", "versions": {"torch": "1"}, "commit": None, "gpu": None}


def test_quick_sweep(quick_results, capsys):
    found = records.read(quick_results / "cpu-sweep.json")
    cells = {(r.suite, str(cases.Case(**r.case)), r.dtype) for r in found.records}
    assert len(cells) == len(sweep.QUICK) * 4
    assert {r.provider for r in found.records} == {"nn.GRU", "gru_fast.cpu"}
    assert {r.parity for r in found.records} == {"ok"}
    assert {r.parity_T for r in found.records if r.case["T"] == 9} == {sweep.GATE_STEPS}
    assert sweep.main("sweep", ["--quick", "--dtype", "float8"]) == 2
    assert "float8" in capsys.readouterr().err


def test_a_sweep_without_time_says_what_it_left(capsys):
    assert sweep.main("sweep", ["--quick", "--budget", "0"]) == 0
    assert f"{4 * len(sweep.QUICK)} cells not measured" in capsys.readouterr().out


def test_the_grid():
    grid = cases.SWEEP
    assert {c.H for c in grid} == {8, 13, 32, 65, 128, 257, 512, 1024}
    assert {c.B for c in grid} >= {1, 256} and {c.T for c in grid} >= {1, 1000}


def test_slopes_of_known_times():
    sizes = (1, 2, 4, 8, 16)
    assert scaling.slope(sizes, [3 * s for s in sizes]) == pytest.approx(1)
    assert scaling.slope(sizes, [s**2 for s in sizes]) == pytest.approx(2)
    # The smaller half, where something constant dominates, does not count.
    assert scaling.slope(sizes, [5, 5, 4, 8, 16]) == pytest.approx(1)


def test_quick_scaling(quick_results):
    found = records.read(quick_results / "cpu-scaling.json")
    slopes = {(f["name"], f["suite"], f["provider"]) for f in found.figures if "suite" in f}
    for axis in ("slope_T", "slope_B", "slope_H"):
        for suite in scaling.SUITES:
            assert (axis, suite, "gru_fast.cpu") in slopes and (axis, suite, "nn.GRU") in slopes
            assert ((axis, suite, "bound") in slopes) == any(r.bound_s for r in found.records)
    assert all(r.parity == "ok" for r in found.records)


def test_quick_import(quick_results):
    found = records.read(quick_results / "cpu-import.json")
    figures = {f["name"]: f["value"] for f in found.figures}
    assert figures["import_torch"] > 0 and figures["import_gru_fast"] > 0
    calls = {f"{n}_call_{gru}" for n in ("first", "second") for gru in ("nn.GRU", "gru_fast.GRU")}
    assert calls <= set(figures)


@pytest.mark.slow
def test_the_wheel_is_built_and_weighed():
    figures = {f["name"]: f["value"] for f in load("benchmarks.importing").wheel()}
    assert figures["wheel_build"] > 0
    assert 0 < figures["wheel"] < 20 * 2**20


def a_run(ours: float, theirs: float = 2.0, spread: float = 0.01, **changes):
    """nn.GRU and gru_fast.cpu on one case."""
    case = asdict(cases.Case(4, 4, 1, 2))
    found = []
    for provider, median in (("nn.GRU", theirs), ("gru_fast.cpu", ours)):
        found.append(
            records.Record(
                "infer", provider, "1", "cpu", "float32", 1, case, "ok",
                median, median * (1 - spread), median * (1 + spread), 5,
                ratio_to_torch=theirs / median, baseline="nn.GRU",
            )
        )  # fmt: skip
    return records.Results(MACHINE | changes, found)


def contended(ours: float, theirs: float = 4.0, spread: float = 0.01):
    """A row between busy neighbours."""
    figures = [
        {
            "name": "contention", "value": value, "unit": "x alone", "suite": "train",
            "p20": value * (1 - spread), "p80": value * (1 + spread), "case": "H8-B1-T2",
            "provider": provider, "threads": 2, "neighbours": 2, "rounds": 5,
        }
        for provider, value in (("nn.GRU", theirs), ("gru_fast.cpu", ours))
    ]  # fmt: skip
    return records.Results(MACHINE, [], figures)


class TestCompare:
    def test_the_same_run_has_no_changes(self):
        text, regressions = compare.compared(a_run(1.0), a_run(1.0))
        assert regressions == 0 and "2 compared, 2 unchanged" in text

    def test_a_slower_kernel_is_a_regression(self):
        text, regressions = compare.compared(a_run(1.0), a_run(1.3))
        assert regressions == 1 and "slower  0.77x" in text

    def test_a_faster_one_is_not(self):
        text, regressions = compare.compared(a_run(1.3), a_run(1.0))
        assert regressions == 0 and "faster  1.30x" in text

    def test_a_slower_machine_is_none(self):
        """Both twice as slow: the ratio is what it was. nn.GRU's own time is told."""
        text, regressions = compare.compared(a_run(1.0), a_run(2.0, 4.0))
        assert regressions == 0 and "slower  0.50x" in text and "nn.GRU infer" in text

    def test_noise_excuses(self):
        assert compare.compared(a_run(1.0), a_run(1.1, spread=0.1))[1] == 0
        assert compare.compared(a_run(1.0), a_run(1.1))[1] == 1

    def test_a_lost_figure_is_a_regression(self):
        new = a_run(1.0)
        lost = dict.fromkeys((*records.NUMBERS, "p20_s", "p80_s"))
        new.records[1] = replace(new.records[1], **lost, error="it broke")
        text, regressions = compare.compared(a_run(1.0), new)
        assert regressions == 1 and "lost    gru_fast.cpu" in text

    def test_what_was_not_run_is_not_lost(self):
        new = records.Results(MACHINE, [])
        assert compare.compared(a_run(1.0), new)[1] == 0

    def test_times_between_neighbours(self):
        text, regressions = compare.compared(contended(2.0), contended(2.0))
        assert regressions == 0 and "2 compared, 2 unchanged" in text
        text, regressions = compare.compared(contended(2.0), contended(3.0))
        assert regressions == 1 and "2 compared, 1 unchanged" in text
        assert "slower  0.67x" in text
        assert "gru_fast.cpu contention train H8-B1-T2, 2 threads  2 x alone -> 3 x alone" in text
        assert compare.compared(contended(2.0), contended(1.5))[1] == 0
        # nn.GRU's is told and no regression; noise excuses.
        text, regressions = compare.compared(contended(2.0), contended(2.0, theirs=9.0))
        assert regressions == 0 and "slower" in text
        assert compare.compared(contended(2.0), contended(3.0, spread=0.6))[1] == 0

    def test_an_old_run_without_percentiles_has_the_noise_of_the_new_one(self):
        old = contended(2.0)
        for f in old.figures:
            del f["p20"], f["p80"]
        assert compare.compared(old, contended(2.2, spread=0.06))[1] == 0
        assert compare.compared(old, contended(2.2, spread=0.01))[1] == 1

    def test_lost_times_between_neighbours(self):
        new = contended(2.0)
        del new.figures[1]
        assert compare.compared(contended(2.0), new)[1] == 1
        case = asdict(cases.Case(8, 8, 1, 2))
        rest = {"feature": "contention/train", "error": "it broke"}
        died = records.Record("features", "nn.GRU", "1", "cpu", "float32", 2, case, **rest)
        text, regressions = compare.compared(contended(2.0), records.Results(MACHINE, [died]))
        assert regressions == 1 and "lost    gru_fast.cpu contention train H8-B1-T2" in text
        assert compare.compared(contended(2.0), records.Results(MACHINE))[1] == 0

    def test_two_real_runs_of_imports(self, quick_results):
        found = records.read(quick_results / "cpu-import.json")
        for f in found.figures:
            f["rounds"] = 5
        slow = records.Results(found.machine, [], [{**f, "value": 9.0} for f in found.figures])
        text, regressions = compare.compared(found, slow)
        names = {"import_gru_fast", "first_call_gru_fast.GRU", "second_call_gru_fast.GRU"}
        assert regressions == len(names) and all(f" {name}" in text for name in names)

    def test_another_machine_is_named(self):
        text, _ = compare.compared(a_run(1.0), a_run(1.0, cpu="z", versions={"torch": "2"}))
        assert "cpu was x, is z" in text and "torch was 1, is 2" in text

    def test_the_exit_code(self, tmp_path, capsys):
        old = tmp_path / "old.json"
        shape = ["--quick", "--suites", "infer", "--dtype", "float32", "--json"]
        assert sweep.main("sweep", [*shape, str(old)]) == 0
        found = records.read(old)
        for r in found.records:
            if r.provider == "gru_fast.cpu":
                r.ratio_to_torch *= 1e9
        found.write(old)
        again = ["--quick", "--suites", "infer", "--dtype", "float32", "--compare", str(old)]
        assert sweep.main("sweep", again) == 1
        assert f"{len(sweep.QUICK)} regressions of ours" in capsys.readouterr().out
        with pytest.raises(SystemExit):
            sweep.main("sweep", ["--compare", str(tmp_path / "none.json")])
        assert "earlier run" in capsys.readouterr().err
