# SPDX-License-Identifier: Apache-2.0
"""The rule by which numbers are compared."""

import torch
from torch import Tensor

FLOAT64_TOLERANCE = 1e-12
"""For float64, where the reference is no better than what is tested: in units of max|reference|."""


def max_error(value: Tensor, truth: Tensor) -> float:
    """Largest absolute difference; infinite if a NaN or infinity is on one side only."""
    if value.numel() == 0:
        return 0.0
    difference = (value.to(torch.float64) - truth).abs()
    return float(torch.where(difference.isnan(), torch.inf, difference).max())


def assert_parity(
    name: str,
    ours: Tensor | list[Tensor],
    theirs: Tensor | list[Tensor],
    truth: Tensor | list[Tensor],
    rounding: float | None = None,
) -> None:
    """The error of ours is at most twice that of theirs, plus one rounding of the largest value.

    The largest error among a few numbers is a matter of luck on both sides. Given a list with one
    tensor for each random draw of the same case, the errors, each in units of the largest value of
    its draw, are averaged first.

    Args:
        name: what is compared, for the message.
        ours: the value under test.
        theirs: PyTorch's in the same dtype: nn.GRU's, or the reference's where nn.GRU has no such
            cell or feature.
        truth: the reference in float64.
        rounding: what stands for one rounding, where products round by more than the dtype does.
    """
    if isinstance(truth, Tensor):
        assert isinstance(ours, Tensor) and isinstance(theirs, Tensor)
        ours, theirs, truth = [ours], [theirs], [truth]
    errors, their_errors = [], []
    for a, b, c in zip(ours, theirs, truth, strict=True):
        assert a.shape == c.shape, f"{name}: shape {tuple(a.shape)}, not {tuple(c.shape)}"
        assert a.dtype == b.dtype, f"{name}: dtype {a.dtype}, not {b.dtype}"
        assert c.dtype == torch.float64
        scale = float(c.abs().max()) if c.numel() else 0.0
        # Where all is zero, only zero is right.
        unit = scale or torch.finfo(torch.float64).tiny
        errors.append(max_error(a, c) / unit)
        their_errors.append(max_error(b, c) / unit)
    error, their_error = sum(errors) / len(errors), sum(their_errors) / len(errors)
    dtype = ours[0].dtype
    bound = FLOAT64_TOLERANCE
    if dtype != torch.float64:
        bound = 2 * their_error + (rounding or torch.finfo(dtype).eps)
    assert error <= bound, (
        f"{name}: error {error:.3g} > bound {bound:.3g}, PyTorch's own error {their_error:.3g}, in "
        f"units of max|reference|, {len(errors)} draws in {dtype}"
    )
