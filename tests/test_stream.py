# SPDX-License-Identifier: Apache-2.0
"""`Stream`: steps, pushes, state as bytes, threads, no allocation."""

import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gru_fast import GRU, GRULanguageModel, Sampler, Stream, packed

CELLS = ("reset_after", "reset_before", "no_reset")
# One unit; odd sizes; longer than a block of the sum; multiples of every register.
SIZES = ((3, 1, 3), (5, 19, 2), (300, 270, 1), (64, 128, 2))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_float32_is_bitwise_the_layer(sampler_isa, cell, size):
    frame, H, layers = size
    gru = GRU(frame, H, layers, cell=cell, bias=frame != 5)
    x = torch.randn(67, frame)
    with torch.no_grad():
        output, h_n = gru(x)
    stream = Stream(gru)
    assert torch.equal(stream.push(x), output)
    assert stream.state == h_n.numpy().tobytes()


@pytest.mark.parametrize("weights", packed.WEIGHTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_push_is_bitwise_the_steps(sampler_isa, weights, size):
    frame, H, layers = size
    stream = Stream(GRU(frame, H, layers), weights)
    x = torch.randn(130, frame) * 3
    pushed = stream.push(x)
    end = stream.state
    stream.reset()
    stepped = torch.stack([stream.step(row).clone() for row in x])
    assert torch.equal(stepped, pushed) and stream.state == end
    stream.reset()
    pieces = [stream.push(piece) for piece in x.split([1, 64, 0, 65])]
    assert torch.equal(torch.cat(pieces), pushed) and stream.state == end


def rounded(rows, weights, scale=None):
    """Rows as the products see them: bfloat16, or 127 steps up to the largest value or `scale`."""
    if weights == "bfloat16":
        return rows.to(torch.bfloat16).to(torch.float64)
    scale = rows.abs().amax(-1, keepdim=True) if scale is None else torch.tensor(scale)
    unit = torch.where(scale > 0, scale, 1.0) / 127
    return (rows / unit).round() * unit


def step_with_rounded_products(gru, x, states, weights):
    """One step of the layers in float64, with both sides of every product rounded."""
    H, per, flat = gru.hidden_size, 4, gru._flat_weights
    scale, result = None, []
    for layer, h in enumerate(states):
        w_ih, w_hh, b_ih, b = (t.detach().double() for t in flat[layer * per : (layer + 1) * per])
        w_ih, w_hh = rounded(w_ih, weights), rounded(w_hh, weights)
        gx = w_ih @ rounded(x, weights, scale) + b_ih
        gh = w_hh @ rounded(h, weights, 1.0) + b
        if gru.cell == "no_reset":
            z, n = (gx + gh).chunk(2)
            z = z.sigmoid()
        else:
            r, z = (gx + gh)[: 2 * H].sigmoid().chunk(2)
            n = gx[2 * H :]
            if gru.cell == "reset_before":
                n = n + w_hh[2 * H :] @ rounded(r * h, weights, 1.0) + b[2 * H :]
            else:
                n = n + r * gh[2 * H :]
        n = n.tanh()
        x, scale = n + z * (h - n), 1.0
        result.append(x)
    return torch.stack(result)


@pytest.mark.parametrize("weights", ("bfloat16", "int8"))
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_narrow_weights_are_the_layer_with_rounded_products(sampler_isa, weights, cell, size):
    frame, H, layers = size
    gru = GRU(frame, H, layers, cell=cell)
    stream = Stream(gru, weights)
    states, errors = torch.zeros(layers, H), []
    frames = torch.randn(20, frame)
    for x in frames:
        expected = step_with_rounded_products(gru, x.double(), states.double(), weights)
        stream.step(x)
        states = torch.frombuffer(bytearray(stream.state), dtype=torch.float32).view(layers, H)
        errors.append((states - expected).abs())
    error = torch.stack(errors)
    # Values within float32 rounding of the middle of two steps may be rounded the other way.
    one_step = {"bfloat16": 2**-8, "int8": 1 / 127}[weights] * float(frames.abs().max())
    assert error.max() < 4 * one_step * float(gru.weight_ih_l0.detach().abs().max())
    assert (error < 2e-6).double().mean() > 0.85


def test_tokens(sampler_isa):
    lm = GRULanguageModel(11, 7, 19, 2)
    tokens = torch.tensor([[3, 1, 4, 10, 0]])
    inputs = lm.teacher_forcing(tokens)
    with torch.no_grad():
        logits, _ = lm(inputs)
    stream = Stream(lm)
    pushed = stream.push(inputs[0])
    torch.testing.assert_close(pushed, logits[0])
    stream.reset()
    stepped = torch.stack([stream.step(t).clone() for t in inputs[0].tolist()])
    assert torch.equal(stepped, pushed)
    assert torch.equal(Stream(Sampler(lm)).push(inputs[0].tolist()), pushed)
    for dtype in (np.uint8, np.int16, np.uint64):
        assert torch.equal(Stream(lm).push(inputs[0].numpy().astype(dtype)), pushed)
    with pytest.raises(ValueError, match=f"token: expected 0 to 11, got {2**64 - 1}"):
        stream.push(np.array([2**64 - 1], np.uint64))


def between(*shape):
    """Values in the middle of two neighbours in bfloat16, of which the even one has to be taken."""
    bits = torch.randn(*shape).bfloat16().view(torch.int16).int()
    return ((bits << 16) | 0x8000).view(torch.float32)


@torch.no_grad()
def test_bfloat16_rounds_to_even(sampler_isa):
    gru, even, x = GRU(9, 21), GRU(9, 21), between(1, 9)
    for name, weight in gru.named_parameters():
        if name.startswith("weight"):
            weight.copy_(between(*weight.shape))
            even.get_parameter(name).copy_(weight.bfloat16())
        else:  # a bias is not rounded
            even.get_parameter(name).copy_(weight)
    expected = Stream(even, "bfloat16").push(x.bfloat16().float())
    assert torch.equal(Stream(gru, "bfloat16").push(x), expected)


@pytest.mark.parametrize("weights", packed.WEIGHTS)
def test_state_is_saved_and_restored(weights):
    gru = GRU(4, 21, 2)
    x = torch.randn(10, 4)
    one, other = Stream(gru, weights), Stream(gru, weights)
    one.push(x[:5])
    other.state = one.state
    assert other.state == one.state and len(one.state) == 2 * 21 * 4
    for form in (bytearray, memoryview, lambda state: np.frombuffer(state, np.float32)):
        other.state = form(one.state)
        assert other.state == one.state
    with pytest.raises(TypeError, match="bytes-like object"):
        other.state = "0" * 2 * 21 * 4
    assert torch.equal(one.push(x[5:]), other.push(x[5:]))
    one.reset()
    assert one.state == bytes(2 * 21 * 4)


def test_step_writes_the_same_tensor():
    for _ in range(20):  # in memory that was used before
        stream = Stream(GRU(4, 8))
        assert torch.equal(stream.output, torch.zeros(8))
        stream.step(torch.ones(4))
        del stream
    stream = Stream(GRU(4, 8))
    first = stream.step(torch.randn(4))
    kept = first.clone()
    second = stream.step(np.zeros(4, np.float32))
    assert first is second is stream.output and not torch.equal(kept, second)


@pytest.mark.parametrize(
    ("bad", "given"),
    [
        (np.zeros(4), "an array of float64"),
        (torch.zeros(4, dtype=torch.float64), "an array of float64"),
        ("abc", "str"),
    ],
    ids=["numpy", "torch", "text"],
)
def test_frames_of_another_type_are_named(bad, given):
    stream = Stream(GRU(4, 8))
    with pytest.raises(TypeError, match=f"frame: expected float32, got {given}"):
        stream.step(bad)
    with pytest.raises(TypeError, match=f"frames: expected float32, got {given}"):
        stream.push(bad)


@pytest.mark.parametrize("token", [2**70, -(2**70)])
def test_a_token_beyond_any_integer_of_c_is_out_of_range(token):
    with pytest.raises(ValueError, match=f"token: expected 0 to 5, got {token}"):
        Stream(GRULanguageModel(5, None, 8)).step(token)


@pytest.mark.parametrize(
    ("bad", "given"),
    [
        (torch.zeros(4, dtype=torch.bfloat16), "torch.bfloat16 on cpu"),
        (torch.zeros(4, device="meta"), "torch.float32 on meta"),
        (torch.zeros(4).to_sparse(), "torch.float32 in torch.sparse_coo on cpu"),
    ],
    ids=["bfloat16", "meta", "sparse"],
)
@pytest.mark.parametrize("make", [lambda: GRU(4, 8), lambda: GRULanguageModel(5, None, 8)])
def test_tensors_that_no_array_can_be_are_named(make, bad, given):
    stream = Stream(make())
    expected = "x: expected a dense CPU tensor of float32, or of integers for tokens, got "
    for call in (stream.step, stream.push):
        with pytest.raises(TypeError, match=f"^{re.escape(expected + given)}$"):
            call(bad)


@pytest.mark.parametrize(
    ("bad", "given"),
    [
        (1.5, "float"),
        (np.float32(1.5), "float32"),
        (torch.tensor(1.5), "an array of float32"),
        (None, "NoneType"),
        ([1], "list"),
        (torch.tensor([1]), "an array of int64"),
    ],
    ids=str,
)
def test_tokens_of_another_type_are_named(bad, given):
    stream = Stream(GRULanguageModel(5, None, 8))
    before = stream.state
    with pytest.raises(TypeError, match=f"token: expected an integer, got {given}"):
        stream.step(bad)
    with pytest.raises(TypeError, match="tokens: expected integers, got an array of float64"):
        stream.push(np.zeros(2))
    with pytest.raises(TypeError, match="tokens: expected integers, got an array of <U1"):
        stream.push(["1", "2"])
    assert stream.state == before


def test_what_an_integer_of_the_users_raises():
    class Interrupted:
        def __index__(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Stream(GRULanguageModel(5, None, 8)).step(Interrupted())


@pytest.mark.parametrize(
    "make", [lambda: Stream(nn.GRU(4, 8)), lambda: Stream(None), lambda: Sampler(GRU(4, 8))]
)
def test_models_of_another_type_are_named(make):
    with pytest.raises(TypeError, match=r"model should be a GRULanguageModel.*, got: \w"):
        make()


def test_what_a_stream_refuses():
    for model in (GRU(4, 8), GRULanguageModel(5, None, 8)):
        with pytest.raises(ValueError, match="weights: expected one of float32"):
            Stream(model, "")
    stream = Stream(GRU(4, 8))
    stream.push(torch.randn(3, 4))
    state = stream.state
    for bad in (torch.zeros(5), torch.zeros(1, 4), 3):
        with pytest.raises((ValueError, TypeError), match=r"frame|array"):
            stream.step(bad)
    with pytest.raises(ValueError, match=r"frames: expected shape \(2, 4\), got \(2, 5\)"):
        stream.push(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="state: expected 32 bytes, got 31"):
        stream.state = bytes(31)
    assert stream.state == state
    narrow = Stream(GRU(4, 8), "int8")
    state = narrow.state
    for bad in (torch.nan, torch.inf, -torch.inf):
        frame = torch.tensor([0, 0, 0, bad])
        with pytest.raises(ValueError, match="frame: expected finite values for int8 weights"):
            narrow.step(frame)
        with pytest.raises(ValueError, match="frames: expected finite values for int8 weights"):
            narrow.push(frame[None])
    assert narrow.state == state
    with pytest.raises(ValueError, match="state: expected values from -1 to 1"):
        narrow.state = np.full(8, 1.5, np.float32).tobytes()
    lm = GRULanguageModel(5, None, 8)
    tokens = Stream(lm)
    for bad in (-1, 6):
        with pytest.raises(ValueError, match=f"token: expected 0 to 5, got {bad}"):
            tokens.step(bad)
        with pytest.raises(ValueError, match="token: expected 0 to 5"):
            tokens.push([0, bad])
    for bad, kind in ((1.5, "float"), ("1", "str"), (None, "NoneType")):
        with pytest.raises(TypeError, match=f"token: expected an integer, got {kind}"):
            tokens.step(bad)
    for bad in ([1.5], np.ones(2), "ab"):
        with pytest.raises(TypeError, match="tokens: expected integers, got an array of"):
            tokens.push(bad)
    assert tokens.push([]).shape == (0, 5)
    with pytest.raises(ValueError, match="weights: expected None with a Sampler"):
        Stream(Sampler(lm), "int8")
    with pytest.raises(RuntimeError, match="bidirectional"):
        Stream(GRU(4, 8, bidirectional=True))


def test_streams_on_several_threads():
    gru = GRU(16, 96, 2)
    stack_inputs = torch.randn(4, 300, 16)
    expected = [Stream(gru).push(x) for x in stack_inputs]
    results = [None] * 4

    def work(i):
        stream = Stream(gru)
        results[i] = torch.stack([stream.step(row).clone() for row in stack_inputs[i]])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_a_second_thread_is_refused():
    """While one thread pushes for a long time without the GIL."""
    stream = Stream(GRU(8, 128, 6))
    x = torch.randn(40_000, 8)
    pushing = threading.Thread(target=stream.push, args=(x,))
    pushing.start()
    time.sleep(0.05)
    refused = 0
    while pushing.is_alive():
        try:
            stream.step(x[0])
        except RuntimeError as error:
            assert "one thread at a time" in str(error)
            refused += 1
    pushing.join()
    assert refused > 0


ALLOCATION_HOOK = """
#define _GNU_SOURCE
#include <stddef.h>
extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);
static long count;
long allocations(void) { return count; }
void *malloc(size_t n) { ++count; return __libc_malloc(n); }
void *calloc(size_t n, size_t m) { ++count; return __libc_calloc(n, m); }
void *realloc(void *p, size_t n) { ++count; return __libc_realloc(p, n); }
void *aligned_alloc(size_t a, size_t n) { ++count; return __libc_memalign(a, n); }
"""

COUNT = """
import ctypes, sys
import numpy as np
from gru_fast import GRU, GRULanguageModel, Stream
hook = ctypes.CDLL(None).allocations
hook.restype = ctypes.c_long
hook()
frame = np.ones(24, np.float32)
for weights in ("float32", "bfloat16", "int8"):
    for stream, x in ((Stream(GRU(24, 40, 2), weights), frame),
                      (Stream(GRULanguageModel(9, 5, 40, 2), weights), 3)):
        step = stream.step
        step(x)
        before = hook()
        for _ in range(1000):
            step(x)
        print(hook() - before)
before = hook()
kept = [bytes(10**6) for _ in range(3)]
print(hook() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the hook is for glibc")
def test_steps_allocate_nothing(tmp_path):
    """Counted by a library that stands before malloc; the last line shows that it counts."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not Path("/proc/self/maps").exists():
        pytest.skip("no C compiler")
    source, library = tmp_path / "hook.c", tmp_path / "hook.so"
    source.write_text(ALLOCATION_HOOK)
    build = [compiler, "-O1", "-shared", "-fPIC", str(source), "-o", str(library)]
    subprocess.run(build, check=True)
    run = subprocess.run(
        [sys.executable, "-c", COUNT], capture_output=True, text=True, check=True,
        env={"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    *steps, control = map(int, run.stdout.split())
    assert steps == [0] * 6 and control >= 3
