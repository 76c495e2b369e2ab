# SPDX-License-Identifier: Apache-2.0
"""docs/api.md has every public name, and no other."""

import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

import gru_fast

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "api.md").read_text("utf-8")
NAMES = set(re.findall(r"`(\w+)`", TEXT))


def test_every_name_of_the_package():
    named = set(re.findall(r"`gru_fast\.(\w+)`", TEXT))
    assert named - {"onnx"} == set(gru_fast.__all__)


@pytest.mark.parametrize("module", ["functional", "init", "notations", "onnx"])
def test_every_name_of_its_modules(module):
    if module == "onnx" and not (find_spec("onnx") and find_spec("onnxscript")):
        pytest.skip("onnx or onnxscript is not installed")
    assert set(import_module(f"gru_fast.{module}").__all__) <= NAMES


def test_variables_of_the_environment():
    sources = [ROOT / "setup.py", *(ROOT / "csrc").rglob("*.cpp"), *ROOT.glob("gru_fast/*.py")]
    texts = [path.read_text("utf-8") for path in sources]
    read = {
        name
        for text in texts
        if "getenv" in text or "environ" in text
        for name in re.findall(r'"(GRU_FAST_\w+)"', text)
    }
    assert {name for name in NAMES if name.startswith("GRU_FAST_")} == read
