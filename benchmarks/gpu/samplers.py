# SPDX-License-Identifier: Apache-2.0
"""Token by token on a GPU: ours, and what one writes with PyTorch, all with the same weights.

Peers: embedding, GRU, head, softmax, draw, and round again, eagerly, in a CUDA graph, and compiled;
and our sampler on this machine's CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import DTYPES, Case
from benchmarks.providers_cuda import captured
from benchmarks.sample.gate import TOKENS, Draw, Gate, sharpened
from benchmarks.sample.providers import cell_of, drawing
from gru_fast import GRULanguageModel, Sampler, sampling

BASELINE = "nn.GRU.sampler"
OURS = "gru_fast.generate"
CPU = "gru_fast.sampler.cpu"
COMPILED = "nn.GRUCell.sampler.compiled"
SAMPLERS = (
    BASELINE, OURS, "nn.GRUCell.sampler", "nn.GRUCell.sampler.graph", COMPILED, CPU,
)  # fmt: skip

MOST_ON_CPU = 64
"""Sequences that the CPU is asked for at most: it would take seconds for more."""


def names(case: Case, device: str, kernels: bool, compiled: bool) -> list[str]:
    """The samplers that can take a case; the first is the baseline.

    Args:
        case: The sizes.
        device: "cuda" or "cpu".
        kernels: Whether Triton is there.
        compiled: Whether to ask `torch.compile`, which takes its time.
    """
    left_out = set() if kernels else {OURS}
    if not compiled or device != "cuda":
        left_out.add(COMPILED)
    if device != "cuda":
        left_out.add("nn.GRUCell.sampler.graph")
    if case.B > MOST_ON_CPU:
        left_out.add(CPU)
    return [name for name in SAMPLERS if name not in left_out]


def model_of(case: Case, dtype: str, device: str) -> GRULanguageModel:
    torch.manual_seed(0)
    like = {"device": device, "dtype": DTYPES[dtype]}
    model = GRULanguageModel(case.V, case.I, case.H, case.L, **like)
    return sharpened(model).requires_grad_(False)


def sampler(name: str, model: GRULanguageModel, case: Case) -> Callable[[], Any]:
    """A call that draws case.T tokens for each of case.B sequences."""
    if name in (OURS, CPU):
        draw = ours(model, case.B, on_cpu=name == CPU)
        return lambda: draw(case.T, False)
    if name == BASELINE:
        return by_layer(model, case)
    if name == COMPILED:
        return by_compiled_cells(model, case)
    call = by_cells(model, case)
    return captured(call) if name.endswith(".graph") else call


def ours(model: GRULanguageModel, B: int, on_cpu: bool = False) -> Draw:
    """`model.generate`, which a dry run has interpreted; or the CPU's `Sampler`."""
    if on_cpu:
        copy = GRULanguageModel(**model.config)
        copy.load_state_dict(model.state_dict())
        return drawing(Sampler(copy).generate, B)
    if model.head.weight.is_cuda:
        return drawing(model.generate, B)
    return drawing(partial(sampling.generate, model), B, loop=sampling.triton_loop)


def wrong(model: GRULanguageModel, case: Case, dtype: str) -> str | None:
    """None, or how far our kernel strays from the model in float64, in some of the timed rows."""
    rows = torch.linspace(0, case.B - 1, min(case.B, 8)).long()
    return Gate(model, case.B, rows, draws=TOKENS).verdict(ours(model, case.B), dtype, seeded=True)


def _drawn(model: GRULanguageModel, h: Tensor) -> Tensor:
    probabilities = torch.softmax(model.head(h), -1, dtype=torch.float32)
    return torch.multinomial(probabilities, 1)[:, 0]


def _beginning(model: GRULanguageModel, case: Case) -> tuple[Tensor, Tensor]:
    weight = model.head.weight
    tokens = torch.zeros(case.B, dtype=torch.long, device=weight.device)
    return tokens, weight.new_zeros(case.L, case.B, case.H)


def by_layer(model: GRULanguageModel, case: Case) -> Callable[[], Tensor]:
    like = {"device": model.head.weight.device, "dtype": model.head.weight.dtype}
    gru = nn.GRU(case.I, case.H, case.L, **like)
    gru.load_state_dict(model.gru.state_dict())
    tokens, h = _beginning(model, case)
    assert model.embedding is not None
    embed = model.embedding

    def call() -> Tensor:
        with torch.no_grad():
            state, last = h, tokens
            for _ in range(case.T):
                output, state = gru(embed(last).unsqueeze(0), state)
                last = _drawn(model, output[0])
            return last

    return call


def _step(model: GRULanguageModel, case: Case) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    cells = [cell_of(model.gru, layer) for layer in range(case.L)]
    assert model.embedding is not None
    embed = model.embedding

    def step(last: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        x, after = embed(last), []
        for layer, cell in enumerate(cells):
            x = cell(x, state[layer])
            after.append(x)
        return _drawn(model, x), torch.stack(after)

    return step


def by_cells(model: GRULanguageModel, case: Case) -> Callable[[], Tensor]:
    step = _step(model, case)
    tokens, h = _beginning(model, case)

    def call() -> Tensor:
        with torch.no_grad():
            last, state = tokens, h
            for _ in range(case.T):
                last, state = step(last, state)
            return last

    return call


def by_compiled_cells(model: GRULanguageModel, case: Case) -> Callable[[], Tensor]:
    """A step under torch.compile with its own CUDA graph, which reuses what it returned."""
    step = torch.compile(_step(model, case), mode="reduce-overhead")
    tokens, h = _beginning(model, case)

    def call() -> Tensor:
        with torch.no_grad():
            last, state = tokens, h
            for _ in range(case.T):
                torch.compiler.cudagraph_mark_step_begin()
                last, state = (t.clone() for t in step(last, state))
            return last

    return call
