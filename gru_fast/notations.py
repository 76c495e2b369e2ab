# SPDX-License-Identifier: Apache-2.0
"""Weights from and to other notations: Keras, ONNX, and the one that concatenates [c, x].

In each, one array holds what is split or ordered differently here. Arrays are NumPy arrays or
whatever `numpy.asarray` takes; those of a bfloat16 module come in float32: NumPy has no bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gru_fast.gru import GRU

__all__ = ["from_course", "from_keras", "from_onnx", "to_course", "to_keras", "to_onnx"]

Array = Any


def from_keras(
    *layers: Sequence[Array],
    reset_after: bool = True,
    bidirectional: bool = False,
    batch_first: bool = True,
) -> GRU:
    """A GRU with the weights of stacked Keras GRU layers.

    Keras stores the gates in the order z, r, h, as columns: kernel (I, 3H), recurrent kernel
    (H, 3H) and, with `use_bias`, a bias: (2, 3H) with `reset_after`, else (3H,). Its z has the
    sense of this library's.

    Args:
        *layers: `layer.get_weights()` of each, from the first; for `Bidirectional(GRU(...))` that
            is the forward layer's arrays and then the backward layer's.
        reset_after: The layers' option: `cell="reset_after"` or `"reset_before"`.
        bidirectional: Whether the layers are `Bidirectional`, their outputs concatenated.
        batch_first: As in `gru_fast.GRU`; Keras works on (B, T, features).

    Returns:
        A `gru_fast.GRU` in the dtype of the first kernel.

    Raises:
        ValueError: Shapes or the number of arrays do not fit, or the first kernel is not of a
            floating dtype.
        TypeError: What stands for a layer is no sequence of arrays.
    """
    if not layers:
        raise ValueError("layers: expected the weights of one layer at least, got none")
    D = 2 if bidirectional else 1
    for k, layer in enumerate(layers):
        if not isinstance(layer, Sequence):
            raise TypeError(
                f"layers[{k}] should be a sequence of arrays, got: {type(layer).__name__}"
            )
    arrays = [[np.asarray(a) for a in layer] for layer in layers]
    bias = len(arrays[0]) == 3 * D
    if not arrays[0]:
        raise ValueError("layers[0]: expected the arrays of a layer, got none")
    kernel = arrays[0][0]
    if kernel.ndim != 2 or kernel.shape[1] % 3:
        raise ValueError(f"layers: expected a kernel (I, 3H) first, got {kernel.shape}")
    gru = GRU(
        kernel.shape[0],
        kernel.shape[1] // 3,
        len(layers),
        bias,
        batch_first,
        bidirectional=bidirectional,
        cell="reset_after" if reset_after else "reset_before",
        dtype=_dtype("layers", kernel),
    )
    per = 3 if bias else 2
    for k, layer in enumerate(arrays):
        if len(layer) != per * D:
            raise ValueError(f"layers[{k}]: expected {per * D} arrays, got {len(layer)}")
        for d in range(D):
            kernel, recurrent, *rest = layer[d * per : (d + 1) * per]
            state = {"weight_ih": kernel.T, "weight_hh": recurrent.T}
            if bias:
                expected = (2, kernel.shape[1]) if reset_after else (kernel.shape[1],)
                if rest[0].shape != expected:
                    raise ValueError(
                        f"layers[{k}]: expected a bias {expected} with reset_after={reset_after}, "
                        f"got {rest[0].shape}"
                    )
                both = rest[0] if reset_after else (rest[0], np.zeros_like(rest[0]))
                state |= {"bias_ih": both[0], "bias_hh": both[1]}
            for name, value in state.items():
                if value.shape[:1] != (3 * gru.hidden_size,):
                    raise ValueError(
                        f"layers[{k}]: expected arrays of {3 * gru.hidden_size} columns, got "
                        f"{name} with {value.T.shape}"
                    )
                parameter = f"{name}_l{k}" + "_reverse" * d
                _set(gru, parameter, _swap_first_two(value))
    return gru


def to_keras(gru: GRU) -> list[list[np.ndarray]]:
    """What `set_weights` of the Keras layers takes, one list of arrays for each layer.

    Raises:
        ValueError: The cell is `no_reset`, which Keras has not, or the GRU has several heads or
            `learn_h0`.
        TypeError: `gru` is not a `gru_fast.GRU`.
    """
    _check_type(gru)
    if gru.cell == "no_reset":
        raise ValueError("gru: Keras has no GRU without a reset gate, cell='no_reset'")
    _check_plain(gru)
    layers = []
    for k in range(gru.num_layers):
        arrays = []
        for suffix in ("", "_reverse") if gru.bidirectional else ("",):
            end = f"_l{k}{suffix}"
            arrays += [_swap_first_two(_array(gru, name + end)).T for name in
                       ("weight_ih", "weight_hh")]  # fmt: skip
            if gru.bias:
                both = [_swap_first_two(_array(gru, name + end)) for name in ("bias_ih", "bias_hh")]
                arrays.append(np.stack(both) if gru.cell == "reset_after" else both[0] + both[1])
        layers.append([np.ascontiguousarray(a) for a in arrays])
    return layers


def from_onnx(
    W: Array,
    R: Array,
    B: Array | None = None,
    *,
    linear_before_reset: bool = False,
    batch_first: bool = False,
) -> GRU:
    """A GRU with the weights of an ONNX GRU node (https://onnx.ai/onnx/operators/onnx__GRU.html).

    ONNX stores the gates in the order z, r, h. Its z has the sense of this library's.

    Args:
        W: (D, 3H, I), D is 2 for `direction="bidirectional"`.
        R: (D, 3H, H).
        B: (D, 6H), the input's biases and then the state's, or None.
        linear_before_reset: The node's attribute: `cell="reset_after"`, else `"reset_before"`.
        batch_first: As in `gru_fast.GRU`; the node's `layout=1`.

    Returns:
        A `gru_fast.GRU` in the dtype of W.

    Raises:
        ValueError: Shapes do not fit, or W is not of a floating dtype.
    """
    W, R = np.asarray(W), np.asarray(R)
    D, rows, I = W.shape if W.ndim == 3 else (0, 0, 0)  # noqa: E741
    H = rows // 3
    if D not in (1, 2) or rows != 3 * H or not H or not I:
        raise ValueError(f"W: expected (1 or 2 directions, 3H, I), got {W.shape}")
    if R.shape != (D, 3 * H, H):
        raise ValueError(f"R: expected {(D, 3 * H, H)}, got {R.shape}")
    B = None if B is None else np.asarray(B)
    if B is not None and B.shape != (D, 6 * H):
        raise ValueError(f"B: expected {(D, 6 * H)}, got {B.shape}")
    gru = GRU(
        I,
        H,
        bias=B is not None,
        batch_first=batch_first,
        bidirectional=D == 2,
        cell="reset_after" if linear_before_reset else "reset_before",
        dtype=_dtype("W", W),
    )
    for d, end in enumerate(("_l0", "_l0_reverse")[:D]):
        state = {"weight_ih": W[d], "weight_hh": R[d]}
        if B is not None:
            state |= {"bias_ih": B[d, : 3 * H], "bias_hh": B[d, 3 * H :]}
        for name, value in state.items():
            _set(gru, name + end, _swap_first_two(value))
    return gru


def to_onnx(gru: GRU) -> list[dict[str, np.ndarray]]:
    """The inputs "W", "R" and, with biases, "B" of an ONNX GRU node for each layer.

    Raises:
        ValueError: The cell is `no_reset`, for which ONNX has no attribute, or the GRU has several
            heads or `learn_h0`.
        TypeError: `gru` is not a `gru_fast.GRU`.
    """
    _check_type(gru)
    if gru.cell == "no_reset":
        raise ValueError("gru: ONNX has no GRU without a reset gate, cell='no_reset'")
    _check_plain(gru)
    layers = []
    for k in range(gru.num_layers):
        suffixes = ("", "_reverse") if gru.bidirectional else ("",)

        def stacked(name: str, k: int = k, suffixes: tuple[str, ...] = suffixes) -> np.ndarray:
            return np.stack([_swap_first_two(_array(gru, f"{name}_l{k}{s}")) for s in suffixes])

        layers.append({"W": stacked("weight_ih"), "R": stacked("weight_hh")})
        if gru.bias:
            both = [stacked("bias_ih"), stacked("bias_hh")]
            layers[-1]["B"] = np.concatenate(both, 1)
    return layers


def from_course(weights: Mapping[str, Array], batch_first: bool = False) -> GRU:
    """A GRU with weights in the notation that concatenates the memory cell and the input.

        Gu = sigmoid(Wu [c, x] + bu)      Gr = sigmoid(Wr [c, x] + br)
        c~ = tanh(Wc [Gr * c, x] + bc)    c  = Gu * c~ + (1 - Gu) * c_prev

    Here z = 1 - Gu, so the rows of z are -Wu and -bu; Gr is r, and c is h.

    Args:
        weights: "Wu", "Wr", "Wc", each (H, H + I), whose first H columns act on c, and "bu", "br",
            "bc", each (H,) or (H, 1). Without "Wr" and "br" it is the simplified GRU, Gr = 1.
        batch_first: As in `gru_fast.GRU`.

    Returns:
        A `gru_fast.GRU` in the dtype of "Wc": `cell="reset_before"`, or `"no_reset"`.

    Raises:
        ValueError: Names or shapes are not those, or "Wc" is not of a floating dtype.
        TypeError: `weights` is not a mapping.
    """
    if not isinstance(weights, Mapping):
        raise TypeError(
            f"weights should be a mapping of names to arrays, got: {type(weights).__name__}"
        )
    gates = "ruc" if "Wr" in weights else "uc"
    names = {kind + gate for gate in gates for kind in "Wb"}
    if set(weights) != names:
        raise ValueError(f"weights: expected {sorted(names)}, got {sorted(weights)}")
    arrays = {name: np.asarray(weights[name]) for name in names}
    H, width = arrays["Wc"].shape if arrays["Wc"].ndim == 2 else (0, 0)
    if not 0 < H < width:
        raise ValueError(f"weights: expected Wc (H, H + I), got {arrays['Wc'].shape}")
    for name, array in arrays.items():
        shapes = [(H, width)] if name[0] == "W" else [(H,), (H, 1)]
        if array.shape not in shapes:
            raise ValueError(f"weights: expected {name} {shapes[-1]}, got {array.shape}")
    sign = {"r": 1, "u": -1, "c": 1}
    W = np.concatenate([sign[g] * arrays["W" + g] for g in gates])
    b = np.concatenate([sign[g] * arrays["b" + g].reshape(H) for g in gates])
    gru = GRU(
        width - H,
        H,
        batch_first=batch_first,
        cell="reset_before" if "r" in gates else "no_reset",
        dtype=_dtype("weights", arrays["Wc"]),
    )
    _set(gru, "weight_hh_l0", W[:, :H])
    _set(gru, "weight_ih_l0", W[:, H:])
    _set(gru, "bias_ih_l0", b)
    _set(gru, "bias_hh_l0", np.zeros_like(b))
    return gru


def to_course(gru: GRU) -> dict[str, np.ndarray]:
    """The weights of one layer in the notation of `from_course`, biases (H, 1).

    Raises:
        ValueError: The GRU has more than one layer, direction or head, `learn_h0`, or the cell
            `reset_after`, which that notation has not.
        TypeError: `gru` is not a `gru_fast.GRU`.
    """
    _check_type(gru)
    _check_plain(gru)
    if gru.num_layers > 1 or gru.bidirectional or gru.cell == "reset_after":
        raise ValueError(
            "gru: expected one layer, one direction and cell='reset_before' or 'no_reset', got "
            f"num_layers={gru.num_layers}, bidirectional={gru.bidirectional}, cell={gru.cell!r}"
        )
    W = np.concatenate([_array(gru, "weight_hh_l0"), _array(gru, "weight_ih_l0")], 1)
    b = np.zeros((len(W), 1), W.dtype)
    if gru.bias:
        b = (_array(gru, "bias_ih_l0") + _array(gru, "bias_hh_l0"))[:, None]
    gates = "uc" if gru.cell == "no_reset" else "ruc"
    result = {}
    for k, gate in enumerate(gates):
        rows = slice(k * gru.hidden_size, (k + 1) * gru.hidden_size)
        sign = -1 if gate == "u" else 1
        result["W" + gate], result["b" + gate] = sign * W[rows], sign * b[rows]
    return result


def _swap_first_two(rows: np.ndarray) -> np.ndarray:
    """(3H, ...) with the first two blocks of H rows exchanged: z, r, n <-> r, z, n."""
    first, second, third = np.split(rows, 3)
    return np.concatenate([second, first, third])


def _array(gru: nn.Module, name: str) -> np.ndarray:
    parameter = gru.get_parameter(name).detach().cpu()
    # NumPy itself has no bfloat16.
    return (parameter.float() if parameter.dtype == torch.bfloat16 else parameter).numpy()


def _dtype(argument: str, array: np.ndarray) -> torch.dtype:
    """The dtype that parameters get from an array."""
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{argument}: expected arrays of a floating dtype, got {array.dtype}")
    return torch.from_numpy(array[:0].copy()).dtype


def _check_type(gru: object) -> None:
    if not isinstance(gru, GRU):
        given = f"{type(gru).__module__}.{type(gru).__qualname__}"
        hint = " (gru_fast.convert turns torch.nn.GRU into one)"
        raise TypeError(
            f"gru should be a gru_fast.GRU, got: {given}{hint * isinstance(gru, nn.GRU)}"
        )


def _check_plain(gru: GRU) -> None:
    if gru.num_heads > 1:
        raise ValueError(f"gru: expected dense recurrent weights, got num_heads={gru.num_heads}")
    if gru.learn_h0:
        raise ValueError("gru: expected a state that begins with zeros, got learn_h0=True")


@torch.no_grad()
def _set(gru: nn.Module, name: str, value: np.ndarray) -> None:
    parameter: Tensor = gru.get_parameter(name)
    if parameter.shape != value.shape:
        raise ValueError(
            f"{name}: expected shape {tuple(parameter.shape)} in this library's layout, "
            f"got {value.shape}"
        )
    parameter.copy_(torch.from_numpy(np.ascontiguousarray(value)))
