# SPDX-License-Identifier: Apache-2.0
"""The Python blocks of pages run as they stand, each page's in order."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
NEEDS = {
    "onnx.md": ("onnx", "onnxruntime", "onnxscript"),
    "patch.md": (),
    "initialisation.md": (),
    "ensembles-and-heads.md": (),
}


@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning")
@pytest.mark.parametrize("page", NEEDS)
def test_blocks_run(page, tmp_path, monkeypatch):
    for package in NEEDS[page]:
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    text = (DOCS / page).read_text("utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    assert blocks
    namespace = {"__name__": page}
    for block in blocks:
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], str(DOCS / page), "exec"), namespace)
