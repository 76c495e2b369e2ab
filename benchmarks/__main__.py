# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks SUITE ...`, from the repository root."""

import signal
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from benchmarks import ROOT

OWN = {
    "all": "benchmarks.full_run",
    "claims": "benchmarks.claims",
    "features": "benchmarks.features.cli",
    "import": "benchmarks.importing",
    "layers": "benchmarks.features.cli",
    "lm": "benchmarks.features.cli",
    "report": "benchmarks.figures",
    "sample": "benchmarks.sample.cli",
    "scaling": "benchmarks.scaling",
    "sweep": "benchmarks.sweep",
}
"""Commands with arguments of their own, and where they are."""

EDITABLE = "python -m pip install --no-build-isolation -e '.[bench]'"


def complaint() -> str | None:
    """What is wrong with the installation, and the command that mends it; None if nothing is."""
    needs = f"from {ROOT}, with torch, setuptools>=77, pybind11 and ninja installed:\n  {EDITABLE}"
    if find_spec("torch") is None:
        return f"torch is not installed; install it, then gru_fast {needs}"
    spec = find_spec("gru_fast")
    origin = Path(spec.origin).parent if spec and spec.origin else None
    if origin != ROOT / "gru_fast":
        return f"gru_fast is not this checkout's but {origin}; run this {needs}"
    # The checkout hides a package that was installed without -e: it has kernels/ elsewhere.
    kernels = find_spec("gru_fast.kernels")
    if kernels is None or kernels.origin is None:
        return f"gru_fast is not installed editable, as the benchmarks need it; run this {needs}"
    # It hides the Python code only of another checkout that this environment is for.
    home = Path(kernels.origin).resolve().parents[1]
    if home != ROOT.resolve():
        return f"the kernels measured would be those of {home}; run this {needs}"
    return None


def main(arguments: list[str]) -> int:
    """Run; the exit code, after Ctrl-C a shell's for that."""
    try:
        return command(arguments)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def command(arguments: list[str]) -> int:
    """Choose what to run, and run it; the exit code."""
    if arguments[:1] == ["gpu"]:
        from benchmarks.gpu import cli as gpu_cli

        return gpu_cli.main(arguments[1:])
    wrong = complaint()
    if wrong is not None:
        print(f"python -m benchmarks: {wrong}", file=sys.stderr)
        return 2
    if arguments[:1] and arguments[0] in OWN:
        return int(import_module(OWN[arguments[0]]).main(*arguments[:1], arguments[1:]))
    from benchmarks import cli

    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
