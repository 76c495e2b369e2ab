# SPDX-License-Identifier: Apache-2.0
"""Launches as they arrive at the driver, in a process where nothing else stands for CUDA.

Between Triton's Python and the driver is a launcher in C, which Triton compiles on the machine. The
tests in triton_support/launcher.py let it call a libcuda that writes down what it is given.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent


def test_launcher(tmp_path):
    triton = find_spec("triton")
    if triton is None or triton.origin is None:
        pytest.skip("triton is not installed: pip install triton")
    headers = Path(triton.origin).parent / "backends" / "nvidia" / "include"
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    python = Path(sysconfig.get_path("include"), "Python.h")
    if not (compiler and (shutil.which("gcc") or shutil.which("clang")) and python.exists()):
        pytest.skip("no C and C++ compilers with Python's headers")
    if not (headers / "cuda.h").exists():
        pytest.skip("this Triton comes without cuda.h")
    if torch.cuda.is_available():
        pytest.skip("PyTorch may have loaded the libcuda of the GPU")
    library = tmp_path / "libcuda.so.1"
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", f"-I{headers}"]
    source = TESTS / "cpp" / "cuda_stand_in.cpp"
    subprocess.run([compiler, *flags, source, "-o", library], check=True)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "triton_support/launcher.py",
        ],
        cwd=TESTS,
        env=os.environ
        | {"CUDA_STAND_IN": str(library), "TRITON_CACHE_DIR": str(tmp_path / "triton")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
