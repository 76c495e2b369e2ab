# SPDX-License-Identifier: Apache-2.0
"""Who can take a call, and why the others cannot: one table, one list of names, one error text."""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from gru_fast import cudnn, ops

NAMES = ("auto", "reference", "cpu", "triton", "cudnn")
"""Names that `backend=` accepts."""

KERNEL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""Dtypes that the ops take; others run on the reference."""

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Those of them with Triton kernels."""

HAS_TRITON = find_spec("triton") is not None
"""Whether Triton is installed; it is imported on first use only."""

AUTOCAST_DEVICES = ("cuda", "xpu", "mps")
"""Devices where autocast applies to a call: on the CPU it does not."""

_VMAP = torch._C._functorch.TransformType.Vmap
_GRAD = torch._C._functorch.TransformType.Grad


def only_vmap() -> bool:
    """Whether every live `torch.func` transform is `vmap`."""
    stack = torch._C._functorch.get_interpreter_stack()
    return stack is None or all(level.key() == _VMAP for level in stack)


# What torch.compiler.assume_constant_result sets: that function itself loads the whole compiler.
only_vmap._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _one_gradient() -> bool:
    levels = [level.key() for level in torch._C._functorch.get_interpreter_stack() or ()]
    return levels.count(_GRAD) == 1 and levels.count(_VMAP) == len(levels) - 1


def is_distributed(tensor: Tensor) -> bool:
    """Whether it is a DTensor: only PyTorch's own operations know how to run on its parts."""
    if type(tensor) is Tensor:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def needs_composition(steps: Tensor) -> bool:
    """Whether only plain PyTorch operations get a call with this input right.

    True of a DTensor, under forward-mode AD and under every `torch.func` transform but `vmap` and,
    in eager code, one gradient. Dynamo traces it, with guards of its own on both states.
    """
    if forward_ad._current_level >= 0 or is_distributed(steps):
        return True
    if not torch._C._are_functorch_transforms_active() or only_vmap():
        return False
    return torch.compiler.is_compiling() or not _one_gradient()


def counts_flops() -> bool:
    """Whether a `torch.utils.flop_counter.FlopCounterMode` is live.

    It knows PyTorch's own operations only and would count none of ours.
    """
    if torch.compiler.is_compiling() or not torch._C._len_torch_dispatch_stack():
        return False
    counter = sys.modules.get("torch.utils.flop_counter")
    return counter is not None and any(
        isinstance(getattr(mode, "counter", None), counter.FlopCounterMode)
        for mode in _get_current_dispatch_mode_stack()
    )


def dtype_of_call(device_type: str, dtype: torch.dtype) -> torch.dtype:
    """What a call with inputs of this dtype computes in: what autocast asks for, but on the CPU.

    Float64 stays, and so does what is no floating-point number.
    """
    if (
        device_type in AUTOCAST_DEVICES
        and dtype.is_floating_point
        and dtype != torch.float64
        and torch.is_autocast_enabled(device_type)
    ):
        return torch.get_autocast_dtype(device_type)
    return dtype


