# SPDX-License-Identifier: Apache-2.0
"""The specification of the GRU in plain PyTorch: the recurrence and its gradients.

Every kernel is checked against this file and cites its equation numbers. It imports torch only,
runs in any floating dtype on any device, and is itself differentiable by autograd, `torch.func`
and forward-mode AD to any order. The rules of the sampler are in `reference_sampling`.

Sizes: T time steps, B batch, I input, H hidden, G independent recurrences ("groups"), N gate rows
per unit. All equations hold per group. W, U stand for weight_ih, weight_hh and b, c for bias_ih,
bias_hh; `@` acts on row vectors.

Forward, at a step where the row is valid (p = h_prev; a_* = slices of gates_x = x @ W^T + b)

    (1)  s   = p * h_scale                                   (s = p without h_scale)
    (2)  r   = sigmoid(a_r + s @ U_r^T + c_r)                reset gate (r = 1 in no_reset)
    (3)  z   = sigmoid(a_z + s @ U_z^T + c_z)                update gate
    (4)  q   = s @ U_n^T + c_n                               reset_after and no_reset
    (5a) n   = tanh(a_n + r * q)                             reset_after
    (5b) n   = tanh(a_n + (r * s) @ U_n^T + c_n)             reset_before
    (5c) n   = tanh(a_n + q)                                 no_reset
    (6)  h   = (1 - z) * n + z * p

    output = h; workspace = (q, r, z, n) | (r, z, n) | (z, n). Where the row is not valid the
    state is held and both are 0; nothing stored in the padding of x, gates_x or reset_mask is
    ever used. At a reset, p is reset_state (or 0).

Backward. D* are gradients of the loss; Dq0, Dr0, Dz0, Dn0 come with grad_workspace (0 in
first-order use), and Dh = grad_output + the gradient that the next visited step sends to this
state.

    (7)  Dn  = Dh * (1 - z) + Dn0          Dz = Dh * (p - n) + Dz0
    (8)  An  = Dn * (1 - n^2)              Az = Dz * z * (1 - z)
    (9)  Dr  = An * q + Dr0                Dq = An * r + Dq0                 reset_after
    (10) e   = An @ U_n                    Dr = e * s + Dr0                  reset_before
    (11) Ar  = Dr * r * (1 - r)
    (12) Ds  = Ar @ U_r + Az @ U_z + Dq @ U_n      reset_after
             = Ar @ U_r + Az @ U_z + e * r         reset_before
             = Az @ U_z + An @ U_n                 no_reset
    (13) Dp  = Dh * z + Ds * h_scale       D(h_scale) = sum over t of Ds * p
    (14) the previous state receives Dp, or 0 at a reset (then D(reset_state) receives Dp);
         an invalid step passes on what it was given.

    Input-side rows A = (Ar, Az, An); hidden-side rows P = (Ar, Az, Dq) in reset_after, else A:
    (15) D(gates_x) = A      Dx = A @ W       DW = sum A^T x      Db = sum A
    (16) DU = sum P^T s      Dc = sum P       (for reset_before DU_n = sum An^T (r * s))

With recompute=True the workspace is empty: every p is an earlier output, h0 or reset_state, so
(1) to (5) are evaluated again for all t at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

GATES = {"reset_after": 3, "reset_before": 3, "no_reset": 2}
"""Gate rows per hidden unit, N."""

WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
"""Kinds of weights of a layer, in the order of its arguments."""

SLOTS = {"reset_after": 4, "reset_before": 3, "no_reset": 2}
"""Values per hidden unit that the workspace holds, S."""


def scan_order(a: Tensor, reverse: Sequence[bool]) -> Tensor:
    """(T, G, ...) with the time axis of every reverse group flipped; its own inverse."""
    if not any(reverse):
        return a
    if all(reverse):
        return a.flip(0)
    return torch.stack([a[:, g].flip(0) if r else a[:, g] for g, r in enumerate(reverse)], 1)


def _valid_steps(lengths: Tensor | None, T: int) -> Tensor | None:
    """(T, B) bool in time order."""
    if lengths is None:
        return None
    return torch.arange(T, device=lengths.device)[:, None] < lengths


def masks(
    lengths: Tensor | None, reset_mask: Tensor | None, T: int, reverse: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The masks valid and reset, each (T, G, B, 1) in scan order, or None."""
    valid = _valid_steps(lengths, T)
    reset = None
    if reset_mask is not None:
        forward = reset_mask if valid is None else reset_mask & valid
        following = torch.cat([forward[1:], torch.zeros_like(forward[:1])])
        per_group = torch.stack([following if r else forward for r in reverse], 1)
        reset = scan_order(per_group, reverse)[..., None]
    if valid is not None:
        valid = scan_order(torch.stack([valid] * len(reverse), 1), reverse)[..., None]
    return valid, reset


