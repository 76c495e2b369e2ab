# SPDX-License-Identifier: Apache-2.0
"""Large results ask for large pages, unless GRU_FAST_HUGE_PAGES=0."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gru_fast import ops

# The flags of the memory mapping that the middle of an output of 8 MB lies in.
SCRIPT = """
import torch
import gru_fast

with torch.no_grad():
    output, _ = gru_fast.GRU(4, 64)(torch.randn(1024, 32, 4))
middle, within = output.data_ptr() + 4 * output.numel() // 2, False
for line in open("/proc/self/smaps"):
    first = line.split()[0]
    if "-" in first and not first.endswith(":"):
        begin, end = (int(bound, 16) for bound in first.split("-"))
        within = begin <= middle < end
    elif within and first == "VmFlags:":
        print(line)
"""


@pytest.mark.skipif(not ops.HAS_CPU_KERNELS, reason="built without CPU kernels")
@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(),
    reason="needs a Linux kernel with transparent huge pages",
)
@pytest.mark.parametrize("setting", [None, "1", "0"])
def test_large_results_ask_for_large_pages(setting):
    environment = {k: v for k, v in os.environ.items() if k != "GRU_FAST_HUGE_PAGES"}
    if setting is not None:
        environment["GRU_FAST_HUGE_PAGES"] = setting
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "VmFlags:" in run.stdout.split(), "the mapping of the output was not found"
    assert ("hg" in run.stdout.split()) == (setting != "0"), run.stdout
