# SPDX-License-Identifier: Apache-2.0
"""Imports go downwards only: the layers of the code, asserted on its syntax trees."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gru_fast"
KERNELS = ROOT / "kernels"
CSRC = sorted([*(ROOT / "csrc").rglob("*.cpp"), *(ROOT / "csrc").rglob("*.h")])

# From the top down; a module imports from its own layer or below, never in a circle.
LAYERS = [
    ["__init__"],
    ["cli", "cli_*", "commands", "__main__"],
    ["training", "checkpoint", "corpus", "trace", "beside_torch", "explain_generate"],
    ["onnx"],
    ["language_model", "sampling", "sampler", "tokenizers"],
    ["drawing", "gpu_sampling", "native_sampling"],
    ["packed", "sampled_model", "token_ids"],
    [
        "gru",
        "cell",
        "layer_norm_gru",
        "convert",
        "explain",
        "notations",
        "init",
        "patch",
        "prepack",
        "tbptt",
        "memory",
        "onnx_*",
    ],
    ["recurrent"],
    [
        "functional",
        "stack",
        "heads",
        "recurrence",
        "recurrence_*",
        "direct",
        "direct_*",
        "dropout",
        "gates",
    ],
    ["backends", "cudnn"],
    ["ops", "ops_*"],
    [
        "autocast",
        "checks",
        "errors",
        "files",
        "measured",
        "reference",
        "reference_*",
        "kernels",
    ],
    ["_C", "_version"],
]
LEAVES = {"checks", "errors", "measured", "reference", "_version"}
THIRD_PARTY = {"gru_fast", "torch", "numpy"}
ONNX = {"onnx", "onnxscript"}
BINDINGS = {"module.cpp", "packed_stack.h", "sampler.cpp", "sampler.h", "signals.cpp", "stream.cpp"}
OPTIONAL_IN_JOURNEYS = {"click", "matplotlib", "names", "safetensors", "tqdm"}


def rank(module: str) -> int:
    for number, patterns in enumerate(LAYERS):
        if any(fnmatch(module, pattern) for pattern in patterns):
            return number
    raise AssertionError(f"gru_fast/{module}.py has no place in LAYERS of {Path(__file__).name}")


def imports(path: Path, package: str) -> Iterator[tuple[str, bool]]:
    """Yield the absolute name of each import, and whether it runs when the module is imported."""
    tree = ast.parse(path.read_text(), str(path))
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    deferred = {id(inner) for function in functions for inner in ast.walk(function)}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, [package if node.level else "", node.module]))
            is_package = base == "gru_fast"
            names = [f"{base}.{alias.name}" for alias in node.names] if is_package else [base]
        for name in names:
            yield name, id(node) not in deferred


def modules() -> list[str]:
    return sorted(path.stem for path in PACKAGE.glob("*.py"))


def imported_modules(module: str) -> set[str]:
    """Return the gru_fast modules that a module imports; names of the package count as __init__."""
    known = {*modules(), "kernels", "_C"}
    found = set()
    for name, _ in imports(PACKAGE / f"{module}.py", "gru_fast"):
        top, *rest = name.split(".")
        if top == "gru_fast":
            found.add(rest[0] if rest and rest[0] in known else "__init__")
    return found


@pytest.mark.parametrize("module", modules())
def test_imports_go_downwards(module):
    upwards = {other for other in imported_modules(module) if rank(other) < rank(module)}
    assert not upwards, f"gru_fast/{module}.py imports {sorted(upwards)} from a layer above it"


def test_no_cycle():
    graph = {module: imported_modules(module) for module in modules()}
    tuple(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("module", sorted(LEAVES & set(modules())))
def test_leaves_import_nothing_of_the_package(module):
    assert all(rank(other) == rank(module) for other in imported_modules(module))


@pytest.mark.parametrize("module", modules())
def test_third_party_imports(module):
    allowed = sys.stdlib_module_names | THIRD_PARTY
    if rank(module) < rank("gru"):
        allowed = allowed | OPTIONAL_IN_JOURNEYS
    if module == "onnx" or module.startswith("onnx_"):
        allowed = allowed | ONNX
    tops = {name.split(".")[0] for name, _ in imports(PACKAGE / f"{module}.py", "gru_fast")}
    assert tops <= allowed


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.py")), ids=lambda path: path.stem)
def test_kernels_stand_alone(path):
    tops = {name.split(".")[0] for name, _ in imports(path, "")}
    assert tops - {""} <= sys.stdlib_module_names | {"torch", "triton"} | {
        sibling.stem for sibling in KERNELS.glob("*.py")
    }


def test_kernels_are_imported_on_first_use_only():
    for module in modules():
        for name, at_import in imports(PACKAGE / f"{module}.py", "gru_fast"):
            assert not (at_import and name.startswith("gru_fast.kernels")), module


def test_import_pulls_in_no_triton():
    code = """if True:
        import sys, torch
        before = set(sys.modules)
        import gru_fast
        new = set(sys.modules) - before
        print(*[name for name in new if name.startswith(("triton", "gru_fast.kernels"))])
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


@pytest.mark.parametrize("path", CSRC, ids=lambda path: path.name)
def test_torch_and_pybind11_meet_only_above_the_kernels(path):
    """pybind11 in the bindings, DLPack in one, torch in the rest of csrc/, none in csrc/cpu/."""
    headers = re.findall(r"^\s*#include\s*[<\"]([^>\"]+)", path.read_text(), re.MULTILINE)
    foreign = {header.split("/")[0] for header in headers} & {"torch", "ATen", "c10", "pybind11"}
    if path.name in BINDINGS:
        assert foreign == {"pybind11"}
    elif path.name == "exchange.cpp":
        assert [h for h in headers if h.startswith("ATen/")] == ["ATen/dlpack.h"]
        assert foreign == {"ATen"}
    else:
        assert foreign <= ({"torch"} if path.parent == ROOT / "csrc" else set())
