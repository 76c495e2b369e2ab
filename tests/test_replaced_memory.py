# SPDX-License-Identifier: Apache-2.0
"""Tensors whose memory is replaced or freed by others, during a call of the CPU kernels or before.

What reads freed memory dies, so the calls during which it happens run in a process of their own.
"""

import subprocess
import sys
import textwrap

import pytest
import torch

import gru_fast
from gru_fast import ops

pytestmark = pytest.mark.skipif(not ops.HAS_CPU_KERNELS, reason="no compiled CPU kernels")

IN_A_HANDLER = """
    import signal, torch, gru_fast
    torch.set_num_threads({threads})
    gru, x = gru_fast.GRU(64, 512), torch.randn(8000, 2, 64)
    lengths = torch.tensor([8000, 10])
    call = {call}
    with torch.no_grad():
        expected = call(gru, x.clone(), lengths.clone())
    handled = []

    def replace(number, frame):
        gru.bias_hh_l0.data = torch.full((1536,), 1e3)
        gru.weight_hh_l0.data = torch.zeros(1536, 512)
        x.data = torch.zeros(1)
        lengths.fill_(8000)
        handled.append([torch.full((1536,), 7e2) for _ in range(2000)])

    signal.signal(signal.SIGALRM, replace)
    signal.setitimer(signal.ITIMER_REAL, 0.03)
    with torch.no_grad():
        output = call(gru, x, lengths)
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert handled and x.numel() == 1, "the call was over before the signal"
    assert torch.equal(output, expected)
"""
CALLS = {
    "past the dispatcher": "lambda gru, x, lengths: gru(x, lengths=lengths)[0]",
    "the operator": "lambda gru, x, lengths: gru(x, lengths=lengths, "
    "reset_mask=torch.zeros(8000, 2).bool(), reset_state=torch.zeros(1, 2, 512))[0]",
}

ON_A_THREAD = """
    import threading, time, torch, gru_fast
    torch.set_num_threads(1)
    gru, x = gru_fast.GRU(512, 512), torch.randn(2, 1, 512)
    end = time.monotonic() + 1

    def learn():
        while time.monotonic() < end:
            for p in gru.parameters():
                p.data = torch.zeros_like(p)

    threading.Thread(target=learn).start()
    while time.monotonic() < end:
        with torch.set_grad_enabled({saves}):
            output, _ = gru(x)
"""


def run(program, **values):
    code = textwrap.dedent(program).format(**values)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr)


@pytest.mark.skipif(sys.platform == "win32", reason="setitimer")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("call", CALLS)
def test_a_signal_handler_replaces_what_a_call_reads(call, threads):
    """The call goes on with what it was given."""
    run(IN_A_HANDLER, call=CALLS[call], threads=threads)


@pytest.mark.parametrize("saves", [False, True])
def test_another_thread_replaces_the_weights(saves):
    run(ON_A_THREAD, saves=saves)


def freed(tensor):
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize("saves", [False, True])
@pytest.mark.parametrize("name", ["x", "h0", "lengths", "reset_mask"])
def test_memory_that_was_freed_before_a_call(name, saves):
    gru = gru_fast.GRU(3, 4)
    given = {
        "x": torch.randn(5, 2, 3), "h0": torch.zeros(1, 2, 4), "lengths": torch.tensor([5, 4]),
        "reset_mask": torch.zeros(5, 2, dtype=torch.bool),
    }  # fmt: skip
    freed(given[name])
    if name == "h0":
        del given["lengths"], given["reset_mask"]
    with torch.set_grad_enabled(saves), pytest.raises(RuntimeError, match=f"{name}: expected a .*"):
        gru(given.pop("x"), given.pop("h0"), **given)


@pytest.mark.parametrize("name", ["x", "output"])
def test_memory_that_was_freed_before_backward(name):
    x, gru = torch.randn(5, 2, 3), gru_fast.GRU(3, 4)
    output, _ = gru(x)
    total = output.relu().sum()
    freed({"x": x, "output": output}[name])
    with pytest.raises(RuntimeError, match=f"{name}: expected a tensor with memory"):
        total.backward()


def test_a_cell_whose_input_was_freed():
    with pytest.raises(RuntimeError, match="storage"):
        gru_fast.GRUCell(3, 4)(freed(torch.randn(2, 3)), torch.zeros(2, 4))