def by_group(h_scale: Tensor | None, h0: Tensor) -> Tensor | None:
    """(G, B, H) from (B, G*H)."""
    G, B, H = h0.shape
    return None if h_scale is None else h_scale.reshape(B, G, H).transpose(0, 1)


def gates(
    a: Tensor, s: Tensor, weight_hh: Tensor, bias_hh: Tensor | None, cell: str
) -> tuple[Tensor, ...]:
    """Equations (2) to (5): the workspace slots from gates_x and s, both (..., G, B, *)."""
    H = s.shape[-1]
    u = weight_hh.transpose(-1, -2)
    if cell == "reset_before":
        gated = s @ u[..., : 2 * H]
        if bias_hh is not None:
            gated = gated + bias_hh[:, None, : 2 * H]
        r, z = torch.sigmoid(a[..., : 2 * H] + gated).chunk(2, -1)
        candidate = (r * s) @ u[..., 2 * H :]
        if bias_hh is not None:
            candidate = candidate + bias_hh[:, None, 2 * H :]
        return r, z, torch.tanh(a[..., 2 * H :] + candidate)
    gates_h = s @ u
    if bias_hh is not None:
        gates_h = gates_h + bias_hh[:, None]
    if cell == "no_reset":
        return torch.sigmoid(a[..., :H] + gates_h[..., :H]), torch.tanh(
            a[..., H:] + gates_h[..., H:]
        )
    r, z = torch.sigmoid(a[..., : 2 * H] + gates_h[..., : 2 * H]).chunk(2, -1)
    q = gates_h[..., 2 * H :]
    return q, r, z, torch.tanh(a[..., 2 * H :] + r * q)


def project(
    x: Tensor, weight_ih: Tensor, bias_ih: Tensor | None, lengths: Tensor | None = None
) -> Tensor:
    """gates_x = x @ weight_ih^T + bias_ih, (T, B, G, N*H), for x (T, B, I) or (T, B, G, I)."""
    x = without_padding(x, lengths)
    gates_x = torch.einsum("tbi,gki->tbgk" if x.dim() == 3 else "tbgi,gki->tbgk", x, weight_ih)
    return gates_x if bias_ih is None else gates_x + bias_ih


def without_padding(x: Tensor, lengths: Tensor | None) -> Tensor:
    """X with zeros past each row's length, whatever stands there."""
    valid = _valid_steps(lengths, x.shape[0])
    if valid is None:
        return x
    return torch.where(valid.reshape(*valid.shape, *[1] * (x.dim() - 2)), x, 0.0)


