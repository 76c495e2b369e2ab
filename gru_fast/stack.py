# SPDX-License-Identifier: Apache-2.0
"""A stack of layers over what `nn.GRU` takes: batched or not, batch-major or not, packed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from gru_fast.checks import (
    check_batch_sizes,
    check_directions,
    check_matrices,
    check_rows,
    check_strided,
    weight_names,
)
from gru_fast.dropout import Dropout, PackedDropout
from gru_fast.recurrence import BOTH, FORWARD, grouped
from gru_fast.reference import WEIGHTS

__all__ = [
    "check_devices",
    "check_input_width",
    "count_layers",
    "matching",
    "padded",
    "result_dtype",
    "run_layers",
    "state_shape",
]


def run_layers(
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    params: Sequence[Tensor],
    run: Callable[..., tuple[Tensor, Tensor]],
    run_plain: Callable[..., tuple[Tensor, Tensor] | None] | None = None,
    *,
    num_layers: int,
    dropout: float,
    bidirectional: bool,
    batch_first: bool,
    num_heads: int = 1,
    kinds: Sequence[str] = WEIGHTS,
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
        run_plain: a shorter way for a layer without reset_state and h_scale, if there is one: takes
            (T, B, I), (G, B, H), the tensors of one direction after the other, G and, by keyword,
            lengths and reset_mask or, with packed rows (rows, I), batch_sizes; None where it is not
            for the call.
        num_layers: number of layers.
        dropout: probability of the dropout between layers, 0 outside training.
        bidirectional: as in `gru`.
        batch_first: as in `gru`.
        num_heads: as in `gru`; weight_hh has a num_heads-th of the state's columns.
        kinds: what errors call the tensors of one layer and direction.
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
    try:
        if isinstance(input, PackedSequence):
            return _run_packed(
                input, hx, params, run, run_plain, num_layers, dropout, bidirectional, batch_first,
                num_heads, kinds, lengths, reset_mask, reset_state, h_scale,
            )  # fmt: skip
        batched = input.dim() == 3
        if not (lengths is reset_mask is reset_state is None):
            check_rows(input.shape[:-1], batch_first, lengths, reset_mask, reset_state)
            # They come from a loader as often as from the model.
            lengths = None if lengths is None else lengths.to(input.device)
        if not batched:
            if input.dim() != 2:
                raise ValueError(f"input: expected 2 or 3 dimensions, got {input.dim()}")
            _check_dims("an unbatched", 2, hx, reset_state, h_scale)
            x = input.unsqueeze(1)
            hx = None if hx is None else hx.unsqueeze(1)
            lengths = None if lengths is None else lengths.reshape(1)
            reset_mask = None if reset_mask is None else reset_mask.unsqueeze(1)
            reset_state = None if reset_state is None else reset_state.unsqueeze(1)
            h_scale = None if h_scale is None else h_scale.unsqueeze(1)
        else:
            _check_dims("a batched", 3, hx, reset_state, h_scale)
            x = input
            if batch_first:
                x = x.transpose(0, 1)
                reset_mask = None if reset_mask is None else reset_mask.transpose(0, 1)
        drop = Dropout(dropout) if dropout and num_layers > 1 else None
        output, h_n = _stack(
            x, hx, params, run, num_layers, bidirectional, num_heads, kinds, lengths, reset_mask,
            reset_state, h_scale, drop, run_plain,
        )  # fmt: skip
        if not batched:
            return output.squeeze(1), h_n.squeeze(1)
        return (output.transpose(0, 1) if batch_first else output), h_n
    except (RuntimeError, IndexError):
        # Only now, and not before each call, which costs: the ops have names of their own.
        data = input.data if isinstance(input, PackedSequence) else input
        states = {"hx": hx, "reset_state": reset_state, "h_scale": h_scale}
        names = weight_names(kinds, len(params), num_layers, 2 if bidirectional else 1)
        weights = dict(zip(names, params, strict=False))
        check_strided({"input": data, **states, **weights})
        check_matrices(weights)
        check_devices(data, params[0], reset_mask=reset_mask, **states)
        raise


def _run_packed(
    input: PackedSequence,
    hx: Tensor | None,
    params: Sequence[Tensor],
    run: Callable[..., tuple[Tensor, Tensor]],
    run_plain: Callable[..., tuple[Tensor, Tensor] | None] | None,
    num_layers: int,
    dropout: float,
    bidirectional: bool,
    batch_first: bool,
    num_heads: int,
    kinds: Sequence[str],
    lengths: Tensor | None,
    reset_mask: Tensor | None,
    reset_state: Tensor | None,
    h_scale: Tensor | None,
) -> tuple[PackedSequence, Tensor]:
    """`run_layers` in the sorted order of the packed sequence.

    What `run_plain` does not take is padded.
    """
    if lengths is not None:
        raise ValueError("lengths: expected None with a PackedSequence, which has its own")
    data, batch_sizes, sorted_indices, unsorted_indices = input
    if data.dim() != 2:
        raise RuntimeError(f"input: expected packed data of 2 dimensions, got {data.dim()}")

    def sort(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or sorted_indices is None:
            return tensor
        return tensor.index_select(1, sorted_indices)

    # Before they are sorted, which would take the first rows of too many.
    T, B = len(batch_sizes), _first_size(batch_sizes, len(data))
    check_rows((B, T) if batch_first else (T, B), batch_first, None, reset_mask, reset_state)
    _check_dims("a packed", 3, hx, reset_state, h_scale)
    if reset_mask is not None and batch_first:
        reset_mask = reset_mask.transpose(0, 1)
    layers, H = count_layers(num_layers, bidirectional), params[1].shape[1] * num_heads
    states = {"hx": hx, "reset_state": reset_state, "h_scale": h_scale}
    for name, given in states.items():
        if given is not None:
            _check_hx(given, layers, B, H, name)
    check_devices(data, params[0], reset_mask=reset_mask, **states)
    hx = sort(hx)
    start = data.new_zeros(layers, B, H) if hx is None else hx
    finals: list[Tensor] = []
    if run_plain is not None and reset_mask is reset_state is h_scale is None:
        rows = PackedSequence(data, batch_sizes)
        data, finals = _run_rows(rows, start, params, run_plain, num_layers, dropout, bidirectional)
    done = len(finals)
    if done < num_layers:
        data, h_n = _run_padded(
            PackedSequence(data, batch_sizes), start, params, run, num_layers, dropout,
            bidirectional, num_heads, kinds, sort(reset_mask), sort(reset_state), sort(h_scale),
            done,
        )  # fmt: skip
        finals.append(h_n)
    h_n = finals[0] if len(finals) == 1 else torch.cat(finals)
    if unsorted_indices is not None:
        h_n = h_n.index_select(1, unsorted_indices)
    return PackedSequence(data, batch_sizes, sorted_indices, unsorted_indices), h_n


def _run_rows(
    input: PackedSequence,
    hx: Tensor,
    params: Sequence[Tensor],
    run_plain: Callable[..., tuple[Tensor, Tensor] | None],
    num_layers: int,
    dropout: float,
    bidirectional: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The first layers, as many as `run_plain` takes: rows for the next, and their last states."""
    data, batch_sizes = input[:2]
    D, per = 2 if bidirectional else 1, len(params) // num_layers
    finals: list[Tensor] = []
    for k in range(num_layers):
        own = params[k * per : (k + 1) * per]
        h0 = hx[k * D : (k + 1) * D]
        done = run_plain(data, h0, own, D, batch_sizes=batch_sizes)
        if done is None:
            break
        data, h_n = done
        finals.append(h_n)
        if dropout and k + 1 < num_layers:
            data = Dropout(dropout)(data)
    return data, finals


