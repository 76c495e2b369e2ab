# SPDX-License-Identifier: Apache-2.0
"""The operators `torch.ops.gru_fast.*`: the schema, and what PyTorch must know to transform a call.

`layer` is one GRU layer of G independent groups, `scan` the same recurrence over inputs that are
already projected, `*_backward` their gradients. Shapes and semantics are those of `reference`,
which also stands in where no kernel is: the CPU kernels are registered by the compiled module
`gru_fast._C`, CUDA calls go to `gru_fast.kernels`. The batching rules are in `ops_vmap`.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gru_fast import ops_vmap, reference
from gru_fast.checks import check_backward, check_layer, check_length_values, check_scan
from gru_fast.ops_past import are_plain_cuda, is_not_compiled, is_unobserved
from gru_fast.ops_rules import (
    as_kernel,
    autocast_cuda,
    differentiate,
    eager,
    fake_gradients,
    unwatched,
)
from gru_fast.ops_vmap import DIFFERENTIABLE
from gru_fast.reference import SLOTS

_OPTIONAL = "Tensor? lengths, Tensor? reset_mask, Tensor? reset_state, Tensor? h_scale"
_LAYER = (
    "Tensor x, Tensor h0, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, "
    + _OPTIONAL
)
_SCAN = "Tensor gates_x, Tensor h0, Tensor weight_hh, Tensor? bias_hh, " + _OPTIONAL
_MODE = "str cell, bool[] reverse, bool recompute"
_GRADS = "Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_workspace"

_lib: Any = torch.library.Library("gru_fast", "DEF")  # type: ignore[no-untyped-call]
_lib.define(f"layer({_LAYER}, {_MODE}) -> (Tensor output, Tensor h_n, Tensor workspace)")
_lib.define(f"scan({_SCAN}, {_MODE}) -> (Tensor output, Tensor h_n, Tensor workspace)")
_lib.define(
    f"layer_backward({_GRADS}, {_LAYER}, Tensor output, Tensor workspace, {_MODE}, "
    "bool[] output_mask) -> (Tensor grad_x, Tensor grad_h0, Tensor grad_weight_ih, "
    "Tensor grad_weight_hh, Tensor grad_bias_ih, Tensor grad_bias_hh, Tensor grad_reset_state, "
    "Tensor grad_h_scale)"
)
_lib.define(
    f"scan_backward({_GRADS}, {_SCAN}, Tensor output, Tensor workspace, {_MODE}, "
    "bool[] output_mask) -> (Tensor grad_gates_x, Tensor grad_h0, Tensor grad_weight_hh, "
    "Tensor grad_bias_hh, Tensor grad_reset_state, Tensor grad_h_scale)"
)


def _why_no_cpu_kernels(error: ImportError) -> str:
    """What the user can do about a compiled module that is not there, or cannot be loaded."""
    if find_spec("gru_fast._C") is not None:
        return f"gru_fast._C cannot be loaded ({error}): install gru_fast again beside this PyTorch"
    folder = Path(__file__).parents[1]
    if (folder / "csrc").is_dir():
        return (
            f"gru_fast was imported from its sources in {folder}, where nothing is compiled: start "
            "Python in another folder, or install with pip install -e ."
        )
    return (
        "gru_fast was built with GRU_FAST_SKIP_CPU_KERNELS=1, without compiled kernels: install it "
        "again without that variable"
    )


NO_CPU_KERNELS: str | None = None
"""Why there are no compiled kernels; None where they are."""
try:
    from gru_fast import _C  # noqa: F401
except ImportError as _error:
    NO_CPU_KERNELS = _why_no_cpu_kernels(_error)
HAS_CPU_KERNELS = NO_CPU_KERNELS is None

layer: Any = torch.ops.gru_fast.layer.default
scan: Any = torch.ops.gru_fast.scan.default
layer_backward: Any = torch.ops.gru_fast.layer_backward.default
scan_backward: Any = torch.ops.gru_fast.scan_backward.default


def _backward_check(check: Callable[..., None], gradients: int) -> Callable[..., None]:
    def check_all(*args: Any) -> None:
        *forward, output, workspace, cell, reverse, recompute, output_mask = args[3:]
        check(*forward, cell, reverse)
        x, h0 = forward[0], forward[1]
        sizes = (x, h0, output, workspace, cell, recompute, output_mask, gradients)
        check_backward(args[0], args[1], args[2], *sizes)

    return check_all


_check_layer_backward = _backward_check(check_layer, 8)
_check_scan_backward = _backward_check(check_scan, 6)


def _fake_forward(
    steps: Tensor, h0: Tensor, cell: str, recompute: bool
) -> tuple[Tensor, Tensor, Tensor]:
    T, B = steps.shape[:2]
    G, _, H = h0.shape
    workspace = (0,) if recompute else (T, B, G, SLOTS[cell] * H)
    return (
        steps.new_empty(T, B, G * H),
        steps.new_empty(G, B, H),
        steps.new_empty(workspace),
    )


def _layer_fake(*args: Any) -> tuple[Tensor, ...]:
    check_layer(*args[:12])
    return _fake_forward(args[0], args[1], args[10], args[12])


def _scan_fake(*args: Any) -> tuple[Tensor, ...]:
    check_scan(*args[:10])
    return _fake_forward(args[0], args[1], args[8], args[10])


def _layer_backward_fake(*args: Any) -> tuple[Tensor, ...]:
    _check_layer_backward(*args)
    return fake_gradients([args[3 + i] for i in DIFFERENTIABLE["layer"]], args[18], args[4])


def _scan_backward_fake(*args: Any) -> tuple[Tensor, ...]:
    _check_scan_backward(*args)
    return fake_gradients([args[3 + i] for i in DIFFERENTIABLE["scan"]], args[16], args[4])


for _name, _fake in (
    ("layer", _layer_fake),
    ("scan", _scan_fake),
    ("layer_backward", _layer_backward_fake),
    ("scan_backward", _scan_backward_fake),
):
    torch.library.register_fake(f"gru_fast::{_name}", _fake, lib=_lib)


_warned = False


def _warn_once() -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"gru_fast runs on its slow PyTorch reference. {NO_CPU_KERNELS}.",
            RuntimeWarning,
            stacklevel=3,
        )


_CHECKS: dict[str, Callable[..., None]] = {
    "layer": lambda *args: check_layer(*args[:12]),
    "scan": lambda *args: check_scan(*args[:10]),
    "layer_backward": _check_layer_backward,
    "scan_backward": _check_scan_backward,
}
# Positions of x or gates_x and of lengths.
_PLACES = {"layer": (0, 6), "scan": (0, 4), "layer_backward": (3, 9), "scan_backward": (3, 7)}


def _reference_kernel(name: str) -> Callable[..., tuple[Tensor, ...]]:
    return as_kernel(getattr(reference, name), _CHECKS[name], _PLACES[name][0])


def _cpu_fallback(name: str) -> Callable[..., tuple[Tensor, ...]]:
    first, lengths = _PLACES[name]

    def check(*args: Any) -> None:
        _warn_once()
        _CHECKS[name](*args)
        check_length_values(args[lengths], args[first].shape[0])

    return as_kernel(getattr(reference, name), check, first)


cuda_functions: dict[str, Callable[..., tuple[Tensor, ...]]] = {}
"""By the op's name, what serves CUDA tensors, past the dispatcher too; the first call finds it.

