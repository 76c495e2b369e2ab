# SPDX-License-Identifier: Apache-2.0
"""How many bytes a call of a layer takes on the CPU, by mode, before it is run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gru_fast.gru import GRU
from gru_fast.recurrent import check_int
from gru_fast.reference import GATES, SLOTS

__all__ = ["MemoryEstimate", "memory_estimate"]

# Of the CPU kernels: chunk.h, forward.h, panels.h, arena.cpp.
_CHUNK_ROWS = 256
_PROJECT_ROWS, _PROJECT_ROWS_OF_ONE = 64, 128
_UNITS = 16
_KEPT_BYTES = 64 << 20
"""The largest scratch block that a thread keeps for its next call."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a call beside the parameters and the input.

    Attributes:
        saved: what lives between forward and backward, the output included; without training the
            output and the last state.
        peak: the most at any time: during forward, or during backward with the gradients of
            output, input and parameters, and the scratch memory of the kernels.
    """

    saved: int
    peak: int


def memory_estimate(
    module: GRU,
    T: int,
    B: int,
    *,
    training: bool = True,
    recompute: bool | None = None,
    input_grad: bool = False,
) -> MemoryEstimate:
    """Estimate what `module(x)` of T steps and B rows takes on the CPU, in float32 or float64.

    Under `gru_fast.tbptt` with chunks of k steps it is that of T = k, beside the outputs that are
    kept. Autograd's own objects, and memory that the allocator does not give back, come on top.

    Args:
        module: A `gru_fast.GRU`.
        T: Time steps.
        B: Rows.
        training: Whether a backward pass follows; else the call is one under `no_grad`.
        recompute: True or False: as if the module had this option; None: as it is set there.
        input_grad: Whether the input requires a gradient.

    Raises:
        TypeError: `module` is no `gru_fast.GRU`, or T or B not an int.
        ValueError: T or B is negative, the module is not in float32 or float64, or it has several
            heads.
    """
    if not isinstance(module, GRU):
        raise TypeError(f"module should be a gru_fast.GRU, got: {type(module).__name__}")
    if module.num_heads > 1:
        raise ValueError(f"module: expected num_heads=1, got {module.num_heads}")
    for name, size in (("T", T), ("B", B)):
        check_int(name, size)
    if T < 0 or B < 0:
        raise ValueError(f"T, B: expected at least 0, got {T}, {B}")
    dtype = module._flat_weights[0].dtype
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"module: expected float32 or float64, got {dtype}")
    recompute = module.recompute if recompute is None else recompute
    sizes = _Sizes(module, T, B)
    count = sizes.training(recompute, input_grad) if training else sizes.inference()
    return MemoryEstimate(*(n * dtype.itemsize for n in count))


class _Sizes:
    """Numbers of elements."""

    def __init__(self, module: GRU, T: int, B: int) -> None:
        self.module, self.T, self.B = module, T, B
        self.I, self.H, self.L = module.input_size, module.hidden_size, module.num_layers
        self.D = 2 if module.bidirectional else 1
        self.N, self.S = GATES[module.cell], SLOTS[module.cell]
        self.output = T * B * self.D * self.H
        self.states = self.L * self.D * B * self.H
        steps = min(-(-_CHUNK_ROWS // B), T) if B else 0
        self.rows = steps * B  # of a chunk of the backward pass
        self.padded = -(-self.H // _UNITS) * _UNITS
        self.kept = _KEPT_BYTES // module._flat_weights[0].element_size()

    def width(self, k: int) -> int:
        return self.D * self.H if k else self.I

    def weights(self, k: int) -> int:
        return self.D * self.N * self.H * (self.width(k) + self.H + 2 * bool(self.module.bias))

    def stacked(self, k: int) -> int:
        """Copies of the weights: operators take those of both directions as one tensor."""
        return self.weights(k) if self.D == 2 else 0

    def packed(self, columns: int) -> int:
        """A weight of a layer in the kernels' own layout."""
        return self.D * self.N * self.padded * columns

    def forward_scratch(self, k: int) -> int:
        most = _PROJECT_ROWS_OF_ONE if self.B == 1 else _PROJECT_ROWS
        rows = max(self.B, min(self.T * self.B, most))
        # Weights that are used once are read as they lie; threads that share out rows pack them.
        once = self.T * self.B <= most and (self.B == 1 or torch.get_num_threads() == 1)
        packed = self.packed(self.H) if self.T > 1 else 0
        packed += 0 if self.T <= 1 or once else self.packed(self.width(k))
        return packed + self.D * self.padded * (2 * self.B + self.N * rows)

    def backward_scratch(self, k: int, recompute: bool, grad_x: bool) -> int:
        packed = self.packed(self.H) if self.T > 2 else 0
        if grad_x and self.rows < self.T * self.B:
            packed += self.packed(self.width(k))
        D, units = self.D * self.rows * self.S * self.padded, self.padded
        operands = self.rows * (self.width(k) + units)
        rebuilt = 0
        if recompute:
            rebuilt = D + self.rows * (self.width(k) + (4 + self.N) * units)
        return packed + D + operands + rebuilt

    def inference(self) -> tuple[int, int]:
        kept = self.output + 2 * self.states
        peak = max((self.output if k else 0) + self.forward_scratch(k) for k in range(self.L))
        return self.output + self.states, kept + peak

    def training(self, recompute: bool, input_grad: bool) -> tuple[int, int]:
        by_operator = recompute or (self.module.recurrent_dropout > 0 and self.module.training)
        stacked = [self.stacked(k) if by_operator else 0 for k in range(self.L)]
        layer = self.output * (1 if recompute else 1 + self.S)
        dropped = 2 * self.output if self.module.dropout and self.module.training else 0
        saved = [layer + stacked[k] + (dropped if k + 1 < self.L else 0) for k in range(self.L)]
        states = 2 * self.states
        forward = max(self.forward_scratch(k) for k in range(self.L))
        kept = forward if forward <= self.kept else 0
        peak, grads = 0, 0
        for k in reversed(range(self.L)):
            grad_x = bool(k) or input_grad
            grads += self.weights(k)  # both directions' stay in one tensor, if they were stacked
            moment = sum(saved[: k + 1]) + states + grads + self.output
            moment += self.T * self.B * self.width(k) if grad_x else 0
            peak = max(peak, moment + max(kept, self.backward_scratch(k, recompute, grad_x)))
        return sum(saved) + states, max(peak, sum(saved) + states + forward)
