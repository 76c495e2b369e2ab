# SPDX-License-Identifier: Apache-2.0
"""What backward shares over the chunks of a scan: which they are, and what they add up to."""

from __future__ import annotations

import torch
from torch import Tensor

from . import products
from .problem import Problem

CHUNKS = 4
"""Parts in which a long sequence is rebuilt: of what is saved, one part is alive at once."""

CHUNK_ELEMENTS = 2**20, 2**28
"""Least and most values of a rebuilt workspace: a chunk costs launches, a large one memory."""


def chunks_of(problem: Problem, rebuilt: bool) -> list[tuple[int, int]]:
    """Chunks of scan steps, the last first."""
    T = problem.T
    if not rebuilt:
        return [(0, T)]
    elements = problem.B * problem.G * problem.H * 4
    least, most = (-(-count // elements) for count in CHUNK_ELEMENTS)
    length = min(T, max(1, least, min(-(-T // CHUNKS), most)))
    return [(max(0, end - length), end) for end in range(T, 0, -length)]


def runs_of(problem: Problem, steps: tuple[int, int]) -> list[tuple[slice, slice]]:
    """Groups that a chunk meets at the same times, and those times."""
    begin, end = steps
    T = problem.T
    if end - begin == T:
        return [(slice(0, problem.G), slice(0, T))]
    return [
        (groups, slice(T - end, T - begin) if backwards else slice(begin, end))
        for groups, backwards in products.direction_runs(problem.reverse)
    ]


def state_sums(
    problem: Problem, grad_h_n: Tensor | None, need_start: bool, need_scale: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What the chunks hand on, (G, B, H) float32: gradients of state, reset_state and h_scale."""

    def zeros() -> Tensor:
        return torch.zeros_like(problem.h0, dtype=torch.float32)

    if grad_h_n is None:
        state = zeros()
    else:  # a copy, for it is written to
        contiguous = torch.contiguous_format
        state = grad_h_n.to(torch.float32, copy=True, memory_format=contiguous)
    start = zeros() if need_start and problem.reset_state is not None else None
    scale = zeros() if need_scale and problem.h_scale is not None else None
    return state, start, scale


class GateGradients:
    """The gradient of gates_x from its chunks: the only one itself, or a copy of several.

    Attributes:
        value: (T, B, G, N*H), or empty if it is not needed.
    """

    def __init__(self, problem: Problem, needed: bool) -> None:
        self._problem, self._needed = problem, needed
        nothing = needed and 0 in (problem.T, problem.B)
        self.value = problem.gates_x.new_empty(problem.gates_x.shape if nothing else (0,))

    def add(self, rows: Tensor, steps: tuple[int, int]) -> None:
        """Put a chunk's (steps, B, G, N*H) in its place; the one with the last step comes first."""
        T = self._problem.T
        if not self._needed:
            return
        if len(rows) == T:
            self.value = rows
            return
        if steps[1] == T:
            self.value = rows.new_empty(T, *rows.shape[1:])
        for groups, times in runs_of(self._problem, steps):
            self.value[times, :, groups] = rows[:, :, groups]
