# SPDX-License-Identifier: Apache-2.0
"""The C++ code below torch: programs of its own under sanitizers, and what its objects export."""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = {
    "arena_test": ("arena", "huge_pages"),
    "in_place_test": (),
    "parallel_test": (),
    "share_test": (),
    "team_test": ("team",),
    "kernels_test": ("kernels_baseline", "norm_baseline", "team"),
    "sampler_test": ("gru_stream", "sampler_isa", "sampler_baseline", "team"),
}
OBJECTS = ROOT / "build" / str(sysconfig.get_config_var("SOABI")) / "cpu"


def run(name: str, folder: Path, *flags: str, compiler="", emulator=()) -> None:
    """Compile tests/cpp/`name`.cpp and run it; skips without a compiler that knows the flags."""
    compiler = compiler or os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not compiler:
        pytest.skip("no C++ compiler")
    program, empty = folder / name, folder / "empty.cpp"
    flags = ("-std=c++20", "-O1", "-g", "-pthread", "-Wno-psabi", f"-I{ROOT / 'csrc'}", *flags)
    empty.write_text("int main() {}\n")
    if subprocess.run([compiler, *flags, empty, "-o", program]).returncode:
        pytest.skip(f"the compiler does not know {' '.join(flags)}")
    sources = [ROOT / "csrc" / "cpu" / f"{source}.cpp" for source in PROGRAMS[name]]
    sources.append(ROOT / "tests" / "cpp" / f"{name}.cpp")
    subprocess.run([compiler, *flags, *sources, "-o", program], check=True)
    done = subprocess.run([*emulator, program], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


@pytest.mark.parametrize(
    "name", ("arena_test", "in_place_test", "parallel_test", "share_test", "team_test")
)
def test_program(name: str, tmp_path: Path) -> None:
    run(name, tmp_path)


def test_weights_in_place_with_the_widest_registers(tmp_path: Path) -> None:
    run("in_place_test", tmp_path, "-march=native")


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ("address,undefined", "thread"))
@pytest.mark.parametrize("name", PROGRAMS)
def test_under_sanitizers(name: str, sanitizer: str, tmp_path: Path) -> None:
    recover = () if sanitizer == "thread" else ("-fno-sanitize-recover=undefined",)
    run(name, tmp_path, f"-fsanitize={sanitizer}", *recover)


@pytest.mark.slow
@pytest.mark.parametrize("name", ("in_place_test", "kernels_test", "sampler_test"))
def test_widest_registers_under_sanitizers(name: str, tmp_path: Path) -> None:
    """The same code for the registers of this machine, as a build with CXXFLAGS=-march=native."""
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-march=native")
    run(name, tmp_path, *flags)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flags"),
    [
        *((name, "-march=armv8-a") for name in PROGRAMS),
        ("sampler_test", "-march=armv8.2-a+dotprod"),
    ],
)
def test_on_an_emulated_arm_processor(name: str, flags: str, tmp_path: Path) -> None:
    """The portable kernels on another architecture, the samplers also with its dot products."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64 (qemu-user)")
    processor = "cortex-a72" if flags == "-march=armv8-a" else "max"
    emulation = (emulator, "-cpu", processor)
    run(name, tmp_path, "-static", flags, compiler=compiler, emulator=emulation)


def test_wide_instructions_stay_in_their_files() -> None:
    """A weak symbol of a file with wide instructions may replace that of the others.

    The linker keeps one of several definitions of an inline function, and does not know which of
    them every processor can run.
    """
    objects = [p for p in OBJECTS.glob("*.o") if "_avx" in p.stem or "_neon" in p.stem]
    if not objects or shutil.which("nm") is None:
        pytest.skip("no objects with wide instructions, or no nm")
    for path in objects:
        run = subprocess.run(
            ["nm", "--defined-only", path], capture_output=True, text=True, check=True
        )
        symbols = [line.split()[-2:] for line in run.stdout.splitlines()]
        assert len(symbols) > 0
        assert [name for kind, name in symbols if kind in "WVu"] == [], path.name
