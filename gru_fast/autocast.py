# SPDX-License-Identifier: Apache-2.0
"""Autocast, switched off around code that has chosen its dtypes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

_NOTHING = nullcontext()


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """A block with autocast off for one device type, at little cost where it is off already."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return _NOTHING
