# SPDX-License-Identifier: Apache-2.0
"""The README's first Python block runs as it stands; its figures are the committed runs'."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from repository_tools import load

figures = load("benchmarks.figures")

SCRIPT = Path(__file__).parents[1] / "scripts" / "run_readme.py"


def test_first_block_prints_parity_and_speed():
    run = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=True)
    match = re.fullmatch(r"largest difference (\S+), speed-up [\d.]+x\n", run.stdout)
    assert match, run.stdout
    assert float(match[1]) < 1e-5


@pytest.mark.parametrize("page", figures.PAGES, ids=lambda page: page.name)
def test_figures_are_those_of_the_committed_results(page):
    text = page.read_text("utf-8")
    assert figures.BLOCK.search(text)
    assert figures.with_figures(text) == text


def test_figures_that_were_typed_are_found():
    text = figures.PAGES[0].read_text("utf-8")
    block = figures.BLOCK.search(text)
    assert block is not None
    number = re.search(r"\d\.\d\dx", block[0])
    assert number is not None
    start = block.start() + number.start()
    typed = text[:start] + "9" + text[start:]
    assert figures.with_figures(typed) == text


def test_what_explain_quotes_is_the_committed_results():
    table = load("benchmarks.measured")
    assert table.PATH.read_text("utf-8") == table.source(figures.RESULTS)
