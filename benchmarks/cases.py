# SPDX-License-Identifier: Apache-2.0
"""What is measured: sizes, presets and dtypes."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch

DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""Names in records; "tf32" is float32 with torch's TF32 switches on, GPU only."""

SUITES = {
    "train": "forward and backward with every gradient",
    "infer": "forward under no_grad",
    "step": "one call of one time step under no_grad",
}


@dataclass(frozen=True)
class Case:
    """Sizes of one call: one layer, one direction, hx and h_n included.

    Attributes:
        I: input size.
        H: hidden size.
        B: batch.
        T: time steps.
        L: layers.
        V: vocabulary, 0 where there is none.
        resets: share of (t, b) where a new episode begins.
    """

    I: int  # noqa: E741
    H: int
    B: int
    T: int
    L: int = 1
    V: int = 0
    resets: float = 0.0

    def __post_init__(self) -> None:
        if min(self.I, self.H, self.B, self.T, self.L) < 1 or self.V < 0:
            raise ValueError(f"sizes: expected at least 1, got {self}")
        if not 0 <= self.resets < 1:
            raise ValueError(f"resets: expected a share in [0, 1), got {self.resets}")

    def __str__(self) -> str:
        text = "" if self.I == self.H else f"I{self.I}-"
        text += f"H{self.H}-B{self.B}-T{self.T}"
        text += f"-L{self.L}" if self.L > 1 else ""
        text += f"-V{self.V}" if self.V else ""
        return text + (f"-R{self.resets:g}" if self.resets else "")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def square(H: int, B: int, T: int, **more: Any) -> Case:
    """The case with as many inputs as hidden units."""
    return Case(H, H, B, T, **more)


TABLE = [
    square(64, 1, 256),
    square(64, 32, 256),
    square(128, 1, 256),
    square(128, 32, 128),
    square(256, 1, 256),
    square(256, 32, 128),
    square(512, 1, 128),
    square(512, 64, 64),
    square(1024, 1, 64),
    square(1024, 64, 32),
]
QUICK = [square(64, 1, 64), square(128, 8, 32), square(256, 1, 32)]
RL = [square(256, 4096, 24), square(128, 16384, 32), square(256, 128, 128, resets=0.03)]
STEPS = [square(H, B, 1) for H, B in product((64, 128, 256, 512, 1024), (1, 64))]
SWEEP = [
    square(H, B, T)
    for T, H, B in product((1, 50, 1000), (8, 13, 32, 65, 128, 257, 512, 1024), (1, 3, 16, 64, 256))
    if H * H * B * T <= 2**28
]
"""So small that nn.GRU trains each in about a quarter of a second."""
PRESETS = {"table": TABLE, "quick": QUICK, "rl": RL, "steps": STEPS, "sweep": SWEEP}


def parse(text: str) -> list[Case]:
    """Cases from comma-separated presets and shapes such as `H64-B1-T256` or `I32-H64-B8-T9-R0.1`.

    Raises:
        ValueError: a name that is neither.
    """
    found: list[Case] = []
    for name in text.split(","):
        found += PRESETS[name] if name in PRESETS else [_parse_one(name)]
    return list(dict.fromkeys(found))


def _parse_one(name: str) -> Case:
    parts = [re.fullmatch(r"([IHBTLV])(\d+)|(R)(\d*\.?\d+)", part) for part in name.split("-")]
    sizes = {part[1] or part[3]: part[2] or part[4] for part in parts if part}
    if len(sizes) < len(parts) or not {"H", "B", "T"} <= set(sizes):
        raise ValueError(
            f"shapes: expected one of {', '.join(PRESETS)} or a shape like H64-B1-T256, "
            f"got {name!r}"
        )
    resets = float(sizes.pop("R", 0))
    numbers = {letter: int(size) for letter, size in sizes.items()}
    return Case(**{"I": numbers["H"], **numbers}, resets=resets)
