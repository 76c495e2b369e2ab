# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks report`: docs/results.md and its plots are of the committed results."""

import re
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from repository_tools import load

figures = load("benchmarks.figures")
figures_cpu = load("benchmarks.figures_cpu")
plots = load("benchmarks.plots")
records = load("benchmarks.records")


def texts(png: Path) -> dict[str, str]:
    """The text chunks of a PNG."""
    data, place, found = png.read_bytes(), 8, {}
    while place < len(data):
        (length,), kind = struct.unpack(">I", data[place : place + 4]), data[place + 4 : place + 8]
        if kind == b"tEXt":
            name, _, value = data[place + 8 : place + 8 + length].partition(b"\0")
            found[name.decode("latin1")] = value.decode("latin1")
        place += 12 + length
    return found


def test_every_folder_of_results_has_a_page():
    folders = {path.name for path in figures.RESULTS.iterdir() if path.is_dir()}
    assert set(figures.MACHINES) == {""} | folders


@pytest.mark.parametrize("machine", figures.MACHINES)
def test_the_page_is_made_from_the_committed_results(machine):
    page = figures.report_of(machine)
    assert page.read_text("utf-8") == figures.report(machine=machine)


@pytest.mark.parametrize("machine", figures.MACHINES)
def test_the_plots_are_of_the_committed_results(machine):
    """Each keeps the digest of its results: a plot that was not drawn anew is found."""
    page = figures.report_of(machine)
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", page.read_text("utf-8"))
    results, drawn = figures.RESULTS / machine, figures.plots_of(machine)
    sources = {drawn / plot.file: results / plot.source for plot in plots.PLOTS}
    assert pictures
    for picture in pictures:
        path = page.parent / picture
        kept = texts(path)[plots.DIGEST]
        assert kept == plots.digest(sources[path]), f"{picture}: run python -m benchmarks report"


def test_far_cores_are_named():
    def ours(H, exchange_s):
        sizes = {"I": H, "H": H, "B": 2, "T": 3, "L": 1, "V": 0}
        numbers = {"ratio_to_torch": 2.0, "exchange_s": exchange_s}
        return records.Record("train", "gru_fast.cpu", "0", "cpu", "float32", 2, sizes, **numbers)

    found = records.Results({}, [ours(8, 30e-9), ours(16, 160e-9), ours(32, 60e-9)])
    rows = figures_cpu.layers(found).splitlines()[2:]
    assert rows[:3] == ["| 8, 2, 3 | 2.00x |", "| 16, 2, 3 | 2.00x, far |", "| 32, 2, 3 | 2.00x |"]
    assert rows[4].startswith("far: ")
    near = records.Results({}, found.records[::2])
    assert "far" not in figures_cpu.layers(near)


def some(suite, provider, median_s, **more):
    """A record of H = 8, one thread, unless told otherwise."""
    case = {"I": 8, "H": 8, "B": 1, "T": 9, "L": 1, "V": 5 if suite == "sample" else 0}
    case["resets"] = 0.0
    numbers = {"median_s": median_s, "p20_s": median_s, "p80_s": median_s, "rounds": 3}
    about = {"version": "7", "device": "cpu", "dtype": "float32", "threads": 1, "case": case}
    return records.Record(suite, provider, **(about | numbers | {"parity": "ok"} | more))


