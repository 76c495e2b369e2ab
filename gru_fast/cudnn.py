# SPDX-License-Identifier: Apache-2.0
"""cuDNN's GRU through PyTorch's own operator, and the one block in which it reads its weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

_GRU = 3
"""cuDNN's number for this kind of layer."""

_BFLOAT16_SINCE = 91300
"""The version of cuDNN whose recurrent layers have bfloat16, on devices from sm_80 on."""

ALIGNMENT = 16
"""Bytes; PyTorch's own block has more, a part of somebody's buffer may have less."""


def missing() -> str | None:
    """Why this PyTorch does not call cuDNN; None if it does."""
    if torch.version.hip is not None:
        return "PyTorch for AMD devices does not have it"
    if torch.version.cuda is not None and not torch.backends.cudnn.is_available():  # type: ignore[no-untyped-call]
        return "this PyTorch was built without it"
    if not torch.backends.cudnn.enabled:
        return "torch.backends.cudnn.enabled is False"
    return None


def has_bfloat16() -> bool:
    """Whether its recurrent layers take bfloat16 on the current device, where there is one."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return True
    return _has_bfloat16(torch.cuda.current_device())


@cache
def _has_bfloat16(device: int) -> bool:
    version = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    enough = version is not None and version >= _BFLOAT16_SINCE
    return enough and torch.cuda.get_device_capability(device) >= (8, 0)


# What torch.compiler.assume_constant_result sets: that function itself loads the whole compiler.
missing._dynamo_marked_constant = True  # type: ignore[attr-defined]
has_bfloat16._dynamo_marked_constant = True  # type: ignore[attr-defined]


def layer(
    x: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    training: bool,
) -> tuple[Tensor, Tensor]:
    """A layer in one or both directions; training also in `eval()`, where backward may follow.

    Args:
        x: as in `recurrence.layer`, like the tensors after it.
        h0: (G, B, H), G 1 or 2, copied unless it is contiguous: PyTorch's operator refuses others.
        weight_ih: (G, 3H, I).
        weight_hh: (G, 3H, H).
        bias_ih: (G, 3H) or None.
        bias_hh: (G, 3H) or None, as bias_ih.
        training: whether a backward pass follows.

    Returns:
        output (T, B, G*H) and h_n (G, B, H).
    """
    every = (weight_ih, weight_hh, bias_ih, bias_hh)
    parts = [t.unbind(0) for t in every if t is not None]
    weights = [t for group in zip(*parts, strict=True) for t in group]
    return run(x, h0, weights, len(parts), training)


def run(
    x: Tensor, h0: Tensor, weights: list[Tensor], per_direction: int, training: bool
) -> tuple[Tensor, Tensor]:
    """`layer` of weights as `torch.nn.GRU` has them, one direction after the other."""
    both = len(weights) == 2 * per_direction
    output, h_n, *_ = torch._cudnn_rnn(
        x,
        weights,
        per_direction,
        _weights_in_one_block(weights, per_direction, both),
        h0.contiguous(),
        None,
        _GRU,
        weights[1].shape[1],
        0,
        1,
        False,
        0.0,
        training,
        both,
        [],
        None,
    )
    return output, h_n


def flatten(weights: Sequence[Tensor]) -> None:
    """Lay the weights of a layer in one direction out in one block: they point there afterwards.

    Nothing happens where they lie so already, off CUDA, or where cuDNN does not take them.
    """
    first = weights[0]
    if not all(w.is_cuda for w in weights) or block_of(weights) is not None:
        return
    if len({(w.dtype, w.device) for w in weights}) > 1:
        return
    if len({w.data_ptr() for w in weights}) != len(weights):  # tied
        return
    with torch.no_grad(), torch.cuda.device_of(first):  # type: ignore[no-untyped-call]
        acceptable = torch.backends.cudnn.is_acceptable(first)  # type: ignore[no-untyped-call]
        if acceptable and torch._use_cudnn_rnn_flatten_weight():
            _flatten(weights, len(weights), False)


def block_of(weights: Sequence[Tensor]) -> Tensor | None:
    """The weights as one tensor without gradient, if each begins where the one before it ends."""
    first = weights[0]
    end, size = first.data_ptr(), 0
    if end % ALIGNMENT:
        return None
    for weight in weights:
        if weight.data_ptr() != end or not weight.is_contiguous():
            return None
        end += weight.nbytes
        size += weight.numel()
    held = first.untyped_storage().nbytes() // first.element_size()
    if first.storage_offset() + size > held:
        return None
    return first.detach().as_strided((size,), (1,))


def _weights_in_one_block(
    weights: Sequence[Tensor], per_direction: int, both: bool
) -> Tensor | None:
    """All weights as the one block that cuDNN reads: as `flatten` left them, or a copy.

    Without a block PyTorch makes the copy itself, and warns at each call. None where the tensors
    hold no data: under a compiler, or in a mode such as FakeTensorMode.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return None
    first = weights[0]
    if not first.is_cuda:
        return None
    I, H = first.shape[1], weights[1].shape[1]  # noqa: E741
    order, rest = _order(I, H, per_direction, both, first.dtype, first.device)
    if rest == 0 and order == tuple(range(len(weights))):
        block = block_of(weights)
        if block is not None:
            return block
    with torch.no_grad():
        if not order:
            # It points what it is given to the block: aliases, not the parameters.
            aliases = [w.new_empty(0).set_(w) for w in weights]  # type: ignore[call-overload]
            return _flatten(aliases, per_direction, both)
        parts = [weights[i].reshape(-1) for i in order]
        return torch.cat([*parts, first.new_zeros(rest)] if rest else parts)


@cache
def _order(
    I: int,  # noqa: E741
    H: int,
    per_direction: int,
    both: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[tuple[int, ...], int]:
    """In which order weights fill cuDNN's block, and how many numbers follow: its unused biases.

    Of PyTorch, which asks cuDNN more than a thousand questions for it: 0.4 ms. An empty order where
    the weights do not follow one another.
    """
    shapes = [(3 * H, I), (3 * H, H), (3 * H,), (3 * H,)][:per_direction] * (2 if both else 1)
    with torch.inference_mode(False), torch.no_grad():
        weights = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
        block = _flatten(weights, per_direction, both)
    order = sorted(range(len(weights)), key=lambda i: weights[i].storage_offset())
    end = 0
    for i in order:
        if weights[i].storage_offset() != end:
            return (), 0
        end += weights[i].numel()
    return tuple(order), block.numel() - end


def _flatten(weights: Sequence[Tensor], per_direction: int, both: bool) -> Tensor:
    I, H = weights[0].shape[1], weights[1].shape[1]  # noqa: E741
    block: Tensor = torch._cudnn_rnn_flatten_weight(
        list(weights), per_direction, I, _GRU, H, 0, 1, False, both
    )
    return block
