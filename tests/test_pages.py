# SPDX-License-Identifier: Apache-2.0
"""The Python blocks of the README and of the pages run as they stand, each page's in order; their
links lead somewhere."""

import re
from pathlib import Path

import pytest

import gru_fast

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
PAGES = [
    page for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    if BLOCK.search(page.read_text("utf-8"))
]  # fmt: skip
ALL = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
NEEDS = {"onnx.md": ("onnx", "onnxruntime", "onnxscript")}


@pytest.fixture(autouse=True)
def no_patch_is_left():
    yield
    gru_fast.unpatch()


@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_run(page, tmp_path, monkeypatch):
    for package in NEEDS.get(page.name, ()):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    text = page.read_text("utf-8")
    blocks = list(BLOCK.finditer(text))
    namespace = {"__name__": page.name}
    for block in blocks:
        if page.name == "README.md":  # whose blocks are copied one by one
            namespace = {}
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], str(page), "exec"), namespace)


def anchors(page):
    """The names of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", ALL, ids=lambda page: page.name)
def test_links(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if not link.startswith(("http:", "https:")):
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_every_decision_is_on_the_page_that_lists_them():
    index = (ROOT / "docs" / "decisions.md").read_text("utf-8")
    for part in index.split("\n## ")[1:]:
        (page,) = re.findall(r"\]\((decisions/[\w-]+\.md)\)", part)
        text = (ROOT / "docs" / page).read_text("utf-8")
        titles = re.findall(r"^\*\*(.+?)[.:]?\*\*", text, re.DOTALL | re.MULTILINE)
        assert re.findall(r"^- (.+)$", part, re.MULTILINE) == [t.replace("\n", " ") for t in titles]
    named = re.findall(r"\]\(decisions/([\w-]+\.md)\)", index)
    assert sorted(named) == sorted(p.name for p in (ROOT / "docs" / "decisions").iterdir())