def why_not(
    device_type: str,
    dtype: torch.dtype,
    cell: str = "reset_after",
    *,
    lengths: bool = False,
    resets: bool = False,
    h_scale: bool = False,
    gates: bool = False,
    grouped: bool = False,
    empty: bool = False,
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
        gates: whether it returns the values of the gates.
        grouped: whether it is anything but one layer in one or both directions: a call of `scan`,
            other groups, a batch of layers under `torch.vmap`, one bias of two.
        empty: whether it has no step or no sequence.
        composed: whether `needs_composition()` holds for the input.

    Returns:
        Backend name to one sentence; "reference" takes every call and is never a key.
    """
    reasons: dict[str, str] = {}
    if composed:
        transform = (
            "forward-mode AD, a gradient of a gradient, or a compiled gradient of torch.func is "
            "live, or the input is a DTensor: only the reference has it"
        )
        return dict.fromkeys(("cpu", "triton", "cudnn"), transform)
    if device_type != "cpu":
        reasons["cpu"] = f"the input is on {device_type}"
    elif ops.NO_CPU_KERNELS is not None:
        reasons["cpu"] = ops.NO_CPU_KERNELS
    elif dtype not in KERNEL_DTYPES:
        reasons["cpu"] = f"there is no kernel for {dtype}"
    if device_type != "cuda":
        return reasons | dict.fromkeys(
            ("triton", "cudnn"), f"the input is on {device_type}, not on cuda"
        )
    if not HAS_TRITON:
        reasons["triton"] = "triton is not installed: pip install triton"
    elif dtype not in TRITON_DTYPES:
        reasons["triton"] = f"there is no kernel for {dtype}"
    cannot = {
        f"cell={cell!r}": cell != "reset_after",
        "lengths": lengths,
        "resets": resets,
        "recurrent dropout": h_scale,
        "the values of the gates": gates,
        "other groups than the directions of one layer": grouped,
        "calls without steps or sequences": empty,
        f"{dtype}": dtype not in KERNEL_DTYPES,
        f"{dtype} here": dtype == torch.bfloat16 and not cudnn.has_bfloat16(),
    }
    lacking = [what for what, asked in cannot.items() if asked]
    absent = cudnn.missing()
    if absent is not None:
        reasons["cudnn"] = absent
    elif lacking:
        reasons["cudnn"] = f"it does not have {lacking[0]}"
    return reasons


def available_backends() -> tuple[str, ...]:
    """Names of the backends that this installation and machine can run, best first."""
    found = []
    if torch.cuda.is_available():
        found += ["triton"] if HAS_TRITON else []
        found += ["cudnn"] if cudnn.missing() is None else []
    if ops.HAS_CPU_KERNELS:
        found.append("cpu")
    return (*found, "reference")


@cache
def _kernels() -> Any:
    """Imported on first use: what has to do with CUDA only."""
    return import_module("gru_fast.kernels")


def nothing_measured() -> bool:
    """Whether the table of what was measured on GPUs is empty."""
    return not _kernels().measured.POINTS


nothing_measured._dynamo_marked_constant = True  # type: ignore[attr-defined]


def why_cudnn(
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int],
    cell: str,
    training: bool,
) -> str | None:
    """Why "auto" gives a call to cuDNN that it can take; None: a Triton kernel was faster.

    Args:
        device: a CUDA device.
        dtype: of the input.
        sizes: T, B, G, H.
        cell: the kind of cell.
        training: whether a backward pass follows.
    """
    if nothing_measured():
        return "no Triton kernel has been measured on a GPU yet"
    if dtype not in TRITON_DTYPES or 0 in sizes:
        return None
    suite = "train" if training else "infer"
    reason: str | None = _kernels().why_cudnn(device, dtype, sizes, cell, suite)
    return reason


def _check_name(backend: str) -> None:
    if backend not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, NAMES))}, got {backend!r}")


def select(
    backend: str,
    device_type: str,
    dtype: torch.dtype,
    cell: str = "reset_after",
    *,
    lengths: bool = False,
    resets: bool = False,
    h_scale: bool = False,
    gates: bool = False,
    grouped: bool = False,
    empty: bool = False,
    composed: bool = False,
    prefer_cudnn: bool = True,
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
        gates: as in `why_not`.
        grouped: as in `why_not`.
        empty: as in `why_not`.
        composed: as in `why_not`.
        prefer_cudnn: whether "auto" takes cuDNN before Triton, see `why_cudnn`.

    Raises:
        ValueError: backend is not a known name.
        RuntimeError: a backend asked for by name cannot take the call.
    """
    _check_name(backend)
    if backend == "reference":
        return backend
    reasons = why_not(
        device_type,
        dtype,
        cell,
        lengths=lengths,
        resets=resets,
        h_scale=h_scale,
        gates=gates,
        grouped=grouped,
        empty=empty,
        composed=composed,
    )
    if backend == "auto":
        gpu = ("cudnn", "triton") if prefer_cudnn else ("triton", "cudnn")
        return next((n for n in (*gpu, "cpu") if n not in reasons), "reference")
    if backend in reasons:
        raise RuntimeError(f"backend={backend!r} cannot take this call: {reasons[backend]}")
    return backend


def norm_unfit(device: torch.device, dtype: torch.dtype, H: int, plain: bool) -> str | None:
    """Why the layer-normalised Triton kernel does not fit a call on this device; None if it does.

    Args:
        device: of the input; None is the answer for one that is not CUDA.
        dtype: of the input.
        H: hidden size.
        plain: whether the call has neither lengths nor resets nor h_scale.
    """
    if device.type != "cuda" or not HAS_TRITON or dtype not in TRITON_DTYPES:
        return None
    reason: str | None = _kernels().norm_why_not(device, dtype, H, plain)
    return reason


def why_not_norm(
    device_type: str, dtype: torch.dtype, *, unfit: str | None = None, composed: bool = False
) -> dict[str, str]:
    """`why_not` for a layer-normalised GRU.

    Args:
        device_type: as in `why_not`.
        dtype: as in `why_not`.
        unfit: what `norm_unfit` says.
        composed: whether `recurrence_norm.needs_composition()` holds for the input.
    """
    reasons = why_not(device_type, dtype, composed=composed)
    if device_type == "cuda" and not composed:
        reasons["cudnn"] = "it does not have layer normalisation"
        if unfit is not None:
            reasons.setdefault("triton", unfit)
    return reasons


def select_norm(
    backend: str,
    device_type: str,
    dtype: torch.dtype,
    *,
    unfit: str | None = None,
    composed: bool = False,
) -> str:
    """The backend that takes a call of a layer-normalised GRU.

    Args:
        backend: one of `NAMES`.
        device_type: as in `why_not_norm`.
        dtype: as in `why_not_norm`.
        unfit: as in `why_not_norm`.
        composed: as in `why_not_norm`.

    Raises:
        ValueError: as `select`.
        RuntimeError: as `select`.
    """
    _check_name(backend)
    reasons = why_not_norm(device_type, dtype, unfit=unfit, composed=composed)
    if backend == "auto":
        return next((n for n in ("triton", "cpu") if n not in reasons), "reference")
    if backend in reasons:
        raise RuntimeError(f"backend={backend!r} cannot take this call: {reasons[backend]}")
    return backend