What is put here before, as by the benchmarks, which hold every call to one kernel, stays.
"""


def _cuda_function(name: str) -> Callable[..., tuple[Tensor, ...]]:
    found = cuda_functions.get(name)
    if found is None:
        found = _reference_kernel(name)
        if find_spec("triton") is not None:
            found = getattr(importlib.import_module("gru_fast.kernels"), name)
        cuda_functions[name] = found
    return found


def _cuda_kernel(name: str, checked: bool = True) -> Callable[..., tuple[Tensor, ...]]:
    fallback, first = _reference_kernel(name), _PLACES[name][0]

    def kernel(*args: Any) -> tuple[Tensor, ...]:
        if args[first].dtype == torch.float64:
            return fallback(*args)
        if checked:
            _CHECKS[name](*args)
        return _cuda_function(name)(*args)

    return kernel


_cuda_kernels: dict[Any, Callable[..., tuple[Tensor, ...]]] = {}
"""By the op: what the dispatcher calls for CUDA tensors, and `without_grad` past it."""

for _name in _CHECKS:
    _kernel = _cuda_kernel(_name)
    torch.library.register_kernel(f"gru_fast::{_name}", "cuda", _kernel, lib=_lib)
    _cuda_kernels[getattr(torch.ops.gru_fast, _name).default] = _kernel
    if not HAS_CPU_KERNELS:
        torch.library.register_kernel(f"gru_fast::{_name}", "cpu", _cpu_fallback(_name), lib=_lib)


_BelowAutograd: type = torch._C._AutoDispatchBelowAutograd


def without_grad(op: Any, *args: Any) -> tuple[Tensor, ...]:
    """The op past its autograd formula, where nothing is to be differentiated.

    The formula's own wrapper costs as much as a small call even then, and so does the dispatcher
    on the way to a kernel in Python, which is that of CUDA tensors.
    """
    outputs: tuple[Tensor, ...]
    if torch.compiler.is_compiling():
        outputs = op(*args)
    else:
        kernel: Any = _cuda_kernels.get(op)
        if kernel is None or not (are_plain_cuda(args) and is_unobserved() and is_not_compiled()):
            kernel = op._op  # OpOverload.__call__, less its own frame
        with _BelowAutograd():
            outputs = kernel(*args)
    return outputs


_fitting_layer = _cuda_kernel("layer", checked=False)


def layer_of_fitting(*args: Any) -> tuple[Tensor, ...]:
    """`layer` past the dispatcher for who has made sure that it may be and that arguments fit."""
    with _BelowAutograd():
        return _fitting_layer(*args)


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep for `gradient_rule` what a forward op had and gave."""
    ctx.set_materialize_grads(False)
    ctx.cell, ctx.reverse, ctx.recompute = inputs[-3:]
    ctx.save_for_backward(*inputs[:-3], unwatched(output[0]), output[2])


