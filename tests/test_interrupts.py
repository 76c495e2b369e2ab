# SPDX-License-Identifier: Apache-2.0
"""Signals during a long call on the CPU; tests/cpp/kernels_test.cpp has the threads of a layer's.

A timer sends them. The kernels count a call at its end, so a handler that sees the old count runs
inside of it.
"""

import signal
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch.fx.experimental import symbolic_shapes  # noqa: F401 - else first imported by backward

import gru_fast
from gru_fast import ops

if ops.HAS_CPU_KERNELS:
    from gru_fast import _C

pytestmark = pytest.mark.skipif(not ops.HAS_CPU_KERNELS, reason="the pure-Python package")

FORMS = {
    "direct": gru_fast.GRU,
    "operators": partial(gru_fast.GRU, bidirectional=True),
    "norm": gru_fast.LayerNormGRU,
}


@contextmanager
def alarm(after_s: float, handler: Callable[..., Any]):
    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, after_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def long_calls(form: str):
    """Forward without and with gradients, and backward: each takes seconds."""
    module = FORMS[form](32, 256)
    x = torch.randn(1, 1, 32).expand(40_000, 2, 32)
    yield "infer", torch.no_grad()(lambda: module(x))
    yield "forward", lambda: module(x)
    loss = module(x)[0].sum()
    yield "backward", loss.backward


@pytest.mark.parametrize("form", FORMS)
def test_what_a_handler_raises_ends_the_call(form, threads):
    seen = []

    def handler(*_):
        seen.append(_C.launches())
        raise KeyboardInterrupt

    for kind, call in long_calls(form):
        before = _C.launches()
        with alarm(0.04, handler), pytest.raises(KeyboardInterrupt):
            call()
        assert seen.pop() == before, f"{kind}: the handler ran after the call"


def test_a_handler_may_call_the_module(threads):
    """A signal that raises nothing changes no bit of the call that it interrupts."""
    module = gru_fast.GRU(32, 256)
    x, other = torch.randn(40_000, 2, 32), torch.randn(3, 2, 32)
    seen = []
    with torch.no_grad():
        expected, alone = module(x)[0], module(other)[0]
        before = _C.launches()
        with alarm(0.04, lambda *_: seen.append((_C.launches(), module(other)[0]))):
            got = module(x)[0]
    assert torch.equal(got, expected)
    ((launches, inside),) = seen
    assert launches == before, "the handler ran after the call"
    assert torch.equal(inside, alone)


@pytest.mark.parametrize("frames", [True, False], ids=["frames", "tokens"])
def test_what_a_handler_raises_ends_a_push(frames):
    """The state is what it was before."""
    model = gru_fast.GRU(32, 256) if frames else gru_fast.GRULanguageModel(9, None, 256)
    stream = gru_fast.Stream(model)
    x = torch.randn(60_000, 32) if frames else torch.arange(60_000) % 9
    stream.push(x[:100])
    state, seen = stream.state, []

    def handler(*_):
        seen.append(_C.launches())
        raise KeyboardInterrupt

    before = _C.launches()
    with alarm(0.04, handler), pytest.raises(KeyboardInterrupt):
        stream.push(x)
    assert seen == [before], "the handler ran after the call"
    assert stream.state == state
    again = stream.push(x[:100])
    stream.state = state
    assert torch.equal(stream.push(x[:100]), again)
