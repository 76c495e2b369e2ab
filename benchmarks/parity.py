# SPDX-License-Identifier: Apache-2.0
"""The gate before a timing: the project's rule, error at most twice PyTorch's own.

Against the reference in float64, result by result: error <= 2 * e + eps * max|reference|, where e
is the error of nn.GRU in the same dtype. So that a broken nn.GRU excuses nobody, e counts up to
`SANE * max|reference|` only, and nn.GRU itself has to stay within it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

EPS = {
    "float32": torch.finfo(torch.float32).eps,
    "tf32": 2.0**-10,
    "float64": 4096 * torch.finfo(torch.float64).eps,
    "bfloat16": torch.finfo(torch.bfloat16).eps,
    "float16": torch.finfo(torch.float16).eps,
}
"""One rounding; for float64, where the reference is no better than what is tested, 1e-12."""

SANE = {"float32": 1e-3, "tf32": 0.05, "float64": 1e-9, "bfloat16": 0.25, "float16": 0.05}
"""Largest believable error of nn.GRU in units of max|reference|."""


def error_of(value: Tensor, truth: Tensor) -> float:
    """Largest absolute difference; infinite where a NaN or infinity is on one side only."""
    if value.shape != truth.shape:
        return float("inf")
    if truth.numel() == 0:
        return 0.0
    difference = (value.to(truth) - truth).abs()
    return float(torch.where(difference.isnan(), torch.inf, difference).max())


def judge(
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    dtype: str,
) -> str | None:
    """None where every result is right, else the first that is not, in words.

    Args:
        ours: results by name, of the provider under test.
        theirs: nn.GRU's, in the tested dtype.
        truth: the reference's, in float64.
        dtype: a name of `cases.DTYPES`.
    """
    if not set(ours) <= set(truth):
        return f"unknown results {sorted(set(ours) - set(truth))}"
    for name in truth:
        if name not in ours:
            return f"{name} is missing"
        scale = float(truth[name].abs().max()) if truth[name].numel() else 0.0
        error, e = error_of(ours[name], truth[name]), error_of(theirs[name], truth[name])
        bound = 2 * min(e, SANE[dtype] * scale) + EPS[dtype] * scale
        if not error <= bound:
            return f"{name}: error {error:.3g} > {bound:.3g} (nn.GRU {e:.3g}, max {scale:.3g})"
    return None
