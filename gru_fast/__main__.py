# SPDX-License-Identifier: Apache-2.0
"""`python -m gru_fast`: the command line."""

import importlib
import sys


def main() -> None:
    """Run `gru_fast.cli`, or say which packages are missing."""
    missing = []
    for name in ("click", "safetensors", "tqdm"):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            missing.append(name)
    if missing:
        print(
            f"gru-fast needs {', '.join(missing)}: pip install 'gru_fast[train]'", file=sys.stderr
        )
        sys.exit(2)
    from gru_fast.cli import cli

    cli(prog_name="gru-fast")


if __name__ == "__main__":
    main()
