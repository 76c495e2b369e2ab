# SPDX-License-Identifier: Apache-2.0
"""The physical limit that benchmark rows are compared with."""

import pytest

from repository_tools import load

bound = load("benchmarks.bound")
cases = load("benchmarks.cases")
machine = load("benchmarks.machine")
probe = load("benchmarks.probe")

KIB = 1024
# 100 GFLOP/s; 200 GB/s from 24 KiB a thread, 100 from 48, 20 from 64 MiB.
PEAKS = probe.Peaks(
    {"float32": 100e9, "bfloat16": 200e9},
    {24 * KIB: 200e9, 48 * KIB: 100e9, 65536 * KIB: 20e9},
)


def test_bandwidth_between_measured_sizes_is_that_of_the_smaller():
    """The rate of the larger one can be beaten."""
    assert bound.bandwidth_of(PEAKS, 1) == 200e9
    assert bound.bandwidth_of(PEAKS, 48 * KIB - 1) == 200e9
    assert bound.bandwidth_of(PEAKS, 48 * KIB) == 100e9
    assert bound.bandwidth_of(PEAKS, 65535 * KIB) == 100e9
    assert bound.bandwidth_of(PEAKS, 1e12) == 20e9
    assert bound.bandwidth_of(probe.Peaks({}, {}), 1) is None


def test_a_slow_small_measurement_does_not_hide_a_faster_larger_one():
    noisy = probe.Peaks({"float32": 1.0}, {10: 5.0, 20: 50.0, 30: 20.0})
    assert bound.bandwidth_of(noisy, 10) == 50.0


def test_forward_bound_by_weight_bytes():
    """B = 1: the steps wait for 3 * 64 * 64 * 4 = 49152 bytes each, the input product computes."""
    found = bound.lower_bound(cases.square(64, 1, 256), "infer", "float32", 1, PEAKS)
    project, step = 2 * 256 * 3 * 64 * 64 / 100e9, 49152 / 100e9
    assert found == pytest.approx(project + 256 * step)


def test_forward_bound_by_operations():
    found = bound.lower_bound(cases.Case(I=32, H=64, B=32, T=10), "infer", "float32", 1, PEAKS)
    operations = 2 * 10 * 32 * 3 * 64 * (32 + 64)
    assert found == pytest.approx(operations / 100e9)


def test_training_is_three_input_products_one_weight_gradient_and_two_scans():
    case = cases.Case(I=32, H=64, B=32, T=10)
    found = bound.lower_bound(case, "train", "float32", 1, PEAKS)
    of_input, of_state = 2 * 10 * 32 * 3 * 64 * 32, 2 * 10 * 32 * 3 * 64 * 64
    assert found == pytest.approx((3 * of_input + of_state + 2 * of_state) / 100e9)


def test_threads_share_the_weights():
    """Half of 49152 bytes fits in the smaller level."""
    case = cases.square(64, 1, 1)
    found = bound.lower_bound(case, "step", "float32", 2, PEAKS)
    assert found == pytest.approx(2 * 49152 / 200e9)


def test_bfloat16_has_its_own_peak_and_half_the_bytes():
    wide, narrow = cases.square(256, 64, 8), cases.square(256, 1, 8)
    for case in (wide, narrow):
        half = bound.lower_bound(case, "infer", "bfloat16", 1, PEAKS)
        assert half == pytest.approx(bound.lower_bound(case, "infer", "float32", 1, PEAKS) / 2)


def test_figures_worked_out_elsewhere():
    """Zen 4, one core: what a spreadsheet with the same peaks gives, in milliseconds."""
    zen4 = probe.Peaks({"float32": 117.5e9}, {24 * KIB: 215e9, 48 * KIB: 115e9, 3072 * KIB: 98e9})

    def milliseconds(H, B, T, suite):
        return 1e3 * bound.lower_bound(cases.square(H, B, T), suite, "float32", 1, zen4)

    assert milliseconds(64, 1, 256, "infer") == pytest.approx(0.16, abs=0.005)
    assert milliseconds(64, 1, 256, "train") == pytest.approx(0.43, abs=0.005)
    assert milliseconds(512, 64, 64, "infer") == pytest.approx(109.66, rel=1e-3)
    assert milliseconds(512, 64, 64, "train") == pytest.approx(328.98, rel=1e-3)


def test_no_peaks_no_bound():
    case = cases.square(8, 1, 1)
    assert bound.lower_bound(case, "infer", "float32", 1, probe.Peaks({}, {1: 1.0})) is None
    assert bound.lower_bound(case, "infer", "float32", 1, probe.Peaks({"float32": 1.0}, {})) is None


def test_gpu_floor_is_the_larger_of_operations_and_bytes():
    case = cases.Case(I=4, H=8, B=2, T=3)
    weights, activations = 3 * 8 * 12, 3 * 2 * 12 + 2 * 2 * 8
    by_operations = bound.gpu_floor(case, "infer", "bfloat16", 1.0, 1e12)
    assert by_operations == 2 * weights * 6
    by_bytes = bound.gpu_floor(case, "train", "bfloat16", 1e12, 1.0)
    assert by_bytes == 3 * 2 * (weights + activations)


def test_more_threads_are_at_least_as_good():
    one = probe.Peaks({"float32": 10.0}, {1: 3.0, 2: 9.0})
    two = probe.Peaks({"float32": 4.0}, {1: 5.0, 2: 1.0})
    assert two.at_least(one) == probe.Peaks({"float32": 10.0}, {1: 5.0, 2: 9.0})


def test_the_best_of_some_rounds_counts(monkeypatch):
    """Two threads were on one core in all rounds but one."""
    rates = {1: iter([3.0, 4.0, 3.5, 3.0]), 2: iter([4.0, 3.9, 7.5, 4.0])}
    monkeypatch.setattr(
        probe, "measure", lambda n, seconds: probe.Peaks({"float32": next(rates[n])}, {1: 1.0})
    )
    found = probe.measure_all([2, 1])
    assert {n: peaks.flops["float32"] for n, peaks in found.items()} == {1: 4.0, 2: 7.5}


def test_the_probe_measures_this_machine():
    peaks = probe.measure(1, seconds=1e-4)
    assert peaks.flops["float32"] > 0 and peaks.flops["float64"] > 0
    assert list(peaks.bandwidth) == probe.WORKING_SETS
    assert all(rate > 0 for rate in peaks.bandwidth.values())


@pytest.mark.skipif(machine.processors() == 1, reason="one processor")
def test_how_far_apart_the_cores_are():
    assert 1e-9 < probe.exchange_s() < 1e-4


def test_a_checkout_that_cannot_be_written_to(monkeypatch, tmp_path):
    (tmp_path / "build").touch()
    monkeypatch.setattr(probe, "ROOT", tmp_path)
    library = probe._library.__wrapped__()
    assert library.read_bandwidth(1, 4096, 1e-5) > 0
    assert [path.name for path in tmp_path.iterdir()] == ["build"]


def test_without_a_compiler_the_probe_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(probe.ProbeError, match="no-such-compiler"):
        probe.compile_probe(tmp_path)


def test_a_compiler_that_refuses_is_quoted(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(probe.ProbeError, match="cannot compile"):
        probe.compile_probe(tmp_path)
