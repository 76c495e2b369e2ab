# SPDX-License-Identifier: Apache-2.0
"""The numbers of the operators against the reference: every cell, input, direction and gradient."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import CELLS, FEATURES, Case, LayerInputs, layer_inputs
from gru_fast import ops, reference
from helpers import assert_parity
from op_calls import (
    DIRECTIONS,
    backward_arguments,
    draws,
    labels,
    rounded,
    run,
    run_specification,
    scan_arguments,
)

# Every H of the list and every B of the list, in pairs that are not multiples of each other.
SIZES = (
    (1, 17), (3, 1), (7, 2), (16, 9), (17, 5), (33, 8), (64, 3), (65, 17),
)  # fmt: skip


poisoned = pytest.mark.usefixtures("poisoned_memory")


def check_parity(
    case: Case, dtype: torch.dtype, name: str = "layer", modes: Sequence[bool] = (False, True)
) -> None:
    """Parity of outputs and gradients, saved and recomputed."""
    op = getattr(ops, name)
    make = LayerInputs.arguments if name == "layer" else scan_arguments
    G = len(case.reverse)
    ours: dict[bool, list[list[Tensor]]] = {mode: [] for mode in modes}
    theirs, truth = [], []
    for draw in draws(case, dtype):
        inputs = layer_inputs(case, dtype, grad=True, draw=draw)
        grads = [torch.randn(case.T, case.B, G * case.H), torch.randn(G, case.B, case.H)]
        grads = [g.to(dtype) for g in grads]
        theirs.append(run_specification(name, make(inputs), grads))
        truth.append(run_specification(name, make(inputs.to(torch.float64)), grads))
        for mode in modes:
            ours[mode].append(run(op, make(inputs, recompute=mode), grads))
    for mode in modes:
        for k, what in enumerate(labels(make(inputs), op)):
            a, b, c = ([d[k] for d in values] for values in (ours[mode], theirs, truth))
            assert_parity(f"{name} {what}{' recomputed' if mode else ''}", a, b, c)


PARITY = [
    Case(cell, features, DIRECTIONS[(k + j) % 4], T=5, B=B, I=3 + 2 * (j % 4), H=H)
    for k, (cell, features) in enumerate(product(CELLS, FEATURES))
    for j, (H, B) in enumerate(SIZES)
]


@poisoned
@pytest.mark.parametrize("case", PARITY, ids=str)
def test_parity_float32(case: Case) -> None:
    check_parity(case, torch.float32)


@poisoned
@pytest.mark.parametrize("case", PARITY[::2], ids=str)
def test_parity_float64(case: Case) -> None:
    check_parity(case, torch.float64)


@poisoned
@pytest.mark.parametrize("case", PARITY[::3], ids=str)
def test_parity_of_scan(case: Case) -> None:
    check_parity(case, torch.float32, "scan")
    check_parity(case, torch.float64, "scan")


@poisoned
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "case", [*PARITY[::7], Case("reset_after", "everything", (False, True), T=150, B=5)], ids=str
)
def test_parity_in_half_precision(case: Case, dtype: torch.dtype) -> None:
    check_parity(case, dtype)


MORE = [
    Case(cell, "everything", (False, True), T=6, B=5, I=4, H=9, bias=bias, shared_x=shared)
    for cell, bias, shared in product(CELLS, (True, False), (True, False))
] + [
    Case(cell, features, reverse, T=1, B=B, I=1, H=H)
    for cell in CELLS
    for features, reverse, B, H in (
        ("plain", (False,), 1, 24), ("everything", (True,), 2, 5), ("lengths", (False,), 4, 16)
    )
] + [
    Case(cell, "everything", (False, True), T=T, B=B, I=3, H=H)
    for cell, (T, B, H) in product(CELLS, ((150, 4, 20), (3, 300, 5)))
]  # fmt: skip


@poisoned
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", MORE, ids=str)
def test_parity_bias_groups_one_step_and_long(case: Case, dtype: torch.dtype) -> None:
    check_parity(case, dtype)


@poisoned
@pytest.mark.parametrize("cell", CELLS)
def test_workspace(cell: str) -> None:
    inputs = layer_inputs(Case(cell, "everything", (True, False)))
    for name, arguments in (("layer", inputs.arguments()), ("scan", scan_arguments(inputs))):
        ours = getattr(ops, name)(*arguments)[2]
        truth = getattr(reference, name)(*arguments)[2]
        assert_parity("workspace", ours, truth, truth)


@poisoned
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["layer", "scan"])
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("cell", CELLS)
def test_backward_with_a_workspace_gradient(
    cell: str, features: str, name: str, dtype: torch.dtype
) -> None:
    case = Case(cell, features, (False, True), B=5, H=17)
    specification = getattr(reference, f"{name}_backward")
    op = getattr(ops, f"{name}_backward")
    results: list[Any] = []
    for draw in draws(case, dtype):
        inputs = layer_inputs(case, draw=draw)
        exact = [rounded(a) for a in backward_arguments(name, inputs, workspace_grad=True)]
        given = [
            a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in exact
        ]
        results.append((op(*given), specification(*given), specification(*exact)))
    for k, gradient in enumerate(op._schema.returns):
        assert_parity(gradient.name, *([r[side][k] for r in results] for side in range(3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", PARITY[::9], ids=str)
def test_recompute_agrees_with_saved(case: Case, dtype: torch.dtype) -> None:
    inputs = layer_inputs(case, dtype, grad=True)
    grads = [torch.randn(case.T, case.B, inputs.h0.shape[0] * case.H), torch.randn_like(inputs.h0)]
    saved = run(ops.layer, inputs.arguments(), grads)
    rebuilt = run(ops.layer, inputs.arguments(recompute=True), grads)
    assert torch.equal(saved[0], rebuilt[0])
    assert torch.equal(saved[1], rebuilt[1])
    tolerance = 100 * torch.finfo(dtype).eps
    for a, b in zip(saved[2:], rebuilt[2:], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.abs().max()))
