# SPDX-License-Identifier: Apache-2.0
"""Arguments of `gru_fast::norm_scan` that the tests of the layer-normalised GRU share."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cases import Case, layer_inputs

EPS = 1e-5
GRADIENTS = ("gates_x", "h0", "weight_hh", "gamma_hh", "bias_hh", "reset_state", "h_scale")
"""What `norm_scan_backward` returns, in order."""
RESULTS = ("output", "h_n", "workspace", "rstd", *GRADIENTS)
"""What a forward and a backward pass return."""


def eps_of(H: int) -> float:
    """A few values near 0 are magnified by up to 1 / sqrt(eps), and with them what was rounded."""
    return EPS if H > 3 else 0.05


def norm_arguments(
    case: Case, dtype: torch.dtype = torch.float64, grad: bool = False, draw: int = 0
) -> list[Any]:
    """The arguments of `norm_scan` for a case; values are those of float32 or of dtype."""
    inputs = layer_inputs(case, dtype, draw=draw)
    G, H = len(case.reverse), case.H
    generator = torch.Generator().manual_seed(draw + 1000)
    gates_x = torch.randn(case.T, case.B, G, 3 * H, generator=generator)
    gamma = 1 + 0.3 * torch.randn(G, 3 * H, generator=generator)
    arguments = [
        gates_x.to(dtype), inputs.h0, inputs.weight_hh, gamma.to(dtype), inputs.bias_hh,
        inputs.lengths, inputs.reset_mask, inputs.reset_state, inputs.h_scale,
        eps_of(H), list(case.reverse), False,
    ]  # fmt: skip
    return [a.requires_grad_(grad) if is_float(a) else a for a in arguments]


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def cast(arguments: Sequence[Any], dtype: torch.dtype) -> list[Any]:
    return [
        a.detach().to(dtype).requires_grad_(a.requires_grad) if is_float(a) else a
        for a in arguments
    ]


def with_recompute(arguments: Sequence[Any], recompute: bool) -> list[Any]:
    return [*arguments[:11], recompute]


def outcome(module: Any, arguments: Sequence[Any], recompute: bool) -> list[Tensor]:
    """`RESULTS` of a module's `norm_scan` and `norm_scan_backward`.

    The gradients of the results are drawn on the CPU, so that they agree everywhere.
    """
    arguments = with_recompute(arguments, recompute)
    results = module.norm_scan(*arguments)
    generator = torch.Generator().manual_seed(1)
    grads = [
        torch.randn(t.shape, generator=generator).bfloat16().to(t.device, t.dtype)
        for t in results[:2]
    ]
    given = backward_arguments(module.norm_scan, arguments, recompute, grads)
    return [*results, *module.norm_scan_backward(*given)]


def backward_arguments(
    scan: Any, arguments: Sequence[Any], recompute: bool = False, grads: Sequence[Any] = ()
) -> list[Any]:
    """The arguments of `norm_scan_backward` after this forward pass, every gradient wanted."""
    tensors, mode = arguments[:9], arguments[9:11]
    with torch.no_grad():
        output, h_n, workspace, rstd = scan(*tensors, *mode, recompute)
        given = grads or (torch.randn_like(output), torch.randn_like(h_n))
    return [*given, *tensors, output, workspace, rstd, *mode, recompute, [True] * 7]
