# SPDX-License-Identifier: Apache-2.0
"""Products over all times at once, by torch: equations (15) and (16) of `gru_fast.reference`.

They are deterministic and follow, in float32, the same TF32 switch as the scan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

_SETTINGS = torch.backends.cuda.matmul
_PARENT: Any = torch.backends.cudnn
"""Its `fp32_precision` is that of all of CUDA, which products follow until they have their own."""

_is_tuned: Callable[[], bool] = getattr(torch._C, "_cuda_tunableop_is_enabled", lambda: False)
"""Whether TunableOp is on; a PyTorch for CPUs does not have it."""


def matmul_precision(precision: str, tensor: Tensor) -> AbstractContextManager[None]:
    """Round float32 products on CUDA as the scan does: TF32 or not at all."""
    if not tensor.is_cuda or tensor.dtype != torch.float32:
        return nullcontext()
    wanted, before = "tf32" if precision == "tf32" else "ieee", _SETTINGS.fp32_precision
    # TunableOp reads PyTorch's older switch too, and is refused where the two disagree.
    if before == wanted or _is_tuned():
        return nullcontext()
    # What was read may be what all of CUDA does. Written back as it is, it would stay when that
    # changes; nothing tells a setting of the same value from none.
    return _rounding(wanted, "none" if before == _PARENT.fp32_precision else before)


@contextmanager
def _rounding(wanted: str, before: str) -> Iterator[None]:
    # What was there is not read again: another thread may have changed it for its own products.
    _SETTINGS.fp32_precision = wanted
    try:
        yield
    finally:
        _SETTINGS.fp32_precision = before


def project(x: Tensor, weight_ih: Tensor, bias_ih: Tensor | None) -> Tensor:
    """gates_x (T, B, G, N*H) of x (T, B, I) or (T, B, G, I); no strides promised."""
    steps = x.shape[:2]
    G, rows, _ = weight_ih.shape
    if x.dim() == 3:
        weight = weight_ih.flatten(0, 1).t()
        flat = x.flatten(0, 1)
        gates = flat @ weight if bias_ih is None else torch.addmm(bias_ih.flatten(), flat, weight)
        return gates.view(*steps, G, rows)
    flat = x.flatten(0, 1).transpose(0, 1)
    weight = weight_ih.transpose(1, 2)
    if bias_ih is None:
        gates = torch.bmm(flat, weight)
    else:
        gates = torch.baddbmm(bias_ih[:, None], flat, weight)
    return gates.transpose(0, 1).unflatten(0, steps)


def recurrent(entering: Tensor, weight: Tensor) -> Tensor:
    """entering (T, B, G, H) @ weight (G, K, H)^T: (T, B, G, K), no strides promised."""
    T, B = entering.shape[:2]
    gates = torch.bmm(entering.flatten(0, 1).transpose(0, 1), weight.transpose(1, 2))
    return gates.transpose(0, 1).unflatten(0, (T, B))


def weight_gradient(rows: Tensor, columns: Tensor) -> Tensor:
    """Sum over T and B of rows (T, B, G, K) times columns (T, B, [G,] J): (G, K, J)."""
    G, K = rows.shape[2:]
    rows = rows.flatten(0, 1)
    if columns.dim() == 3 and rows.is_contiguous():
        return (rows.flatten(1).t() @ columns.flatten(0, 1)).view(G, K, -1)
    columns = columns.flatten(0, 1)
    if columns.dim() == 2:
        columns = columns[:, None].expand(-1, G, -1)
    return torch.bmm(rows.permute(1, 2, 0), columns.transpose(0, 1))


def weight_gradients(*pairs: tuple[Tensor, Tensor]) -> Tensor:
    """`weight_gradient` of each pair of rows and columns, one below the other."""
    (first, columns), *_ = pairs
    G, J = columns.shape[2:]
    if G > 1:
        return torch.cat([weight_gradient(*pair) for pair in pairs], 1)
    heights = [rows.shape[3] for rows, _ in pairs]
    result = first.new_empty(1, sum(heights), J)
    for (rows, values), part in zip(pairs, result[0].split(heights), strict=True):
        torch.mm(rows.flatten(0, 2).t(), values.flatten(0, 2), out=part)
    return result


def input_gradient(rows: Tensor, weight_ih: Tensor, shared: bool) -> Tensor:
    """rows (T, B, G, N*H) @ weight_ih (G, N*H, I): (T, B, I), summed over groups, if shared."""
    T, B = rows.shape[:2]
    flat = rows.flatten(0, 1)
    if shared:
        return (flat.flatten(1) @ weight_ih.flatten(0, 1)).unflatten(0, (T, B))
    return torch.bmm(flat.transpose(0, 1), weight_ih).transpose(0, 1).unflatten(0, (T, B))


def without_padding(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x with 0 past each row's length, where anything may be stored."""
    if lengths is None:
        return x
    valid = torch.arange(x.shape[0], device=x.device)[:, None] < lengths
    return torch.where(valid.reshape(*valid.shape, *[1] * (x.dim() - 2)), x, 0.0)


def direction_runs(reverse: tuple[bool, ...]) -> list[tuple[slice, bool]]:
    """Runs of neighbouring groups with one direction."""
    runs, first = [], 0
    for direction, members in groupby(reverse):
        count = len(list(members))
        runs.append((slice(first, first + count), direction))
        first += count
    return runs


def state_gradients(
    h0: Tensor, state: Tensor | None, start: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of h0, reset_state and h_scale, from float32 sums (G, B, H), the scale's as (B, G*H).

    Empty for each that is None, each time another tensor: PyTorch complains of an operator that
    returns one of them twice.
    """

    def gradient(total: Tensor | None) -> Tensor:
        return h0.new_empty(0) if total is None else total.to(h0.dtype)

    by_batch = None if scale is None else scale.transpose(0, 1).flatten(1)
    return gradient(state), gradient(start), gradient(by_batch)


class Total:
    """A sum over chunks: the one term itself, or float32 where there are several."""

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self.dtype = torch.float32

    def add(self, term: Tensor) -> None:
        if self.value is None:
            self.value, self.dtype = term, term.dtype
        else:
            self.value = self.value.float() + term.float()

    def result(self) -> Tensor:
        assert self.value is not None
        return self.value.to(self.dtype).contiguous()

    def gradient(self, of: Tensor | None, like: Tensor) -> Tensor:
        """The sum as the gradient of a tensor, 0 without terms; empty as no gradient is wanted."""
        if of is None:
            return like.new_empty(0)
        return torch.zeros_like(of) if self.value is None else self.result()
