# SPDX-License-Identifier: Apache-2.0
"""Truncated backpropagation through time: a long sequence in chunks, the state cut between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from gru_fast.checks import check_length_values
from gru_fast.recurrent import check_int

__all__ = ["Chunk", "tbptt"]


class Chunk(NamedTuple):
    """What a module gave for a part of the time steps.

    Attributes:
        output: of these steps; its graph ends where the chunk begins.
        h_n: the state after them.
        time: the steps, to be taken from whatever runs along the sequence: `target[chunk.time]`,
            or `target[:, chunk.time]` with `batch_first`.
    """

    output: Tensor
    h_n: Tensor
    time: slice


def tbptt(
    module: nn.Module,
    input: Tensor,
    steps: int,
    hx: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    reset_mask: Tensor | None = None,
    reset_state: Tensor | None = None,
) -> Iterator[Chunk]:
    """Run a layer over a sequence chunk by chunk; no gradient goes from a chunk to the one before.

    A chunk is computed when it is asked for, with the weights as they are then: call `backward` on
    its loss, and step the optimizer if you like, before you take the next. What it keeps for
    backward is freed with it, so memory grows with `steps`, not with T. The numbers of forward are
    those of one call, unless the weights change or recurrent dropout draws a mask for each chunk;
    those of a `LayerNormGRU` to within rounding.

    Args:
        module: `gru_fast.GRU`, `torch.nn.GRU`, or any module that is called as these are and has
            `batch_first` if it takes batch-major data.
        input: (T, B, I), (B, T, I) with `batch_first`, or (T, I) for one sequence.
        steps: Time steps of a chunk, the last one may have fewer; at least 1.
        hx: Initial state, passed to the first chunk as it is: gradients reach it from there.
        lengths: (B,), as in `gru_fast.GRU.forward`, for the whole sequence; its values
            are read here only if they lie on the CPU.
        reset_mask: (T, B) or (B, T), as there.
        reset_state: As there, for every chunk: each `backward` goes through it. If it requires a
            gradient it must be a leaf, for the first `backward` would free a graph behind it.

    Yields:
        A `Chunk` for each `steps` time steps.

    Raises:
        ValueError: `steps` is less than 1, `input` has fewer than two dimensions, or `module` is
            bidirectional: its reverse direction begins at the end.
        TypeError: `module` cannot be called, or its state is not a Tensor, as that of an LSTM;
            `steps` is not an int; `input`, `hx`, `lengths`, `reset_mask` or `reset_state` is not a
            Tensor.
        RuntimeError: `lengths` on the CPU outside 0 ... T, or `reset_mask` of another T.

    Source: Williams and Peng 1990, "An efficient gradient-based algorithm for on-line training of
    recurrent network trajectories", with as many steps forward as back.

    Example:
        >>> for chunk in tbptt(rnn, x, steps=64):
        ...     loss = criterion(head(chunk.output), target[chunk.time])
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
    """
    if not callable(module):
        raise TypeError(f"module should be a torch.nn.Module, got: {type(module).__name__}")
    check_int("steps", steps)
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    if not isinstance(input, Tensor):
        raise TypeError(f"input should be a Tensor, got: {type(input).__name__}")
    optional = {"lengths": lengths, "reset_mask": reset_mask, "reset_state": reset_state}
    for name, given in {"hx": hx, **optional}.items():
        if given is not None and not isinstance(given, Tensor):
            raise TypeError(f"{name} should be a Tensor or None, got: {type(given).__name__}")
    if input.dim() < 2:
        raise ValueError(f"input: expected 2 or 3 dimensions, got {input.dim()}")
    if getattr(module, "bidirectional", False):
        raise ValueError("module: expected one direction, a reverse one begins at the end")
    dim = 1 if input.dim() == 3 and getattr(module, "batch_first", False) else 0
    T = input.shape[dim]
    if lengths is not None and lengths.is_cpu:
        check_length_values(lengths, T)
    if reset_mask is not None and (reset_mask.dim() <= dim or reset_mask.shape[dim] != T):
        shape = tuple(reset_mask.shape)
        raise RuntimeError(f"reset_mask: expected T = {T} time steps, got shape {shape}")
    return _chunks(module, input, dim, steps, hx, lengths, reset_mask, reset_state)


def _chunks(
    module: nn.Module,
    input: Tensor,
    dim: int,
    steps: int,
    hx: Tensor | None,
    lengths: Tensor | None,
    reset_mask: Tensor | None,
    reset_state: Tensor | None,
) -> Iterator[Chunk]:
    T = input.shape[dim]
    for begin in range(0, T, steps):
        count = min(steps, T - begin)
        options: dict[str, Any] = {}
        if lengths is not None:
            options["lengths"] = (lengths - begin).clamp(0, count)
        if reset_mask is not None:
            options["reset_mask"] = reset_mask.narrow(dim, begin, count)
        if reset_state is not None:
            options["reset_state"] = reset_state
        output, h_n = module(input.narrow(dim, begin, count), hx, **options)
        if not isinstance(h_n, Tensor):
            raise TypeError(
                "module should return (output, h_n), both Tensors, as a GRU does; h_n of "
                f"{type(module).__name__} is: {type(h_n).__name__}"
            )
        yield Chunk(output, h_n, slice(begin, begin + count))
        hx = h_n.detach()
        del output, h_n
