# SPDX-License-Identifier: Apache-2.0
"""The specification of the layer-normalised GRU in plain PyTorch: recurrence and gradients.

The cell is reset_after with a norm on each of its two gate products, over all 3H of their values
together (Ba et al. 2016, arXiv:1607.06450, in the form that the library haste has). Symbols, masks
and equations (1) to (16) are those of `reference`. `norm_scan` begins where the input product is
normalised already: gates_x = LN(x @ W^T) * gamma_ih + bias_ih, which PyTorch's own operations do.

Forward; c = bias_hh, gamma = gamma_hh, and the mean is over the 3H values of a row

    (17) u    = s @ U^T                                       u = (u_r, u_z, u_n)
    (18) rstd = 1 / sqrt(mean((u - mean(u))^2) + eps)
    (19) v    = (u - mean(u)) * rstd
    (20) k    = v * gamma + c
    (21) r = sigmoid(a_r + k_r)      z = sigmoid(a_z + k_z)      n = tanh(a_n + r * k_n)

    and h is that of (6). workspace = (v_r, v_z, v_n, r, z, n), 6H values, and rstd, one. Where the
    row is not valid, they are 0.

Backward: Dh, Dn, Dz, An, Az of (7) and (8), and with q = k_n, P = (Ar, Az, Dq) of (9) and (11).

    (22) D(gamma) = sum P * v      Dc = sum P
    (23) y  = P * gamma      Du = rstd * (y - mean(y) - v * mean(y * v))
    (24) Ds = Du @ U         DU = sum Du^T s

    The rest is (13), (14) and D(gates_x) = (Ar, Az, An). With recompute=True workspace and rstd are
    empty, and (17) to (21) are evaluated again for all t at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gru_fast.reference import by_group, masks, previous_states, scan_order, stack_time

NORM_SLOTS = 6
"""Values per hidden unit that the workspace holds."""


def _norm_gates(
    a: Tensor, s: Tensor, weight_hh: Tensor, gamma: Tensor, bias_hh: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Equations (17) to (21): v, rstd, q, r, z, n from gates_x and s, both (..., G, B, *)."""
    H = s.shape[-1]
    u = s @ weight_hh.transpose(-1, -2)
    centred = u - u.mean(-1, keepdim=True)
    # As PyTorch's norms: rstd^3, which the gradient needs, is beyond float16 where s is zero.
    wide = centred.float() if centred.dtype.itemsize == 2 else centred
    rstd = torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps).to(u.dtype)
    v = centred * rstd
    k = v * gamma[:, None]
    if bias_hh is not None:
        k = k + bias_hh[:, None]
    r, z = torch.sigmoid(a[..., : 2 * H] + k[..., : 2 * H]).chunk(2, -1)
    q = k[..., 2 * H :]
    return v, rstd, q, r, z, torch.tanh(a[..., 2 * H :] + r * q)


