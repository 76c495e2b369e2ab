# SPDX-License-Identifier: Apache-2.0
"""One layer-normalised GRU layer as a function: the op where it is right, else the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from gru_fast import backends, ops, ops_norm, reference_norm
from gru_fast.checks import check_norm_scan
from gru_fast.recurrence import FORWARD, as_autocast, is_plain, needs_grad
from gru_fast.reference import without_padding


def needs_composition(x: Tensor) -> bool:
    """As that of `backends`; here `vmap` is the only transform that the operators get right."""
    if forward_ad._current_level >= 0 or backends.is_distributed(x):
        return True
    return torch._C._are_functorch_transforms_active() and not backends.only_vmap()


def norm_layer(
    x: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    gamma_ih: Tensor,
    gamma_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    reset_mask: Tensor | None = None,
    reset_state: Tensor | None = None,
    h_scale: Tensor | None = None,
    eps: float = 1e-5,
    reverse: Sequence[bool] = FORWARD,
    recompute: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One GRU layer of G groups with a layer norm on both gate products.

    Args:
        x: (T, B, I), shared by all groups.
        h0: (G, B, H).
        weight_ih: (G, 3H, I).
        weight_hh: (G, 3H, H).
        gamma_ih: (G, 3H), gain of the norm of x @ weight_ih^T.
        gamma_hh: (G, 3H), gain of the norm of h @ weight_hh^T.
        bias_ih: (G, 3H) or None, added after the norm.
        bias_hh: (G, 3H) or None, added after the norm.
        lengths: (B,) int64 or int32, 0 <= length <= T.
        reset_mask: (T, B) bool, true where a new episode begins.
        reset_state: (G, B, H), the state an episode begins with; None means zeros.
        h_scale: (B, G*H), multiplies the state that enters the recurrent product.
        eps: added to both variances, > 0.
        reverse: one flag per group.
        recompute: save inputs and output only, and rebuild the gates in backward.
        backend: a name of `gru_fast.backends.NAMES`.

    Returns:
        output (T, B, G*H) and h_n (G, B, H).

    Raises:
        RuntimeError: arguments that do not fit together, or a named backend that cannot take them.
        ValueError: an unknown backend.

    Source: Ba et al. 2016, arXiv:1607.06450; the equations are in `gru_fast.reference_norm`.
    """
    tensors = (
        x, h0, weight_ih, weight_hh, gamma_ih, gamma_hh, bias_ih, bias_hh, lengths, reset_mask,
        reset_state, h_scale,
    )  # fmt: skip
    return as_autocast(_layer, tensors, eps, reverse, recompute, backend)


def _layer(
    x: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    gamma_ih: Tensor,
    gamma_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    lengths: Tensor | None,
    reset_mask: Tensor | None,
    reset_state: Tensor | None,
    h_scale: Tensor | None,
    eps: float,
    reverse: Sequence[bool],
    recompute: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    gates_x = _gates_x(x, weight_ih, gamma_ih, bias_ih, lengths, eps)
    tensors = (
        gates_x, h0, weight_hh, gamma_hh, bias_hh, lengths, reset_mask, reset_state, h_scale,
    )  # fmt: skip
    unfit = None
    if x.is_cuda and not torch.compiler.is_compiling():  # there the op itself decides
        plain = lengths is reset_mask is h_scale is None
        unfit = backends.norm_unfit(x.device, x.dtype, h0.shape[2], plain)
    if backend == "auto" and backends.counts_flops():
        backend = "reference"
    facts: dict[str, Any] = {"unfit": unfit, "composed": needs_composition(x)}
    if backends.select_norm(backend, x.device.type, x.dtype, **facts) == "reference":
        check_norm_scan(*tensors, eps, reverse)
        output, h_n, _, _ = reference_norm.norm_scan(*tensors, eps, reverse, True)
    elif not needs_grad(gates_x, h0, weight_hh, gamma_hh, bias_hh, reset_state, h_scale):
        output, h_n, _, _ = ops.without_grad(ops_norm.norm_scan, *tensors, eps, reverse, True)
    else:
        op = ops_norm.eager_norm_scan if is_plain(gates_x) else ops_norm.norm_scan
        output, h_n, _, _ = op(*tensors, eps, reverse, recompute)
    return output, h_n


def _gates_x(
    x: Tensor,
    weight_ih: Tensor,
    gamma_ih: Tensor,
    bias_ih: Tensor | None,
    lengths: Tensor | None,
    eps: float,
) -> Tensor:
    """The normalised input products, (T, B, G, 3H), by PyTorch's own operations."""
    # What is stored in the padding must not reach the gradients of the weights.
    x = without_padding(x, lengths)
    parts = [
        F.layer_norm(
            F.linear(x, w), w.shape[:1], gain, None if bias_ih is None else bias_ih[g], eps
        )
        for g, (w, gain) in enumerate(zip(weight_ih, gamma_ih, strict=True))
    ]
    return parts[0].unsqueeze(2) if len(parts) == 1 else torch.stack(parts, 2)
