# SPDX-License-Identifier: Apache-2.0
"""Which calls go past the dispatcher, and what they would be without that."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import gru_fast
from gru_fast import direct

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
"""What goes past the dispatcher without gradients."""


def is_widened(dtype: torch.dtype) -> bool:
    """Whether it is computed in float32, on the instruction set that is chosen."""
    from gru_fast import _C

    return dtype is torch.float16 or (dtype is torch.bfloat16 and not _C.multiplies_bfloat16())


def trains(dtype: torch.dtype) -> bool:
    """Whether a call with gradients goes past the dispatcher."""
    return not is_widened(dtype)


class Spy:
    """Counts the calls that went past the dispatcher."""

    def __init__(self, native: Callable[..., Any]) -> None:
        self.native = native
        self.taken = 0

    def __call__(self, *args: Any) -> Any:
        results = self.native(*args)
        self.taken += results is not None
        return results


def outcome(call: Callable[[], Any]) -> tuple[Tensor, ...] | tuple[type[Exception], str]:
    """The results, or what is raised."""
    try:
        results = call()
    except Exception as error:
        return type(error), str(error)
    if not isinstance(results, tuple):
        return (results,)
    return tuple(r.data if isinstance(r, PackedSequence) else r for r in results)


def assert_same(given: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    for a, b in zip(given, expected, strict=True):
        if isinstance(b, Tensor):
            assert type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape
            assert a.is_contiguous() == b.is_contiguous() and a.is_inference() == b.is_inference()
            assert a.requires_grad == b.requires_grad
            assert torch.equal(a, b) or a.is_meta
        else:
            assert a == b


def assert_as_by_ops(call: Callable[[], Any]) -> None:
    given = outcome(call)
    with direct.turned_off():
        expected = outcome(call)
    assert_same(given, expected)


def assert_inferred_as_by_ops(module: nn.Module, *calls: Callable[[], Any]) -> None:
    """Calls of the module without gradients, outside of `prepacked` and within it."""
    for call in calls:
        assert_as_by_ops(call)
    with gru_fast.prepacked(module):
        for call in calls:
            assert_as_by_ops(call)


def profiled(call: Callable[[], Any]) -> Any:
    """The results of a call that somebody watches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        return call()


def leaves_of(module: nn.Module, *tensors: Tensor) -> list[Tensor]:
    return [t for t in (*tensors, *module.parameters()) if t.requires_grad]


def trained(
    call: Callable[[], Any], leaves: list[Tensor], used: tuple[int, ...] = (0, 1)
) -> list[Tensor | None]:
    """The results of a call and the gradients of leaves, of some of the results."""
    results = call()
    results = results if isinstance(results, tuple) else (results,)
    outputs = [results[i] for i in used if i < len(results)]
    generator = torch.Generator().manual_seed(3)
    grads = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
    return [*results, *torch.autograd.grad(outputs, leaves, grads, allow_unused=True)]


def assert_trained_as_by_ops(
    call: Callable[[], Any], leaves: list[Tensor], used: tuple[int, ...] = (0, 1)
) -> None:
    given = trained(call, leaves, used)
    with direct.turned_off():
        expected = trained(call, leaves, used)
    for a, b in zip(given, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert a.shape == b.shape and a.dtype == b.dtype
            assert a.requires_grad == b.requires_grad and type(a) is type(b)
            assert torch.equal(a, b)


def assert_twice_differentiated_as_by_ops(
    spy: Spy, call: Callable[[], Tensor], leaves: list[Tensor]
) -> None:
    """The second derivatives of the output that the call returns."""

    def twice() -> tuple[Tensor, ...]:
        first = torch.autograd.grad(call().square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)  # type: ignore

    before = spy.taken
    given = twice()
    assert spy.taken > before
    with direct.turned_off():
        expected = twice()
    for a, b in zip(given, expected, strict=True):
        torch.testing.assert_close(a, b)
