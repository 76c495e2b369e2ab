# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels under Triton's interpreter, in processes of their own.

TRITON_INTERPRET=1 has to be set before triton is imported and forbids compiling, so the tests in
triton_support/interpreted*.py cannot share this process.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from versions import needs_triton_interpreter

TESTS = Path(__file__).parent

pytestmark = needs_triton_interpreter

SCANS = ("interpreted", "interpreted_edges", "interpreted_norm")


def run(files: tuple[str, ...], *arguments: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(
        [*command, *(f"triton_support/{file}.py" for file in files)],
        cwd=TESTS,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.parametrize("files", [SCANS, ("interpreted_generate",)], ids=["scans", "generate"])
def test_interpreted(files):
    run(files, "-m", "not slow")


@pytest.mark.slow
@pytest.mark.parametrize("group", ["cta", "grid", "step", "norm"])
def test_interpreted_widely(group):
    run(SCANS, "-m", "slow", "-k", group)


@pytest.mark.slow
def test_generate_interpreted_widely():
    run(("interpreted_generate",), "-m", "slow")
