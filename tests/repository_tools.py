# SPDX-License-Identifier: Apache-2.0
"""Modules of the repository that are not installed."""

import subprocess
import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]


def load(name: str) -> ModuleType:
    """A module of a folder beside gru_fast/, without putting the repository root on the path."""
    top = name.partition(".")[0]
    if top not in sys.modules:
        init = ROOT / top / "__init__.py"
        spec = spec_from_file_location(top, init, submodule_search_locations=[str(init.parent)])
        assert spec is not None and spec.loader is not None
        sys.modules[top] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[top])
    return import_module(name)


def load_script(name: str) -> ModuleType:
    """scripts/<name>.py, not run."""
    spec = spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Python with these arguments in the root of the repository."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)
