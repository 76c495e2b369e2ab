# SPDX-License-Identifier: Apache-2.0
"""Sampling and streaming on the CPU with weights that were packed once: `Sampler`, `Stream`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, NoReturn, overload

import torch
from torch import Tensor

from gru_fast import packed, sampling
from gru_fast.gru import GRU
from gru_fast.recurrent import check_int
from gru_fast.sampled_model import LanguageModel, check_language_model
from gru_fast.sampling import GenerateOutput

if TYPE_CHECKING:
    from gru_fast._C import PackedStack

__all__ = ["Sampler", "Stream"]


def _no_pickle(given: object) -> str:
    name = type(given).__name__
    state = ", store its `state`" if isinstance(given, Stream) else ""
    return f"cannot pickle a {name}: pickle its model{state} and make a {name} where it is loaded"


def _no_array(x: Tensor) -> TypeError:
    """What to raise for a tensor that NumPy has nothing for, on another device for one."""
    layout = "" if x.layout == torch.strided else f" in {x.layout}"
    return TypeError(
        "x: expected a dense CPU tensor of float32, or of integers for tokens, got "
        f"{x.dtype}{layout} on {x.device}"
    )


class Sampler:
    """A snapshot of a language model's weights, packed for generation on the CPU.

    `model.generate` packs the weights in every call; a sampler does it once. It does not see what
    happens to the model later: call `refresh()` after training goes on. Threads may share one,
    and copies share the packed weights. Pickle the model instead.

    Args:
        model: A `GRULanguageModel` on the CPU, float32 or narrower.
        weights: "float32"; "bfloat16", half the bytes; or "int8", a quarter, with one scale a row.
            States are carried and logits computed in float32; what enters a product is rounded
            as the weights are.
        threads: At most so many of torch's threads a call; 0: all of them.

    Raises:
        RuntimeError: The kernels cannot take the model; the text says why.
        TypeError: `model` is no language model, or `threads` not an int.
        ValueError: `weights` is unknown; int8 with NaN or infinity among the weights, or NaN in a
            bias; or `threads` is negative.

    Example:
        >>> sampler = Sampler(model, weights="int8")
        >>> tokens = sampler.generate(max_new_tokens=100, num_return_sequences=64, seed=1)
    """

    def __init__(self, model: LanguageModel, weights: str = "float32", *, threads: int = 0) -> None:
        """See the class."""
        check_language_model(model)
        check_int("threads", threads)
        if threads < 0:
            raise ValueError(f"threads: expected at least 0, got {threads}")
        self._model, self._weights, self._threads = model, weights, min(threads, 2**31 - 1)
        self.refresh()

    def refresh(self) -> None:
        """Take the model's weights as they are now; calls that are running keep the old ones."""
        model = self._model
        stack = packed.pack_model(model, self._weights)
        # What a call asks of the model: it may be elsewhere by then.
        weight = model.head.weight.detach().new_empty(0)
        self._shape: Any = SimpleNamespace(
            vocab_size=model.vocab_size,
            start=model.start,
            gru=SimpleNamespace(parameters=lambda: iter((weight,))),
            head=SimpleNamespace(weight=weight),
        )
        self._stack = stack

    def __copy__(self) -> Sampler:
        """Another sampler of the same model and snapshot."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Sampler:
        """The same of a copy of the model. The snapshot, which never changes, is shared."""
        twin = copy.copy(self)
        twin._model = copy.deepcopy(self._model, memo)
        return twin

    def __reduce__(self) -> NoReturn:
        """Refuse: packed weights are laid out for the processor that runs."""
        raise TypeError(_no_pickle(self))

    @property
    def kernel(self) -> str:
        """Name of the instruction set that serves it."""
        return self._stack.kernel

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights and the token table."""
        return self._stack.nbytes

    @overload
    def generate(
        self,
        input_ids: Tensor | Sequence[int] | Sequence[Sequence[int]] | None = None,
        *,
        return_dict_in_generate: Literal[False] = False,
        **options: Any,
    ) -> Tensor: ...

    @overload
    def generate(
        self,
        input_ids: Tensor | Sequence[int] | Sequence[Sequence[int]] | None = None,
        *,
        return_dict_in_generate: Literal[True],
        **options: Any,
    ) -> GenerateOutput: ...

    def generate(
        self,
        input_ids: Tensor | Sequence[int] | Sequence[Sequence[int]] | None = None,
        **options: Any,
    ) -> Tensor | GenerateOutput:
        """`GRULanguageModel.generate` with the packed weights.

        With float32 weights the same seed gives the same tokens as `model.generate`.

        Raises:
            ValueError: As `GRULanguageModel.generate`.
            TypeError: As `GRULanguageModel.generate`.
        """
        loop = partial(sampling.native_loop, stack=self._stack, threads=self._threads)
        return sampling.generate(self._shape, input_ids, loop=loop, **options)


