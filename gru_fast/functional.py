# SPDX-License-Identifier: Apache-2.0
"""The GRU as functions with nn.GRU's conventions: `gru`, `gru_cell`; `layer` and `scan` below."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from gru_fast import direct, direct_training, heads
from gru_fast.checks import check_rows
from gru_fast.dropout import Dropout, PackedDropout, state_scale
from gru_fast.gates import Gates, arranged, from_workspaces
from gru_fast.recurrence import FORWARD, layer, layer_with_gates, scan

Input = TypeVar("Input", Tensor, PackedSequence)

__all__ = ["gru", "gru_cell", "layer", "scan"]

_BOTH = (False, True)


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
        backend: a name of `gru_fast.backends.NAMES`.

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
    _check_input_width(input, weight_ih, 1)
    batched = input.dim() == 2
    x = input.unsqueeze(0) if batched else input[None, None]
    if hx is None:
        h0 = x.new_zeros(1, x.shape[1], weight_hh.shape[1])
    else:
        if hx.dim() != input.dim():
            raise RuntimeError(f"hx: expected {input.dim()} dimensions like input, got {hx.dim()}")
        h0 = hx.unsqueeze(0) if batched else hx[None, None]
    expected = (1, x.shape[1], weight_hh.shape[1])
    if h0.shape != expected:
        wanted = expected[1:] if batched else expected[2:]
        raise RuntimeError(
            f"hx: expected shape {wanted}, got {tuple(hx.shape) if hx is not None else None}"
        )
    dtype = h0.dtype
    x, h0 = _matching(x, h0, weight_ih)
    grouped: list[Any] = [None if w is None else w.unsqueeze(0) for w in weights]
    output, _ = layer(x, h0, *grouped, cell=cell, backend=backend)
    output = output[0] if batched else output[0, 0]
    return output if output.dtype == dtype or not output.is_cpu else output.to(dtype)


def _check_input_width(input: Tensor, weight_ih: Tensor, axis: int) -> None:
    if input.shape[-1] != weight_ih.shape[axis]:
        raise RuntimeError(
            "input: expected input.size(-1) to be equal to input_size, "
            f"{weight_ih.shape[axis]}, got {input.shape[-1]}"
        )


def _matching(x: Tensor, hx: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype of the weights if autocast allows them to differ."""
    dtype = weight.dtype
    if x.dtype == dtype and hx.dtype == dtype:
        return x, hx
    if torch._C._is_any_autocast_enabled():
        return x.to(dtype), hx.to(dtype)
    if x.dtype != dtype:
        raise ValueError(f"input: expected the dtype of the weights, {dtype}, got {x.dtype}")
    raise RuntimeError(f"hx: expected the dtype of input, {dtype}, got {hx.dtype}")


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
        backend: a name of `gru_fast.backends.NAMES`.
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
            PackedSequence; a probability outside [0, 1] that the call draws with; an unknown
            backend.
        TypeError: lengths or reset_mask is not a Tensor.
        RuntimeError: sizes, dtypes or devices that do not fit together, an unknown cell, or a named
            backend that cannot take the call.

    Source: Cho et al. 2014, arXiv:1406.1078; the equations are in `gru_fast.reference`.
    """
    plain = not (bidirectional or return_gates or (training and (dropout or recurrent_dropout)))
    plain = plain and num_heads == 1
    if plain and lengths is reset_mask is reset_state is h_scale is None:
        done = direct.gru(input, hx, params, num_layers, bias, batch_first, cell, backend)
        if done is not None:
            return done
    _check_params(params, 4 if bias else 2, num_layers, bias, bidirectional)
    if recurrent_dropout and training:
        layers = num_layers * (2 if bidirectional else 1)
        shape = state_shape(input, layers, params[1].shape[-1] * num_heads, batch_first)
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
    if num_heads == 1 and not (return_gates or recompute):
        one = partial(direct_training.layer, cell=cell, backend=backend)
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


def state_shape(
    input: Tensor | PackedSequence, layers: int, H: int, batch_first: bool
) -> tuple[int, ...]:
    """The shape of hx for an input: (layers, B, H), or (layers, H) if it is unbatched."""
    if isinstance(input, PackedSequence):
        return layers, int(input.batch_sizes[0]), H
    if input.dim() == 2:
        return layers, H
    if input.dim() != 3:
        raise ValueError(f"input: expected 2 or 3 dimensions, got {input.dim()}")
    return layers, input.shape[0 if batch_first else 1], H


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
    expected = num_layers * (2 if bidirectional else 1) * per
    if len(params) != expected:
        raise RuntimeError(
            f"params: expected {expected} tensors for num_layers={num_layers}, "
            f"bias={bias}, bidirectional={bidirectional}, got {len(params)}"
        )


def run_layers(
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    params: Sequence[Tensor],
    run: Callable[..., tuple[Tensor, Tensor]],
    run_one: Callable[..., tuple[Tensor, Tensor] | None] | None = None,
    *,
    num_layers: int,
    dropout: float,
    bidirectional: bool,
    batch_first: bool,
    num_heads: int = 1,
    lengths: Tensor | None,
    reset_mask: Tensor | None,
    reset_state: Tensor | None,
    h_scale: Tensor | None,
) -> tuple[Tensor | PackedSequence, Tensor]:
    """Layers over what `nn.GRU` takes: batched or not, batch-major or not, packed.

    Args:
        input: as in `gru`.
        hx: as in `gru`.
        params: the same number of tensors for each layer and direction; weight_ih comes first,
            then weight_hh.
        run: one layer of G directions; takes (T, B, I), (G, B, H), each of the layer's tensors
            with G in front, and by keyword lengths, reset_mask, reset_state, h_scale and reverse.
        run_one: a shorter way for a layer in one direction without any of these, if there is one:
            takes (T, B, I), (1, B, H) and the layer's tensors; None where it is not for the call.
        num_layers: number of layers.
        dropout: probability of the dropout between layers, 0 outside training.
        bidirectional: as in `gru`.
        batch_first: as in `gru`.
        num_heads: as in `gru`; weight_hh has a num_heads-th of the state's columns.
        lengths: as in `gru`.
        reset_mask: as in `gru`.
        reset_state: as in `gru`.
        h_scale: as in `gru`.

    Returns:
        As `gru`.

    Raises:
        ValueError: as `gru`.
        RuntimeError: as `gru`.
    """
    if isinstance(input, PackedSequence):
        return _run_packed(
            input, hx, params, run, num_layers, dropout, bidirectional, num_heads, lengths,
            reset_mask, reset_state, h_scale,
        )  # fmt: skip
    batched = input.dim() == 3
    if lengths is not None or reset_mask is not None:
        check_rows(input, batch_first, lengths, reset_mask)
        # They come from a loader as often as from the model.
        lengths = None if lengths is None else lengths.to(input.device)
    if not batched:
        if input.dim() != 2:
            raise ValueError(f"input: expected 2 or 3 dimensions, got {input.dim()}")
        if hx is not None and hx.dim() != 2:
            raise RuntimeError(f"hx: expected 2 dimensions for an unbatched input, got {hx.dim()}")
        x = input.unsqueeze(1)
        hx = None if hx is None else hx.unsqueeze(1)
        lengths = None if lengths is None else lengths.reshape(1)
        reset_mask = None if reset_mask is None else reset_mask.unsqueeze(1)
        reset_state = None if reset_state is None else reset_state.unsqueeze(1)
        h_scale = None if h_scale is None else h_scale.unsqueeze(1)
    else:
        if hx is not None and hx.dim() != 3:
            raise RuntimeError(f"hx: expected 3 dimensions for a batched input, got {hx.dim()}")
        x = input
        if batch_first:
            x = x.transpose(0, 1)
            reset_mask = None if reset_mask is None else reset_mask.transpose(0, 1)
    drop = Dropout(dropout) if dropout and num_layers > 1 else None
    output, h_n = _stack(
        x, hx, params, run, num_layers, bidirectional, num_heads, lengths, reset_mask,
        reset_state, h_scale, drop, run_one,
    )  # fmt: skip
    if not batched:
        return output.squeeze(1), h_n.squeeze(1)
    return (output.transpose(0, 1) if batch_first else output), h_n


def _run_packed(
    input: PackedSequence,
    hx: Tensor | None,
    params: Sequence[Tensor],
    run: Callable[..., tuple[Tensor, Tensor]],
    num_layers: int,
    dropout: float,
    bidirectional: bool,
    num_heads: int,
    lengths: Tensor | None,
    reset_mask: Tensor | None,
    reset_state: Tensor | None,
    h_scale: Tensor | None,
) -> tuple[PackedSequence, Tensor]:
    """`run_layers` in the sorted order of the packed sequence, padded."""
    if lengths is not None:
        raise ValueError("lengths: expected None with a PackedSequence, which has its own")
    data, batch_sizes, sorted_indices, unsorted_indices = input
    if data.dim() != 2:
        raise RuntimeError(f"input: expected packed data of 2 dimensions, got {data.dim()}")
    if hx is not None and hx.dim() != 3:
        raise RuntimeError(f"hx: expected 3 dimensions for a packed input, got {hx.dim()}")
    x, row_lengths = pad_packed_sequence(PackedSequence(data, batch_sizes))

    def sort(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or sorted_indices is None:
            return tensor
        return tensor.index_select(1, sorted_indices)

    if hx is not None:
        H = params[1].shape[1] * num_heads
        _check_hx(hx, num_layers * (2 if bidirectional else 1), x.shape[1], H)
    drop = PackedDropout(dropout, row_lengths) if dropout and num_layers > 1 else None
    output, h_n = _stack(
        x, sort(hx), params, run, num_layers, bidirectional, num_heads,
        row_lengths.to(data.device), sort(reset_mask), sort(reset_state), sort(h_scale), drop,
    )  # fmt: skip
    if unsorted_indices is not None:
        h_n = h_n.index_select(1, unsorted_indices)
    packed = pack_padded_sequence(output, row_lengths).data
    return PackedSequence(packed, batch_sizes, sorted_indices, unsorted_indices), h_n


def _check_hx(hx: Tensor, layers: int, B: int, H: int, name: str = "hx") -> None:
    if hx.shape != (layers, B, H):
        raise RuntimeError(f"{name}: expected hidden size {(layers, B, H)}, got {tuple(hx.shape)}")


def _stack(
    x: Tensor,
    hx: Tensor | None,
    params: Sequence[Tensor],
    run: Callable[..., tuple[Tensor, Tensor]],
    num_layers: int,
    bidirectional: bool,
    num_heads: int,
    lengths: Tensor | None,
    reset_mask: Tensor | None,
    reset_state: Tensor | None,
    h_scale: Tensor | None,
    drop: Callable[[Tensor], Tensor] | None,
    run_one: Callable[..., tuple[Tensor, Tensor] | None] | None = None,
) -> tuple[Tensor, Tensor]:
    """All layers over time-major (T, B, I)."""
    D = 2 if bidirectional else 1
    per = len(params) // (num_layers * D)
    B, H = x.shape[1], params[1].shape[-1] * num_heads
    _check_input_width(x, params[0], 1)
    if hx is None:
        hx = x.new_zeros(num_layers * D, B, H)
    else:
        _check_hx(hx, num_layers * D, B, H)
    for name, tensor in (("reset_state", reset_state), ("h_scale", h_scale)):
        if tensor is not None:
            _check_hx(tensor, num_layers * D, B, H, name)
    dtype = hx.dtype
    x, hx = _matching(x, hx, params[0])
    reverse = _BOTH if bidirectional else FORWARD
    if bidirectional or not (lengths is reset_mask is reset_state is h_scale is None):
        run_one = None
    finals: list[Tensor] = []
    for k in range(num_layers):
        own = params[k * D * per : (k + 1) * D * per]
        rows = slice(k * D, (k + 1) * D)
        h0 = hx if num_layers == 1 else hx[rows]
        done = None if run_one is None else run_one(x, h0, own)
        if done is None:
            if bidirectional:
                weights = [torch.stack((own[i], own[i + per])) for i in range(per)]
            else:
                weights = [w.unsqueeze(0) for w in own]
            done = run(
                x,
                h0,
                *weights,
                lengths=lengths,
                reset_mask=reset_mask,
                reset_state=None if reset_state is None else reset_state[rows],
                h_scale=None if h_scale is None else h_scale[rows].transpose(0, 1).flatten(1),
                reverse=reverse,
            )
        x, h_n = done
        finals.append(h_n)
        if drop is not None and k + 1 < num_layers:
            x = drop(x)
    h_n = finals[0] if num_layers == 1 else torch.cat(finals)
    if x.dtype != dtype and x.is_cpu:
        return x.to(dtype), h_n.to(dtype)
    return x, h_n
