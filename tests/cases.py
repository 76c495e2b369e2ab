# SPDX-License-Identifier: Apache-2.0
"""Sizes, features and random arguments that the tests share."""

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from gru_fast.reference import GATES

CELLS = tuple(GATES)
FEATURES = ("plain", "lengths", "resets", "reset_state", "h_scale", "everything")


@dataclass(frozen=True)
class Case:
    """One call: sizes and which optional inputs it has."""

    cell: str = "reset_after"
    features: str = "plain"
    reverse: tuple[bool, ...] = (False,)
    T: int = 4
    B: int = 3
    I: int = 5  # noqa: E741
    H: int = 7
    bias: bool = True
    shared_x: bool = True

    def __str__(self) -> str:
        directions = "".join("<" if r else ">" for r in self.reverse)
        text = f"{self.cell}-{self.features}-{directions}-T{self.T}B{self.B}I{self.I}H{self.H}"
        return text + ("" if self.bias else "-nobias") + ("" if self.shared_x else "-xpergroup")


@dataclass
class LayerInputs:
    """The arguments of `gru_fast::layer`, in order."""

    x: Tensor
    h0: Tensor
    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    lengths: Tensor | None
    reset_mask: Tensor | None
    reset_state: Tensor | None
    h_scale: Tensor | None
    cell: str
    reverse: list[bool]
    recompute: bool = field(default=False)

    def arguments(self, **changes: Any) -> list[Any]:
        return [changes.get(f.name, getattr(self, f.name)) for f in fields(self)]

    def to(self, dtype: torch.dtype) -> "LayerInputs":
        return LayerInputs(
            *[
                v.detach().to(dtype).requires_grad_(v.requires_grad)
                if isinstance(v, Tensor) and v.is_floating_point()
                else v
                for v in self.arguments()
            ]
        )

    def leaves(self) -> dict[str, Tensor]:
        """The differentiable inputs, by name."""
        named = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {n: v for n, v in named if isinstance(v, Tensor) and v.is_floating_point()}


def layer_inputs(
    case: Case, dtype: torch.dtype = torch.float64, grad: bool = False, draw: int = 0
) -> LayerInputs:
    """Random arguments, rounded to float32 or to dtype if that is coarser."""
    generator = torch.Generator().manual_seed(draw)
    T, B, H, G = case.T, case.B, case.H, len(case.reverse)
    rows = GATES[case.cell] * H
    every = case.features == "everything"

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float32) * scale
        return values.to(dtype).requires_grad_(grad)

    lengths = reset_mask = reset_state = h_scale = None
    if every or case.features == "lengths":
        lengths = torch.randint(0, T + 1, (B,), generator=generator)
        lengths[:1] = T
        lengths[1:2] = 0
    if every or case.features in ("resets", "reset_state"):
        reset_mask = torch.rand(T, B, generator=generator) < 0.4
    if every or case.features == "reset_state":
        reset_state = normal(G, B, H)
    if every or case.features == "h_scale":
        keep = torch.rand(B, G * H, generator=generator) < 0.7
        h_scale = (keep.to(dtype) / 0.7).requires_grad_(grad)
    return LayerInputs(
        normal(*((T, B, case.I) if case.shared_x else (T, B, G, case.I))),
        normal(G, B, H),
        normal(G, rows, case.I, scale=case.I**-0.5),
        normal(G, rows, H, scale=H**-0.5),
        normal(G, rows) if case.bias else None,
        normal(G, rows) if case.bias else None,
        lengths,
        reset_mask,
        reset_state,
        h_scale,
        case.cell,
        list(case.reverse),
    )