def scan(
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
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence over projected inputs; equations (1) to (6).

    Args:
        gates_x: (T, B, G, N*H), bias_ih included.
        h0: (G, B, H).
        weight_hh: (G, N*H, H), gate order r, z, n (z, n for no_reset).
        bias_hh: (G, N*H).
        lengths: (B,) int64 or int32, 0 <= length <= T.
        reset_mask: (T, B) bool, true where a new episode begins.
        reset_state: (G, B, H), the state an episode begins with; zero if None.
        h_scale: (B, G*H), multiplies the state that enters the recurrent product.
        cell: "reset_after", "reset_before" or "no_reset".
        reverse: G flags; a true one scans that group from the last valid step to the first.
        recompute: return an empty workspace, of shape (0,).

    Returns:
        output (T, B, G*H), h_n (G, B, H), workspace (T, B, G, S*H).
    """
    T, B, G = gates_x.shape[:3]
    H = h0.shape[-1]
    a = scan_order(gates_x.transpose(1, 2), reverse)
    valid, reset = masks(lengths, reset_mask, T, reverse)
    scale = by_group(h_scale, h0)
    start = torch.zeros_like(h0) if reset_state is None else reset_state
    state = h0
    outputs, saved = [], []
    for t in range(T):
        p = state if reset is None else torch.where(reset[t], start, state)
        s = p if scale is None else p * scale
        a_t = a[t] if valid is None else torch.where(valid[t], a[t], 0.0)
        slots = gates(a_t, s, weight_hh, bias_hh, cell)
        z, n = slots[-2:]
        h = (1 - z) * n + z * p
        if valid is None:
            state = h
        else:
            state = torch.where(valid[t], h, state)
            h = torch.where(valid[t], h, 0.0)
        outputs.append(h)
        if not recompute:
            packed = torch.cat(slots, -1)
            saved.append(packed if valid is None else torch.where(valid[t], packed, 0.0))
    output = stack_time(outputs, gates_x, (B, G * H), reverse)
    if recompute:
        return output, state.clone(), gates_x.new_empty(0)
    return output, state.clone(), stack_time(saved, gates_x, (B, G, SLOTS[cell] * H), reverse)


def stack_time(
    steps: list[Tensor], like: Tensor, shape: tuple[int, ...], reverse: Sequence[bool]
) -> Tensor:
    """Steps of (G, B, K) in scan order to (T, *shape) in time order."""
    if not steps:
        # Of which a gradient can be asked. torch.vmap over nothing multiplies no numbers.
        return like.new_zeros(0, *shape) + 0 * like.sum()[None]
    return scan_order(torch.stack(steps), reverse).transpose(1, 2).reshape(len(steps), *shape)


def layer(
    x: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    lengths: Tensor | None,
    reset_mask: Tensor | None,
    reset_state: Tensor | None,
    h_scale: Tensor | None,
    cell: str,
    reverse: Sequence[bool],
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One GRU layer of G groups: `project`, then `scan`.

    Args:
        x: (T, B, I), shared by all groups, or (T, B, G, I).
        h0: (G, B, H).
        weight_ih: (G, N*H, I).
        weight_hh: (G, N*H, H).
        bias_ih: (G, N*H).
        bias_hh: (G, N*H).
        lengths: as in `scan`.
        reset_mask: as in `scan`.
        reset_state: as in `scan`.
        h_scale: as in `scan`.
        cell: as in `scan`.
        reverse: as in `scan`.
        recompute: as in `scan`.

    Returns:
        output (T, B, G*H), h_n (G, B, H), workspace (T, B, G, S*H).
    """
    gates_x = project(x, weight_ih, bias_ih, lengths)
    optional = (lengths, reset_mask, reset_state, h_scale)
    return scan(gates_x, h0, weight_hh, bias_hh, *optional, cell, reverse, recompute)


def previous_states(
    output: Tensor,
    h0: Tensor,
    valid: Tensor | None,
    reset: Tensor | None,
    start: Tensor,
    reverse: Sequence[bool],
) -> Tensor:
    """The state before every step, (T, G, B, H) in scan order; 0 where the row is invalid."""
    shape = (*output.shape[:2], h0.shape[0], h0.shape[2])
    h = scan_order(output.reshape(shape).transpose(1, 2), reverse)
    p = torch.cat([h0[None], h[:-1]])[: h.shape[0]]
    if valid is not None:
        # A reverse scan starts from h0 at the first valid step that it meets.
        before = torch.cat([torch.zeros_like(valid[:1]), valid[:-1]])
        p = torch.where(before, p, h0)
    if reset is not None:
        p = torch.where(reset, start, p)
    return p if valid is None else torch.where(valid, p, 0.0)


def scan_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_workspace: Tensor | None,
    gates_x: Tensor,
    h0: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    lengths: Tensor | None,
    reset_mask: Tensor | None,
    reset_state: Tensor | None,
    h_scale: Tensor | None,
    output: Tensor,
    workspace: Tensor,
    cell: str,
    reverse: Sequence[bool],
    recompute: bool,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `scan`; equations (7) to (16), in differentiable operations.

    Returns:
        Gradients of gates_x, h0, weight_hh, bias_hh, reset_state, h_scale; one that output_mask
        excludes, or whose input is None, is an empty tensor of shape (0,).
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
        slots = gates(a, s, weight_hh, bias_hh, cell)
    else:
        slots = scan_order(workspace.transpose(1, 2), reverse).chunk(SLOTS[cell], -1)
    z, n = slots[-2:]
    r = slots[-3] if len(slots) > 2 else z

    grad_out = grad_ws = None
    if grad_output is not None:
        grad_out = scan_order(grad_output.reshape(T, B, G, H).transpose(1, 2), reverse)
    if grad_workspace is not None and not recompute:
        grad_ws = scan_order(grad_workspace.transpose(1, 2), reverse)

    state = torch.zeros_like(h0) if grad_h_n is None else grad_h_n
    steps: list[tuple[Tensor, ...]] = []
    for t in reversed(range(T)):
        dh = state if grad_out is None else state + grad_out[t]
        dn, dz = dh * (1 - z[t]), dh * (p[t] - n[t])
        extra: Sequence[Tensor] = () if grad_ws is None else grad_ws[t].chunk(SLOTS[cell], -1)
        if extra:
            dn, dz = dn + extra[-1], dz + extra[-2]
        an, az = dn * (1 - n[t] * n[t]), dz * z[t] * (1 - z[t])
        if cell == "no_reset":
            rows = hidden_rows = torch.cat([az, an], -1)
            ds = hidden_rows @ weight_hh
        elif cell == "reset_after":
            dr, dq = an * slots[0][t], an * r[t]
            if extra:
                dr, dq = dr + extra[1], dq + extra[0]
            ar = dr * r[t] * (1 - r[t])
            rows, hidden_rows = torch.cat([ar, az, an], -1), torch.cat([ar, az, dq], -1)
            ds = hidden_rows @ weight_hh
        else:
            e = an @ weight_hh[:, 2 * H :]
            dr = e * s[t] + extra[0] if extra else e * s[t]
            ar = dr * r[t] * (1 - r[t])
            rows = hidden_rows = torch.cat([ar, az, an], -1)
            ds = rows[..., : 2 * H] @ weight_hh[:, : 2 * H] + e * r[t]
        dp = dh * z[t] + (ds if scale is None else ds * scale)
        passed = dp if reset is None else torch.where(reset[t], 0.0, dp)
        if valid is not None:
            rows, hidden_rows, ds = (torch.where(valid[t], v, 0.0) for v in (rows, hidden_rows, ds))
            passed = torch.where(valid[t], passed, state)
        steps.append((rows, hidden_rows, ds, dp))
        state = passed

    empty = gates_x.new_empty(0)
    if not steps:
        wanted = (gates_x, None, weight_hh, bias_hh, reset_state, h_scale)
        zeros = [empty if w is None or not m else torch.zeros_like(w)
                 for w, m in zip(wanted, output_mask, strict=True)]  # fmt: skip
        zeros[1] = state.clone() if output_mask[1] else empty
        return zeros[0], zeros[1], zeros[2], zeros[3], zeros[4], zeros[5]
    rows, hidden_rows, ds, dp = (torch.stack(column[::-1]) for column in zip(*steps, strict=True))

    grad_gates_x = grad_w = grad_b = grad_start = grad_scale = empty
    if output_mask[0]:
        grad_gates_x = scan_order(rows, reverse).transpose(1, 2)
    if output_mask[2]:
        grad_w = torch.einsum("tgbk,tgbh->gkh", hidden_rows, s)
        if cell == "reset_before":
            grad_n = torch.einsum("tgbk,tgbh->gkh", rows[..., 2 * H :], r * s)
            grad_w = torch.cat([grad_w[:, : 2 * H], grad_n], 1)
    if output_mask[3] and bias_hh is not None:
        grad_b = hidden_rows.sum((0, 2))
    if output_mask[4] and reset_state is not None:
        grad_start = torch.zeros_like(h0)
        if reset is not None:
            grad_start = torch.where(reset, dp, 0.0).sum(0)
    if output_mask[5] and h_scale is not None:
        grad_scale = (ds * p).sum(0).transpose(0, 1).flatten(1)
    grad_h0 = state.clone() if output_mask[1] else empty
    return grad_gates_x, grad_h0, grad_w, grad_b, grad_start, grad_scale


def layer_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_workspace: Tensor | None,
    x: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    lengths: Tensor | None,
    reset_mask: Tensor | None,
    reset_state: Tensor | None,
    h_scale: Tensor | None,
    output: Tensor,
    workspace: Tensor,
    cell: str,
    reverse: Sequence[bool],
    recompute: bool,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `layer`: `scan_backward`, then equation (15) by products over all T.

    Returns:
        Gradients of x, h0, weight_ih, weight_hh, bias_ih, bias_hh, reset_state, h_scale; empty as
        in `scan_backward`.
    """
    if recompute:
        gates_x = project(x, weight_ih, bias_ih, lengths)
    else:
        T, B = x.shape[:2]
        gates_x = x.new_empty(()).expand(T, B, *weight_ih.shape[:2])
    need_x, need_h0, need_ih, need_hh, need_b_ih, need_b_hh, need_start, need_scale = output_mask
    need_rows = need_x or need_ih or need_b_ih
    rows, grad_h0, grad_w, grad_b, grad_start, grad_scale = scan_backward(
        grad_output,
        grad_h_n,
        grad_workspace,
        gates_x,
        h0,
        weight_hh,
        bias_hh,
        lengths,
        reset_mask,
        reset_state,
        h_scale,
        output,
        workspace,
        cell,
        reverse,
        recompute,
        (need_rows, need_h0, need_hh, need_b_hh, need_start, need_scale),
    )
    grad_x = grad_weight_ih = grad_bias_ih = x.new_empty(0)
    shared = x.dim() == 3
    if need_x:
        grad_x = torch.einsum("tbgk,gki->tbi" if shared else "tbgk,gki->tbgi", rows, weight_ih)
    if need_ih:
        padded = without_padding(x, lengths)
        grad_weight_ih = torch.einsum("tbgk,tbi->gki" if shared else "tbgk,tbgi->gki", rows, padded)
    if need_b_ih and bias_ih is not None:
        grad_bias_ih = rows.sum((0, 1))
    return grad_x, grad_h0, grad_weight_ih, grad_w, grad_bias_ih, grad_b, grad_start, grad_scale
