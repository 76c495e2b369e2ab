# SPDX-License-Identifier: Apache-2.0
"""Calls of the operators and of the reference that several tests share."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cases import Case, LayerInputs
from gru_fast import reference
from torch_threads import torch_threads

DIRECTIONS = ((False,), (True,), (False, True), (True, False, False))


def scan_arguments(inputs: LayerInputs, **changes: Any) -> list[Any]:
    """The same call for `gru_fast::scan`, projected in float64 so that all dtypes agree."""
    i = inputs.to(torch.float64)
    with torch.no_grad():
        gates_x = reference.project(i.x, i.weight_ih, i.bias_ih)
    x = inputs.x
    gates_x = gates_x.to(torch.float32).to(x.dtype).requires_grad_(x.requires_grad)
    rest = inputs.arguments(**changes)
    return [gates_x, rest[1], rest[3], *rest[5:]]


def turned(value: Any) -> Any:
    """The same values, none beside the next; what is no tensor stays as it is."""
    return torch.stack((value, value), -1)[..., 0] if isinstance(value, Tensor) else value


def run(op: Any, arguments: Sequence[Any], grads: Sequence[Tensor]) -> list[Tensor]:
    """output, h_n and the gradient of every differentiable argument."""
    outputs = op(*arguments)[:2]
    leaves = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    gradients = torch.autograd.grad(outputs, leaves, [g.to(outputs[0].dtype) for g in grads])
    return [*(o.detach() for o in outputs), *gradients]


def run_specification(name: str, arguments: Sequence[Any], grads: Sequence[Tensor]) -> list[Tensor]:
    """`run` on the reference, on one thread: its small operations are five times faster so."""
    with torch_threads(1):
        return run(getattr(reference, name), arguments, grads)


def labels(arguments: Sequence[Any], op: Any) -> list[str]:
    names = [a.name for a in op._schema.arguments]
    live = (isinstance(a, Tensor) and a.requires_grad for a in arguments)
    return ["output", "h_n", *[n for n, keep in zip(names, live, strict=True) if keep]]


def draws(sizes: Case, dtype: torch.dtype) -> range:
    """More for small sizes, where an error is the largest of fewer numbers."""
    if dtype == torch.float64:
        return range(1)
    return range(24 if sizes.B * min(sizes.H, sizes.T * sizes.I) < 20 else 8)


def rounded(value: Any) -> Any:
    """A float64 tensor with float32's digits."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.float().double()
    return value


def backward_arguments(
    name: str, inputs: LayerInputs, workspace_grad: bool = False, **changes: Any
) -> list[Any]:
    make = LayerInputs.arguments if name == "layer" else scan_arguments
    arguments = make(inputs, **changes)
    with torch.no_grad():
        output, h_n, workspace = getattr(reference, name)(*arguments)
    grads = [torch.randn_like(output), torch.randn_like(h_n), None]
    if workspace_grad:
        grads[2] = torch.randn_like(workspace)
    for t in (*grads, output, workspace):
        if t is not None:
            t.requires_grad_(inputs.x.requires_grad)
    tensors, modes = arguments[:-3], arguments[-3:]
    mask = [True] * (8 if name == "layer" else 6)
    return [*grads, *tensors, output, workspace, *modes, mask]
