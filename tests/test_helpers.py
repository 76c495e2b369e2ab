# SPDX-License-Identifier: Apache-2.0
"""The comparison fails when it should."""

import pytest
import torch

from helpers import assert_parity

TRUTH = torch.linspace(-2, 2, 9, dtype=torch.float64)
EPS = torch.finfo(torch.float32).eps


def shifted(amount: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    value = TRUTH.to(dtype, copy=True)
    value[3] += amount
    return value


def test_accepts_twice_the_error_of_pytorch() -> None:
    assert_parity("y", shifted(1.9e-3), shifted(-1e-3), TRUTH)


def test_accepts_one_rounding() -> None:
    assert_parity("y", shifted(1.9 * EPS), TRUTH.float(), TRUTH)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (shifted(2.1e-3), shifted(1e-3)),
        (shifted(3 * EPS), TRUTH.float()),
        (shifted(1e-10, torch.float64), TRUTH),
        (shifted(float("nan")), TRUTH.float()),
        (shifted(float("inf")), TRUTH.float()),
        (TRUTH.float()[:-1], TRUTH.float()),
        (TRUTH, TRUTH.float()),
    ],
    ids=["3x", "rounding", "float64", "nan", "inf", "shape", "dtype"],
)
def test_rejects(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    with pytest.raises(AssertionError, match=r"^y: "):
        assert_parity("y", ours, theirs, TRUTH)


@pytest.mark.usefixtures("poisoned_memory")
def test_uninitialised_memory_is_poisoned() -> None:
    assert torch.empty(5).isnan().all()
    assert torch.zeros(5).new_empty(3).isnan().all()
