# SPDX-License-Identifier: Apache-2.0
"""`bidirectional`: both directions at the same time, beside one after the other.

One after the other is two layers on what was turned round in advance: no flip, no joining of
outputs is in its time. With `one_thread` in its name it uses one thread whatever the run has, so
that the gain of both, the second thread's and that of running together, is seen in one row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import gru_fast
from benchmarks.cases import Case, square
from benchmarks.features.layer import draw, module_of
from benchmarks.features.row import Call, Drawn, Named, Row, Tensors, Way, call_of, load
from benchmarks.problem import WEIGHTS as NAMES

BACK = "_reverse"


def draw_both(case: Case, generator: torch.Generator) -> Tensors:
    """`draw` with the weights of both directions, and the gradient of both outputs."""
    there, back = draw(case, generator), draw(case, generator)
    grad_y = torch.cat([there.pop("grad_y"), back["grad_y"]], -1)
    return there | {name + BACK: back[name] for name in NAMES} | {"grad_y": grad_y}


def together(kind: Any, suite: str) -> Way:
    """One bidirectional layer."""

    def way(tensors: Tensors) -> Call:
        x, grad_y = tensors["x"], tensors["grad_y"]
        module = kind(x.shape[2], grad_y.shape[2] // 2, bidirectional=True, dtype=x.dtype)
        leaves = load(module, tensors)

        def forward() -> Tensors:
            return {"y": module(x)[0]}

        return call_of(suite, forward, leaves, {"y": grad_y})

    return way


def one_after_the_other(suite: str, threads: int | None = None) -> Way:
    """Two layers; with `threads` as torch's number of threads if given."""

    def way(tensors: Tensors) -> Call:
        there, back = (g.contiguous() for g in tensors["grad_y"].chunk(2, -1))
        given: dict[str, Tensors] = {
            "": {"x": tensors["x"], "grad_y": there},
            BACK: {"x": tensors["x"].flip(0), "grad_y": back.flip(0)},
        }
        calls: dict[str, Call] = {}
        for end, values in given.items():
            module = module_of(gru_fast.GRU, values | {n: tensors[n + end] for n in NAMES})

            def forward(module: nn.RNNBase = module, values: Tensors = values) -> Tensors:
                return {"y": module(values["x"])[0]}

            leaves: Tensors = {name: module.get_parameter(name) for name in NAMES}
            calls[end] = call_of(suite, forward, leaves, {"y": values["grad_y"]})

        def both() -> Tensors:
            return {name + end: t for end, call in calls.items() for name, t in call().items()}

        def with_threads() -> Tensors:
            assert threads is not None
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                return both()
            finally:
                torch.set_num_threads(before)

        return both if threads is None else with_threads

    return way


def joined(found: Tensors) -> Tensors:
    """The results of two layers as those of one."""
    y = torch.cat([found["y"], found[f"y{BACK}"].flip(0)], -1)
    return {name: t for name, t in found.items() if name != f"y{BACK}"} | {"y": y}


def _row(suite: str) -> Row:
    name = "gru_fast.one_after_the_other"
    return Row(
        Drawn(
            square(64, 1, 256), suite, "float32", "cpu", feature=f"bidirectional/{suite}",
            draw=draw_both, exact=together(nn.GRU, suite),
        ),
        [
            Named(name, one_after_the_other(suite), baseline=True, results=joined),
            Named(f"{name}.one_thread", one_after_the_other(suite, 1), results=joined),
            Named("gru_fast.bidirectional", together(gru_fast.GRU, suite)),
            Named("nn.GRU.bidirectional", together(nn.GRU, suite)),
        ],
        quick=Case(5, 8, 3, 9),
        more=[square(256, 1, 256), square(256, 32, 128), square(16, 4, 8), square(512, 4, 8)],
        command="layers",
    )  # fmt: skip


ROWS = [_row("train"), _row("infer")]
