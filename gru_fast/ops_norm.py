# SPDX-License-Identifier: Apache-2.0
"""The operators of the layer-normalised GRU: `gru_fast::norm_scan` and its gradients.

As `ops`, with shapes and semantics of `reference_norm`. The workspace and rstd are for the backward
op only and are not differentiable: a second derivative rebuilds the gates from the inputs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from gru_fast import ops, ops_vmap, reference_norm
from gru_fast.checks import check_length_values, check_norm_backward, check_norm_scan
from gru_fast.ops_rules import (
    as_kernel,
    autocast_cuda,
    differentiate,
    eager,
    fake_gradients,
    unwatched,
)
from gru_fast.reference_norm import NORM_SLOTS

_ARGUMENTS = (
    "Tensor gates_x, Tensor h0, Tensor weight_hh, Tensor gamma_hh, Tensor? bias_hh, "
    "Tensor? lengths, Tensor? reset_mask, Tensor? reset_state, Tensor? h_scale"
)
_MODE = "float eps, bool[] reverse, bool recompute"

_lib: Any = torch.library.Library("gru_fast", "FRAGMENT")  # type: ignore[no-untyped-call]
_lib.define(
    f"norm_scan({_ARGUMENTS}, {_MODE}) -> "
    "(Tensor output, Tensor h_n, Tensor workspace, Tensor rstd)"
)
_lib.define(
    f"norm_scan_backward(Tensor? grad_output, Tensor? grad_h_n, {_ARGUMENTS}, Tensor output, "
    f"Tensor workspace, Tensor rstd, {_MODE}, bool[] output_mask) -> "
    "(Tensor grad_gates_x, Tensor grad_h0, Tensor grad_weight_hh, Tensor grad_gamma_hh, "
    "Tensor grad_bias_hh, Tensor grad_reset_state, Tensor grad_h_scale)"
)

norm_scan: Any = torch.ops.gru_fast.norm_scan.default
norm_scan_backward: Any = torch.ops.gru_fast.norm_scan_backward.default

_INPUTS = 9
# Differentiable inputs of norm_scan: position in its schema to position in output_mask.
_GRADS = {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 7: 5, 8: 6}


def _check(*args: Any) -> None:
    check_norm_scan(*args[:11])


def _check_backward(*args: Any) -> None:
    eps, reverse, recompute, output_mask = args[14:]
    _check(*args[2:11], eps, reverse)
    given: Any = (*args[:4], *args[11:14], recompute, output_mask)
    check_norm_backward(*given)


def _fake(*args: Any) -> tuple[Tensor, ...]:
    _check(*args)
    gates_x, h0, recompute = args[0], args[1], args[11]
    T, B = gates_x.shape[:2]
    G, _, H = h0.shape
    return (
        gates_x.new_empty(T, B, G * H),
        gates_x.new_empty(G, B, H),
        gates_x.new_empty((0,) if recompute else (T, B, G, NORM_SLOTS * H)),
        gates_x.new_empty((0,) if recompute else (T, B, G)),
    )


def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    _check_backward(*args)
    inputs, output_mask = args[2:11], args[17]
    return fake_gradients([inputs[i] for i in _GRADS], output_mask, args[3])


torch.library.register_fake("gru_fast::norm_scan", _fake, lib=_lib)
torch.library.register_fake("gru_fast::norm_scan_backward", _fake_backward, lib=_lib)


def _reference_kernel(
    name: str, check: Callable[..., None], first: int
) -> Callable[..., tuple[Tensor, ...]]:
    def check_all(*args: Any) -> None:
        check(*args)
        if args[first].is_cpu:
            check_length_values(args[first + 5], args[first].shape[0])

    return as_kernel(getattr(reference_norm, name), check_all, first)


def _cuda_kernel(
    name: str, check: Callable[..., None], first: int
) -> Callable[..., tuple[Tensor, ...]]:
    """The Triton kernel where it fits, else the reference."""
    fallback = _reference_kernel(name, check, first)

    def kernel(*args: Any) -> tuple[Tensor, ...]:
        gates_x, h0 = args[first : first + 2]
        if gates_x.dtype == torch.float64 or find_spec("triton") is None:
            return fallback(*args)
        kernels = importlib.import_module("gru_fast.kernels")
        plain = args[first + 5] is args[first + 6] is args[first + 8] is None
        if kernels.norm_why_not(gates_x.device, gates_x.dtype, h0.shape[2], plain) is not None:
            return fallback(*args)
        check(*args)
        function: Callable[..., tuple[Tensor, ...]] = getattr(kernels, name)
        return function(*args)

    return kernel


for _name, _checks, _first in (
    ("norm_scan", _check, 0),
    ("norm_scan_backward", _check_backward, 2),
):
    _spec = (_name, _checks, _first)
    torch.library.register_kernel(f"gru_fast::{_name}", "cuda", _cuda_kernel(*_spec), lib=_lib)
    if not ops.HAS_CPU_KERNELS:
        torch.library.register_kernel(
            f"gru_fast::{_name}", "cpu", _reference_kernel(*_spec), lib=_lib
        )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mode = inputs[_INPUTS:]
    ctx.mark_non_differentiable(output[2], output[3])
    ctx.save_for_backward(*inputs[:_INPUTS], unwatched(output[0]), output[2], output[3])


def _backward(
    ctx: Any, grad_output: Tensor | None, grad_h_n: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad
    result: list[Tensor | None] = [None] * len(needed)
    if grad_output is None and grad_h_n is None:
        return tuple(result)
    mask = [needed[i] for i in _GRADS]
    arguments = (grad_output, grad_h_n, *ctx.saved_tensors, *ctx.mode, mask)
    differentiated = torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()
    op = norm_scan_backward
    grads = op(*arguments) if differentiated else ops.without_grad(op, *arguments)
    for i, k in _GRADS.items():
        if needed[i]:
            result[i] = grads[k]
    return tuple(result)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.eps, ctx.reverse, _, ctx.output_mask = inputs[-4:]
    # Without workspace and rstd: derivatives pass through what they are made of.
    ctx.save_for_backward(*inputs[:12])


def _double_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    def gradients(*tensors: Any) -> tuple[Tensor, ...]:
        nothing = tensors[2].new_empty(0)
        given: Any = (*tensors, nothing, nothing, ctx.eps, ctx.reverse, True, ctx.output_mask)
        return reference_norm.norm_scan_backward(*given)

    return differentiate(gradients, ctx, grads)


torch.library.register_autograd("gru_fast::norm_scan", _backward, setup_context=_save, lib=_lib)
torch.library.register_autograd(
    "gru_fast::norm_scan_backward", _double_backward, setup_context=_save_backward, lib=_lib
)


eager_norm_scan = eager(
    f"{norm_scan.name()}.eager", partial(ops.without_grad, norm_scan), _save, _backward
)

# On the CPU nothing is registered, and float32 stays.
_lib.impl("norm_scan", autocast_cuda(norm_scan), "AutocastCUDA")

# Where the axis B is, of what differs per sequence.
_BATCH_AXIS = {0: 1, 1: 1, 5: 0, 6: 1, 7: 1, 8: 0}


def _batched(info: Any, in_dims: Sequence[Any], *args: Any) -> Any:
    """A batch over sequences is a larger B; over weights it is a loop."""
    size = info.batch_size
    weights = any(isinstance(d, int) for i, d in enumerate(in_dims) if i not in _BATCH_AXIS)
    if size == 0 or weights:
        return ops_vmap.loop(norm_scan, size, in_dims, args)
    folded = list(args)
    for i, axis in _BATCH_AXIS.items():
        if args[i] is not None:
            front = ops_vmap.front(args[i], in_dims[i], size)
            folded[i] = front.movedim(0, axis).flatten(axis, axis + 1)
    outputs = norm_scan(*folded)
    recompute = args[_INPUTS + 2]
    unfolded = [o.unflatten(1, (size, -1)) for o in (outputs[:2] if recompute else outputs)]
    return (*unfolded, *outputs[len(unfolded) :]), tuple(
        1 if k < len(unfolded) else None for k in range(4)
    )


def _batched_backward(info: Any, in_dims: Sequence[Any], *args: Any) -> Any:
    return ops_vmap.loop(norm_scan_backward, info.batch_size, in_dims, args)


torch.library.register_vmap("gru_fast::norm_scan", _batched, lib=_lib)
torch.library.register_vmap("gru_fast::norm_scan_backward", _batched_backward, lib=_lib)
