# SPDX-License-Identifier: Apache-2.0
"""Samplers on more threads than there are sequences."""

import subprocess
import sys

import pytest

pytest.importorskip("gru_fast._C", reason="gru_fast was built without its CPU kernels")

# In a process of its own: torch keeps threads that it has started.
PROGRAM = """
import torch
import gru_fast

torch.manual_seed(0)
model = gru_fast.GRULanguageModel(65, 256, 256)
sampler = gru_fast.Sampler(model)
found = []
for threads in (1, 72):
    torch.set_num_threads(threads)
    found.append(
        sampler.generate(
            max_new_tokens=6, num_return_sequences=66, seed=1, return_dict_in_generate=True
        )
    )
one, many = found
assert torch.equal(one.sequences, many.sequences)
assert torch.equal(one.hidden, many.hidden)
"""


def test_a_row_is_refilled_when_every_thread_is_done_with_it() -> None:
    """The units of 64 rows are split, and two sequences wait; all that run end together."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
