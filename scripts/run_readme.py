# SPDX-License-Identifier: Apache-2.0
"""Run the first Python block of README.md: parity and speed beside nn.GRU on this machine."""

import re
from pathlib import Path


def first_block() -> str:
    """Return the source of the first Python block."""
    text = (Path(__file__).parents[1] / "README.md").read_text()
    match = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert match is not None, "README.md has no Python block"
    return match.group(1)


if __name__ == "__main__":
    exec(compile(first_block(), "README.md", "exec"))
