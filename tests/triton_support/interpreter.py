# SPDX-License-Identifier: Apache-2.0
"""What Triton's interpreter lacks: bfloat16, TF32, libdevice, programs side by side, bounds.

The interpreter does arithmetic on the raw bits of bfloat16, ignores `input_precision`, refuses
functions of libdevice, runs the programs of a launch one after the other, so that a barrier
between them never opens, and reads and writes wherever a pointer points. Import this
with TRITON_INTERPRET=1 set, before the kernels. Works on Triton 3.6 and 3.9.
"""

import inspect
import os
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as upstream

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1 before importing triton"

_Builder = upstream.InterpreterBuilder
_Handle = upstream.TensorHandle
_ORIGINAL = {
    name: getattr(_Builder, name)
    for name in ("cast_impl", "create_fp_to_fp", "binary_op", "unary_op", "create_dot")
}


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """Float32 to the bits of bfloat16, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    last = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + last) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def bfloat16_values(bits: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def rounded(values: np.ndarray, mantissa: int = 10) -> np.ndarray:
    """Float32 rounded to so many explicit bits of mantissa; TF32 has 10."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    dropped = np.uint32(23 - mantissa)
    last = (bits >> dropped) & np.uint32(1)
    half = (np.uint32(1) << (dropped - np.uint32(1))) - np.uint32(1)
    keep = ~((np.uint32(1) << dropped) - np.uint32(1))
    return ((bits + half + last) & keep).view(np.float32)


def _is_bfloat16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widen(handle: Any) -> Any:
    return _Handle(bfloat16_values(handle.data), tl.float32) if _is_bfloat16(handle) else handle


def _narrow(handle: Any) -> Any:
    return _Handle(bfloat16_bits(handle.data), tl.bfloat16)


def _cast(self: Any, source: Any, target: Any) -> Any:
    if _is_bfloat16(source):
        source = _widen(source)
        return source if target.scalar == tl.float32 else _cast(self, source, target)
    if target.scalar == tl.bfloat16:
        return _narrow(_ORIGINAL["cast_impl"](self, source, tl.float32))
    return _ORIGINAL["cast_impl"](self, source, target)


def _float_to_float(self: Any, source: Any, target: Any, rounding: Any) -> Any:
    if _is_bfloat16(source) or target.scalar == tl.bfloat16:
        return _cast(self, source, target)
    return _ORIGINAL["create_fp_to_fp"](self, source, target, rounding)


def _binary(self: Any, left: Any, right: Any, operation: Callable[..., Any]) -> Any:
    if not (_is_bfloat16(left) or _is_bfloat16(right)):
        return _ORIGINAL["binary_op"](self, left, right, operation)
    result = operation(_widen(left).data, _widen(right).data)
    if result.dtype == bool:
        return _Handle(result, tl.int1)
    return _narrow(_Handle(result, tl.float32))


def _unary(self: Any, operand: Any, operation: Callable[..., Any]) -> Any:
    result = _ORIGINAL["unary_op"](self, _widen(operand), operation)
    return _narrow(result) if _is_bfloat16(operand) else result


def _dot(self: Any, a: Any, b: Any, acc: Any, precision: Any, imprecise: Any) -> Any:
    name = str(precision).split(".")[-1].lower()
    a, b = _widen(a), _widen(b)
    if a.data.dtype != np.float32 or not name.startswith("tf32"):
        return _ORIGINAL["create_dot"](self, a, b, acc, precision, imprecise)
    a_high, b_high = rounded(a.data), rounded(b.data)
    product = a_high @ b_high
    if name == "tf32x3":
        a_low, b_low = rounded(a.data - a_high), rounded(b.data - b_high)
        product = a_low @ b_high + a_high @ b_low + product
    return _Handle((product + acc.data).astype(acc.data.dtype), acc.dtype.scalar)


_MENDED = dict(zip(_ORIGINAL, (_cast, _float_to_float, _binary, _unary, _dot), strict=True))


def install_numerics() -> None:
    """From now on bfloat16 and TF32 round as on a GPU."""
    for name, function in _MENDED.items():
        setattr(_Builder, name, function)


def install_tanh() -> None:
    """From now on libdevice's tanh is NumPy's, which kernels of other packages call."""

    def tanh(x: Any) -> Any:
        return tl.tensor(_Handle(np.tanh(x.handle.data), x.handle.dtype), x.type)

    tl.extra.cuda.libdevice.tanh = tanh


class _Extents:
    """Where the tensors of a launch lie; overlapping ones count as one."""

    def __init__(self, tensors: Iterable[Any]) -> None:
        spans = sorted(
            (t.data_ptr(), t.data_ptr() + _elements_spanned(t) * t.element_size())
            for t in tensors
            if hasattr(t, "data_ptr")
        )
        self.begins = np.array([begin for begin, _ in spans], np.uint64)
        self.ends = np.maximum.accumulate(np.array([end for _, end in spans], np.uint64))

    def check(self, pointers: Any, mask: Any) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses = pointers.data[mask.data.astype(bool)].astype(np.uint64)
        which = np.searchsorted(self.begins, addresses, "right").astype(np.int64) - 1
        outside = (which < 0) | (addresses + np.uint64(size) > self.ends[which])
        if bool(outside.any()):
            raise IndexError(f"{int(outside.sum())} addresses outside the tensors of the launch")


