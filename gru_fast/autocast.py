# SPDX-License-Identifier: Apache-2.0
"""Autocast, switched off around code that has chosen its dtypes."""

from __future__ import annotations

from typing import Any

import torch


class without_autocast:
    """Run a block with autocast off for one device type, at no cost where it is off already."""

    def __init__(self, device_type: str) -> None:
        """Take the device type, as in `torch.autocast`."""
        self.device_type = device_type
        self.context: torch.autocast | None = None

    def __enter__(self) -> None:
        """Disable autocast if it is enabled."""
        if torch.is_autocast_enabled(self.device_type):
            self.context = torch.autocast(self.device_type, enabled=False)
            self.context.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *exc: Any) -> None:
        """Restore autocast."""
        if self.context is not None:
            self.context.__exit__(*exc)
