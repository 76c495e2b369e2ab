# SPDX-License-Identifier: Apache-2.0
"""A layer that the tests of `prepacked` step."""

import copy

import torch
from torch import Tensor

import gru_fast

I, H = 5, 19  # noqa: E741


class Stepper:
    """A layer, and what it gives with the weights that it has now."""

    def __init__(self) -> None:
        self.module = gru_fast.GRU(I, H)
        self.x, self.h = torch.randn(1, 2, I), torch.randn(1, 2, H)

    def __call__(self) -> Tensor:
        return self.module(self.x, self.h)[0]

    def expected(self) -> Tensor:
        return copy.deepcopy(self.module)(self.x, self.h)[0]
