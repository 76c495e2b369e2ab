# SPDX-License-Identifier: Apache-2.0
"""The operators as `torch.autograd.Function`s, which `torch.func.grad` and `vmap` of it can see.

The formula of an operator that `torch.library` registers is out of their reach. Functions are out
of reach of forward-mode AD: see `backends.needs_composition`. Import it when a transform is live,
not before: it loads the compiler, as `torch.func` does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gru_fast import ops, ops_vmap, reference

Apply = Callable[..., tuple[Tensor, ...]]


def _function(op: Any, save: Any, backward: Any, rule: Callable[[Apply], Any]) -> Apply:
    """op.apply whose batching rule is made from it: what vmap folds can be differentiated again."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, ...]:
            return ops.without_grad(op, *args)

        @staticmethod
        def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
            return batched(info, in_dims, *args)

        setup_context = staticmethod(save)

    Function.backward = staticmethod(backward)  # type: ignore[method-assign]
    Function.__name__ = op.name()
    # Below the transforms a compiled caller's Dynamo would take each of its frames for a program.
    apply: Apply = torch.compiler.disable(Function.apply)  # type: ignore[no-untyped-call]
    batched = rule(apply)
    return apply


def _pair(name: str) -> tuple[Apply, Apply]:
    op_backward = getattr(ops, f"{name}_backward")

    def backward_rule(apply: Apply) -> Any:
        over_rows = apply if name == "scan" else scan_backward
        return ops_vmap.backward_rule(apply, over_rows, name)

    backward = _function(
        op_backward,
        ops.save_backward,
        ops.double_backward_rule(getattr(reference, f"{name}_backward")),
        backward_rule,
    )
    gradient = ops.gradient_rule(backward, name)
    forward = _function(
        getattr(ops, name), ops.save, gradient, lambda apply: ops_vmap.forward_rule(apply, name)
    )
    return forward, backward


scan, scan_backward = _pair("scan")
layer, _ = _pair("layer")
