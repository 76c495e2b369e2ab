# SPDX-License-Identifier: Apache-2.0
"""Argument checks of the ops: each message has the argument, the expected and the given."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gru_fast.reference import GATES, SLOTS
from gru_fast.reference_norm import NORM_SLOTS


def check_cell(cell: str) -> None:
    """Raise RuntimeError unless cell is a known one."""
    if cell not in GATES:
        raise RuntimeError(f"cell: expected one of {', '.join(map(repr, GATES))}, got {cell!r}")


def weight_names(kinds: Sequence[str], count: int, num_layers: int, directions: int) -> list[str]:
    """Names of all weights of a stack in their order; `kinds` may have some that it lacks."""
    own = kinds[: count // (num_layers * directions)]
    return [
        f"{kind}_l{layer}{suffix}"
        for layer in range(num_layers)
        for suffix in ("", "_reverse")[:directions]
        for kind in own
    ]


def check_strided(tensors: Mapping[str, Tensor | None]) -> None:
    """Raise RuntimeError if one, by the caller's name, is sparse or in a layout of MKL-DNN.

    What is no Tensor, or a nested one, is left to others.
    """
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.layout not in (torch.strided, torch.jagged):
            raise RuntimeError(
                f"{name}: expected a dense tensor, got {tensor.layout}: call .to_dense() on it"
            ) from None


def check_matrices(weights: Mapping[str, Tensor | None]) -> None:
    """Raise RuntimeError if one of those named weight_* has not two dimensions."""
    for name, weight in weights.items():
        if weight is not None and name.startswith("weight") and weight.dim() != 2:
            raise RuntimeError(f"{name}: expected 2 dimensions, got {weight.dim()}") from None


def check_directions(weights: Sequence[Tensor], kinds: Sequence[str], layer: int) -> None:
    """Raise RuntimeError unless both directions of a layer have the same dtypes and shapes.

    Stacked, tensors of two dtypes would become one of the wider. Under autocast they may differ, as
    those of nn.GRU may.
    """
    half = len(weights) // 2
    for kind, a, b in zip(kinds, weights[:half], weights[half:], strict=False):
        if a.dtype != b.dtype and not torch._C._is_any_autocast_enabled():
            text = f"one dtype, got {a.dtype} and {b.dtype}"
        elif a.shape != b.shape:
            text = f"one shape, got {tuple(a.shape)} and {tuple(b.shape)}"
        else:
            continue
        raise RuntimeError(f"{kind}_l{layer} and {kind}_l{layer}_reverse: expected {text}")


def _check_shape(name: str, tensor: Tensor | None, expected: tuple[int, ...], axes: str) -> None:
    if tensor is not None and tuple(tensor.shape) != expected:
        raise RuntimeError(f"{name}: expected shape {axes} = {expected}, got {tuple(tensor.shape)}")


def _check_alike(first: str, tensors: dict[str, Tensor | None]) -> None:
    like = tensors[first]
    assert like is not None
    if not like.is_floating_point():
        raise RuntimeError(f"{first}: expected a floating dtype, got {like.dtype}")
    dtype, device = like.dtype, like.device
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise RuntimeError(
                f"{name}: expected the dtype of {first}, {dtype}, got {tensor.dtype}"
            )
        if tensor.device != device:
            raise RuntimeError(
                f"{name}: expected the device of {first}, {device}, got {tensor.device}"
            )


def check_scan(
    gates_x: Tensor,
    h0: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    lengths: Tensor | None,
    reset_mask: Tensor | None,
    reset_state: Tensor | None,
    h_scale: Tensor | None,
    cell: str,
    reverse: Sequence[bool],
) -> None:
    """Raise RuntimeError unless the arguments of `gru_fast::scan` fit together."""
    check_cell(cell)
    if gates_x.dim() != 4:
        raise RuntimeError(
            f"gates_x: expected shape (T, B, G, {GATES[cell]}*H), got {tuple(gates_x.shape)}"
        )
    if h0.dim() != 3:
        raise RuntimeError(f"h0: expected shape (G, B, H), got {tuple(h0.shape)}")
    G, H = h0.shape[0], h0.shape[2]
    T, B = gates_x.shape[:2]
    rows = GATES[cell] * H
    _check_shape("gates_x", gates_x, (T, B, G, rows), f"(T, B, G, {GATES[cell]}*H)")
    _check_recurrence(
        "gates_x", gates_x, h0, weight_hh, bias_hh, lengths, reset_mask, reset_state, h_scale,
        cell, reverse,
    )  # fmt: skip


def check_layer(
    x: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    lengths: Tensor | None,
    reset_mask: Tensor | None,
    reset_state: Tensor | None,
    h_scale: Tensor | None,
    cell: str,
    reverse: Sequence[bool],
) -> None:
    """Raise RuntimeError unless the arguments of `gru_fast::layer` fit together."""
    check_cell(cell)
    if x.dim() not in (3, 4):
        raise RuntimeError(f"x: expected shape (T, B, I) or (T, B, G, I), got {tuple(x.shape)}")
    if h0.dim() != 3:
        raise RuntimeError(f"h0: expected shape (G, B, H), got {tuple(h0.shape)}")
    G, H = h0.shape[0], h0.shape[2]
    N = GATES[cell]
    T, B, width = x.shape[0], x.shape[1], x.shape[-1]
    if x.dim() == 4:
        _check_shape("x", x, (T, B, G, width), "(T, B, G, I)")
    _check_shape("weight_ih", weight_ih, (G, N * H, width), f"(G, {N}*H, I)")
    _check_shape("bias_ih", bias_ih, (G, N * H), f"(G, {N}*H)")
    _check_recurrence(
        "x", x, h0, weight_hh, bias_hh, lengths, reset_mask, reset_state, h_scale, cell, reverse
    )
    _check_alike("x", {"x": x, "weight_ih": weight_ih, "bias_ih": bias_ih})


def _check_rows_dtypes(lengths: Tensor | None, reset_mask: Tensor | None) -> None:
    if lengths is not None and lengths.dtype not in (torch.int64, torch.int32):
        raise RuntimeError(f"lengths: expected dtype int64 or int32, got {lengths.dtype}")
    if reset_mask is not None and reset_mask.dtype != torch.bool:
        raise RuntimeError(f"reset_mask: expected dtype bool, got {reset_mask.dtype}")


def _check_recurrence(
    name: str,
    steps: Tensor,
    h0: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    lengths: Tensor | None,
    reset_mask: Tensor | None,
    reset_state: Tensor | None,
    h_scale: Tensor | None,
    cell: str,
    reverse: Sequence[bool],
) -> None:
    T, B = steps.shape[:2]
    G, H = h0.shape[0], h0.shape[2]
    N = GATES[cell]
    if G < 1 or H < 1:
        raise RuntimeError(f"h0: expected G >= 1 and H >= 1, got {tuple(h0.shape)}")
    if len(reverse) != G:
        raise RuntimeError(f"reverse: expected {G} values, one per group, got {len(reverse)}")
    _check_shape("h0", h0, (G, B, H), "(G, B, H)")
    _check_shape("weight_hh", weight_hh, (G, N * H, H), f"(G, {N}*H, H)")
    _check_shape("bias_hh", bias_hh, (G, N * H), f"(G, {N}*H)")
    _check_shape("lengths", lengths, (B,), "(B,)")
    _check_shape("reset_mask", reset_mask, (T, B), "(T, B)")
    _check_shape("reset_state", reset_state, (G, B, H), "(G, B, H)")
    _check_shape("h_scale", h_scale, (B, G * H), "(B, G*H)")
    if reset_state is not None and reset_mask is None:
        raise RuntimeError("reset_state: expected None without reset_mask, got a tensor")
    _check_rows_dtypes(lengths, reset_mask)
    for argument, tensor in (("lengths", lengths), ("reset_mask", reset_mask)):
        if tensor is not None and tensor.device != steps.device:
            raise RuntimeError(
                f"{argument}: expected the device of {name}, {steps.device}, got {tensor.device}"
            )
    _check_alike(
        name,
        {
            name: steps,
            "h0": h0,
            "weight_hh": weight_hh,
            "bias_hh": bias_hh,
            "reset_state": reset_state,
            "h_scale": h_scale,
        },
    )


def check_norm_scan(
    gates_x: Tensor,
    h0: Tensor,
    weight_hh: Tensor,
    gamma_hh: Tensor,
    bias_hh: Tensor | None,
    lengths: Tensor | None,
    reset_mask: Tensor | None,
    reset_state: Tensor | None,
    h_scale: Tensor | None,
    eps: float,
    reverse: Sequence[bool],
) -> None:
    """Raise RuntimeError unless the arguments of `gru_fast::norm_scan` fit together."""
    check_scan(
        gates_x, h0, weight_hh, bias_hh, lengths, reset_mask, reset_state, h_scale, "reset_after",
        reverse,
    )  # fmt: skip
    G, H = h0.shape[0], h0.shape[2]
    _check_shape("gamma_hh", gamma_hh, (G, 3 * H), "(G, 3*H)")
    _check_alike("gates_x", {"gates_x": gates_x, "gamma_hh": gamma_hh})
    if not 0 < eps < math.inf:
        raise RuntimeError(f"eps: expected a positive number, got {eps}")


def check_norm_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    gates_x: Tensor,
    h0: Tensor,
    output: Tensor,
    workspace: Tensor,
    rstd: Tensor,
    recompute: bool,
    output_mask: Sequence[bool],
) -> None:
    """The same for what `gru_fast::norm_scan_backward` takes beside these arguments."""
    T, B = gates_x.shape[:2]
    G, H = h0.shape[0], h0.shape[2]
    _check_shape("grad_output", grad_output, (T, B, G * H), "(T, B, G*H)")
    _check_shape("grad_h_n", grad_h_n, (G, B, H), "(G, B, H)")
    _check_shape("output", output, (T, B, G * H), "(T, B, G*H)")
    for name, tensor, shape, axes in (
        ("workspace", workspace, (T, B, G, NORM_SLOTS * H), f"(T, B, G, {NORM_SLOTS}*H)"),
        ("rstd", rstd, (T, B, G), "(T, B, G)"),
    ):
        expected = (0,) if recompute else shape
        _check_shape(name, tensor, expected, "(0,) with recompute" if recompute else axes)
    if len(output_mask) != 7:
        raise RuntimeError(f"output_mask: expected 7 values, got {len(output_mask)}")
    _check_alike(
        "h0",
        {
            "h0": h0,
            "grad_output": grad_output,
            "grad_h_n": grad_h_n,
            "output": output,
            "workspace": workspace,
            "rstd": rstd,
        },
    )


def check_rows(
    axes: Sequence[int],
    batch_first: bool,
    lengths: Tensor | None,
    reset_mask: Tensor | None,
    reset_state: Tensor | None,
) -> None:
    """Raise unless they fit an input in its own layout, which the ops do not know.

    Args:
        axes: its shape without the last axis: (T, B), (B, T) with batch_first, or (T,).
        batch_first: whether a 3-D input is batch-major.
        lengths: (B,), or one value for a 2-D input.
        reset_mask: bool, of this shape.
        reset_state: of any shape here.

    Raises:
        TypeError: one of them is not a Tensor.
        RuntimeError: its shape or dtype does not fit.
    """
    tensors = {"lengths": lengths, "reset_mask": reset_mask, "reset_state": reset_state}
    for name, given in tensors.items():
        if given is not None and not isinstance(given, Tensor):
            raise TypeError(f"{name} should be a Tensor, got: {type(given).__name__}")
    names = "(T,)" if len(axes) == 1 else "(B, T)" if batch_first else "(T, B)"
    if lengths is not None and len(axes) == 1 and lengths.numel() != 1:
        raise RuntimeError(
            f"lengths: expected one value for an unbatched input, got shape {tuple(lengths.shape)}"
        )
    if len(axes) == 2:
        _check_shape("lengths", lengths, (axes[0 if batch_first else 1],), "(B,)")
    _check_shape("reset_mask", reset_mask, tuple(axes), names)
    _check_rows_dtypes(lengths, reset_mask)


def check_batch_sizes(batch_sizes: Tensor, rows: int) -> None:
    """Raise RuntimeError unless they are those of a PackedSequence of so many rows.

    Without any row all may be 0. Reads the values.
    """
    if batch_sizes.dim() != 1 or batch_sizes.dtype != torch.int64:
        raise RuntimeError(
            f"batch_sizes: expected one dimension of int64, got shape {tuple(batch_sizes.shape)} "
            f"of {batch_sizes.dtype}"
        )
    sizes: list[int] = batch_sizes.tolist()
    if sum(sizes) != rows:
        raise RuntimeError(
            f"batch_sizes: expected values whose sum is the number of rows of data, {rows}, "
            f"got the sum {sum(sizes)}"
        )
    if rows == 0 and not any(sizes):
        return
    for t, size in enumerate(sizes):
        if size < 1 or size > sizes[max(t - 1, 0)]:
            expected = ">= 1" if size < 1 else f"that never rise, {sizes[t - 1]} or less"
            raise RuntimeError(f"batch_sizes: expected values {expected}, got {size} at step {t}")


def check_integers(name: str, given: Tensor) -> None:
    """Raise a TypeError unless the tensor is of integers, which bools are not here."""
    if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        raise TypeError(f"{name}: expected integers, got {given.dtype}")


def check_length_values(lengths: Tensor | None, T: int) -> None:
    """Raise RuntimeError unless 0 <= lengths <= T; reads the values, so for CPU tensors only."""
    if lengths is not None and lengths.numel() > 0:
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > T:
            raise RuntimeError(
                f"lengths: expected values from 0 to T = {T}, got values from {low} to {high}"
            )


def check_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_workspace: Tensor | None,
    steps: Tensor,
    h0: Tensor,
    output: Tensor,
    workspace: Tensor,
    cell: str,
    recompute: bool,
    output_mask: Sequence[bool],
    gradients: int,
) -> None:
    """Raise RuntimeError unless what a backward op adds to its forward op's arguments fits."""
    T, B = steps.shape[:2]
    G, H = h0.shape[0], h0.shape[2]
    _check_shape("grad_output", grad_output, (T, B, G * H), "(T, B, G*H)")
    _check_shape("grad_h_n", grad_h_n, (G, B, H), "(G, B, H)")
    _check_shape("output", output, (T, B, G * H), "(T, B, G*H)")
    saved = (0,) if recompute else (T, B, G, SLOTS[cell] * H)
    axes = "(0,) with recompute" if recompute else f"(T, B, G, {SLOTS[cell]}*H)"
    _check_shape("workspace", workspace, saved, axes)
    _check_shape("grad_workspace", grad_workspace, saved, axes)
    if recompute and grad_workspace is not None:
        raise RuntimeError("grad_workspace: expected None with recompute, got a tensor")
    if len(output_mask) != gradients:
        raise RuntimeError(f"output_mask: expected {gradients} values, got {len(output_mask)}")
    _check_alike(
        "h0",
        {
            "h0": h0,
            "grad_output": grad_output,
            "grad_h_n": grad_h_n,
            "grad_workspace": grad_workspace,
            "output": output,
            "workspace": workspace,
        },
    )
