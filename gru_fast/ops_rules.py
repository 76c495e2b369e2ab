# SPDX-License-Identifier: Apache-2.0
"""What PyTorch must know of an operator, as far as its schema does not matter.

Kernels made of a reference, the autograd function of plain calls, second derivatives, autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gru_fast.autocast import without_autocast

Op = Callable[..., tuple[Tensor, ...]]
Save = Callable[[Any, tuple[Any, ...], tuple[Tensor, ...]], None]


def owned(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What a kernel may return: contiguous tensors of its own.

    To autograd they must be no views either: it forbids to change such an output in place.
    """
    # The reference hands out one empty tensor for every gradient that is not wanted.
    whole = (out.contiguous() if out.numel() else out.clone() for out in outputs)
    view: Any = torch.ops.aten._unsafe_view
    return tuple(view(out, out.shape) if out._is_view() else out for out in whole)


def as_kernel(function: Op, check: Callable[..., None], first: int) -> Op:
    """A reference function as a kernel: checked, autocast off, outputs its own.

    Args:
        function: the reference.
        check: raises for arguments that do not fit.
        first: the position of an argument on the device that counts.
    """

    def kernel(*args: Any) -> tuple[Tensor, ...]:
        check(*args)
        with without_autocast(args[first].device.type):
            outputs = function(*args)
        return owned(outputs)

    return kernel


def fake_gradients(
    inputs: Sequence[Tensor | None], output_mask: Sequence[bool], like: Tensor
) -> tuple[Tensor, ...]:
    """Gradients without values: of the inputs' shapes where they are wanted, else empty."""
    return tuple(
        like.new_empty(t.shape if t is not None and wanted else (0,))
        for t, wanted in zip(inputs, output_mask, strict=True)
    )


def unwatched(output: Tensor, batch_sizes: Tensor | None = None) -> Tensor:
    """The output of a forward op as it is saved: that of a single step may be changed in place.

    Backward reads the outputs before the last step only, as the states that were multiplied. So
    for one step autograd need not watch it, and `h = cell(x, h); h[done] = 0` is as legal as with
    `torch.nn.GRUCell`. Packed rows come with their batch sizes, one for each step.
    """
    T = (output if batch_sizes is None else batch_sizes).shape[0]
    one = isinstance(T, int) and T == 1 and not torch._C._are_functorch_transforms_active()
    return output.data if one else output


def differentiate(
    function: Op, ctx: Any, grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Differentiate a backward op through the reference, which is right to any order.

    Args:
        function: the reference of the op, as a function of the tensors that `ctx` has saved.
        ctx: of the op's autograd formula, with the `output_mask` that the op was given.
        grads: the gradients of the op's outputs.
    """
    needed = ctx.needs_input_grad
    result: list[Tensor | None] = [None] * len(needed)
    tensors = ctx.saved_tensors
    active = [i for i, t in enumerate(tensors) if t is not None and needed[i]]
    live = [k for k, g in enumerate(grads) if g is not None and ctx.output_mask[k]]
    if not active or not live:
        return tuple(result)

    def restricted(*inputs: Tensor) -> tuple[Tensor, ...]:
        arguments = list(tensors)
        for i, t in zip(active, inputs, strict=True):
            arguments[i] = t
        out = function(*arguments)
        return tuple(out[k] for k in live)

    with without_autocast(tensors[active[0]].device.type):
        pullback = torch.func.vjp(restricted, *[tensors[i] for i in active])[1]
        for i, g in zip(active, pullback(tuple(grads[k] for k in live)), strict=True):
            result[i] = g
    return tuple(result)


class _Eager(torch.autograd.Function):
    """What `register_autograd` does, less its bookkeeping, for calls that nothing transforms."""

    op: Op
    save: Save

    @classmethod
    def forward(cls, ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        """The op, with what backward needs saved."""
        output = cls.op(*args)
        cls.save(ctx, args, output)
        return output


def eager(name: str, op: Op, save: Save, backward: Callable[..., Any]) -> Op:
    """An op with its gradient, as one autograd function.

    Args:
        name: what the function is called in a graph.
        op: what is called, below autograd.
        save: keeps for `backward` what the op had and gave.
        backward: its gradient.
    """
    parts: dict[str, Any] = {"op": op, "save": save, "backward": backward}
    methods = {key: staticmethod(part) for key, part in parts.items()}
    function: Any = type(name, (_Eager,), methods)
    return function.apply  # type: ignore[no-any-return]


def autocast_cuda(op: Op) -> Op:
    """The op for CUDA autocast: casts as those of matrix products are."""

    def cast(*args: Any) -> tuple[Tensor, ...]:
        dtype = torch.get_autocast_dtype("cuda")
        with torch.autocast("cuda", enabled=False):
            return op(
                *[
                    a.to(dtype)
                    if isinstance(a, Tensor) and a.is_floating_point() and a.dtype != torch.float64
                    else a
                    for a in args
                ]
            )

    return cast
