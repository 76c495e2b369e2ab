# SPDX-License-Identifier: Apache-2.0
"""Inference on CUDA by the short way: plain layers in one direction, one after the other.

What runs them is chosen as in `recurrence.layer`, once for all layers, which are of one size. What
is saved are the arguments that such a call has not, handed from `functional` to `stack` and on,
and, where cuDNN runs, weights that are grouped only to be taken apart again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gru_fast import cudnn, ops
from gru_fast.ops_past import are_plain_cuda, is_not_compiled
from gru_fast.recurrence import FORWARD, route_of_inference
from gru_fast.reference import GATES


def gru(
    input: Tensor,
    hx: Tensor | None,
    params: Sequence[Tensor],
    num_layers: int,
    bias: bool,
    batch_first: bool,
    cell: str,
    backend: str,
) -> tuple[Tensor, Tensor] | None:
    """`functional.gru` in one direction, of a call that `direct` found to be unobserved.

    None where `functional.gru` has to see the call: it is not plain, the reference takes it, or
    there is something wrong with it.
    """
    per = 4 if bias else 2
    if len(params) != per * num_layers or input.dim() != 3 or cell not in GATES:
        return None
    if any(weight is None for weight in params) or not is_not_compiled():
        return None
    if not are_plain_cuda((input, hx, *params)):
        return None
    x = input.transpose(0, 1) if batch_first else input
    H = params[1].shape[-1]
    shape = (num_layers, x.shape[1], H)
    if H < 1 or not _fit(x, params, per, GATES[cell] * H, H):
        return None
    if hx is None:
        hx = x.new_zeros(shape)
    elif hx.shape != shape or hx.dtype != x.dtype or hx.get_device() != x.get_device():
        return None
    route = route_of_inference(x, H, backend, cell)
    if route == "reference":
        return None
    finals = []
    for k in range(num_layers):
        own = list(params[k * per : (k + 1) * per])
        h0 = hx if num_layers == 1 else hx[k : k + 1]
        if route == "cudnn":
            x, h_n = cudnn.run(x, h0, own, per, False)
        else:
            weights: list[Any] = [weight.unsqueeze(0) for weight in own]
            rest = (None,) * (8 - per)
            x, h_n, _ = ops.layer_of_fitting(x, h0, *weights, *rest, cell, FORWARD, True)
        finals.append(h_n)
    h_n = finals[0] if num_layers == 1 else torch.cat(finals)
    return x.transpose(0, 1) if batch_first else x, h_n


def gru_cell(
    input: Tensor, hx: Tensor | None, weights: Sequence[Tensor | None], cell: str, backend: str
) -> Tensor | None:
    """`functional.gru_cell`, likewise."""
    params = [weight for weight in weights if weight is not None]
    biased = len(params) == 4
    if input.dim() != 2 or (hx is not None and (type(hx) is not Tensor or hx.dim() != 2)):
        return None
    if not biased and (len(params) != 2 or weights[0] is None or weights[1] is None):
        return None
    hx = None if hx is None else hx.unsqueeze(0)
    done = gru(input.unsqueeze(0), hx, params, 1, biased, False, cell, backend)
    if done is None:
        return None
    state: Tensor = torch.ops.aten._unsafe_view(done[0], done[0].shape[1:])  # as functional does
    return state


def _fit(x: Tensor, params: Sequence[Tensor], per: int, rows: int, H: int) -> bool:
    """Whether the weights of every layer have the shapes, dtype and device that x asks for."""
    dtype, device, width = x.dtype, x.get_device(), x.shape[2]
    for place, weight in enumerate(params):
        kind = place % per
        wanted = (rows,) if kind > 1 else (rows, H if kind or place else width)
        if weight.shape != wanted or weight.dtype != dtype or weight.get_device() != device:
            return False
    return True
