# SPDX-License-Identifier: Apache-2.0
"""torch's TF32 switches, all three at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def float32_as(dtype: str) -> Iterator[None]:
    """TF32 in products and cuDNN's RNNs for "tf32", none for any other dtype."""
    products = torch.backends.cuda.matmul
    switches = (products, torch.backends.cudnn.rnn, torch.backends.cudnn.conv)
    before = [switch.fp32_precision for switch in switches]
    # The old switch first: torchrl reads it, which torch refuses where the two disagree.
    products.allow_tf32 = dtype == "tf32"
    for switch in switches:
        switch.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    try:
        yield
    finally:
        products.allow_tf32 = before[0] == "tf32"
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value
