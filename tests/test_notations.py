# SPDX-License-Identifier: Apache-2.0
"""Weights in other notations, against those notations' equations written out in NumPy."""

import os
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from gru_fast import GRU
from gru_fast.notations import from_course, from_keras, from_onnx, to_course, to_keras, to_onnx

WIDTH, H, T, B = 4, 6, 5, 3
RNG = np.random.default_rng(0)


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def keras_layer(x, weights, reset_after, units):
    """(B, T, units) from (B, T, features): columns are the gates z, r, h."""
    kernel, recurrent, *bias = weights
    zero = np.zeros(3 * units)
    input_bias, recurrent_bias = (
        (bias[0] if reset_after else (bias[0], zero)) if bias else (zero,) * 2
    )
    h = np.zeros((len(x), units))
    outputs = []
    for t in range(x.shape[1]):
        xz, xr, xh = np.split(x[:, t] @ kernel + input_bias, 3, axis=1)
        uz, ur, uh = np.split(recurrent, 3, axis=1)
        bz, br, bh = np.split(recurrent_bias, 3)
        z = sigmoid(xz + h @ uz + bz)
        r = sigmoid(xr + h @ ur + br)
        hh = np.tanh(xh + r * (h @ uh + bh)) if reset_after else np.tanh(xh + (r * h) @ uh)
        h = z * h + (1 - z) * hh
        outputs.append(h)
    return np.stack(outputs, 1)


def keras_weights(features, reset_after, use_bias, dtype=np.float64):
    shapes = [(features, 3 * H), (H, 3 * H)]
    if use_bias:
        shapes.append((2, 3 * H) if reset_after else (3 * H,))
    return [RNG.normal(size=shape).astype(dtype) for shape in shapes]


@pytest.mark.parametrize("reset_after", [True, False])
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_keras(reset_after, use_bias, bidirectional):
    D = 2 if bidirectional else 1
    layers = [
        [a for _ in range(D) for a in keras_weights(width, reset_after, use_bias)]
        for width in (WIDTH, D * H)
    ]
    x = RNG.normal(size=(B, T, WIDTH))
    expected = x
    for layer in layers:
        half = len(layer) // D
        parts = [keras_layer(expected, layer[:half], reset_after, H)]
        if bidirectional:
            back = keras_layer(expected[:, ::-1], layer[half:], reset_after, H)
            parts.append(back[:, ::-1])
        expected = np.concatenate(parts, 2)
    gru = from_keras(*layers, reset_after=reset_after, bidirectional=bidirectional)
    assert gru.weight_ih_l0.dtype == torch.float64 and gru.bias == use_bias
    output, _ = gru(torch.from_numpy(x))
    np.testing.assert_allclose(output.detach().numpy(), expected, atol=1e-12)
    for layer, again in zip(layers, to_keras(gru), strict=True):
        for a, b in zip(layer, again, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("cell", ["reset_after", "reset_before"])
def test_to_keras_adds_both_biases_where_keras_has_one(cell):
    gru = GRU(WIDTH, H, batch_first=True, cell=cell).double()
    x = RNG.normal(size=(B, T, WIDTH))
    expected = gru(torch.from_numpy(x))[0].detach().numpy()
    (layer,) = to_keras(gru)
    found = keras_layer(x, layer, cell == "reset_after", H)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def course_cell(x, p):
    """All c<t>, (T, B, H), one column vector at a time."""
    outputs = np.zeros((T, B, H))
    for b in range(B):
        c = np.zeros((H, 1))
        for t in range(T):
            xt = x[t, b][:, None]
            both = np.concatenate([c, xt])
            update = sigmoid(p["Wu"] @ both + p["bu"])
            relevance = sigmoid(p["Wr"] @ both + p["br"]) if "Wr" in p else 1.0
            candidate = np.tanh(p["Wc"] @ np.concatenate([relevance * c, xt]) + p["bc"])
            c = update * candidate + (1 - update) * c
            outputs[t, b] = c[:, 0]
    return outputs


def course_weights(gates, dtype=np.float64):
    shapes = {"W": (H, H + WIDTH), "b": (H, 1)}
    return {k + g: RNG.normal(size=shapes[k]).astype(dtype) for g in gates for k in "Wb"}


@pytest.mark.parametrize(("gates", "cell"), [("urc", "reset_before"), ("uc", "no_reset")])
def test_course(gates, cell):
    weights = course_weights(gates)
    x = RNG.normal(size=(T, B, WIDTH))
    gru = from_course(weights)
    assert gru.cell == cell
    output = gru(torch.from_numpy(x))[0].detach().numpy()
    np.testing.assert_allclose(output, course_cell(x, weights), atol=1e-12)
    again = to_course(gru)
    assert again.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(again[name], value)
    flat = {name: a[:, 0] if name[0] == "b" else a.tolist() for name, a in weights.items()}
    torch.testing.assert_close(from_course(flat).state_dict(), gru.state_dict())


@pytest.mark.parametrize("cell", ["reset_before", "no_reset"])
@pytest.mark.parametrize("bias", [True, False])
def test_to_course(cell, bias):
    gru = GRU(WIDTH, H, bias=bias, cell=cell).double()
    x = RNG.normal(size=(T, B, WIDTH))
    expected = gru(torch.from_numpy(x))[0].detach().numpy()
    np.testing.assert_allclose(course_cell(x, to_course(gru)), expected, atol=1e-12)


def test_bfloat16_becomes_float32():
    gru = GRU(2, 3, dtype=torch.bfloat16)
    narrow = to_keras(gru)[0]
    wide = to_keras(gru.float())[0]
    for a, b in zip(narrow, wide, strict=True):
        assert a.dtype == np.float32 and np.array_equal(a, b)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="no_reset"):
        to_keras(GRU(WIDTH, H, cell="no_reset"))
    with pytest.raises(ValueError, match="cell='reset_after'"):
        to_course(GRU(WIDTH, H))
    with pytest.raises(ValueError, match="num_layers=2"):
        to_course(GRU(WIDTH, H, 2, cell="reset_before"))
    with pytest.raises(ValueError, match="bidirectional=True"):
        to_course(GRU(WIDTH, H, bidirectional=True, cell="reset_before"))
    after = keras_weights(WIDTH, True, True)
    with pytest.raises(ValueError, match=r"expected a bias \(18,\) with reset_after=False, got"):
        from_keras(after, reset_after=False)
    with pytest.raises(ValueError, match=r"layers\[1\]: expected 3 arrays, got 2"):
        from_keras(after, keras_weights(H, True, False))
    with pytest.raises(ValueError, match="weight_ih_l1: expected shape"):
        from_keras(after, after)
    above = keras_weights(H, True, True)
    for odd in (
        [above[0][:, 1:], above[1], above[2][:, 1:]],
        [above[0], above[1][:, 1:], above[2]],
    ):
        with pytest.raises(ValueError, match=r"layers\[1\]: expected arrays of 18 columns, got"):
            from_keras(after, odd)
    with pytest.raises(ValueError, match="got none"):
        from_keras()
    with pytest.raises(ValueError, match=r"expected a kernel \(I, 3H\) first, got \(4, 7\)"):
        from_keras([np.zeros((4, 7)), np.zeros((2, 6))])
    weights = course_weights("urc")
    with pytest.raises(ValueError, match=r"expected.*'br'.*, got"):
        from_course({k: v for k, v in weights.items() if k != "br"})
    with pytest.raises(ValueError, match=r"expected Wu \(6, 10\), got \(10, 6\)"):
        from_course({**weights, "Wu": weights["Wu"].T})
    with pytest.raises(ValueError, match=r"expected Wc \(H, H \+ I\), got \(3,\)"):
        from_course({**weights, "Wc": np.zeros(3)})
    with pytest.raises(ValueError, match=r"layers\[0\]: expected the arrays of a layer, got none"):
        from_keras([])


