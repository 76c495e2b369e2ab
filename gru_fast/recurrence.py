# SPDX-License-Identifier: Apache-2.0
"""`layer` and `scan` as functions: the op where it is right, the reference composed elsewhere.

An eager call on CUDA looks at its sizes to choose between cuDNN and Triton. Nothing else does, so a
change of T or B does not recompile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gru_fast import backends, cudnn, ops, reference
from gru_fast.backends import KERNEL_DTYPES, counts_flops, needs_composition
from gru_fast.checks import check_layer, check_scan

FORWARD = (False,)
BOTH = (False, True)


def grouped(weights: Sequence[Tensor | None], directions: int) -> list[Tensor | None]:
    """Those of one direction after the other as `layer` takes them: each of all directions."""
    if directions == 1:
        return [None if weight is None else weight.unsqueeze(0) for weight in weights]
    half = len(weights) // 2
    pairs = zip(weights[:half], weights[half:], strict=True)
    return [None if a is None or b is None else torch.stack((a, b)) for a, b in pairs]


def _takes_ops(steps: Tensor, backend: str) -> bool:
    """Whether that is plain without looking further: the usual call on a CPU."""
    return (
        backend == "auto"
        and (steps.is_cpu or steps.is_meta)
        and steps.dtype in KERNEL_DTYPES
        and not needs_composition(steps)
        and not counts_flops()
    )


def _route(
    steps: Tensor, h0: Tensor, backend: str, cell: str, training: bool, **features: bool
) -> str:
    """What takes the call: "ops", "cudnn", or "reference" for it composed of plain operations."""
    if backend == "auto" and counts_flops():
        return "reference"
    prefer_cudnn = True
    dtype = backends.dtype_of_call(steps.device.type, steps.dtype)
    if backend == "auto" and steps.is_cuda:
        # Compiled code does not choose by T and B, which would compile it again for others.
        if torch.compiler.is_compiling():
            prefer_cudnn = backends.nothing_measured()
        else:
            sizes = (*steps.shape[:2], h0.shape[0], h0.shape[2])
            prefer_cudnn = (
                backends.why_cudnn(steps.device, dtype, sizes, cell, training) is not None
            )
    name = backends.select(
        backend,
        steps.device.type,
        dtype,
        cell,
        empty=_is_empty(steps),
        composed=needs_composition(steps),
        prefer_cudnn=prefer_cudnn,
        **features,
    )
    return _route_to(name)


def _is_empty(steps: Tensor) -> bool:
    """Whether a CUDA call has no step or no sequence; compiled code is not made for one."""
    return steps.is_cuda and not torch.compiler.is_compiling() and 0 in steps.shape[:2]


def _route_to(backend: str) -> str:
    return backend if backend in ("reference", "cudnn") else "ops"


def route_of_inference(x: Tensor, H: int, backend: str, cell: str) -> str:
    """`_route` of a plain layer in one direction on CUDA that `is_unobserved`, with H units."""
    prefer_cudnn = True
    if backend == "auto":
        sizes = (x.shape[0], x.shape[1], 1, H)
        prefer_cudnn = backends.why_cudnn(x.device, x.dtype, sizes, cell, False) is not None
    name = backends.select(
        backend, "cuda", x.dtype, cell, empty=_is_empty(x), prefer_cudnn=prefer_cudnn
    )
    return _route_to(name)


def _is_grouped(
    x: Tensor, bias_ih: Tensor | None, bias_hh: Tensor | None, reverse: Sequence[bool]
) -> bool:
    """Whether the call is anything but one layer in one or both directions."""
    return (
        x.dim() != 3
        or tuple(reverse) not in (FORWARD, BOTH)
        or (bias_ih is None) != (bias_hh is None)
        or torch._C._are_functorch_transforms_active()
    )


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a gradient of any of the tensors may be asked for."""
    if not torch.is_grad_enabled():
        return False
    return torch._C._are_functorch_transforms_active() or any(
        t is not None and t.requires_grad for t in tensors
    )


def _under_gradient() -> bool:
    """Whether a gradient of torch.func is taken that the ops themselves can be a part of."""
    return (
        torch._C._are_functorch_transforms_active()
        and not torch.compiler.is_compiling()
        and not backends.only_vmap()
    )


def is_plain(steps: Tensor) -> bool:
    """Whether nothing but autograd itself looks at the call: no compiler, transform or mode."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state()
        or (steps.is_cuda and torch.is_autocast_enabled("cuda"))
    )


def as_autocast(
    function: Callable[..., tuple[Any, ...]], tensors: Sequence[Tensor | None], *rest: Any
) -> tuple[Any, ...]:
    """A function under autocast's rules for the ops: tensors are cast on CUDA, not on the CPU."""
    first = tensors[0]
    assert first is not None
    device = first.device.type
    known = device == "cpu" or device in backends.AUTOCAST_DEVICES
    if not known or not torch.is_autocast_enabled(device):
        return function(*tensors, *rest)
    tensors = [t if t is None else t.to(backends.dtype_of_call(device, t.dtype)) for t in tensors]
    with torch.autocast(device, enabled=False):
        return function(*tensors, *rest)


