# SPDX-License-Identifier: Apache-2.0
"""When a call may go past the dispatcher: where no part of PyTorch would miss the operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_WATCHERS = ("_len_torch_dispatch_stack", "_len_torch_function_stack", "_get_tracing_state")

CAN_TELL = all(hasattr(torch._C, name) for name in _WATCHERS) and hasattr(
    torch.autograd, "_profiler_enabled"
)
"""Whether this PyTorch says what `is_unobserved` asks it."""

_frames: Any = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)
_callback: Any = getattr(_frames, "get_eval_frame_callback", None)

_PLAIN = (Tensor, nn.Parameter)
_OTHER = (type(None), str, bool, list, tuple)


def is_unobserved() -> bool:
    """Whether nothing would see that no operator was called.

    Dynamo never gets behind `is_compiling`, to which it knows the answer.
    """
    C: Any = torch._C
    return not (
        torch.compiler.is_compiling()
        or C._are_functorch_transforms_active()
        or C._len_torch_dispatch_stack()
        or C._len_torch_function_stack()
        or C._get_tracing_state()
        or torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
        or forward_ad._current_level >= 0
    )


def is_not_compiled() -> bool:
    """Whether Dynamo looks at no frame of this thread, as it does after a graph has broken.

    What `torch.library` registers it is told to leave alone, which takes time in each call.
    """
    return _callback is not None and _callback() is None


def are_plain_cuda(args: Sequence[Any]) -> bool:
    """Whether the dispatcher would hand arguments of an op to its CUDA kernel just as they are.

    It would not if one is of a subclass, on another device, has no memory of its own, is yet to be
    negated, or is to be cast by autocast.
    """
    for value in args:
        kind = type(value)
        if kind in _PLAIN:
            if (
                not value.is_cuda
                or value.layout is not torch.strided
                or value.is_nested
                or value.is_neg()
                or value._is_zerotensor()
            ):
                return False
        elif kind not in _OTHER:
            return False
    return CAN_TELL and not torch.is_autocast_enabled("cuda")
