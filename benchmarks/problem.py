# SPDX-License-Identifier: Apache-2.0
"""The tensors of one case, the same for every provider, and what is right for them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.cases import DTYPES, Case
from gru_fast import reference

GATE_ELEMENTS = 2**22
"""The gate runs on at most this many outputs (T * B * H): the float64 reference keeps them all."""

GATE_STEPS = {"cpu": 2**31, "cuda": 64}
"""And on at most this many time steps: on a GPU the reference is bound by its launches."""

GATE_DRAWS = 4

WEIGHTS = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")


@dataclass(frozen=True)
class Problem:
    """Inputs of a one-layer GRU, drawn for a seed.

    Attributes:
        case: the sizes.
        suite: "train", "infer" or "step".
        dtype: a name of `DTYPES`.
        device: "cpu" or "cuda".
        seed: of the draw.
        feature: the row of the features suite that this is the problem of, or None.
        cell: as in `gru_fast.GRU`.
    """

    case: Case
    suite: str
    dtype: str
    device: str
    seed: int = 0
    feature: str | None = None

    cell: ClassVar[str] = "reset_after"

    def __post_init__(self) -> None:
        if self.case.L != 1:
            raise ValueError(f"case: expected one layer, got L = {self.case.L}")

    @property
    def training(self) -> bool:
        return self.suite == "train"

    @property
    def is_plain_layer(self) -> bool:
        """Whether `case` says all about its cost."""
        return True

    @property
    def beside_torch(self) -> bool:
        """Whether nn.GRU can take it, and so is the yardstick of the gate."""
        return not self.case.resets

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """x, h0, the four weights by nn.GRU's names, and grad_output, grad_h_n."""
        case = self.case
        generator = torch.Generator(self.device).manual_seed(self.seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            values = torch.randn(shape, generator=generator, device=self.device) * scale
            return values.to(DTYPES[self.dtype])

        rows, bound = 3 * case.H, case.H**-0.5
        return {
            "x": normal(case.T, case.B, case.I),
            "h0": normal(1, case.B, case.H, scale=0.5),
            "weight_ih_l0": normal(rows, case.I, scale=bound),
            "weight_hh_l0": normal(rows, case.H, scale=bound),
            "bias_ih_l0": normal(rows, scale=bound),
            "bias_hh_l0": normal(rows, scale=bound),
            "grad_output": normal(case.T, case.B, case.H),
            "grad_h_n": normal(1, case.B, case.H),
        }

    @cached_property
    def reset_mask(self) -> Tensor | None:
        """(T, B), or None."""
        if not self.case.resets:
            return None
        generator = torch.Generator(self.device).manual_seed(self.seed + 1)
        shape = (self.case.T, self.case.B)
        drawn = torch.rand(shape, generator=generator, device=self.device)
        return drawn < self.case.resets

    def for_gate(self) -> list[Problem]:
        """The draws of the gate.

        With so few time steps that the reference can keep all it computes; several draws of a
        small problem.
        """
        rows = self.case.B * self.case.H
        steps = min(self.case.T, GATE_STEPS[self.device], max(2, GATE_ELEMENTS // rows))
        values = rows * steps + 3 * self.case.H * (self.case.I + self.case.H)
        draws = min(GATE_DRAWS, max(1, GATE_ELEMENTS // 16 // values))
        case = replace(self.case, T=steps)
        return [replace(self, case=case, seed=self.seed + 2 * draw) for draw in range(draws)]

    @cached_property
    def truth(self) -> dict[str, Tensor]:
        """Every result by the reference in float64."""
        return self.by_reference(torch.float64)

    def dense(self, weight_hh: Tensor) -> Tensor:
        """The recurrent weights as the reference takes them, (3H, H)."""
        return weight_hh

    def by_reference(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """output, h_n and, for training, the gradient of every input."""
        inputs = {n: t.to(dtype).requires_grad_(self.training) for n, t in self.tensors.items()}
        grad_output, grad_h_n = inputs.pop("grad_output"), inputs.pop("grad_h_n")
        x, h0, *weights = inputs.values()
        with torch.set_grad_enabled(self.training):
            weights[1] = self.dense(weights[1])
            output, h_n, _ = reference.layer(
                x, h0, *(w.unsqueeze(0) for w in weights), None, self.reset_mask, None, None,
                self.cell, (False,), True,
            )  # fmt: skip
        results = {"output": output, "h_n": h_n}
        if self.training:
            gradients = torch.autograd.grad(
                (output, h_n), list(inputs.values()), (grad_output.detach(), grad_h_n.detach())
            )
            results |= {f"grad_{n}": g for n, g in zip(inputs, gradients, strict=True)}
        return {n: t.detach() for n, t in results.items()}
