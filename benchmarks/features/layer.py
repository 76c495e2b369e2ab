# SPDX-License-Identifier: Apache-2.0
"""One plain layer as tensors by name, for rows that call it in different ways."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.cases import Case
from benchmarks.features.row import Tensors, load


def draw(case: Case, generator: torch.Generator) -> Tensors:
    """Input, weights, and the gradient of the output."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    I, H = case.I, case.H  # noqa: E741
    return {
        "x": normal(case.T, case.B, I),
        "weight_ih_l0": normal(3 * H, I) * H**-0.5,
        "weight_hh_l0": normal(3 * H, H) * H**-0.5,
        "bias_ih_l0": normal(3 * H) * H**-0.5,
        "bias_hh_l0": normal(3 * H) * H**-0.5,
        "grad_y": normal(case.T, case.B, H),
    }


def module_of(kind: Any, tensors: Tensors, **options: Any) -> nn.RNNBase:
    """A module with the drawn weights."""
    x, H = tensors["x"], tensors["grad_y"].shape[2]
    module: nn.RNNBase = kind(x.shape[2], H, dtype=x.dtype, **options)
    load(module, tensors)
    return module