def norm_scan(
    gates_x: Tensor,
    h0: Tensor,
    weight_hh: Tensor,
    gamma_hh: Tensor,
    bias_hh: Tensor | None,
    lengths: Tensor | None,
    reset_mask: Tensor | None,
    reset_state: Tensor | None,
    h_scale: Tensor | None,
    eps: float,
    reverse: Sequence[bool],
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The recurrence over normalised input products; equations (1), (6) and (17) to (21).

    Args:
        gates_x: (T, B, G, 3H), normalised, gamma_ih and bias_ih applied.
        h0: (G, B, H).
        weight_hh: (G, 3H, H), gate order r, z, n.
        gamma_hh: (G, 3H), the gain of the norm.
        bias_hh: (G, 3H), its bias.
        lengths: as in `reference.scan`.
        reset_mask: as in `reference.scan`.
        reset_state: as in `reference.scan`.
        h_scale: as in `reference.scan`.
        eps: added to the variance, > 0.
        reverse: as in `reference.scan`.
        recompute: return an empty workspace and rstd, of shape (0,).

    Returns:
        output (T, B, G*H), h_n (G, B, H), workspace (T, B, G, 6H), rstd (T, B, G).
    """
    T, B, G = gates_x.shape[:3]
    H = h0.shape[-1]
    a = scan_order(gates_x.transpose(1, 2), reverse)
    valid, reset = masks(lengths, reset_mask, T, reverse)
    scale = by_group(h_scale, h0)
    start = torch.zeros_like(h0) if reset_state is None else reset_state
    state = h0
    outputs, saved, rstds = [], [], []
    for t in range(T):
        p = state if reset is None else torch.where(reset[t], start, state)
        s = p if scale is None else p * scale
        a_t = a[t] if valid is None else torch.where(valid[t], a[t], 0.0)
        v, rstd, _, r, z, n = _norm_gates(a_t, s, weight_hh, gamma_hh, bias_hh, eps)
        h = (1 - z) * n + z * p
        if valid is None:
            state = h
        else:
            state = torch.where(valid[t], h, state)
            h = torch.where(valid[t], h, 0.0)
        outputs.append(h)
        if not recompute:
            packed = torch.cat((v, r, z, n), -1)
            if valid is not None:
                packed, rstd = (torch.where(valid[t], w, 0.0) for w in (packed, rstd))
            saved.append(packed)
            rstds.append(rstd)
    output = stack_time(outputs, gates_x, (B, G * H), reverse)
    if recompute:
        return output, state.clone(), gates_x.new_empty(0), gates_x.new_empty(0)
    workspace = stack_time(saved, gates_x, (B, G, NORM_SLOTS * H), reverse)
    return output, state.clone(), workspace, stack_time(rstds, gates_x, (B, G), reverse)


def norm_scan_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    gates_x: Tensor,
    h0: Tensor,
    weight_hh: Tensor,
    gamma_hh: Tensor,
    bias_hh: Tensor | None,
    lengths: Tensor | None,
    reset_mask: Tensor | None,
    reset_state: Tensor | None,
    h_scale: Tensor | None,
    output: Tensor,
    workspace: Tensor,
    rstd: Tensor,
    eps: float,
    reverse: Sequence[bool],
    recompute: bool,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `norm_scan`; equations (7) to (14) and (22) to (24), differentiable.

    Returns:
        Gradients of gates_x, h0, weight_hh, gamma_hh, bias_hh, reset_state, h_scale; one that
        output_mask excludes, or whose input is None, is an empty tensor of shape (0,).
    """
    T, B, G = gates_x.shape[:3]
    H = h0.shape[-1]
    valid, reset = masks(lengths, reset_mask, T, reverse)
    scale = by_group(h_scale, h0)
    start = torch.zeros_like(h0) if reset_state is None else reset_state

    p = previous_states(output, h0, valid, reset, start, reverse)
    s = p if scale is None else p * scale
    if recompute:
        a = scan_order(gates_x.transpose(1, 2), reverse)
        a = a if valid is None else torch.where(valid, a, 0.0)
        v, inverse, q, r, z, n = _norm_gates(a, s, weight_hh, gamma_hh, bias_hh, eps)
    else:
        saved = scan_order(workspace.transpose(1, 2), reverse)
        v, (r, z, n) = saved[..., : 3 * H], saved[..., 3 * H :].chunk(3, -1)
        q = v[..., 2 * H :] * gamma_hh[:, None, 2 * H :]
        q = q if bias_hh is None else q + bias_hh[:, None, 2 * H :]
        inverse = scan_order(rstd.transpose(1, 2), reverse)[..., None]

    grad_out = None
    if grad_output is not None:
        grad_out = scan_order(grad_output.reshape(T, B, G, H).transpose(1, 2), reverse)
    state = torch.zeros_like(h0) if grad_h_n is None else grad_h_n
    steps: list[tuple[Tensor, ...]] = []
    for t in reversed(range(T)):
        dh = state if grad_out is None else state + grad_out[t]
        an = dh * (1 - z[t]) * (1 - n[t] * n[t])
        az = dh * (p[t] - n[t]) * z[t] * (1 - z[t])
        ar = an * q[t] * r[t] * (1 - r[t])
        rows, products = torch.cat([ar, az, an], -1), torch.cat([ar, az, an * r[t]], -1)
        y = products * gamma_hh[:, None]
        moved = (y * v[t]).mean(-1, keepdim=True)
        du = inverse[t] * (y - y.mean(-1, keepdim=True) - v[t] * moved)
        ds = du @ weight_hh
        dp = dh * z[t] + (ds if scale is None else ds * scale)
        passed = dp if reset is None else torch.where(reset[t], 0.0, dp)
        step = rows, products, du, ds
        if valid is not None:
            step = tuple(torch.where(valid[t], w, 0.0) for w in step)  # type: ignore[assignment]
            passed = torch.where(valid[t], passed, state)
        steps.append((*step, dp))
        state = passed

    empty = gates_x.new_empty(0)
    if not steps:
        wanted = (gates_x, None, weight_hh, gamma_hh, bias_hh, reset_state, h_scale)
        zeros = [empty if w is None or not m else torch.zeros_like(w)
                 for w, m in zip(wanted, output_mask, strict=True)]  # fmt: skip
        zeros[1] = state.clone() if output_mask[1] else empty
        return zeros[0], zeros[1], zeros[2], zeros[3], zeros[4], zeros[5], zeros[6]
    rows, products, du, ds, dp = (torch.stack(column[::-1]) for column in zip(*steps, strict=True))

    grad_gates_x = grad_w = grad_gamma = grad_b = grad_start = grad_scale = empty
    if output_mask[0]:
        grad_gates_x = scan_order(rows, reverse).transpose(1, 2)
    if output_mask[2]:
        grad_w = torch.einsum("tgbk,tgbh->gkh", du, s)
    if output_mask[3]:
        grad_gamma = (products * v).sum((0, 2))
    if output_mask[4] and bias_hh is not None:
        grad_b = products.sum((0, 2))
    if output_mask[5] and reset_state is not None:
        grad_start = torch.zeros_like(h0)
        if reset is not None:
            grad_start = torch.where(reset, dp, 0.0).sum(0)
    if output_mask[6] and h_scale is not None:
        grad_scale = (ds * p).sum(0).transpose(0, 1).flatten(1)
    grad_h0 = state.clone() if output_mask[1] else empty
    return grad_gates_x, grad_h0, grad_w, grad_gamma, grad_b, grad_start, grad_scale
