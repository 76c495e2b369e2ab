# SPDX-License-Identifier: Apache-2.0
"""The rule by which numbers are compared."""

import torch
from torch import Tensor

FLOAT64_TOLERANCE = 1e-12
"""For float64, where the reference is no better than what is tested: times max|reference|."""


def max_error(value: Tensor, truth: Tensor) -> float:
    """Largest absolute difference; infinite if a NaN or infinity is on one side only."""
    if value.numel() == 0:
        return 0.0
    difference = (value.to(torch.float64) - truth).abs()
    return float(torch.where(difference.isnan(), torch.inf, difference).max())


def assert_parity(name: str, ours: Tensor, theirs: Tensor, truth: Tensor) -> None:
    """The error of ours is at most twice that of theirs, plus one rounding of the largest value.

    Args:
        name: what is compared, for the message.
        ours: the value under test.
        theirs: PyTorch's in the same dtype: nn.GRU's, or the reference's where nn.GRU has no such
            cell or feature.
        truth: the reference in float64.
    """
    assert ours.shape == truth.shape, f"{name}: shape {tuple(ours.shape)}, not {tuple(truth.shape)}"
    assert ours.dtype == theirs.dtype, f"{name}: dtype {ours.dtype}, not {theirs.dtype}"
    assert truth.dtype == torch.float64
    scale = float(truth.abs().max()) if truth.numel() else 0.0
    error, their_error = max_error(ours, truth), max_error(theirs, truth)
    if ours.dtype == torch.float64:
        bound = FLOAT64_TOLERANCE * scale
    else:
        bound = 2 * their_error + torch.finfo(ours.dtype).eps * scale
    assert error <= bound, (
        f"{name}: error {error:.3g} > bound {bound:.3g} (PyTorch's own error {their_error:.3g}, "
        f"max|reference| {scale:.3g}, {ours.dtype})"
    )