def gradient_rule(
    op: Callable[..., tuple[Tensor, ...]], name: str
) -> Callable[..., tuple[Tensor | None, ...]]:
    """The gradient of "layer" or "scan" by a call of its backward op."""
    gradients = {position: k for k, position in enumerate(DIFFERENTIABLE[name])}

    def backward(
        ctx: Any, grad_output: Tensor | None, grad_h_n: Tensor | None, grad_ws: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad
        result: list[Tensor | None] = [None] * len(needed)
        if ctx.recompute:
            grad_ws = None
        if grad_output is None and grad_h_n is None and grad_ws is None:
            return tuple(result)
        arguments = (
            grad_output, grad_h_n, grad_ws, *ctx.saved_tensors, ctx.cell, ctx.reverse,
            ctx.recompute, [needed[i] for i in gradients],
        )  # fmt: skip
        past_formula = isinstance(op, torch._ops.OpOverload) and not (
            torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()
        )
        grads = without_grad(op, *arguments) if past_formula else op(*arguments)
        for i, k in gradients.items():
            if needed[i]:
                result[i] = grads[k]
        return tuple(result)

    return backward


def save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep for `double_backward_rule` what a backward op had."""
    ctx.set_materialize_grads(False)
    ctx.cell, ctx.reverse, ctx.recompute, ctx.output_mask = inputs[-4:]
    ctx.save_for_backward(*inputs[:-4])


def double_backward_rule(
    function: Callable[..., tuple[Tensor, ...]],
) -> Callable[..., tuple[Tensor | None, ...]]:
    """Differentiate a backward op through the reference, which is right to any order."""

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
            return function(*tensors, ctx.cell, ctx.reverse, ctx.recompute, ctx.output_mask)

        return differentiate(gradients, ctx, grads)

    return backward


_layer_gradient = gradient_rule(layer_backward, "layer")
_scan_gradient = gradient_rule(scan_backward, "scan")

eager_layer = eager(f"{layer.name()}.eager", partial(without_grad, layer), save, _layer_gradient)
eager_scan = eager(f"{scan.name()}.eager", partial(without_grad, scan), save, _scan_gradient)

torch.library.register_autograd("gru_fast::layer", _layer_gradient, setup_context=save, lib=_lib)
torch.library.register_autograd("gru_fast::scan", _scan_gradient, setup_context=save, lib=_lib)
for _name in ("layer_backward", "scan_backward"):
    torch.library.register_autograd(
        f"gru_fast::{_name}",
        double_backward_rule(getattr(reference, _name)),
        setup_context=save_backward,
        lib=_lib,
    )


# On the CPU nothing is registered, and float32 stays.
for _name, _op in (("layer", layer), ("scan", scan)):
    _lib.impl(_name, autocast_cuda(_op), "AutocastCUDA")

ops_vmap.register(_lib)
