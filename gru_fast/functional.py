# SPDX-License-Identifier: Apache-2.0
"""The GRU as functions with nn.GRU's conventions: `gru`, `gru_cell`; `layer` and `scan` below."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from gru_fast import direct, direct_training, heads
from gru_fast.checks import check_matrices, check_strided, weight_names
from gru_fast.dropout import state_scale
from gru_fast.gates import Gates, arranged, from_workspaces
from gru_fast.recurrence import layer, layer_with_gates, scan
from gru_fast.reference import WEIGHTS
from gru_fast.stack import (
    check_devices,
    check_input_width,
    count_layers,
    matching,
    result_dtype,
    run_layers,
    state_shape,
)

Input = TypeVar("Input", Tensor, PackedSequence)

__all__ = ["gru", "gru_cell", "layer", "scan"]


def gru_cell(
    input: Tensor,
    hx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    cell: str = "reset_after",
    backend: str = "auto",
) -> Tensor:
    """One step of one layer.

    Args:
        input: (B, I), or (I,).
        hx: (B, H), or (H,); None means zeros.
        weight_ih: (N*H, I).
        weight_hh: (N*H, H).
        bias_ih: (N*H,) or None.
        bias_hh: (N*H,) or None.
        cell: "reset_after", "reset_before" or "no_reset".
        backend: "auto", or one of `gru_fast.available_backends()`.

    Returns:
        The new state, shaped as hx.

    Raises:
        ValueError: input or hx is neither 1-D nor 2-D, input is not in the dtype of the weights, or
            an unknown backend.
        RuntimeError: sizes that do not fit, an hx of another dtype, an unknown cell, or a named
            backend that cannot take the call.
    """
    weights = [weight_ih, weight_hh, bias_ih, bias_hh]
    h = direct.gru_cell(input, hx, weights, cell, backend)
    if h is None:
        h = direct_training.gru_cell(input, hx, weights, cell, backend)
    if h is not None:
        return h
    if input.dim() not in (1, 2):
        raise ValueError(f"input: expected 1 or 2 dimensions, got {input.dim()}")
    if hx is not None and hx.dim() not in (1, 2):
        raise ValueError(f"hx: expected 1 or 2 dimensions, got {hx.dim()}")
    try:
        check_input_width(input, weight_ih)
        batched = input.dim() == 2
        x = input.unsqueeze(0) if batched else input[None, None]
        if hx is None:
            h0 = x.new_zeros(1, x.shape[1], weight_hh.shape[1])
        else:
            if hx.dim() != input.dim():
                raise RuntimeError(
                    f"hx: expected {input.dim()} dimensions like input, got {hx.dim()}"
                )
            h0 = hx.unsqueeze(0) if batched else hx[None, None]
        expected = (1, x.shape[1], weight_hh.shape[1])
        if h0.shape != expected:
            wanted = expected[1:] if batched else expected[2:]
            raise RuntimeError(
                f"hx: expected shape {wanted}, got {tuple(hx.shape) if hx is not None else None}"
            )
        dtype = h0.dtype
        x, h0 = matching(x, h0, weight_ih)
        grouped: list[Any] = [None if w is None else w.unsqueeze(0) for w in weights]
        output, _ = layer(x, h0, *grouped, cell=cell, backend=backend)
    except (RuntimeError, IndexError):
        # Only now, and not before each call, which costs: the operator has names of its own.
        named = dict(zip(WEIGHTS, weights, strict=True))
        check_strided({"input": input, "hx": hx, **named})
        check_matrices(named)
        check_devices(input, weight_ih, hx=hx)
        raise
    # Not output[0], which is a view to autograd: `h.detach_()` would be refused.
    state: Tensor = torch.ops.aten._unsafe_view(output, output.shape[1 if batched else 2 :])
    return state if state.dtype == dtype or not state.is_cpu else state.to(result_dtype(dtype))


@overload
def gru(
    input: Input,
    hx: Tensor | None,
    params: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bias: bool = True,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    cell: str = "reset_after",
    backend: str = "auto",
    recompute: bool = False,
    num_heads: int = 1,
    lengths: Tensor | None = None,
    reset_mask: Tensor | None = None,
    reset_state: Tensor | None = None,
    h_scale: Tensor | None = None,
    recurrent_dropout: float = 0.0,
    return_gates: Literal[False] = False,
) -> tuple[Input, Tensor]: ...


@overload
def gru(
    input: Input,
    hx: Tensor | None,
    params: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bias: bool = True,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    cell: str = "reset_after",
    backend: str = "auto",
    recompute: bool = False,
    num_heads: int = 1,
    lengths: Tensor | None = None,
    reset_mask: Tensor | None = None,
    reset_state: Tensor | None = None,
    h_scale: Tensor | None = None,
    recurrent_dropout: float = 0.0,
    return_gates: bool,
) -> tuple[Input, Tensor] | tuple[Input, Tensor, Gates]: ...


def gru(
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    params: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bias: bool = True,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    cell: str = "reset_after",
    backend: str = "auto",
    recompute: bool = False,
    num_heads: int = 1,
    lengths: Tensor | None = None,
    reset_mask: Tensor | None = None,
    reset_state: Tensor | None = None,
    h_scale: Tensor | None = None,
    recurrent_dropout: float = 0.0,
    return_gates: bool = False,
) -> tuple[Tensor | PackedSequence, Tensor] | tuple[Tensor | PackedSequence, Tensor, Gates]:
    """A stack of GRU layers, with the conventions of `torch.nn.GRU`. D is 2 if bidirectional.

    Args:
        input: (T, B, I), (B, T, I) with batch_first, (T, I) unbatched, or a PackedSequence.
        hx: (num_layers*D, B, H), any strides; (num_layers*D, H) unbatched; None means zeros.
        params: per layer and direction weight_ih (N*H, I or D*H), weight_hh (N*H, H) and, with
            bias, bias_ih (N*H,), bias_hh (N*H,); N is 3, or 2 for no_reset.
        num_layers: number of layers.
        bias: whether params hold biases.
        dropout: probability of the dropout between layers, in training only.
        training: whether to apply dropout.
        bidirectional: whether every layer has a second, reverse direction.
        batch_first: whether input, output and reset_mask are batch-major.
        cell: "reset_after" (nn.GRU's), "reset_before" or "no_reset".
        backend: "auto", or one of `gru_fast.available_backends()`.
        recompute: save inputs and outputs only, and rebuild the gates in backward.
        num_heads: K > 1 makes the recurrent weights block-diagonal, each weight_hh (N*H, H/K); see
            `gru_fast.GRU`.
        lengths: (B,) int64 or int32, on any device, 0 <= length <= T; output is 0 from there on.
            Not with a PackedSequence.
        reset_mask: (T, B), (B, T) with batch_first, or (T,) unbatched, bool: true where a step
            begins a new episode.
        reset_state: shaped as hx, the state of a new episode; None means zeros.
        h_scale: shaped as hx, multiplies the state that enters the recurrent product.
        recurrent_dropout: probability with which a unit of the state is 0 in the recurrent
            products of a whole row, in training only; drawn by torch's generator.
        return_gates: whether to return the values of the gates; recompute is then ignored.

    Returns:
        output (T, B, D*H) in the layout of input, h_n shaped as hx and, with return_gates,
        `gru_fast.gates.Gates`.

    Raises:
        ValueError: input is neither 2-D nor 3-D, or not in the dtype of params; lengths beside a
            PackedSequence; a recurrent_dropout outside [0, 1] that the call draws with; num_layers
            below 1; num_heads that is no divisor of H; an unknown backend.
        TypeError: lengths, reset_mask or reset_state is not a Tensor.
        RuntimeError: sizes, dtypes or devices that do not fit together, a dropout outside [0, 1]
            that the call draws with, an unknown cell, or a named backend that cannot take the call.

    Source: Cho et al. 2014, arXiv:1406.1078; the equations are in `gru_fast.reference`.
    """
    plain = not (return_gates or (training and (dropout or recurrent_dropout)))
    if plain and reset_state is h_scale is None:
        done = direct.gru(
            input, hx, params, num_layers, bias, bidirectional, batch_first, lengths, reset_mask,
            num_heads, cell, backend,
        )  # fmt: skip
        if done is not None:
            return done
    _check_params(params, 4 if bias else 2, num_layers, bias, bidirectional)
    if num_heads != 1:
        heads.check_num_heads(num_heads, params[1], cell)
    if recurrent_dropout and training:
        H = params[1].shape[-1] * num_heads
        shape = state_shape(input, num_layers, bidirectional, H, batch_first)
        h_scale = state_scale(recurrent_dropout, shape, params[1], h_scale)
    run: Callable[..., tuple[Tensor, Tensor]]
    workspaces: list[Tensor] = []
    if return_gates:
        inner: Callable[..., Any] = layer_with_gates
        if num_heads > 1:
            inner = partial(heads.layer_with_gates, num_heads=num_heads)

        def run(*tensors: Tensor, **features: Any) -> tuple[Tensor, Tensor]:
            output, h_n, workspace = inner(*tensors, cell=cell, backend=backend, **features)
            workspaces.append(workspace)
            return output, h_n
    else:
        run = layer if num_heads == 1 else partial(heads.layer, num_heads=num_heads)
        run = partial(run, cell=cell, backend=backend, recompute=recompute)
    one = None
    if not (return_gates or recompute):
        past = direct_training if torch.is_grad_enabled() else direct
        one = partial(past.layer, num_heads=num_heads, cell=cell, backend=backend)
    results = run_layers(
        input,
        hx,
        params,
        run,
        one,
        num_layers=num_layers,
        dropout=dropout if training else 0.0,
        bidirectional=bidirectional,
        batch_first=batch_first,
        num_heads=num_heads,
        lengths=lengths,
        reset_mask=reset_mask,
        reset_state=reset_state,
        h_scale=h_scale,
    )
    if not return_gates:
        return results
    return *results, _as_input(from_workspaces(workspaces, cell), input, batch_first)


def _as_input(gates: Gates, input: Tensor | PackedSequence, batch_first: bool) -> Gates:
    """Gates (L*D, T, B, H) in the layout and the order of rows of an input."""
    if isinstance(input, PackedSequence):
        order = input.unsorted_indices
        if order is not None:
            gates = arranged(gates, lambda gate: gate.index_select(2, order))
        batched = True
    else:
        batched = input.dim() == 3
    if not batched:
        return arranged(gates, lambda gate: gate.squeeze(2))
    return arranged(gates, lambda gate: gate.transpose(1, 2)) if batch_first else gates


def _check_params(
    params: Sequence[Tensor], per: int, num_layers: int, bias: bool, bidirectional: bool
) -> None:
    if num_layers < 1:
        raise ValueError(f"num_layers: expected at least 1, got {num_layers}")
    expected = count_layers(num_layers, bidirectional) * per
    if len(params) != expected:
        raise RuntimeError(
            f"params: expected {expected} tensors for num_layers={num_layers}, "
            f"bias={bias}, bidirectional={bidirectional}, got {len(params)}"
        )
    for k, weight in enumerate(params):
        if weight is None:
            name = weight_names(WEIGHTS, expected, num_layers, 2 if bidirectional else 1)[k]
            raise TypeError(f"{name} should be a Tensor, got: NoneType")
