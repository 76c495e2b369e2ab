# SPDX-License-Identifier: Apache-2.0
"""The arguments of one scan, as the kernels take them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .tiling import Device, Sizes, device_of

GATES = {"reset_after": 3, "reset_before": 3, "no_reset": 2}
"""Gate rows per hidden unit, N."""

SLOTS = {"reset_after": 4, "reset_before": 3, "no_reset": 2}
"""Values per hidden unit that the workspace holds, S."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that the kernels take."""

_MOST_TILE_STRIDE = 2**31 // 256

# torch.backends.cudnn takes microseconds to hand out what is in it.
_SWITCH = torch.backends.cudnn.rnn

MOST_UNITS = 2**31 // (64 * max(SLOTS.values()))
"""G * H at most, where a tile of up to 64 rows has several."""


class Problem(NamedTuple):
    """G recurrences over (T, B), none of T, B, G, H zero; shapes as in `gru_fast.reference`.

    gates_x has any strides but in its last axis; every other tensor is contiguous. A tuple, since
    a frozen dataclass takes five times as long to make, for every call.
    """

    gates_x: Tensor
    h0: Tensor
    weight_hh: Tensor
    bias_hh: Tensor | None
    lengths: Tensor | None
    reset_mask: Tensor | None
    reset_state: Tensor | None
    h_scale: Tensor | None
    cell: str
    reverse: tuple[bool, ...]
    precision: str
    T: int
    B: int
    G: int
    H: int

    def launches(self, most: int = 65535) -> list[tuple[int, int, int]]:
        """(first group, groups, direction bits): at most so many groups, 31 if directions mix.

        Bit i is the direction of the i-th group of the launch, and bit 31 that of all after it.
        """
        if self.G == 1:
            return [(0, 1, -int(self.reverse[0]))]
        uniform = len(set(self.reverse)) == 1
        size = most if uniform else min(most, 31)
        result = []
        for first in range(0, self.G, size):
            part = self.reverse[first : first + size]
            bits = sum(1 << i for i, r in enumerate(part) if r)
            result.append((first, len(part), -int(self.reverse[0]) if uniform else bits))
        return result

    def shared_arguments(self) -> dict[str, Any]:
        """What forward and backward kernels both take, by the name of the parameter."""
        return {
            "h0_ptr": self.h0,
            "lengths_ptr": self.lengths,
            "reset_mask_ptr": self.reset_mask,
            "reset_state_ptr": self.reset_state,
            "h_scale_ptr": self.h_scale,
            "T": self.T,
            "B": self.B,
            "G": self.G,
            "CELL": self.cell,
            "H": self.H,
        }

    def forward_arguments(self) -> dict[str, Any]:
        """What every forward kernel takes beside its outputs, by the name of the parameter."""
        stride_t, stride_b, stride_g, _ = self.gates_x.stride()
        return self.shared_arguments() | {
            "gates_x_ptr": self.gates_x,
            "weight_ptr": self.weight_hh,
            "stride_gates_t": stride_t,
            "stride_gates_b": stride_b,
            "stride_gates_g": stride_g,
            "bias_ptr": self.bias_hh,
        }


@dataclass(frozen=True)
class Chunk:
    """What a backward scan reads and writes for the scan steps steps[0] ... steps[1] - 1.

    Attributes:
        problem: Of all T steps.
        grad_output: (T, B, G*H), or None.
        grad_workspace: As the workspace, or None.
        output: (T, B, G*H).
        workspace: Of the chunk, or of the whole sequence if that is the chunk.
        steps: Scan steps, [begin, end).
        grad_gates: (steps, B, G, N*H), written.
        grad_q: (steps, B, G, H), written; None unless the cell is reset_after.
        grad_state: (G, B, H) float32, the gradient of the state after the chunk; receives that of
            the state before it.
        grad_start: (G, B, H) float32 of reset_state, added to; or None.
        grad_scale: (G, B, H) float32 of h_scale, added to; or None.
    """

    problem: Problem
    grad_output: Tensor | None
    grad_workspace: Tensor | None
    output: Tensor
    workspace: Tensor
    steps: tuple[int, int]
    grad_gates: Tensor
    grad_q: Tensor | None
    grad_state: Tensor
    grad_start: Tensor | None
    grad_scale: Tensor | None

    def arguments(self) -> dict[str, Any]:
        """What every backward kernel takes, by the name of the parameter."""
        return self.problem.shared_arguments() | {
            "grad_output_ptr": self.grad_output,
            "grad_workspace_ptr": self.grad_workspace,
            "output_ptr": self.output,
            "workspace_ptr": self.workspace,
            "grad_gates_ptr": self.grad_gates,
            "grad_q_ptr": self.grad_q,
            "grad_state_ptr": self.grad_state,
            "grad_start_ptr": self.grad_start,
            "grad_scale_ptr": self.grad_scale,
            "step_begin": self.steps[0],
            "step_end": self.steps[1],
            "PRECISION": self.problem.precision,
        }


def problem_of(
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
) -> Problem:
    """Bring arguments that `gru_fast.ops` has checked into the form that the kernels take.

    Only what has another form is copied.

    Raises:
        RuntimeError: a dtype without a kernel, or rows too wide for offsets of 32 bits in a tile.
    """
    if gates_x.dtype not in DTYPES:
        raise RuntimeError(f"gates_x: expected a dtype of {DTYPES}, got {gates_x.dtype}")
    G, B, H = h0.shape
    if B > 1 and G * H > MOST_UNITS:
        raise RuntimeError(f"h0: expected G * H <= {MOST_UNITS} with B > 1, got {G} * {H}")
    if gates_x.stride(3) != 1 or gates_x.stride(1) > _MOST_TILE_STRIDE:
        gates_x = gates_x.contiguous()
    return Problem(
        gates_x,
        h0.contiguous(),
        weight_hh.contiguous(),
        _contiguous(bias_hh),
        _contiguous(lengths),
        None if reset_mask is None else reset_mask.contiguous().view(torch.uint8),
        _contiguous(reset_state),
        _contiguous(h_scale),
        cell,
        tuple(reverse),
        dot_precision(gates_x),
        gates_x.shape[0],
        B,
        G,
        H,
    )


def turned(weight_hh: Tensor) -> Tensor:
    """W_hh (G, N*H, H) with each gate transposed, (G, N, H, H): what gradients are multiplied by.

    A copy, because tensor cores take 32-bit operands only as they lie.
    """
    G, rows, H = weight_hh.shape
    return weight_hh.view(G, rows // H, H, H).transpose(2, 3).contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def dot_precision(tensor: Tensor) -> str:
    """How products round: float32 follows torch's TF32 switch for RNNs, as cuDNN does."""
    if tensor.is_cuda and torch.version.hip is not None:
        return "ieee"  # the one that Triton knows on every AMD device
    if tensor.dtype != torch.float32:
        return "tf32"
    if tensor.is_cuda and device_of(tensor).arch < 80:
        return "ieee"
    return "tf32" if _SWITCH.fp32_precision == "tf32" else "tf32x3"


class _StandIn(NamedTuple):
    """What is asked of a tensor to know where it is, and how products of it round."""

    device: torch.device
    dtype: torch.dtype
    is_cuda: bool


def call_on(
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int],
    cell: str,
    plain: bool = True,
) -> tuple[Device, Sizes]:
    """What the tables go by, for a call of T, B, G, H that has no tensors yet."""
    stand_in: Any = _StandIn(device, dtype, device.type == "cuda")
    precision = dot_precision(stand_in)
    return device_of(stand_in), Sizes(*sizes, cell, dtype, precision, plain)


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's device the one that kernels are launched on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
