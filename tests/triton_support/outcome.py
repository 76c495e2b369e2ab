# SPDX-License-Identifier: Apache-2.0
"""One call of a layer, forward and backward, with every result by its name."""

from collections.abc import Callable

import torch
from torch import Tensor

from cases import LayerInputs

RESULTS = (
    "output", "h_n", "workspace", "grad_x", "grad_h0", "grad_weight_ih", "grad_weight_hh",
    "grad_bias_ih", "grad_bias_hh", "grad_reset_state", "grad_h_scale",
)  # fmt: skip


def outcome(
    function: Callable, backward: Callable, inputs: LayerInputs, dtype: torch.dtype, recompute: bool
) -> dict[str, Tensor]:
    """Results and gradients, by name, of `layer` and `layer_backward` of the same implementation.

    The gradients of the results are drawn on the CPU, so that they agree on every device.
    """
    inputs = inputs.to(dtype)
    results = function(*inputs.arguments(recompute=recompute))
    generator = torch.Generator().manual_seed(1)
    outer: list[Tensor | None] = [
        torch.randn(t.shape, generator=generator).bfloat16().to(t.device, dtype) for t in results
    ]
    if recompute:
        outer[2] = None
    saved = (results[0], results[2])
    mode = (inputs.cell, inputs.reverse, recompute, [True] * 8)
    gradients = backward(*outer, *inputs.arguments()[:10], *saved, *mode)
    return dict(zip(RESULTS, (*results, *gradients), strict=True))
