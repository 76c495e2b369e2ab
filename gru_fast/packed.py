# SPDX-License-Identifier: Apache-2.0
"""Weights packed for the samplers of `csrc/`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gru_fast import ops
from gru_fast.gru import GRU
from gru_fast.recurrent import weights_of
from gru_fast.sampled_model import LanguageModel, why_not_layers

if TYPE_CHECKING:
    from gru_fast._C import PackedStack, Stream

WEIGHTS = ("float32", "bfloat16", "int8")
"""How packed weights are kept; states and logits are float32 throughout."""


def why_not(gru: GRU, head: nn.Linear | None = None) -> str | None:
    """Why the native samplers cannot take these layers; None if they can."""
    if ops.NO_CPU_KERNELS is not None:
        return ops.NO_CPU_KERNELS
    reason = why_not_layers(gru, head)
    if reason is not None:
        return reason
    tensors = [*weights_of(gru), *([] if head is None else head.parameters())]
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return f"weights are on {tensor.device}"
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"weights are {tensor.dtype}: states and logits would only be float32"
    return None


def why_not_model(model: LanguageModel) -> str | None:
    """Why the native samplers cannot take a language model; None if they can."""
    return model.why_not_weights_alone() or why_not(model.gru, model.head)


def pack(
    gru: GRU,
    weights: str = "float32",
    *,
    table: Tensor | None = None,
    head: nn.Linear | None = None,
) -> PackedStack:
    """A snapshot of the layers, of the table before them and of the head behind them.

    Args:
        gru: One direction, any cell and number of layers. Its dropout is not used.
        weights: One of `WEIGHTS`. bfloat16 also rounds the states that enter a product; int8 has
            one scale for each row of weights, and states in 127 steps.
        table: (V + 1, N*H), what each token adds to the gates of the first layer, the last row
            being that of the zero vector. None: the input is a frame of `gru.input_size` features.
        head: From H to logits. None: the output is the last layer's state.

    Raises:
        RuntimeError: `why_not` has a reason.
        ValueError: `weights` is not in `WEIGHTS`, or int8 with NaN or infinity among the weights,
            or NaN in the table or the layers' biases: 8 bits have none, so it would pass for zero.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights: expected one of {', '.join(WEIGHTS)}, got {weights!r}")
    _refuse(why_not(gru, head))
    flat, per = gru._flat_weights, 4 if gru.bias else 2
    layers = []
    for layer in range(gru.num_layers):
        weight_ih, weight_hh, *biases = flat[layer * per : (layer + 1) * per]
        biases = biases or [None, None]
        layers.append((_array(weight_ih), _array(weight_hh), *map(_array, biases)))
    head_weight, head_bias = (None, None) if head is None else (head.weight, head.bias)
    if weights == "int8":
        products = [*flat[0::per], *flat[1::per], *([] if head_weight is None else [head_weight])]
        if not all(bool(torch.isfinite(w).all()) for w in products):
            raise ValueError("weights: expected finite values for int8, got NaN or infinity")
        summands = [*flat[2::per], *flat[3::per]] if gru.bias else []
        if any(bool(w.isnan().any()) for w in [*summands, *([] if table is None else [table])]):
            raise ValueError("weights: expected no NaN in tables and biases for int8, got NaN")
    from gru_fast import _C

    return _C.PackedStack(
        gru.cell, weights, _array(table), layers, _array(head_weight), _array(head_bias)
    )


def stream(stack: PackedStack) -> Stream:
    """A stream at the zero state."""
    from gru_fast import _C

    return _C.Stream(stack)


def pack_model(model: LanguageModel, weights: str = "float32") -> PackedStack:
    """`pack` for a language model."""
    _refuse(model.why_not_weights_alone())
    with torch.no_grad():
        return pack(model.gru, weights, table=model.token_table(), head=model.head)


def _refuse(reason: str | None) -> None:
    if reason is not None:
        raise RuntimeError(f"the native sampler cannot take this model: {reason}")


def _array(tensor: Tensor | None) -> Any:
    if tensor is None:
        return None
    return tensor.detach().to("cpu", torch.float32).contiguous().numpy()
