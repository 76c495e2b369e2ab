# SPDX-License-Identifier: Apache-2.0
"""The samplers below Python and torch: examples/stream.c, and the kernels under sanitizers."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from gru_fast import GRU, Stream

_C = pytest.importorskip("gru_fast._C", reason="gru_fast was built without its CPU kernels")

ROOT = Path(__file__).parents[1]
SOURCES = ("gru_stream", "sampler_isa", "sampler_baseline", "team")


@pytest.mark.slow
def test_the_c_program_gives_the_layers_bits(tmp_path):
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    c_compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    if compiler is None or c_compiler is None:
        pytest.skip("no compiler")
    objects = [tmp_path / f"{name}.o" for name in (*SOURCES, "stream")]
    flags = ["-O2", "-std=c++20", "-ffp-contract=fast", "-fno-math-errno", "-Wall", "-Wno-psabi"]
    for name, made in zip(SOURCES, objects, strict=False):
        source = ROOT / "csrc" / "cpu" / f"{name}.cpp"
        subprocess.run([compiler, *flags, "-c", source, "-o", made], check=True)
    c_flags = ["-O1", "-std=c99", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc' / 'cpu'}"]
    example = ROOT / "examples" / "stream.c"
    subprocess.run([c_compiler, *c_flags, "-c", example, "-o", objects[-1]], check=True)
    program = tmp_path / "stream"
    subprocess.run([compiler, "-pthread", *objects, "-o", program], check=True)

    gru, x = GRU(10, 37, 2), torch.randn(50, 10)
    weights = tmp_path / "weights.bin"
    weights.write_bytes(b"".join(w.detach().numpy().tobytes() for w in gru._flat_weights))
    run = subprocess.run(
        [program, weights, "10", "37", "2"], input=x.numpy().tobytes(), capture_output=True
    )
    assert run.returncode == 0, run.stderr
    states = torch.frombuffer(bytearray(run.stdout), dtype=torch.float32).view(50, 37)
    before = _C.cpu_isa()
    _C.set_cpu_isa("baseline")
    try:
        assert torch.equal(states, Stream(gru).push(x))
    finally:
        _C.set_cpu_isa(before)
    assert subprocess.run([program, weights, "10", "38", "2"], capture_output=True).returncode == 1


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ("address,undefined", "thread"))
def test_samplers_under_sanitizers(sanitizer, tmp_path):
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    flags = ["-std=c++20", "-O1", "-g", "-pthread", "-Wno-psabi", f"-fsanitize={sanitizer}"]
    program = tmp_path / "sampler_test"
    empty = tmp_path / "empty.cpp"
    empty.write_text("int main() {}\n")
    if subprocess.run([compiler, *flags, empty, "-o", program]).returncode:
        pytest.skip(f"the compiler has no {sanitizer} sanitizer")
    sources = [ROOT / "csrc" / "cpu" / f"{name}.cpp" for name in SOURCES[1:]]
    sources.append(ROOT / "tests" / "cpp" / "sampler_test.cpp")
    subprocess.run([compiler, *flags, f"-I{ROOT / 'csrc'}", *sources, "-o", program], check=True)
    run = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert (run.returncode, run.stdout) == (0, "ok\n"), run.stderr
