# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks claims`: every ratio of the pages is found and can be measured again."""

import re
from dataclasses import replace

import pytest

from repository_tools import load

claims = load("benchmarks.claims")
cli = load("benchmarks.cli")
figures = load("benchmarks.figures")
records = load("benchmarks.records")


OURS_ONLY = {"train", "infer", "step", "sample"}
"""Parts of a page in which every ratio is one of ours."""


@pytest.mark.parametrize("path", figures.CLAIMS, ids=lambda path: path.name)
def test_every_ratio_of_a_page_is_a_claim(path):
    """As many as the tables have cells with a ratio, block by block."""
    page = path.read_text("utf-8")
    blocks = [match for match in figures.BLOCK.finditer(page) if "/" not in match[2]]
    assert blocks
    for match, (_, results, parts) in zip(blocks, claims.committed(page), strict=True):
        if results.machine["gpu"] is None and set(parts) <= OURS_ONLY:
            shown = len(re.findall(r"\d(?:\.\d+)?x", match[0]))
            assert len(list(claims.claims_of(results, parts))) == shown, parts


@pytest.mark.parametrize("part", ["lm", "features"])
def test_ours_are_the_claims_of_named_rows(quick_results, part):
    results = records.read(quick_results / f"cpu-{part}.json")
    found = list(claims.claims_of(results, [part]))
    ours = [r.provider for r in results.records if r.provider.startswith("gru_fast.")]
    assert [claim.ours.provider for claim in found] == ours
    again = claims.again(found[:1], claims.timing.DRY, full=False)
    assert claims.judge(found[0], again).yours is not None


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("claims") / "small.json"
    arguments = ["train", "infer", "--shapes", "I3-H8-B2-T4", "--providers", "gru_fast.cpu"]
    assert cli.main([*arguments, "--quick", "--json", str(path)]) == 0
    return records.read(path)


@pytest.fixture
def a_page(small_run, tmp_path, monkeypatch):
    """Makes a page of that run, with its ratios multiplied by a factor."""
    return lambda factor: make_page(small_run, tmp_path, monkeypatch, factor)


def make_page(small_run, tmp_path, monkeypatch, factor):
    changed = [
        replace(r, ratio_to_torch=r.ratio_to_torch and r.ratio_to_torch * factor)
        for r in small_run.records
    ]
    records.Results(small_run.machine, changed).write(tmp_path / "small.json")
    page = tmp_path / "page.md"
    page.write_text("<!-- figures: small.json train -->\n<!-- end of figures -->\n")
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    monkeypatch.setattr(figures, "CLAIMS", (page,))


@pytest.mark.parametrize(("factor", "code", "word"), [(1e-3, 0, "kept"), (1e3, 1, "BROKEN")])
def test_a_run_of_claims(a_page, capsys, factor, code, word):
    a_page(factor)
    assert claims.main("claims", ["--quick"]) == code
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if "nn.GRU / gru_fast.cpu" in line]
    assert len(lines) == 2 and all(f"  {word}" in line for line in lines)
    assert f"2 of 2 claims tried: {2 if word == 'kept' else 0} kept" in out


def test_what_is_not_reached_is_not_broken(a_page, capsys):
    a_page(1000)
    assert claims.main("claims", ["--quick", "--budget", "-1"]) == 0
    out = capsys.readouterr().out
    assert "0 of 2 claims tried: 0 kept, 0 broken\n2 not run: no time left, --full" in out


def test_what_looks_broken_is_measured_once_more(a_page, capsys):
    a_page(1e3)
    (_, results, parts), *_ = claims.committed(figures.CLAIMS[0].read_text())
    efforts = [claims.timing.DRY, claims.timing.DRY]
    lines = []
    found = claims.verdicts(
        list(claims.claims_of(results, parts)), efforts, 60.0, False, lines.append
    )
    assert [v.broken for v in found] == [True, True]
    assert sum("BROKEN" in line for line in lines) == 4 and "\nonce more" in lines[2]


def test_an_error_of_ours_breaks_a_claim_and_one_of_a_peer_does_not():
    case = {"I": 1, "H": 1, "B": 1, "T": 1, "L": 1, "V": 0, "resets": 0.0}
    numbers = {"median_s": 1.0, "p20_s": 1.0, "p80_s": 1.0, "rounds": 3}
    ours, theirs = (
        records.Record("infer", name, "1", "cpu", "float32", 1, case, "ok", **numbers)
        for name in ("gru_fast.cpu", "nn.GRU")
    )
    claim = claims.Claim(ours, "nn.GRU", 1.0)
    assert claims.judge(claim, [ours, theirs]).word == "kept"
    failed = dict.fromkeys(numbers) | {"parity": "wrong", "error": "h_n is wrong"}
    assert claims.judge(claim, [replace(ours, **failed), theirs]).word == "BROKEN h_n is wrong"
    assert not claims.judge(claim, [ours, replace(theirs, **failed)]).broken
    assert "nn.GRU does not run here" in claims.judge(claim, [ours]).word
    # What the rounds spread is added to the tolerance, but does not hide the loss of a third.
    assert claims.judge(claim, [ours, theirs]).tolerance == claims.TOLERANCE == 0.15
    wide = [replace(r, p20_s=0.95, p80_s=1.05) for r in (ours, theirs)]
    assert claims.judge(claim, wide).tolerance == pytest.approx(0.25)
    wider = [replace(r, p20_s=0.5, p80_s=1.5) for r in (ours, theirs)]
    assert claims.judge(claim, wider).tolerance == claims.MOST_TOLERANCE < 1 / 3
    third_less = claims.judge(replace(claim, ratio=1.5), wider)
    assert third_less.broken and "     1.50x    1.05x    1.00x  BROKEN" in claims.line(third_less)


def test_loops_of_calls_draw_fewer_tokens_unless_all_are_asked_for():
    case = {"I": 8, "H": 8, "B": 1, "T": 2000, "L": 1, "V": 9, "resets": 0.0}
    numbers = {"median_s": 1.0, "p20_s": 1.0, "p80_s": 1.0, "rounds": 3}
    ours, loop = (
        claims.Claim(
            records.Record("sample", name, "1", "cpu", "float32", 1, case, "ok", **numbers),
            "nn.GRU.loop",
            3.0,
        )
        for name in ("gru_fast.generate", "gru_fast.loop")
    )
    # The baseline, which takes three times as long, draws a tenth, and so does our loop.
    assert claims.one_call_each([ours]) == pytest.approx(1 + 3 * claims.STEADY_TOKENS / 2000)
    assert claims.one_call_each([loop]) == pytest.approx(4 * claims.STEADY_TOKENS / 2000)
    for full in (False, True):
        found = claims.verdicts([ours, loop], [claims.timing.DRY], 60.0, full, lambda line: None)
        assert [v.yours is not None for v in found] == [True, True]