def test_sampling_beside_every_peer():
    baseline = {"baseline": "nn.GRU.loop"}
    found = [
        some("sample", "nn.GRU.loop", 4.0, ratio_to_torch=1.0, **baseline),
        some("sample", "nn.GRUCell.loop", 3.0, ratio_to_torch=1.3, **baseline),
        some("sample", "onnxruntime.loop", 2.0, ratio_to_torch=2.0, **baseline),
        some("sample", "gru_fast.loop", 3.5, ratio_to_torch=1.2, **baseline),
        some("sample", "gru_fast.sampler", 0.5, ratio_to_torch=8.0, dtype="int8", **baseline),
    ]
    results = records.Results({}, found)
    assert (
        figures_cpu.samples(results).splitlines()[2]
        == "| 8, 1, 5, 1 | 1.20x, 0.00257k/s | 8.00x, 0.018k/s |"
    )
    cell, onnx = figures_cpu.loops(results).split("\n\n")
    assert cell.splitlines() == [
        "| `nn.GRUCell.loop`: H, B, V, threads | loop float32 | sampler int8 |",
        "| --- | --: | --: |",
        "| 8, 1, 5, 1 | **0.86x** | 6.00x |",
    ]
    assert onnx.splitlines()[0].startswith("| `onnxruntime.loop`: ")
    assert onnx.splitlines()[2] == "| 8, 1, 5, 1 | **0.57x** | 4.00x |"
    assert figures_cpu.lost(results).splitlines() == [
        "| I = H, B, T | `onnxruntime.loop`'s time / ours | `nn.GRUCell.loop`'s time / ours |",
        "| --- | --: | --: |",
        "| sample 8, 1, 9, V 5, 1 thread: `gru_fast.loop` float32 | **0.57x** | **0.86x** |",
    ]


def test_rows_without_a_peers_figure_are_counted():
    wrong = {"p20_s": None, "p80_s": None, "rounds": None, "error": "off"}
    found = [
        some("infer", "gru_fast.cpu", 1.0),
        some("infer", "jax", None, parity="wrong", **wrong),
        some("train", "jax", None, parity="wrong", **wrong),
        some("infer", "keras", None, parity="none", **wrong),
    ]
    assert figures_cpu.lost(records.Results({}, found[:1])) == "None."
    assert figures_cpu.lost(records.Results({}, found)) == (
        "None.\n\nRows that are not compared, because the peer has no figure: "
        "`jax` 2 (inexact), `keras` 1 (failed)."
    )


@pytest.mark.parametrize(
    ("part", "suite", "provider"),
    [
        ("train", "train", "gru_fast.cpu"),
        ("infer", "infer", "gru_fast.cpu"),
        ("step", "step", "gru_fast.cpu"),
        ("peers", "infer", "gru_fast.cpu"),
        ("lost", "infer", "gru_fast.cpu"),
        ("sweep", "train", "gru_fast.cpu"),
        ("sample", "sample", "gru_fast.sampler"),
        ("loops", "sample", "gru_fast.sampler"),
        ("lost", "sample", "gru_fast.sampler"),
        ("features", "features", "gru_fast.GRU"),
        ("lm", "lm", "gru_fast.GRULanguageModel"),
    ],
)
def test_cells_from_a_busy_machine_are_marked(part, suite, provider):
    more = {"ratio_to_torch": 0.5, "baseline": "nn.GRU"}
    if suite == "features":
        more["feature"] = "one/infer"

    def shown(other_cpu):
        found = [
            some(suite, name, 1.0, other_cpu=other_cpu, **more)
            for name in ("nn.GRU", "nn.GRU.loop", "onnxruntime", provider)
        ]
        found[-1].median_s = 2.0
        machine = records.read(figures.RESULTS / "cpu-sample.json").machine
        return figures.render(records.Results(machine, found), [part])

    assert "busy" not in shown(0.04)
    assert re.search(r"(, busy \|)|(\| busy \|(.|\n)*\| 1 \|\n)", shown(0.06))
    assert "\n\nbusy: other processes took more than 5% of the CPU time meanwhile.\n" in shown(0.06)


def test_every_suite_has_its_section(quick_results):
    page = figures.report(quick_results)
    for name, (title, _) in figures.CONTENTS.items():
        assert (f"## {title}\n" in page) == (quick_results / name).exists()
    assert re.search(r"\| import of `torch` \| [\d.]+ m?s \|", page)
    assert "reset_mask/infer" in page and "`gru_fast.GRULanguageModel`" in page
    assert re.search(r"\| T of 32 to 128, 1 thread \| -?\d\.\d\d \|", page)
    assert re.search(r"\| infer, float32, 1 thread \| 8 \| \d+% \|", page)


