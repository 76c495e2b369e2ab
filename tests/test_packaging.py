# SPDX-License-Identifier: Apache-2.0
"""What the built packages hold, and that the pure-Python one works."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import gru_fast

ROOT = Path(__file__).parents[1]
SOURCES = ["gru_fast", "kernels", "csrc"]
FOLDERS = [*SOURCES, "tests", "examples", "benchmarks", "docs", "scripts"]
METADATA = ["pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"]
FILES = [*METADATA, "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", ".clang-format"]
BUILT = shutil.ignore_patterns("*.so", "__pycache__")
PYTHON_FILES = {
    *(f"gru_fast/{path.name}" for path in (ROOT / "gru_fast").glob("*.py*")),
    *(f"gru_fast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")),
    "gru_fast/py.typed",
}


def build(tmp_path: Path, kind: str, **environment: str) -> Path:
    """Build a 'wheel' or 'sdist' from a copy of the sources; returns the file."""
    tree, out = tmp_path / "tree", tmp_path / "out"
    whole = kind == "sdist"
    for folder in FOLDERS if whole else SOURCES:
        shutil.copytree(ROOT / folder, tree / folder, ignore=BUILT)
    for file in FILES if whole else METADATA:
        shutil.copy(ROOT / file, tree)
    command = [sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", out, tree]
    run = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    (file,) = out.iterdir()
    return file


def contents(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def test_installed_metadata():
    assert metadata.version("gru_fast") == gru_fast.__version__
    info = metadata.metadata("gru_fast")
    assert info["License-Expression"] == "Apache-2.0"
    assert info["Requires-Python"] == ">=3.10"
    core = [line for line in metadata.requires("gru_fast") or [] if "extra ==" not in line]
    assert sorted(core) == ["numpy", "torch>=2.11"]
    extras = {"triton", "train", "plot", "bench", "bench-gpu", "onnx", "dev"}
    assert set(info.get_all("Provides-Extra")) == extras


def test_changelog_names_the_version():
    released = re.sub(r"\.dev\d+$", "", gru_fast.__version__)
    heading = "[Unreleased]" if released != gru_fast.__version__ else f"[{released}]"
    assert f"## {heading}" in (ROOT / "CHANGELOG.md").read_text()


def test_sdist_holds_every_source(tmp_path):
    """Whoever builds from it can also run the tests, the benchmarks and the Makefile."""
    with tarfile.open(build(tmp_path, "sdist")) as archive:
        members = archive.getmembers()
    names = {member.name.partition("/")[2] for member in members if member.isfile()}
    here = {
        str(path.relative_to(ROOT))
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in {".so", ".pyc"}
    }
    written = {"PKG-INFO", "setup.cfg"}
    egg_info = {name for name in names if name.startswith("gru_fast.egg-info/")}
    assert names - written - egg_info == here | set(FILES)


def test_pure_python_wheel(tmp_path):
    """No binary inside; it says once that the kernels are missing, and its numbers are nn.GRU's."""
    wheel = build(tmp_path, "wheel", GRU_FAST_SKIP_CPU_KERNELS="1")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert contents(wheel) == PYTHON_FILES

    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    assert "built with GRU_FAST_SKIP_CPU_KERNELS=1" in warning_of_a_call(tmp_path / "site")


def test_without_kernels_it_says_why(tmp_path):
    """Sources that hide an installed package from a Python started beside them; a broken binary."""
    shutil.copytree(ROOT / "gru_fast", tmp_path / "gru_fast", ignore=BUILT)
    (tmp_path / "csrc").mkdir()
    warning = warning_of_a_call(tmp_path)
    assert f"imported from its sources in {tmp_path}, where nothing is compiled" in warning
    binary = tmp_path / "gru_fast" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    binary.write_bytes(b"no library")
    assert "gru_fast._C cannot be loaded (" in warning_of_a_call(tmp_path)


def warning_of_a_call(site: Path) -> str:
    """The one warning of two calls of the package in a folder, whose numbers are nn.GRU's."""
    code = """if True:
        import warnings
        import gru_fast, torch
        assert gru_fast.__file__.startswith(SITE), gru_fast.__file__
        theirs, ours, x = torch.nn.GRU(5, 7), gru_fast.GRU(5, 7), torch.randn(4, 3, 5)
        ours.load_state_dict(theirs.state_dict())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                torch.testing.assert_close(ours(x), theirs(x))
        print(*[str(warning.message) for warning in caught], sep="\\n")
    """.replace("SITE", repr(str(site)))
    # -S: without the .pth files, through which an editable install would offer its own _C.
    path = os.pathsep.join([str(site), *filter(None, sys.path)])
    run = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        cwd=site,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    (warning,) = run.stdout.splitlines()
    return warning


def test_missing_compiler_names_the_way_out(tmp_path):
    environment = {**os.environ, "PATH": str(tmp_path), "CXX": ""}
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path)]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode != 0
    assert "GRU_FAST_SKIP_CPU_KERNELS=1" in run.stderr


@pytest.mark.slow
def test_compiled_wheel(tmp_path):
    wheel = build(tmp_path, "wheel")
    (binary,) = contents(wheel) - PYTHON_FILES
    assert re.fullmatch(r"gru_fast/_C\.cpython-\d+-.*\.so", binary)
