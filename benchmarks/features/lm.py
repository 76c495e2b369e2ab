# SPDX-License-Identifier: Apache-2.0
"""A whole training step of a character model: loss, gradients, clipping, Adam. Suite `lm`.

`GRULanguageModel` beside what one writes with torch.nn, with the same weights and the same tokens,
and beside that model after `gru_fast.convert`, which changes its GRU and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gru_fast
from benchmarks.cases import Case
from benchmarks.features.row import Call, Drawn, Named, Row, Tensors, load

CLIP = 1.0
WEIGHTS = ("embedding.weight", "gru.weight_ih_l0", "gru.weight_hh_l0", "gru.bias_ih_l0")
WEIGHTS += ("gru.bias_hh_l0", "head.weight", "head.bias")


class TorchModel(nn.Module):
    """nn.Embedding, nn.GRU, nn.Linear; time first, which is the faster way for nn.GRU."""

    def __init__(self, V: int, I: int, H: int) -> None:  # noqa: E741
        super().__init__()
        self.embedding = nn.Embedding(V, I)
        self.gru = nn.GRU(I, H)
        self.head = nn.Linear(H, V)

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean cross-entropy; the first input is the zero vector, then come the true tokens."""
        tokens = tokens.T
        entering = F.pad(self.embedding(tokens[:-1]), (0, 0, 0, 0, 1, 0))
        logits = self.head(self.gru(entering)[0])
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def _draw(case: Case, generator: torch.Generator) -> Tensors:
    device = generator.device

    def uniform(*shape: int, bound: float) -> Tensor:
        return (torch.rand(shape, generator=generator, device=device) * 2 - 1) * bound

    V, I, H, k = case.V, case.I, case.H, case.H**-0.5  # noqa: E741
    shapes = ((V, I), (3 * H, I), (3 * H, H), (3 * H,), (3 * H,), (V, H), (V,))
    tensors = {n: uniform(*s, bound=k) for n, s in zip(WEIGHTS, shapes, strict=True)}
    tensors["embedding.weight"] = torch.randn(V, I, generator=generator, device=device)
    tokens = torch.randint(V, (case.B, case.T), generator=generator, device=device)
    return {**tensors, "tokens": tokens}


def _step(make: Callable[[int, int, int], nn.Module], tensors: Tensors) -> Call:
    """The call: one step, which leaves the clipped gradients behind."""
    V, I = tensors["embedding.weight"].shape  # noqa: E741
    made = make(V, I, tensors["head.weight"].shape[1])
    model = made.to(tensors["head.weight"])
    parameters = load(model, tensors)
    # So small that many steps in a row stay where the first was.
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-7)
    tokens = tensors["tokens"]

    def call() -> Tensors:
        optimiser.zero_grad()
        loss: Tensor = model.loss(tokens)  # type: ignore[operator]
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimiser.step()
        results = {"loss": loss}
        for name, parameter in parameters.items():
            assert parameter.grad is not None
            results[f"grad_{name}"] = parameter.grad
        return results

    return call


def by_torch(tensors: Tensors) -> Call:
    return _step(TorchModel, tensors)


def by_convert(tensors: Tensors) -> Call:
    def make(V: int, I: int, H: int) -> nn.Module:  # noqa: E741
        model = TorchModel(V, I, H)
        gru_fast.convert(model)
        return model

    return _step(make, tensors)


def by_gru_fast(tensors: Tensors) -> Call:
    return _step(gru_fast.GRULanguageModel, tensors)


PROBLEM = Drawn(
    Case(512, 512, 64, 128, V=65),
    "lm",
    "float32",
    "cpu",
    feature="lm/step",
    draw=_draw,
    exact=by_torch,
)
ROWS = [
    Row(
        PROBLEM,
        [
            Named("nn.GRU.model", by_torch, baseline=True),
            Named("gru_fast.convert", by_convert),
            Named("gru_fast.GRULanguageModel", by_gru_fast),
        ],
        quick=Case(6, 9, 3, 5, V=7),
        more=[Case(64, 128, 32, 64, V=65)],
        command="lm",
    )
]