def layer(
    x: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    reset_mask: Tensor | None = None,
    reset_state: Tensor | None = None,
    h_scale: Tensor | None = None,
    cell: str = "reset_after",
    reverse: Sequence[bool] = FORWARD,
    recompute: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One GRU layer of G independent groups; N is 3 gate rows, or 2 for no_reset.

    Args:
        x: (T, B, I), shared by all groups, or (T, B, G, I).
        h0: (G, B, H).
        weight_ih: (G, N*H, I).
        weight_hh: (G, N*H, H).
        bias_ih: (G, N*H) or None.
        bias_hh: (G, N*H) or None.
        lengths: (B,) int64 or int32, 0 <= length <= T.
        reset_mask: (T, B) bool, true where a new episode begins.
        reset_state: (G, B, H), the state an episode begins with; None means zeros.
        h_scale: (B, G*H), multiplies the state that enters the recurrent product.
        cell: "reset_after", "reset_before" or "no_reset".
        reverse: one flag per group.
        recompute: save inputs and output only, and rebuild the gates in backward.
        backend: a name of `gru_fast.backends.NAMES`.

    Returns:
        output (T, B, G*H) and h_n (G, B, H).

    Raises:
        RuntimeError: arguments that do not fit together, an unknown cell, or a named backend that
            cannot take them.
        ValueError: an unknown backend.

    Source: Cho et al. 2014, arXiv:1406.1078; the equations are in `gru_fast.reference`.
    """
    tensors = (
        x, h0, weight_ih, weight_hh, bias_ih, bias_hh, lengths, reset_mask, reset_state, h_scale,
    )  # fmt: skip
    output, h_n, *_ = _layer(tensors, cell, reverse, recompute, backend, False)
    return output, h_n


def layer_with_gates(
    *tensors: Tensor | None,
    lengths: Tensor | None = None,
    reset_mask: Tensor | None = None,
    reset_state: Tensor | None = None,
    h_scale: Tensor | None = None,
    cell: str = "reset_after",
    reverse: Sequence[bool] = FORWARD,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`layer` with the workspace (T, B, G, S*H) of `gru_fast.reference` as a third result."""
    given = (*tensors, None, None)[:6]  # without biases
    optional = (lengths, reset_mask, reset_state, h_scale)
    output, h_n, workspace = _layer((*given, *optional), cell, reverse, False, backend, True)
    return output, h_n, workspace


def _layer(
    tensors: Any,
    cell: str,
    reverse: Sequence[bool],
    recompute: bool,
    backend: str,
    gates: bool,
) -> Any:
    x, h0, weight_ih, weight_hh, bias_ih, bias_hh, *optional = tensors
    lengths, reset_mask, reset_state, h_scale = optional
    training = needs_grad(x, h0, weight_ih, weight_hh, bias_ih, bias_hh, reset_state, h_scale)
    route = "ops"
    if not _takes_ops(x, backend):
        route = _route(
            x,
            h0,
            backend,
            cell,
            training,
            lengths=lengths is not None,
            resets=reset_mask is not None,
            h_scale=h_scale is not None,
            gates=gates,
            grouped=_is_grouped(x, bias_ih, bias_hh, reverse),
        )
    if route != "ops":
        check: Callable[..., None] = check_layer
        check(*tensors, cell, reverse)
        if route == "cudnn":
            return as_autocast(cudnn.layer, tensors[:6], training)
        return as_autocast(reference.layer, tensors, cell, reverse, not gates)
    if _under_gradient():
        from gru_fast import ops_functions

        saves_nothing = (recompute or not training) and not gates
        return as_autocast(ops_functions.layer, tensors, cell, reverse, saves_nothing)
    if not training:
        return ops.without_grad(ops.layer, *tensors, cell, reverse, not gates)
    op = ops.eager_layer if is_plain(x) else ops.layer
    return op(*tensors, cell, reverse, recompute)


def scan(
    gates_x: Tensor,
    h0: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    reset_mask: Tensor | None = None,
    reset_state: Tensor | None = None,
    h_scale: Tensor | None = None,
    cell: str = "reset_after",
    reverse: Sequence[bool] = FORWARD,
    recompute: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The recurrence of `layer` over inputs that are already projected.

    Args:
        gates_x: (T, B, G, N*H), x @ weight_ih^T + bias_ih in the order of gates r, z, n.
        h0: as in `layer`.
        weight_hh: as in `layer`.
        bias_hh: as in `layer`.
        lengths: as in `layer`.
        reset_mask: as in `layer`.
        reset_state: as in `layer`.
        h_scale: as in `layer`.
        cell: as in `layer`.
        reverse: as in `layer`.
        recompute: as in `layer`.
        backend: as in `layer`.

    Returns:
        output (T, B, G*H) and h_n (G, B, H).

    Raises:
        RuntimeError: as `layer`.
        ValueError: as `layer`.
    """
    tensors = (gates_x, h0, weight_hh, bias_hh, lengths, reset_mask, reset_state, h_scale)
    training = needs_grad(gates_x, h0, weight_hh, bias_hh, reset_state, h_scale)
    route = "ops"
    if not _takes_ops(gates_x, backend):
        route = _route(
            gates_x,
            h0,
            backend,
            cell,
            training,
            lengths=lengths is not None,
            resets=reset_mask is not None,
            h_scale=h_scale is not None,
            grouped=True,
        )
    if route == "reference":
        check_scan(*tensors, cell, reverse)
        return as_autocast(reference.scan, tensors, cell, reverse, True)[:2]
    if _under_gradient():
        from gru_fast import ops_functions

        saves_nothing = recompute or not training
        return as_autocast(ops_functions.scan, tensors, cell, reverse, saves_nothing)[:2]
    if not training:
        output, h_n, _ = ops.without_grad(ops.scan, *tensors, cell, reverse, True)
    else:
        op = ops.eager_scan if is_plain(gates_x) else ops.scan
        output, h_n, _ = op(*tensors, cell, reverse, recompute)
    return output, h_n
