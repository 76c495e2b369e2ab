# SPDX-License-Identifier: Apache-2.0
"""`num_heads`: block-diagonal recurrent weights, 8 heads, as the world models of Dreamer have them.

Beside a Python loop over one small nn.GRU, or one of ours, for each head, and beside one dense
nn.GRU whose weights are zero between the heads. For one row it takes less time than the loop; who
trains it has to keep those zeros, which is not timed. One step is what an agent takes that acts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import gru_fast
from benchmarks.cases import Case, square
from benchmarks.features.row import Call, Drawn, Named, Row, Tensors, Way, call_of, load
from benchmarks.problem import WEIGHTS as NAMES

HEADS = 8


def draw(case: Case, generator: torch.Generator) -> Tensors:
    """Weights of gru_fast.GRU with heads."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    I, H = case.I, case.H  # noqa: E741
    return {
        "x": normal(case.T, case.B, I),
        "weight_ih_l0": normal(3 * H, I) * H**-0.5,
        "weight_hh_l0": normal(3 * H, H // HEADS) * (H // HEADS) ** -0.5,
        "bias_ih_l0": normal(3 * H) * H**-0.5,
        "bias_hh_l0": normal(3 * H) * H**-0.5,
        "grad_y": normal(case.T, case.B, H),
    }


def _of_head(tensor: Tensor, head: int) -> Tensor:
    """The rows of one head, gate by gate."""
    return torch.cat([gate.chunk(HEADS)[head] for gate in tensor.chunk(3)])


def joined(results: Tensors) -> Tensors:
    """What the loop found, head by head, as one tensor of each kind, in the order of the heads."""
    kinds = dict.fromkeys(name.rpartition(".")[0] for name in results)
    return {
        kind: torch.cat([results[f"{kind}.{k}"] for k in range(HEADS)], -1 if kind == "y" else 0)
        for kind in kinds
    }


def by_head(results: Tensors) -> Tensors:
    """Gradients in the order of the heads, as `joined` has them."""
    return {
        name: torch.cat([_of_head(t, k) for k in range(HEADS)]) if name != "y" else t
        for name, t in results.items()
    }


def loop(kind: Any, suite: str) -> Way:
    """One head after the other."""

    def way(tensors: Tensors) -> Call:
        x, H = tensors["x"], tensors["grad_y"].shape[2]
        modules = [kind(x.shape[2], H // HEADS, dtype=x.dtype) for _ in range(HEADS)]
        with torch.no_grad():
            for head, module in enumerate(modules):
                for name in NAMES:
                    module.get_parameter(name).copy_(_of_head(tensors[name], head))

        def forward() -> Tensors:
            return {f"y.{k}": module(x)[0] for k, module in enumerate(modules)}

        leaves: Tensors = {
            f"{name}.{k}": module.get_parameter(name)
            for k, module in enumerate(modules)
            for name in NAMES
        }
        parts = tensors["grad_y"].chunk(HEADS, -1)
        return call_of(
            suite, forward, leaves, {f"y.{k}": g.contiguous() for k, g in enumerate(parts)}
        )

    return way


def dense(suite: str) -> Way:
    """One nn.GRU with zeros between the heads."""

    def way(tensors: Tensors) -> Call:
        x, H = tensors["x"], tensors["grad_y"].shape[2]
        module = nn.GRU(x.shape[2], H, dtype=x.dtype)
        blocks = [torch.block_diag(*g.chunk(HEADS)) for g in tensors["weight_hh_l0"].chunk(3)]
        leaves = load(module, tensors | {"weight_hh_l0": torch.cat(blocks)})
        return call_of(suite, lambda: {"y": module(x)[0]}, leaves, {"y": tensors["grad_y"]})

    return way


def within_heads(results: Tensors) -> Tensors:
    """What `dense` found, without gradients of the zeros, as `joined` has it."""
    name = "grad_weight_hh_l0"
    if name not in results:
        return results
    of_gates = [
        torch.cat([rows.chunk(HEADS, 1)[k] for k, rows in enumerate(gate.chunk(HEADS))])
        for gate in results[name].chunk(3)
    ]
    return by_head(results | {name: torch.cat(of_gates)})


def heads(suite: str) -> Way:
    """All heads in one call."""

    def way(tensors: Tensors) -> Call:
        x, H = tensors["x"], tensors["grad_y"].shape[2]
        module = gru_fast.GRU(x.shape[2], H, num_heads=HEADS, dtype=x.dtype)
        with torch.no_grad():
            for name in NAMES:
                module.get_parameter(name).copy_(tensors[name])

        def forward() -> Tensors:
            return {"y": module(x)[0]}

        leaves: Tensors = {name: module.get_parameter(name) for name in NAMES}
        return call_of(suite, forward, leaves, {"y": tensors["grad_y"]})

    return way


def _exact(suite: str) -> Way:
    def way(tensors: Tensors) -> Call:
        call = loop(nn.GRU, suite)(tensors)
        return lambda: joined(call())

    return way


def _row(suite: str) -> Row:
    return Row(
        Drawn(
            square(512, 16, 64), suite, "float32", "cpu", feature=f"num_heads/{suite}",
            draw=draw, exact=_exact(suite),
        ),
        [
            Named("nn.GRU.loop", loop(nn.GRU, suite), baseline=True, results=joined),
            Named("nn.GRU.dense", dense(suite), results=within_heads),
            Named("gru_fast.GRU.loop", loop(gru_fast.GRU, suite), results=joined),
            Named("gru_fast.GRU.num_heads", heads(suite), results=by_head),
        ],
        quick=Case(5, 16, 3, 9),
        more=[square(512, 1, 64), square(512, 1, 1)],
    )  # fmt: skip


ROWS = [_row("train"), _row("infer")]
