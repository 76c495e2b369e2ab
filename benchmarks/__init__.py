# SPDX-License-Identifier: Apache-2.0
"""Parity and speed of gru_fast beside its peers: `python -m benchmarks`, from the repository root.

A tool of the repository, not installed. docs/benchmarks.md has the method.
"""

from pathlib import Path

ROOT = Path(__file__).parents[1]
