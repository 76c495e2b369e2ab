# SPDX-License-Identifier: Apache-2.0
"""Who can take a call, and why the others cannot: one table, one list of names, one error text."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

from gru_fast import ops

NAMES = ("auto", "reference", "cpu", "triton", "cudnn")
"""Names that `backend=` accepts."""

KERNEL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""Dtypes that the ops take; others run on the reference."""

_VMAP = torch._C._functorch.TransformType.Vmap


def _only_vmap() -> bool:
    stack = torch._C._functorch.get_interpreter_stack()
    return stack is None or all(level.key() == _VMAP for level in stack)


# What torch.compiler.assume_constant_result sets: that function itself loads the whole compiler.
_only_vmap._dynamo_marked_constant = True  # type: ignore[attr-defined]


def needs_composition() -> bool:
    """Whether a live transform is one that only plain PyTorch operations get right.

    True under forward-mode AD and under every `torch.func` transform but `vmap`. Dynamo traces it,
    with guards of its own on both states.
    """
    if forward_ad._current_level >= 0:
        return True
    return torch._C._are_functorch_transforms_active() and not _only_vmap()


def why_not(
    device_type: str,
    dtype: torch.dtype,
    cell: str = "reset_after",
    *,
    lengths: bool = False,
    resets: bool = False,
    h_scale: bool = False,
    composed: bool = False,
) -> dict[str, str]:
    """The backends that cannot take a call, with the reason of each.

    Args:
        device_type: of the input, for example "cpu".
        dtype: of the input.
        cell: the kind of cell.
        lengths: whether the call has lengths (a packed sequence has).
        resets: whether it has a reset_mask.
        h_scale: whether it has a recurrent dropout scale.
        composed: whether `needs_composition()` holds.

    Returns:
        Backend name to one sentence; "reference" takes every call and is never a key.
    """
    reasons: dict[str, str] = {}
    if composed:
        transform = "forward-mode AD or a torch.func transform is live: only the reference has it"
        return dict.fromkeys(("cpu", "triton", "cudnn"), transform)
    if device_type != "cpu":
        reasons["cpu"] = f"the input is on {device_type}"
    elif not ops.HAS_CPU_KERNELS:
        reasons["cpu"] = "gru_fast._C was not built (GRU_FAST_SKIP_CPU_KERNELS, or no compiler)"
    elif dtype not in KERNEL_DTYPES:
        reasons["cpu"] = f"there is no kernel for {dtype}"
    for name in ("triton", "cudnn"):
        if device_type != "cuda":
            reasons[name] = f"the input is on {device_type}, not on cuda"
        else:
            reasons[name] = "this version of gru_fast has no such kernel yet"
    return reasons


def available_backends() -> tuple[str, ...]:
    """Names of the backends that this installation and machine can run, best first."""
    found = []
    if ops.HAS_CPU_KERNELS:
        found.append("cpu")
    return (*found, "reference")


def select(
    backend: str,
    device_type: str,
    dtype: torch.dtype,
    cell: str = "reset_after",
    *,
    lengths: bool = False,
    resets: bool = False,
    h_scale: bool = False,
    composed: bool = False,
) -> str:
    """The backend that takes a call.

    Args:
        backend: one of `NAMES`; "auto" takes the best one that can.
        device_type: as in `why_not`.
        dtype: as in `why_not`.
        cell: as in `why_not`.
        lengths: as in `why_not`.
        resets: as in `why_not`.
        h_scale: as in `why_not`.
        composed: as in `why_not`.

    Raises:
        ValueError: backend is not a known name.
        RuntimeError: a backend asked for by name cannot take the call.
    """
    if backend not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, NAMES))}, got {backend!r}")
    if backend == "reference":
        return backend
    reasons = why_not(
        device_type,
        dtype,
        cell,
        lengths=lengths,
        resets=resets,
        h_scale=h_scale,
        composed=composed,
    )
    if backend == "auto":
        return next((n for n in ("triton", "cudnn", "cpu") if n not in reasons), "reference")
    if backend in reasons:
        raise RuntimeError(f"backend={backend!r} cannot take this call: {reasons[backend]}")
    return backend
