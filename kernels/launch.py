# SPDX-License-Identifier: Apache-2.0
"""Launches of one kernel that differ in a few numbers only: Triton binds the arguments once.

Each launch through Triton binds some thirty keywords, looks at every argument to specialise the
kernel for it, and makes a key of what it found to look the binary up. Launches that follow one
another with the same tensors need that once: the next ones go to the binary itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from triton.compiler import CompiledKernel
from triton.runtime import driver

MOST = 2**31 - 1
"""A larger number is of another type to Triton, and the kernel another binary for it."""


class Launches:
    """A kernel with a grid and arguments, to be launched again and again within one call of ours.

    Only numbers change from launch to launch that the kernel is not specialised for, from -1 up to
    `MOST`; so the binary stays the one that Triton chose. The tensors stay the same, and
    with them their dtype and alignment. All goes to the stream that is current in that call.

    In the interpreter, and where a hook of the kernel is to see its arguments, Triton makes all
    launches. Hooks of the runtime are called by either way.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], *changing: str
    ) -> None:
        """Launch nothing yet.

        Args:
            kernel: A `triton.jit` function.
            grid: Programs on each axis.
            arguments: What stays the same, by the name of the parameter, and options of the launch.
            changing: Parameters that each launch is given, of those in `do_not_specialize`.
        """
        self._kernel = kernel
        self._grid = grid
        self._arguments = arguments
        self._changing = changing
        self._binaries: dict[tuple[Any, ...], CompiledKernel] = {}
        self._bound: dict[tuple[Any, ...], tuple[Callable[..., None], list[Any], int]] = {}
        self._places: list[int] = []

    def __call__(self, *numbers: int, **variant: Any) -> None:
        """Launch once.

        Args:
            numbers: The values of `changing`.
            variant: Compile-time parameters, the same names in each launch; each combination of
                their values is another binary.
        """
        key = tuple(variant.values())
        bound = self._bound.get(key)
        if bound is None or max(numbers) > MOST:
            bound = self._bind(key, numbers, variant)
            if bound is None:
                return
        launch, values, stream = bound
        for place, number in zip(self._places, numbers):  # noqa: B905, strict costs as much again
            values[place] = number
        launch(*values, stream=stream)

    def _bind(
        self, key: tuple[Any, ...], numbers: tuple[int, ...], variant: dict[str, Any]
    ) -> tuple[Callable[..., None], list[Any], int] | None:
        """What the second launch of a variant goes by; None of one that Triton has made instead."""
        kernel = self._kernel
        changed = dict(zip(self._changing, numbers, strict=True))
        given = {**self._arguments, **variant, **changed}
        if key not in self._binaries or max(numbers) > MOST:
            compiled = kernel[self._grid](**given)
            whole = isinstance(compiled, CompiledKernel) and max(numbers) <= MOST
            if whole and not kernel.pre_run_hooks:
                self._binaries[key] = compiled
            return None
        specialized = set(self._changing).difference(kernel.do_not_specialize)
        if specialized:
            raise ValueError(f"changing: expected names in do_not_specialize, got {specialized}")
        self._places = [kernel.arg_names.index(name) for name in self._changing]
        stream = driver.active.get_current_stream(driver.active.get_current_device())
        launch = self._binaries[key][(*self._grid, 1, 1)[:3]]
        self._bound[key] = launch, [given[name] for name in kernel.arg_names], stream
        return self._bound[key]