class Stream:
    """One sequence that is fed from outside, one input at a time or several.

    Keeps the state between calls and a snapshot of the weights. Steps allocate nothing; `push`
    only its result. One thread at a time may use a stream, any number of streams may run. A copy
    goes on from the same state by itself, with the same packed weights; `state` can be stored.

    Args:
        model: A `gru_fast.GRU`: inputs are frames (I,), outputs the last layer's state (H,).
            A `GRULanguageModel`: inputs are token ids, V for the zero vector, outputs logits (V,).
            A `Sampler`: as its model, sharing its snapshot.
        weights: As in `Sampler`, float32 by default; None for a `Sampler`, which has its own.

    Attributes:
        output: The tensor that `step` writes and returns.

    Raises:
        RuntimeError: The kernels cannot take the model; the text says why.
        TypeError: `model` is none of these (`gru_fast.convert` makes a `gru_fast.GRU` of a
            `torch.nn.GRU`).
        ValueError: `weights` is unknown, or given with a `Sampler`.

    Example:
        >>> stream = Stream(gru_fast.GRU(40, 128), weights="int8")
        >>> state = stream.step(torch.zeros(40))
    """

    def __init__(self, model: GRU | LanguageModel | Sampler, weights: str | None = None) -> None:
        """See the class."""
        if isinstance(model, Sampler):
            if weights is not None:
                raise ValueError(f"weights: expected None with a Sampler, got {weights!r}")
            stack = model._stack
        elif isinstance(model, GRU):
            stack = packed.pack(model, "float32" if weights is None else weights)
        else:
            check_language_model(model, ", a Sampler or a gru_fast.GRU")
            stack = packed.pack_model(model, "float32" if weights is None else weights)
        self._begin(stack)

    def _begin(self, stack: PackedStack) -> None:
        self._stack, self._native = stack, packed.stream(stack)
        self._step = self._native.step
        self.output: Tensor = torch.from_numpy(self._native.output)

    def __copy__(self) -> Stream:
        """A stream with the same snapshot that goes on from the same state, apart from this one.

        Raises:
            RuntimeError: Another thread is using the stream.
        """
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._begin(self._stack)
        twin.state = self.state
        twin.output.copy_(self.output)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Stream:
        """As `copy.copy`: the snapshot, which never changes, is shared."""
        return copy.copy(self)

    def __reduce__(self) -> NoReturn:
        """Refuse: packed weights are laid out for the processor that runs."""
        raise TypeError(_no_pickle(self))

    def step(self, x: Any) -> Tensor:
        """Feed one input; returns `output`, which the next step overwrites.

        Args:
            x: A frame (I,) of float32, tensor or array; or a token id.

        Raises:
            ValueError: The shape does not fit, the id is outside 0 ... V, or a frame for int8
                weights holds NaN or infinity.
            TypeError: The frame is not of float32, or the id not an integer.
            RuntimeError: Another thread is using the stream.
        """
        # detach() costs as much as a small step.
        if isinstance(x, Tensor):
            try:
                x = x.detach().numpy() if x.requires_grad else x.numpy()
            except TypeError:
                raise _no_array(x) from None
        self._step(x)
        return self.output

    def push(self, x: Any) -> Tensor:
        """Feed n inputs in one call; bitwise what n steps give.

        Args:
            x: Frames (n, I) of float32, or n token ids; a tensor, an array or a list.

        Returns:
            (n, H) or (n, V) outputs, a new tensor.

        Raises:
            ValueError: The shape does not fit, an id is outside 0 ... V, or frames for int8
                weights hold NaN or infinity.
            TypeError: The frames are not of float32, or the ids not integers.
            RuntimeError: Another thread is using the stream.
            KeyboardInterrupt: Within a tenth of a second of the signal; the state is as before.
        """
        if isinstance(x, Tensor):
            try:
                x = x.detach().numpy()
            except TypeError:
                raise _no_array(x) from None
        return torch.from_numpy(self._native.push(x))

    def reset(self) -> None:
        """Make the state zero."""
        self._native.reset()

    @property
    def state(self) -> bytes:
        """The state (L, H) as float32 in the machine's byte order; may be set, to any bytes-like.

        Raises:
            TypeError: What it is set to is not bytes-like.
            ValueError: Another number of bytes; with int8 weights also values outside [-1, 1].
        """
        state: bytes = self._native.state
        return state

    @state.setter
    def state(self, value: bytes) -> None:
        self._native.state = bytes(memoryview(value))
