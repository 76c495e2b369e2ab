# SPDX-License-Identifier: Apache-2.0
"""The streams for C, without Python and torch: examples/stream.c."""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

from gru_fast import GRU, Stream

_C = pytest.importorskip("gru_fast._C", reason="gru_fast was built without its CPU kernels")

ROOT = Path(__file__).parents[1]
SOURCES = ("gru_stream", "sampler_isa", "sampler_baseline", "team")


def compilers():
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    c_compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    if compiler is None or c_compiler is None:
        pytest.skip("no compiler")
    return compiler, c_compiler


def compiled(tmp_path, name):
    """The object of a file of csrc/cpu/, for any processor."""
    compiler, _ = compilers()
    made = tmp_path / f"{name}.o"
    flags = ["-O2", "-std=c++20", "-ffp-contract=fast", "-fno-math-errno", "-Wall", "-Wno-psabi"]
    source = ROOT / "csrc" / "cpu" / f"{name}.cpp"
    subprocess.run([compiler, *flags, "-c", source, "-o", made], check=True)
    return made


def link(tmp_path, objects):
    """The program of these objects and of the example."""
    compiler, c_compiler = compilers()
    example, program = tmp_path / "stream.o", tmp_path / "stream"
    flags = ["-O1", "-std=c99", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc' / 'cpu'}"]
    source = ROOT / "examples" / "stream.c"
    subprocess.run([c_compiler, *flags, "-c", source, "-o", example], check=True)
    subprocess.run([compiler, "-pthread", *objects, example, "-o", program], check=True)
    return program


def assert_is_the_stream(program, tmp_path, isa):
    """The bits of `Stream` on an instruction set; what does not fit is refused."""
    gru, x = GRU(10, 37, 2), torch.randn(50, 10)
    weights = tmp_path / "weights.bin"
    weights.write_bytes(b"".join(w.detach().numpy().tobytes() for w in gru._flat_weights))
    env = {**os.environ, "GRU_FAST_CPU_ISA": isa}
    call = [program, weights, "10", "37", "2"]
    run = subprocess.run(call, input=x.numpy().tobytes(), capture_output=True, env=env)
    assert run.returncode == 0, run.stderr
    states = torch.frombuffer(bytearray(run.stdout), dtype=torch.float32).view(50, 37)
    before = _C.cpu_isa()
    _C.set_cpu_isa(isa)
    try:
        assert torch.equal(states, Stream(gru).push(x))
    finally:
        _C.set_cpu_isa(before)
    call[3] = "38"
    assert subprocess.run(call, capture_output=True, env=env).returncode == 1


@pytest.mark.slow
def test_the_c_program_gives_the_streams_bits(tmp_path):
    objects = [compiled(tmp_path, name) for name in SOURCES]
    assert_is_the_stream(link(tmp_path, objects), tmp_path, "baseline")


def test_the_c_program_on_every_instruction_set(tmp_path):
    """Linked with the objects of the extension: csrc/cpu/ needs neither torch nor Python."""
    built = ROOT / "build" / str(sysconfig.get_config_var("SOABI")) / "cpu"
    # Not those that an older build may have left: the extension has no use for them.
    sources = {path.stem for path in (ROOT / "csrc" / "cpu").glob("*.cpp")} - {"gru_stream"}
    objects = sorted(path for path in built.glob("*.o") if path.stem in sources)
    if not objects:
        pytest.skip("the extension was not built here")
    program = link(tmp_path, [*objects, compiled(tmp_path, "gru_stream")])
    for isa in _C.cpu_isas():
        assert_is_the_stream(program, tmp_path, isa)
    call = [program, tmp_path / "weights.bin", "10", "37", "2"]
    env = {**os.environ, "GRU_FAST_CPU_ISA": "none"}
    run = subprocess.run(call, capture_output=True, env=env, text=True)
    assert (run.returncode, run.stderr) == (1, "refused\n")
