# SPDX-License-Identifier: Apache-2.0
"""Providers of the GPU only: loops captured in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.problem import Problem
from benchmarks.providers import Prepared, Provider
from benchmarks.providers_torch import CellLoop


def captured(call: Callable[[], Any], warm_up: int = 2) -> Callable[[], Any]:
    """The call as the replay of a CUDA graph; returns the same tensors each time.

    What the graph reads lives as long as the replay: it keeps the call.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_up):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        returned = call()

    def replay(kept: Callable[[], Any] = call) -> Any:
        graph.replay()
        return returned

    return replay


class CapturedCellLoop(Provider):
    """The loop over nn.GRUCell without its launch costs."""

    name = "nn.GRUCell.graph"

    def why_not(self, problem: Problem) -> str | None:
        return "inference only" if problem.training else None

    def prepare(self, problem: Problem, threads: int) -> Prepared:
        plain = CellLoop().prepare(problem, threads)
        return Prepared(captured(plain.call), plain.results)


def providers() -> list[Provider]:
    return [CapturedCellLoop()]
