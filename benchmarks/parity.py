# SPDX-License-Identifier: Apache-2.0
"""The gate before a timing: the project's rule, error at most twice PyTorch's own.

Against the reference in float64, result by result, in units of max|reference|:
error <= 2 * e + eps, where e is the error of nn.GRU in the same dtype. The largest error among few
numbers is a matter of luck on both sides, so small cases are drawn several times and the errors
averaged. So that a broken nn.GRU excuses nobody, e counts up to `SANE` only, and nn.GRU itself has
to stay within it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean

import torch
from torch import Tensor

Results = Mapping[str, Tensor]

EPS = {
    "float32": torch.finfo(torch.float32).eps,
    "tf32": 2.0**-10,
    "float64": 4096 * torch.finfo(torch.float64).eps,
    "bfloat16": torch.finfo(torch.bfloat16).eps,
    "float16": torch.finfo(torch.float16).eps,
}
"""One rounding; for float64, where the reference is no better than what is tested, 1e-12."""

SANE = {"float32": 1e-3, "tf32": 0.05, "float64": 1e-9, "bfloat16": 0.25, "float16": 0.05}
"""Largest believable error of nn.GRU."""


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Largest absolute difference in units of max|truth|.

    Infinite for another shape, or where a NaN or infinity is on one side only.
    """
    if value.shape != truth.shape:
        return float("inf")
    if truth.numel() == 0:
        return 0.0
    difference = (value.to(truth) - truth).abs()
    error = float(torch.where(difference.isnan(), torch.inf, difference).max())
    # Where all is zero, only zero is right.
    return error / (float(truth.abs().max()) or torch.finfo(torch.float64).tiny)


def judge(
    ours: Sequence[Results], theirs: Sequence[Results], truth: Sequence[Results], dtype: str
) -> str | None:
    """None where every result is right, else the first that is not, in words.

    Args:
        ours: per draw of the inputs the results by name, of the provider under test.
        theirs: nn.GRU's, in the tested dtype.
        truth: the reference's, in float64.
        dtype: a name of `cases.DTYPES`.

    Raises:
        ValueError: no result to judge.
    """
    if not truth or not truth[0]:
        raise ValueError("truth: expected at least one result, got none")
    for name in truth[0]:
        if any(name not in results for results in ours):
            return f"{name} is missing"
        error, e = (
            mean(relative_error(a[name], c[name]) for a, c in zip(results, truth, strict=True))
            for results in (ours, theirs)
        )
        bound = 2 * min(e, SANE[dtype]) + EPS[dtype]
        if not error <= bound:
            return (
                f"{name}: error {error:.3g} > {bound:.3g} of the largest value (nn.GRU {e:.3g}), "
                f"{len(truth)} draws"
            )
    return None
