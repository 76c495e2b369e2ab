# SPDX-License-Identifier: Apache-2.0
"""Calls leave no memory behind: what malloc has handed out is the same after thousands of them."""

import ctypes
import gc

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import gru_fast

CALLS = 1000


class Info(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
        ).split()
    ]


try:
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Info
except (OSError, AttributeError):
    pytest.skip("mallinfo2 is a function of glibc 2.33 and newer", allow_module_level=True)


def in_use() -> int:
    gc.collect()
    info = mallinfo2()
    return info.uordblks + info.hblkhd


X, LENGTHS = torch.randn(4, 3, 8), torch.tensor([4, 2, 1])
PACKED = pack_padded_sequence(X, LENGTHS)
GRU = gru_fast.GRU(8, 16)
BOTH = gru_fast.GRU(8, 16, 2, bidirectional=True)
HEADS = gru_fast.GRU(8, 16, 2, num_heads=2)
NORM = gru_fast.LayerNormGRU(8, 16)
CELL = gru_fast.GRUCell(8, 16)
MODEL = gru_fast.GRULanguageModel(10, None, 16)


def backward(module, x=X, **options):
    module.zero_grad()
    output, _ = module(x, **options)
    (output.data if isinstance(output, PackedSequence) else output).sum().backward()


@torch.no_grad()
def prepacked():
    with gru_fast.prepacked(GRU):
        GRU(X)


def refused():
    with pytest.raises(RuntimeError):
        torch.ops.gru_fast.layer(
            X, X, X, X, None, None, None, None, None, None, "lstm", [False], False
        )


PROGRAMS = {
    "inference": lambda: torch.no_grad()(BOTH)(X),
    "inference by the op": lambda: torch.no_grad()(HEADS)(X),
    "inference of packed rows": lambda: torch.no_grad()(BOTH)(PACKED),
    "training": lambda: backward(BOTH),
    "training by the op": lambda: backward(HEADS),
    "training of packed rows": lambda: backward(BOTH, PACKED),
    "lengths": lambda: backward(BOTH, lengths=LENGTHS),
    "lengths by the op": lambda: backward(HEADS, lengths=LENGTHS),
    "layer norm": lambda: backward(NORM),
    "a step of a cell": lambda: CELL(X[0]).sum().backward(),
    "a language model": lambda: MODEL.loss(torch.tensor([[1, 2, 3]])).backward(),
    "generate": lambda: MODEL.generate(max_new_tokens=3),
    "prepacked": prepacked,
    "a stream": lambda: gru_fast.Stream(GRU).step(torch.zeros(8)),
    "an error": refused,
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_call_leaves_memory_behind(name):
    program = PROGRAMS[name]
    for _ in range(200):
        program()
    before = in_use()
    for _ in range(CALLS):
        program()
    assert (in_use() - before) / CALLS < 8