@pytest.mark.parametrize("write", [to_keras, to_onnx, to_course])
def test_what_is_no_gru_is_named(write):
    with pytest.raises(TypeError, match=r"gru should be a gru_fast.GRU, got: builtins.NoneType$"):
        write(None)
    with pytest.raises(TypeError, match=r"got: torch\.nn.*\.GRU \(gru_fast.convert turns"):
        write(torch.nn.GRU(WIDTH, H))


def test_arguments_of_other_types_are_named():
    with pytest.raises(TypeError, match=r"weights should be a mapping .*, got: list"):
        from_course([1])
    with pytest.raises(TypeError, match=r"layers\[1\] should be a sequence .*, got: NoneType"):
        from_keras(keras_weights(WIDTH, True, True), None)
    integers = [np.ones((WIDTH, 3 * H), int), np.ones((H, 3 * H), int)]
    with pytest.raises(ValueError, match="layers: expected arrays of a floating dtype, got int64"):
        from_keras(integers)
    with pytest.raises(ValueError, match="W: expected arrays of a floating dtype, got int64"):
        from_onnx(integers[0].T[None], integers[1].T[None])
    weights = {name: value.astype(int) for name, value in course_weights("urc").items()}
    with pytest.raises(ValueError, match=r"weights: expected arrays of a floating .*, got int64"):
        from_course(weights)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("keras") is None, reason="keras is not installed")
def test_keras_itself():
    code = """if True:
        import keras, numpy as np, torch
        from gru_fast.notations import from_keras, to_keras
        x = np.random.default_rng(0).normal(size=(3, 5, 4)).astype("float32")
        for reset_after in (True, False):
            layer = keras.layers.GRU(6, return_sequences=True, reset_after=reset_after,
                                     bias_initializer="random_normal")
            expected = keras.ops.convert_to_numpy(layer(x))
            gru = from_keras(layer.get_weights(), reset_after=reset_after)
            found = gru(torch.from_numpy(x))[0].detach().numpy()
            np.testing.assert_allclose(found, expected, atol=1e-6)
            layer.set_weights(to_keras(gru)[0])
        print("ok")
    """
    environment = {**os.environ, "KERAS_BACKEND": "torch"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert run.stdout.strip() == "ok", run.stderr
