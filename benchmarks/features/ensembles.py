# SPDX-License-Identifier: Apache-2.0
"""`ensemble`: 16 models on the same input; `per_sample`: the gradient of each sequence by itself.

Beside a Python loop over nn.GRU, and over our own modules.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, func, nn

import gru_fast
from benchmarks.cases import Case, square
from benchmarks.features.row import Call, Drawn, Named, Row, Tensors, Way, call_of, inference
from benchmarks.problem import WEIGHTS as NAMES

MODELS = 16


def _draw(case: Case, generator: torch.Generator, models: int) -> Tensors:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    I, H = case.I, case.H  # noqa: E741
    return {
        "x": normal(case.T, case.B, I),
        "weight_ih_l0": normal(models, 3 * H, I) * H**-0.5,
        "weight_hh_l0": normal(models, 3 * H, H) * H**-0.5,
        "bias_ih_l0": normal(models, 3 * H) * H**-0.5,
        "bias_hh_l0": normal(models, 3 * H) * H**-0.5,
        "grad_y": normal(models, case.T, case.B, H),
    }


def draw_ensemble(case: Case, generator: torch.Generator) -> Tensors:
    """Stacked weights, one x, and a gradient of every output."""
    return _draw(case, generator, MODELS)


def draw_samples(case: Case, generator: torch.Generator) -> Tensors:
    """The weights of one model."""
    return _draw(case, generator, 1)


def _made(kind: Any, tensors: Tensors, k: int) -> nn.Module:
    x, weight = tensors["x"], tensors["weight_hh_l0"]
    module: nn.Module = kind(x.shape[2], weight.shape[2], dtype=x.dtype, device=x.device)
    with torch.no_grad():
        for name in NAMES:
            module.get_parameter(name).copy_(tensors[name][k])
    return module


def loop(kind: Any, suite: str) -> Way:
    """One model after the other."""

    def way(tensors: Tensors) -> Call:
        models = [_made(kind, tensors, k) for k in range(MODELS)]
        x = tensors["x"]

        def forward() -> Tensors:
            return {f"y.{k}": model(x)[0] for k, model in enumerate(models)}

        leaves: Tensors = {
            f"{name}.{k}": model.get_parameter(name)
            for k, model in enumerate(models)
            for name in NAMES
        }
        return call_of(
            suite, forward, leaves, {f"y.{k}": g for k, g in enumerate(tensors["grad_y"])}
        )

    return way


def stacked(results: Tensors) -> Tensors:
    """What the loop found, one by one, as one tensor of each kind."""
    kinds = dict.fromkeys(name.rpartition(".")[0] for name in results)
    count = len(results) // len(kinds)
    return {kind: torch.stack([results[f"{kind}.{k}"] for k in range(count)]) for kind in kinds}


def _stacked(way: Way) -> Way:
    def exact(tensors: Tensors) -> Call:
        call = way(tensors)
        return lambda: stacked(call())

    return exact


def vmap(suite: str) -> Way:
    """torch.vmap over the parameters, gradients by autograd through it."""

    def way(tensors: Tensors) -> Call:
        module = _made(gru_fast.GRU, tensors, 0)
        leaves = {name: tensors[name].clone().requires_grad_() for name in NAMES}
        x, grad_y = tensors["x"], tensors["grad_y"]
        run = torch.vmap(lambda p: func.functional_call(module, p, (x,))[0])
        if suite == "infer":
            return inference(lambda: {"y": run(leaves)})

        def call() -> Tensors:
            y = run(leaves)
            found = torch.autograd.grad(y, list(leaves.values()), grad_y)
            return {"y": y} | {f"grad_{name}": g for name, g in zip(leaves, found, strict=True)}

        return call

    return way


def vmap_grad(tensors: Tensors) -> Call:
    """torch.vmap of torch.func.grad over the parameters."""
    module = _made(gru_fast.GRU, tensors, 0)
    params = {name: tensors[name] for name in NAMES}
    x, grad_y = tensors["x"], tensors["grad_y"]

    def loss(p: Tensors, g: Tensor) -> tuple[Tensor, Tensor]:
        y = func.functional_call(module, p, (x,))[0]
        return (y * g).sum(), y

    run = torch.vmap(func.grad(loss, has_aux=True))

    def call() -> Tensors:
        found, y = run(params, grad_y)
        return {"y": y} | {f"grad_{name}": g for name, g in found.items()}

    return call


def samples_in_a_loop(kind: Any) -> Way:
    """A backward pass for each sequence."""

    def way(tensors: Tensors) -> Call:
        module = _made(kind, tensors, 0)
        parameters = [module.get_parameter(name) for name in NAMES]
        rows = list(zip(tensors["x"].unbind(1), tensors["grad_y"][0].unbind(1), strict=True))

        def call() -> Tensors:
            results: Tensors = {}
            for k, (x, g) in enumerate(rows):
                found = torch.autograd.grad(module(x[:, None])[0], parameters, g[:, None])
                results |= {f"grad_{n}.{k}": t for n, t in zip(NAMES, found, strict=True)}
            return results

        return call

    return way


def samples_by_vmap(tensors: Tensors) -> Call:
    """torch.vmap of torch.func.grad over the sequences."""
    module = _made(gru_fast.GRU, tensors, 0)
    params = {name: tensors[name][0] for name in NAMES}

    def loss(p: Tensors, x: Tensor, g: Tensor) -> Tensor:
        return (func.functional_call(module, p, (x[:, None],))[0] * g[:, None]).sum()

    run = torch.vmap(func.grad(loss), (None, 1, 1))

    def call() -> Tensors:
        found = run(params, tensors["x"], tensors["grad_y"][0])
        return {f"grad_{name}": g for name, g in found.items()}

    return call


def _ensemble(suite: str) -> Row:
    more = [Named("gru_fast.GRU.vmap_grad", vmap_grad)] if suite == "train" else []
    return Row(
        Drawn(
            square(64, 1, 100), suite, "float32", "cpu", feature=f"ensemble/{suite}",
            draw=draw_ensemble, exact=_stacked(loop(nn.GRU, suite)),
        ),
        [
            Named("nn.GRU.loop", loop(nn.GRU, suite), baseline=True, results=stacked),
            Named("gru_fast.GRU.loop", loop(gru_fast.GRU, suite), results=stacked),
            Named("gru_fast.GRU.vmap", vmap(suite)),
            *more,
        ],
        quick=Case(5, 8, 3, 9),
        more=[square(64, 8, 100), square(64, 32, 100)],
    )  # fmt: skip


ROWS = [
    _ensemble("train"),
    _ensemble("infer"),
    Row(
        Drawn(
            square(64, 32, 64), "train", "float32", "cpu", feature="per_sample/train",
            draw=draw_samples, exact=_stacked(samples_in_a_loop(nn.GRU)),
        ),
        [
            Named("nn.GRU.loop", samples_in_a_loop(nn.GRU), baseline=True, results=stacked),
            Named("gru_fast.GRU.loop", samples_in_a_loop(gru_fast.GRU), results=stacked),
            Named("gru_fast.GRU.vmap_grad", samples_by_vmap),
        ],
        quick=Case(5, 8, 3, 9),
    ),
]  # fmt: skip
