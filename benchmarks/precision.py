# SPDX-License-Identifier: Apache-2.0
"""torch's TF32 switches, all three at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def float32_as(dtype: str) -> Iterator[None]:
    """TF32 in products and cuDNN's RNNs for "tf32", none for any other dtype."""
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn.rnn, torch.backends.cudnn.conv)
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    try:
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value