def _elements_spanned(tensor: Any) -> int:
    if tensor.numel() == 0:
        return 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in steps)


def install_bounds() -> None:
    """From now on a load or store outside the tensors of its launch is an error."""
    arguments = upstream.GridExecutor._init_args_hst
    load, store = _Builder.create_masked_load, _Builder.create_masked_store
    current: list[_Extents] = []

    def noted(self: Any, args: Any, kwargs: Any) -> Any:
        found = arguments(self, args, kwargs)
        current[:] = [_Extents((*found[0], *found[1].values()))]
        return found

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        current[0].check(pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        current[0].check(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    upstream.GridExecutor._init_args_hst = noted
    _Builder.create_masked_load, _Builder.create_masked_store = checked_load, checked_store


@contextmanager
def original_numerics() -> Iterator[None]:
    """The interpreter as it comes, for a test that watches whether it has been mended."""
    for name, function in _ORIGINAL.items():
        setattr(_Builder, name, function)
    try:
        yield
    finally:
        install_numerics()


class _Schedule:
    """Threads of which one runs; at each switch point a seeded draw says which goes on."""

    def __init__(self, programs: int, seed: int, limit: int) -> None:
        self.random = random.Random(seed)
        self.turns = [threading.Semaphore(0) for _ in range(programs)]
        self.alive = set(range(programs))
        self.error: BaseException | None = None
        self.left = limit

    def switch(self, me: int, finished: bool = False) -> None:
        self.left -= 1
        if finished:
            self.alive.discard(me)
        if self.left < 0 and self.error is None:
            self.error = RuntimeError("no progress: the programs of a grid wait for each other")
        if self.alive:
            following = self.random.choice(sorted(self.alive))
            if following != me or finished:
                self.turns[following].release()
                if not finished:
                    self.turns[me].acquire()
        if self.error is not None and not finished:
            raise self.error


_me = threading.local()
_SWITCH_AT = ("create_atomic_rmw", "create_atomic_cas", "create_masked_store")


@contextmanager
def concurrent_grid(seed: int = 0, limit: int = 100_000) -> Iterator[None]:
    """Run the programs of each launch interleaved, as the seed says; waiting in vain is an error.

    They switch before every store and around every atomic. Missing fences do not show, missing
    barriers and wrong counts of participants do.
    """
    running: list[_Schedule | None] = [None]
    before_call = upstream.GridExecutor.__call__
    before = {name: getattr(_Builder, name) for name in _SWITCH_AT}

    def switching(name: str) -> Callable[..., Any]:
        def operation(self: Any, *args: Any, **kwargs: Any) -> Any:
            schedule = running[0]
            if schedule is not None:
                schedule.switch(_me.program)
            result = before[name](self, *args, **kwargs)
            if schedule is not None and "atomic" in name:
                schedule.switch(_me.program)
            return result

        return operation

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        parameters = inspect.getfullargspec(self.fn)
        known = {*parameters.args, *parameters.kwonlyargs}
        if "counters_ptr" in known:
            assert kwargs.get("launch_cooperative_grid"), "programs that meet must run at once"
        kwargs = {name: value for name, value in kwargs.items() if name in known}
        host_args, host_kwargs = self._init_args_hst(args, kwargs)
        scope = upstream._patch_lang(self.fn)
        try:
            named = inspect.getcallargs(self.fn, *host_args, **host_kwargs)
            named = {
                name: value if name in self.constexprs else upstream._implicit_cvt(value)
                for name, value in named.items()
            }
            grid = self.grid(named) if callable(self.grid) else self.grid
            grid = tuple(grid) + (1,) * (3 - len(grid))
            upstream.interpreter_builder.set_grid_dim(*grid)
            places = list(np.ndindex(*grid))
            schedule = _Schedule(len(places), seed, limit)

            def program(number: int) -> None:
                _me.program, _me.place = number, places[number]
                schedule.turns[number].acquire()
                try:
                    if schedule.error is None:
                        self.fn(**named)
                except BaseException as raised:
                    schedule.error = schedule.error or raised
                finally:
                    schedule.switch(number, finished=True)

            threads = [
                threading.Thread(target=program, args=(number,), daemon=True)
                for number in range(len(places))
            ]
            for thread in threads:
                thread.start()
            running[0] = schedule
            schedule.turns[0].release()
            for thread in threads:
                thread.join()
            if schedule.error is not None:
                raise schedule.error
        finally:
            running[0] = None
            scope.restore()
        self._restore_args_dev(args, host_args, kwargs, host_kwargs)

    upstream.GridExecutor.__call__ = call
    _Builder.grid_idx = property(lambda self: _me.place, lambda self, value: None)
    for name in _SWITCH_AT:
        setattr(_Builder, name, switching(name))
    try:
        yield
    finally:
        upstream.GridExecutor.__call__ = before_call
        del _Builder.grid_idx
        for name, function in before.items():
            setattr(_Builder, name, function)
