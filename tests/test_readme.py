# SPDX-License-Identifier: Apache-2.0
"""The first Python block of the README runs as it stands."""

import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "scripts" / "run_readme.py"


def test_first_block_prints_parity_and_speed():
    run = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=True)
    match = re.fullmatch(r"largest difference (\S+), speed-up [\d.]+x\n", run.stdout)
    assert match, run.stdout
    assert float(match[1]) < 1e-5
