# SPDX-License-Identifier: Apache-2.0
"""Compile csrc/ into gru_fast._C; everything static is in pyproject.toml.

Environment: GRU_FAST_SKIP_CPU_KERNELS=1 builds the pure-Python package; CXX names the compiler;
CXXFLAGS are appended to its flags; MAX_JOBS bounds the parallel compilations.
"""

import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sysconfig
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

TORCH_REQUIREMENT = "torch>=2.11"
TORCH_MINIMUM = (2, 11)
SKIP = "GRU_FAST_SKIP_CPU_KERNELS"
SKIP_HINT = (
    f"Set {SKIP}=1 to build the pure-Python package instead: "
    "it runs on the reference implementation, which is slower."
)

MACHINE = platform.machine().lower()
X86 = MACHINE in ("x86_64", "amd64")
# On macOS every processor has the dot products, and the compiler uses them unasked.
NEON_DOT = MACHINE in ("aarch64", "arm64") and platform.system() == "Linux"
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
AVX512_BF16 = ["-mavx512bf16"]
AVX512_DOT = ["-mavx512vnni", *AVX512_BF16]
X86_KERNELS = {
    "kernels_avx2.cpp": AVX2,
    "kernels_avx512.cpp": AVX2 + AVX512,
    "kernels_avx512_bf16.cpp": AVX2 + AVX512 + AVX512_BF16,
    "norm_avx2.cpp": AVX2,
    "norm_avx512.cpp": AVX2 + AVX512,
    "sampler_avx2.cpp": AVX2,
    "sampler_avx512.cpp": AVX2 + AVX512,
    "sampler_avx512_dot.cpp": AVX2 + AVX512 + AVX512_DOT,
}
NEON_DOT_KERNELS = {"sampler_neon_dot.cpp": ["-march=armv8.2-a+dotprod"]}
KERNEL_FLAGS = {**X86_KERNELS, **NEON_DOT_KERNELS}
FOR_C = {"gru_stream.cpp"}  # programs without Python compile it themselves
PYBIND11 = {"module.cpp", "sampler.cpp", "signals.cpp", "stream.cpp"}
DLPACK = {"exchange.cpp"}
PYTHON = {"direct.cpp", "direct_backward.cpp", "prepack.cpp"}
COMMON = [
    *("-O3", "-DNDEBUG", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-pthread"),
    *("-fno-math-errno", "-ffp-contract=fast", "-Wall", "-Wno-psabi", "-Icsrc"),
    *(["-DGRU_FAST_X86=1"] if X86 else []),
    *(["-DGRU_FAST_NEON_DOT=1"] if NEON_DOT else []),
]

# Tuned for most processors, newer GCC (16.2, not 12.2) multiplies and adds apart in some copies of
# a product, so that bits would depend on how many rows a call has.
FUSED = ["--param", "avoid-fma-max-bits=0"]


def find_torch() -> Path | None:
    """Return the folder of a usable torch, also that of the environment we are installing into.

    pip's build isolation hides that environment but runs the same interpreter, so the site folders
    are still the ones that `site` names. Headers and one library are all we need: no import.
    """
    sites = [*site.getsitepackages(), site.getusersitepackages()]
    spec = find_spec("torch") or PathFinder.find_spec("torch", sites)
    if spec is None or spec.origin is None:
        return None
    root = Path(spec.origin).parent
    version = re.search(r"__version__ = '(\d+)\.(\d+)", (root / "version.py").read_text())
    if version is None or tuple(map(int, version.groups())) < TORCH_MINIMUM:
        return None
    return root


def find_compiler() -> str:
    """Return the C++ compiler command, CXX if it is set; MSVC lacks the GNU vector extensions."""
    candidates = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    for command in filter(None, candidates if os.name == "posix" else []):
        if shutil.which(shlex.split(command)[0]):
            return command
    raise CompileError(f"gru_fast needs a C++20 compiler such as g++ >= 11. {SKIP_HINT}")


def if_known(flags: list[str]) -> list[str]:
    """Return the flags, or none if the compiler does not know them."""
    command = [*shlex.split(os.environ["CXX"]), *flags, "-Werror", "-fsyntax-only", "-xc++", "-"]
    run = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
    return [] if run.returncode else flags


def flags_of(source: Path, torch: Path) -> list[str]:
    """Return what a file is compiled with beyond COMMON; only the edges see foreign headers."""

    def system(*folders: str) -> list[str]:
        return [flag for folder in folders for flag in ("-isystem", folder)]

    python, torch_headers = sysconfig.get_path("include"), str(torch / "include")
    if source.name in PYBIND11:
        import pybind11

        return system(pybind11.get_include(), python)
    if source.name in PYTHON:
        return system(python)
    if source.name in DLPACK:
        return system(python, torch_headers)
    if source.parent.name == "csrc":
        return ["-DTORCH_TARGET_VERSION=0x020b000000000000", *system(torch_headers)]
    return KERNEL_FLAGS.get(source.name, [])


class BuildExt(build_ext):
    """Compile with ninja: in parallel, flags per file, only what an edit touches; then link."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # An editable install would compile everything again in a fresh temporary folder.
        self.build_temp = os.path.join("build", sysconfig.get_config_var("SOABI"))

    def run(self) -> None:
        os.environ["CXX"] = find_compiler()
        super().run()

    def build_extension(self, ext: Extension) -> None:
        torch = find_torch()
        if torch is None:
            raise CompileError(f"{TORCH_REQUIREMENT} is not installed here. {SKIP_HINT}")
        objects = self.compile_objects([Path(source) for source in ext.sources], torch)
        ext.sources, ext.extra_objects, ext.depends = [], objects, objects
        ext.library_dirs, ext.libraries = [str(torch / "lib")], ["torch_cpu"]
        super().build_extension(ext)

    def compile_objects(self, sources: list[Path], torch: Path) -> list[str]:
        """Write build.ninja and run it; returns the object files."""
        import ninja
        from ninja.ninja_syntax import Writer

        build = Path(self.build_temp)
        build.mkdir(parents=True, exist_ok=True)
        flags = [*COMMON, *if_known(FUSED), *shlex.split(os.environ.get("CXXFLAGS", ""))]
        objects = []
        with open(build / "build.ninja", "w") as file:
            graph = Writer(file, width=100)
            graph.variable("builddir", str(build))
            command = [os.environ["CXX"], shlex.join(flags), "$flags -MD -MF $out.d -c $in -o $out"]
            graph.rule("cxx", " ".join(command), depfile="$out.d", deps="gcc", description="$in")
            for source in sources:
                objects.append(str(build / source.with_suffix(".o").relative_to("csrc")))
                variables = {"flags": shlex.join(flags_of(source, torch))}
                graph.build(objects[-1], "cxx", str(source), variables=variables)
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        run = [os.path.join(ninja.BIN_DIR, "ninja"), "-f", str(build / "build.ninja"), *jobs]
        if subprocess.run(run).returncode:
            raise CompileError(f"compiling csrc/ failed, see above. {SKIP_HINT}")
        return objects


def arguments() -> dict:
    """Return what setup() needs for the extension; nothing for the pure-Python package."""
    if os.environ.get(SKIP, "0") not in ("", "0"):
        return {}
    built = {**(X86_KERNELS if X86 else {}), **(NEON_DOT_KERNELS if NEON_DOT else {})}
    left_out = FOR_C | (KERNEL_FLAGS.keys() - built.keys())
    sources = [p for p in sorted(Path("csrc").rglob("*.cpp")) if p.name not in left_out]
    extension = Extension("gru_fast._C", [str(source) for source in sources], language="c++")
    # Without torch the build front end fetches it into its own environment, then runs us again.
    missing = {} if find_torch() else {"setup_requires": [TORCH_REQUIREMENT]}
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExt}, **missing}


setup(**arguments())
