# SPDX-License-Identifier: Apache-2.0
"""Token by token in plain PyTorch: embedding, GRU, head, softmax, draw, and round again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.cases import DTYPES, Case
from benchmarks.providers_cuda import captured

SAMPLERS = ("nn.GRU.sampler", "nn.GRUCell.sampler", "nn.GRUCell.sampler.graph")
"""The first is the baseline; the last needs a GPU."""


def sampler(name: str, case: Case, dtype: str, device: str) -> Callable[[], Any]:
    """A call that draws case.T tokens for each of case.B sequences; returns the last ones."""
    like = {"device": device, "dtype": DTYPES[dtype]}
    embed, head = nn.Embedding(case.V, case.I, **like), nn.Linear(case.H, case.V, **like)
    h = torch.zeros(case.B, case.H, **like)
    tokens = torch.zeros(case.B, dtype=torch.long, device=device)

    def drawn(h_t: torch.Tensor) -> torch.Tensor:
        probabilities = torch.softmax(head(h_t), -1, dtype=torch.float32)
        return torch.multinomial(probabilities, 1)[:, 0]

    if name == "nn.GRU.sampler":
        gru = nn.GRU(case.I, case.H, **like)

        def by_layer() -> torch.Tensor:
            with torch.no_grad():
                state, last = h.unsqueeze(0), tokens
                for _ in range(case.T):
                    output, state = gru(embed(last).unsqueeze(0), state)
                    last = drawn(output[0])
                return last

        return by_layer

    cell = nn.GRUCell(case.I, case.H, **like)

    def by_cell() -> torch.Tensor:
        with torch.no_grad():
            state, last = h, tokens
            for _ in range(case.T):
                state = cell(embed(last), state)
                last = drawn(state)
            return last

    return captured(by_cell) if name.endswith(".graph") else by_cell