def _first_size(batch_sizes: Tensor, rows: int) -> int:
    """B, which a tensor can have: the other sizes are left to who reads them."""
    B = int(batch_sizes[0])
    if not 0 < B <= rows:
        check_batch_sizes(batch_sizes, rows)
    return B


def padded(rows: Tensor, batch_sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Packed rows (rows, ...) as (T, B, ...), and their lengths.

    Raises:
        RuntimeError: sizes with which `pad_packed_sequence` would write past the end of its memory.
    """
    check_batch_sizes(batch_sizes, len(rows))
    if len(rows) == 0:  # pad_packed_sequence would lose the graph
        return rows.reshape(len(batch_sizes), 0, *rows.shape[1:]), batch_sizes[:0]
    return pad_packed_sequence(PackedSequence(rows, batch_sizes))


# Dynamo calls `pad_packed_sequence` outside its graphs, and so it should what reads sizes.
for _function in (_first_size, padded):
    vars(_function).update(
        _torchdynamo_disable=True,
        _torchdynamo_disable_msg="the sizes of a PackedSequence are values: give a padded tensor "
        "and lengths= instead",
    )


def _run_padded(
    input: PackedSequence,
    hx: Tensor,
    params: Sequence[Tensor],
    run: Callable[..., tuple[Tensor, Tensor]],
    num_layers: int,
    dropout: float,
    bidirectional: bool,
    num_heads: int,
    kinds: Sequence[str],
    reset_mask: Tensor | None,
    reset_state: Tensor | None,
    h_scale: Tensor | None,
    first: int,
) -> tuple[Tensor, Tensor]:
    """Layers from the first on over (T, B, I): the rows of the output, and the last states."""
    x, lengths = padded(input.data, input.batch_sizes)
    packs = len(lengths) > 0  # nn.GRU takes no rows, pack_padded_sequence refuses them
    drop = PackedDropout(dropout, lengths) if dropout and num_layers > 1 and packs else None
    output, h_n = _stack(
        x, hx, params, run, num_layers, bidirectional, num_heads, kinds, lengths.to(x.device),
        reset_mask, reset_state, h_scale, drop, first=first,
    )  # fmt: skip
    return pack_padded_sequence(output, lengths).data if packs else output.flatten(0, 1), h_n


def _stack(
    x: Tensor,
    hx: Tensor | None,
    params: Sequence[Tensor],
    run: Callable[..., tuple[Tensor, Tensor]],
    num_layers: int,
    bidirectional: bool,
    num_heads: int,
    kinds: Sequence[str],
    lengths: Tensor | None,
    reset_mask: Tensor | None,
    reset_state: Tensor | None,
    h_scale: Tensor | None,
    drop: Callable[[Tensor], Tensor] | None,
    run_plain: Callable[..., tuple[Tensor, Tensor] | None] | None = None,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """All layers from the first on over its time-major input (T, B, *)."""
    D = 2 if bidirectional else 1
    per = len(params) // (num_layers * D)
    B, H = x.shape[1], params[1].shape[-1] * num_heads
    if first == 0:
        check_input_width(x, params[0])
    if hx is None:
        hx = x.new_zeros(num_layers * D, B, H)
    else:
        _check_hx(hx, num_layers * D, B, H)
    dtype = hx.dtype
    x, hx = matching(x, hx, params[0])
    if reset_state is not None:
        _check_hx(reset_state, num_layers * D, B, H, "reset_state")
        _, reset_state = matching(x, reset_state, params[0], "reset_state")
    if h_scale is not None:
        _check_hx(h_scale, num_layers * D, B, H, "h_scale")
        _, h_scale = matching(x, h_scale, params[0], "h_scale")
    reverse = BOTH if bidirectional else FORWARD
    if not (reset_state is h_scale is None):
        run_plain = None
    finals: list[Tensor] = []
    for k in range(first, num_layers):
        own = params[k * D * per : (k + 1) * D * per]
        rows = slice(k * D, (k + 1) * D)
        h0 = hx if num_layers == 1 else hx[rows]
        done = None
        if run_plain is not None:
            done = run_plain(x, h0, own, D, lengths=lengths, reset_mask=reset_mask)
        if done is None:
            if bidirectional:
                check_directions(own, kinds, k)
            done = run(
                x,
                h0,
                *grouped(own, D),
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
    h_n = finals[0] if len(finals) == 1 else torch.cat(finals)
    if x.dtype != dtype and x.is_cpu:
        dtype = result_dtype(dtype)
        return x.to(dtype), h_n.to(dtype)
    return x, h_n


def count_layers(num_layers: int, bidirectional: bool) -> int:
    """Layers times directions L * D: how many layers have a state and weights of their own."""
    return num_layers * (2 if bidirectional else 1)


def state_shape(
    input: Tensor | PackedSequence, num_layers: int, bidirectional: bool, H: int, batch_first: bool
) -> tuple[int, ...]:
    """The shape of hx for an input: (L * D, B, H), or (L * D, H) if it is unbatched."""
    layers = count_layers(num_layers, bidirectional)
    if isinstance(input, PackedSequence):
        return layers, int(input.batch_sizes[0]), H
    if input.dim() == 2:
        return layers, H
    if input.dim() != 3:
        raise ValueError(f"input: expected 2 or 3 dimensions, got {input.dim()}")
    return layers, input.shape[0 if batch_first else 1], H


def _check_dims(
    kind: str, dims: int, hx: Tensor | None, reset_state: Tensor | None, h_scale: Tensor | None
) -> None:
    for name, state in (("hx", hx), ("reset_state", reset_state), ("h_scale", h_scale)):
        if state is not None and state.dim() != dims:
            raise RuntimeError(
                f"{name}: expected {dims} dimensions for {kind} input, got {state.dim()}"
            )


def _check_hx(hx: Tensor, layers: int, B: int, H: int, name: str = "hx") -> None:
    if hx.shape != (layers, B, H):
        raise RuntimeError(f"{name}: expected hidden size {(layers, B, H)}, got {tuple(hx.shape)}")


def check_input_width(input: Tensor, weight_ih: Tensor) -> None:
    """Raise RuntimeError unless the last axis of input is the I of weight_ih (N*H, I)."""
    if input.shape[-1] != weight_ih.shape[1]:
        raise RuntimeError(
            "input: expected input.size(-1) to be equal to input_size, "
            f"{weight_ih.shape[1]}, got {input.shape[-1]}"
        )


def check_devices(input: Tensor, weight_ih: Tensor, **others: Tensor | None) -> None:
    """Raise RuntimeError unless the input and the others, by name, are where the weights are."""
    if input.device != weight_ih.device:
        raise RuntimeError(
            f"input: expected the device of the weights, {weight_ih.device}, got {input.device}"
        ) from None
    for name, tensor in others.items():
        if tensor is not None and tensor.device != input.device:
            raise RuntimeError(
                f"{name}: expected the device of input, {input.device}, got {tensor.device}"
            ) from None


def matching(x: Tensor, hx: Tensor, weight: Tensor, name: str = "hx") -> tuple[Tensor, Tensor]:
    """Both in the dtype of the weights if autocast allows them to differ; `name` is that of hx."""
    dtype = weight.dtype
    if x.dtype == dtype and hx.dtype == dtype:
        return x, hx
    if torch._C._is_any_autocast_enabled():
        return x.to(dtype), hx.to(dtype)
    if x.dtype != dtype:
        raise ValueError(f"input: expected the dtype of the weights, {dtype}, got {x.dtype}")
    raise RuntimeError(f"{name}: expected the dtype of input, {dtype}, got {hx.dtype}")


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of results on the CPU for a state of this dtype that the weights do not have.

    It is that of nn.GRU, whose state meets gates in the dtype of autocast.
    """
    if torch.is_autocast_enabled("cpu"):
        return torch.promote_types(dtype, torch.get_autocast_dtype("cpu"))
    return dtype