def test_plots_of_every_suite(quick_results, tmp_path):
    pytest.importorskip("matplotlib")
    drawn = {path.name: path for path in plots.draw_all(quick_results, tmp_path)}
    assert set(drawn) == {"sweep-train.png", "sweep-infer.png", "scaling.png", "lm.png"}
    for plot in plots.PLOTS:
        if plot.file in drawn:
            assert texts(drawn[plot.file])[plots.DIGEST] == plots.digest(
                quick_results / plot.source
            )


def test_where_a_peer_is_faster(quick_results):
    found = records.read(quick_results / "cpu-sweep.json")
    first = next(r for r in found.records if r.provider == "gru_fast.cpu")
    theirs = next(r for r in found.records if r.provider == "nn.GRU" and r.case == first.case)
    for r in found.records:
        r.median_s, r.other_cpu = 1.0, None
    assert figures.figures_cpu.lost(found) == "None."
    theirs.median_s = 0.5
    assert "beside `nn.GRU` | **0.50x** |" in figures.figures_cpu.lost(found)


def test_instruction_sets_beside_a_best_one_that_is_wrong():
    case = {"I": 8, "H": 8, "B": 1, "T": 9, "L": 1, "V": 0}
    ratios = {"nn.GRU": 1.0, "gru_fast.cpu.baseline": 0.5, "gru_fast.cpu.avx2": 2.0}
    sets = [
        records.Record("features", name, "1", "cpu", "float32", 1, case, feature="isa/infer")
        for name in (*ratios, "gru_fast.cpu.avx512")
    ]
    for record in sets[:3]:
        record.ratio_to_torch = ratios[record.provider]
    sets[3].ratio_to_torch = 4.0
    found = records.Results({}, sets)
    head = "| I = H, B, T | baseline, 1 thread | avx2, 1 thread | avx512, 1 thread |"
    shown = figures.figures_cpu.isas(found).splitlines()
    assert shown[0] == head
    assert shown[2] == "| infer: 8, 1, 9 | 0.12 (**0.50x**) | 0.50 (2.00x) | 4.00x |"
    sets[3].ratio_to_torch, sets[3].error = None, "output is wrong"
    shown = figures.figures_cpu.isas(found).splitlines()
    assert shown[0] == head
    assert shown[2] == "| infer: 8, 1, 9 | - (**0.50x**) | - (2.00x) | output is wrong |"


def test_a_peer_that_is_wrong_or_fails_is_told_from_one_that_does_not_take_the_case():
    case = {"I": 8, "H": 8, "B": 1, "T": 9, "L": 1, "V": 0}
    numbers = {"median_s": 1.0, "p20_s": 1.0, "p80_s": 1.0, "rounds": 3, "parity": "ok"}
    found = [
        records.Record("infer", name, "7", "cpu", "float32", 1, case, **rest)
        for name, rest in {
            "gru_fast.cpu": numbers,
            "nn.GRU": numbers,
            "jax": {"parity": "wrong", "error": "too far off"},
            "keras": {"error": "it broke"},
            "onnx": numbers | {"median_s": 2.0, "p80_s": 2.0},
        }.items()
    ]
    found += [replace(r, suite="train") for r in found[:2]]
    found += [replace(found[2], suite="train")]
    lines = figures.figures_cpu.peers(records.Results({}, found)).splitlines()
    assert lines[0] == "| I = H, B, T | `jax` 7 | `keras` 7 | `onnx` 7 |"
    assert lines[2:] == [
        "| train 8, 1, 9, 1 thread | inexact | - | - |",
        "| infer 8, 1, 9, 1 thread | inexact | failed | 2.00x |",
    ]
