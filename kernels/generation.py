# SPDX-License-Identifier: Apache-2.0
"""One call of `generate`: the weights, the rules of the draw and what the rows have come to."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import problem
from .generate_tables import Model
from .problem import DTYPES, GATES
from .tiling import Sizes, whole

PADDING = -100
"""What stands after the end of a row of tokens."""

ALIVE, ENDED, BAD_LOGITS, BAD_ID = range(4)
"""What `Rows.status` holds; the kernels write these numbers."""

MOST_DRAWN_FROM = 1024
"""Tokens whose logits, for all rows that a program draws for, are one tile in forms that split."""

LOGITS_OF_WARP = 64
"""Where there are more tokens, those of a tile beside weights or states, over all of its rows.

They are read in parts, once for each pass; with 128, weights on chip spilled 8 to 40 bytes.
"""

MOST_OF_HEAD = 32
"""Tokens whose logits a program computes at a time, there."""


@dataclass(frozen=True)
class Weights:
    """A token model; contiguous, of one dtype and device.

    Attributes:
        cell: The kind of cell.
        table: (V + 1, N*H), what each token adds to the gates of layer 0; the last row is that of
            the zero vector.
        weight_ih: (L - 1, N*H, H) of the layers above, or None for one layer.
        weight_hh: (L, N*H, H).
        bias_ih: (L - 1, N*H), or None.
        bias_hh: (L, N*H), or None.
        head: (V, H).
        head_bias: (V,), or None.
        precision: As in `Problem`.
        units: Hidden units of the model: those after them, up to H, are padding.
    """

    cell: str
    table: Tensor
    weight_ih: Tensor | None
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    head: Tensor
    head_bias: Tensor | None
    precision: str
    units: int

    @property
    def L(self) -> int:
        return self.weight_hh.shape[0]

    @property
    def H(self) -> int:
        return self.weight_hh.shape[2]

    @property
    def V(self) -> int:
        return self.head.shape[0]

    def arguments(self) -> dict[str, Any]:
        """By the name of the parameter of a kernel."""
        return {
            "table_ptr": self.table,
            "weight_ih_ptr": self.weight_ih,
            "weight_hh_ptr": self.weight_hh,
            "bias_ih_ptr": self.bias_ih,
            "bias_hh_ptr": self.bias_hh,
            "head_ptr": self.head,
            "head_bias_ptr": self.head_bias,
            "V": self.V,
            "CELL": self.cell,
            "L": self.L,
            "H": self.H,
            "PRECISION": self.precision,
        }


def weights_of(
    cell: str,
    table: Tensor,
    layers: Sequence[Sequence[Tensor]],
    head: Tensor,
    head_bias: Tensor | None,
) -> Weights:
    """Weights from those of each layer: weight_ih, weight_hh and, with biases, bias_ih, bias_hh.

    The first layer's weight_ih and bias_ih are in the table. Several layers are copied, and so is
    everything if H is not `whole`: padding are units whose weights, and so states, are 0.

    Raises:
        RuntimeError: A dtype without a kernel, an unknown cell, or a shape that does not fit.
    """
    if table.dtype not in DTYPES:
        raise RuntimeError(f"table: expected a dtype of {DTYPES}, got {table.dtype}")
    if cell not in GATES:
        raise RuntimeError(f"cell: expected one of {tuple(GATES)}, got {cell!r}")
    V, H = head.shape
    rows = GATES[cell] * H
    biased = len(layers[0]) == 4
    expected = [("table", table, (V + 1, rows)), ("head", head, (V, H))]
    if head_bias is not None:
        expected.append(("head_bias", head_bias, (V,)))
    for number, (weight_ih, weight_hh, *biases) in enumerate(layers):
        if number:
            expected.append((f"weight_ih of layer {number}", weight_ih, (rows, H)))
        expected.append((f"weight_hh of layer {number}", weight_hh, (rows, H)))
        expected += [(f"bias of layer {number}", bias, (rows,)) for bias in biases]
    for name, tensor, shape in expected:
        if tuple(tensor.shape) != shape or tensor.dtype != table.dtype:
            raise RuntimeError(
                f"{name}: expected shape {shape} and {table.dtype}, got {tuple(tensor.shape)} and "
                f"{tensor.dtype}"
            )
        if tensor.device != table.device:
            raise RuntimeError(
                f"{name}: expected the device of table, {table.device}, got {tensor.device}"
            )

    def stacked(number: int, first: int, *axes: int) -> Tensor | None:
        tensors = [_whole(layer[number].detach(), H, *axes) for layer in layers[first:]]
        if not tensors:
            return None
        return tensors[0].unsqueeze(0).contiguous() if len(tensors) == 1 else torch.stack(tensors)

    weight_hh = stacked(1, 0, 0, 1)
    assert weight_hh is not None
    return Weights(
        cell,
        _whole(table.detach(), H, 1).contiguous(),
        stacked(0, 1, 0, 1),
        weight_hh,
        stacked(2, 1, 0) if biased else None,
        stacked(3, 0, 0) if biased else None,
        _whole(head.detach(), H, 1).contiguous(),
        None if head_bias is None else head_bias.detach().contiguous(),
        problem.dot_precision(table),
        H,
    )


def model_of(weights: Weights, B: int) -> Model:
    """What the tables need to know of a call."""
    dtype = weights.table.dtype
    sizes = Sizes(1, B, 1, weights.units, weights.cell, dtype, weights.precision)
    return Model(sizes, weights.L, weights.V)


def _whole(tensor: Tensor, H: int, *axes: int) -> Tensor:
    """The tensor with zeros after every H elements along the axes, up to `tiling.whole(H)`."""
    if H == whole(H):
        return tensor
    for axis in axes:
        parts = tensor.unflatten(axis, (-1, H))
        after = [0, 0] * (parts.ndim - axis - 2)
        tensor = F.pad(parts, [*after, 0, whole(H) - H]).flatten(axis, axis + 1)
    return tensor


@dataclass(frozen=True)
class Rules:
    """How a token is drawn; as `gru_fast.sampling.SamplingOptions`, checked there."""

    do_sample: bool = True
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    eos: int | None = None
    seed: int = 0

    def arguments(self, V: int) -> dict[str, Any]:
        """By the name of the parameter of a kernel; what has no effect is compiled out."""
        top_k = V if self.top_k is None else min(self.top_k, V)
        # Of a smaller share no more is kept, and its bits would be an int32 to Triton.
        top_p = 1.0 if self.top_p is None else max(self.top_p, 1e-300)
        shaped = self.temperature != 1 or top_k < V or top_p < 1 or bool(self.min_p)
        return {
            "eos": -1 if self.eos is None else self.eos,
            "seed_low": _signed(self.seed),
            "seed_high": _signed(self.seed >> 32),
            "temperature": float(self.temperature),
            "top_k": top_k,
            "top_p": struct.unpack("<q", struct.pack("<d", top_p))[0],
            "min_p": 0.0 if self.min_p is None else float(self.min_p),
            "SAMPLE": self.do_sample,
            "SHAPED": self.do_sample and shaped,
            "TOP_K": self.do_sample and top_k < V,
            "TOP_P": self.do_sample and top_p < 1,
        }


@dataclass(frozen=True)
class Rows:
    """What the kernels read and write of B sequences.

    Attributes:
        prompts: (B, P) int64.
        lengths: (B,) int64, tokens of each prompt.
        state: (L, B, H) float32: the one that the last token of each row was drawn from.
        status: (B,) int32, ALIVE and so on.
        tokens: (B, S) int64, PADDING where nothing was drawn.
        log_probs: (B, S) float32, 0 there.
        shortest: The smallest of the lengths.
        longest: The largest of them.
    """

    prompts: Tensor
    lengths: Tensor
    state: Tensor
    status: Tensor
    tokens: Tensor
    log_probs: Tensor
    shortest: int
    longest: int

    @property
    def B(self) -> int:
        return self.prompts.shape[0]

    def arguments(self) -> dict[str, Any]:
        """By the name of the parameter of a kernel."""
        return {
            "prompts_ptr": self.prompts,
            "lengths_ptr": self.lengths,
            "state_ptr": self.state,
            "status_ptr": self.status,
            "tokens_ptr": self.tokens,
            "log_probs_ptr": self.log_probs,
            "B": self.B,
            "P": self.prompts.shape[1],
            "S": self.tokens.shape[1],
        }


def new_rows(weights: Weights, prompts: Tensor, lengths: Tensor, S: int) -> Rows:
    """B sequences before their first step."""
    B, like = len(prompts), {"device": prompts.device}
    shortest, longest = (int(n) for n in torch.stack(lengths.aminmax()).tolist())
    return Rows(
        prompts.contiguous(),
        lengths.contiguous(),
        torch.zeros(weights.L, B, weights.H, dtype=torch.float32, **like),
        torch.full((B,), ALIVE, dtype=torch.int32, **like),
        torch.full((B, S), PADDING, **like),
        torch.zeros(B, S, dtype=torch.float32, **like),
        shortest,
        longest,
    )


@dataclass(frozen=True)
class Generation:
    """What a launcher takes beside the steps to run."""

    weights: Weights
    rules: Rules
    rows: Rows

    def arguments(self, BLOCK_V: int) -> dict[str, Any]:
        """By the name of the parameter of a kernel; BLOCK_V tokens are drawn from at a time."""
        weights = self.weights
        ids = -(-weights.V // BLOCK_V) * BLOCK_V
        rest = {"BLOCK_V": BLOCK_V, "id_bits": (ids - 1).bit_length()}
        return weights.arguments() | self.rules.arguments(weights.V) | self.rows.arguments() | rest

    def split_arguments(self, DRAW_B: int, in_part: int) -> dict[str, Any]:
        """The same for a form that splits the head and the draw over programs.

        Args:
            DRAW_B: Rows that one program draws for, a power of two.
            in_part: Logits of all of them in one tile, where those of V tokens are none.
        """
        V = self.weights.V
        BLOCK_V = max(16, 1 << (V - 1).bit_length())
        if BLOCK_V > MOST_DRAWN_FROM:
            BLOCK_V = max(16, in_part // DRAW_B)
        rest = {"BLOCK_T": MOST_OF_HEAD, "WHOLE": V <= BLOCK_V}
        return self.arguments(BLOCK_V) | rest


@dataclass(frozen=True)
class Exchange:
    """What the programs of a split form hand to each other; operands as `generate_layers` says.

    Attributes:
        operand: (2, L, B, H), in the dtype of the weights.
        gated: (B, H) in that dtype, or None: r * s of reset_before.
        update: (B, H) float32, or None: z of reset_before.
        logits: (B, V) float32.
    """

    operand: Tensor
    gated: Tensor | None
    update: Tensor | None
    logits: Tensor

    def arguments(self) -> dict[str, Any]:
        """By the name of the parameter of a kernel."""
        return {
            "operand_ptr": self.operand,
            "gated_ptr": self.gated,
            "update_ptr": self.update,
            "logits_ptr": self.logits,
        }


def exchange_of(call: Generation, position: int) -> Exchange:
    """Buffers for launches that begin at a position."""
    state, table = call.rows.state, call.weights.table
    operand = table.new_empty(2, *state.shape)
    operand[position % 2].copy_(state)
    gated = update = None
    if call.weights.cell == "reset_before":
        gated, update = table.new_empty(state.shape[1:]), torch.empty_like(state[0])
    logits = state.new_empty(call.rows.B, call.weights.V)
    return Exchange(operand, gated, update, logits)


def parameters(kernel: Any, known: dict[str, Any]) -> dict[str, Any]:
    """Those of the values that the kernel has a parameter for."""
    return {name: known[name] for name in kernel.arg_names if name in known}


def _signed(word: int) -> int:
    """The low 32 bits as a signed number, so that every seed has one type."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word
