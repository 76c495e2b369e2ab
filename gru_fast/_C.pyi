# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence
from typing import Any, Literal, overload

from numpy.typing import NDArray
from torch import Tensor

_Floats = NDArray[Any]
_Layer = tuple[_Floats | None, _Floats, _Floats | None, _Floats | None]

class PackedStack:
    def __init__(
        self,
        cell: str,
        weights: str,
        table: _Floats | None,
        layers: Sequence[_Layer],
        head_weight: _Floats | None,
        head_bias: _Floats | None,
        *,
        plain: bool = False,
    ) -> None: ...
    @property
    def kernel(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    def generate(
        self,
        *,
        inputs: NDArray[Any],
        input_begin: NDArray[Any],
        position: NDArray[Any],
        stream: NDArray[Any],
        limit: NDArray[Any],
        eos: Sequence[int],
        seed: int,
        do_sample: bool,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        min_p: float | None,
        h0: _Floats | None,
        log_probs: bool,
        threads: int,
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None, NDArray[Any]]: ...

class Stream:
    def __init__(self, stack: PackedStack) -> None: ...
    @property
    def output(self) -> NDArray[Any]: ...
    def step(self, input: Any) -> NDArray[Any]: ...
    def push(self, inputs: Any) -> NDArray[Any]: ...
    def reset(self) -> None: ...
    state: bytes

def draw(
    logits: NDArray[Any],
    seed: int,
    position: NDArray[Any],
    stream: NDArray[Any],
    *,
    do_sample: bool = True,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> tuple[NDArray[Any], NDArray[Any]]: ...
def cpu_isa() -> str: ...
def cpu_isas() -> list[str]: ...
def set_cpu_isa(name: str) -> None: ...
def multiplies_bfloat16() -> bool: ...
def launches() -> int: ...
def set_scratch_poison(on: bool) -> None: ...
def build_info() -> dict[str, object]: ...
def enable_direct(tensor: type, parameter: type, /) -> bool: ...
@overload
def run_direct(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    layers: int,
    bias: bool,
    bidirectional: bool,
    batch_first: bool,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset_mask: Tensor | None,
    num_heads: int,
    cell: str,
    saves: bool,
    /,
) -> tuple[Tensor, ...] | None: ...
@overload
def run_direct(
    input: Tensor,
    hx: Tensor,
    weights: Sequence[Tensor | None],
    layers: None,
    bias: Literal[True],
    bidirectional: Literal[False],
    batch_first: bool,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset_mask: Tensor | None,
    num_heads: int,
    cell: str,
    saves: Literal[False],
    /,
) -> Tensor | None: ...
@overload
def run_direct(
    input: Tensor,
    hx: Tensor,
    weights: Sequence[Tensor | None],
    layers: None,
    bias: Literal[True],
    bidirectional: Literal[False],
    batch_first: bool,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset_mask: Tensor | None,
    num_heads: int,
    cell: str,
    saves: Literal[True],
    /,
) -> tuple[Tensor, Tensor] | None: ...
def takes_direct(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor | None],
    layers: int | None,
    bias: bool,
    bidirectional: bool,
    batch_first: bool,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset_mask: Tensor | None,
    num_heads: int,
    cell: str,
    saves: bool,
    /,
) -> Literal[True] | None: ...
def run_direct_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    input: Tensor,
    hx: Tensor,
    weights: Sequence[Tensor | None],
    output: Tensor,
    workspace: Tensor,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset_mask: Tensor | None,
    num_heads: int,
    is_cell: bool,
    cell: str,
    wanted: Sequence[bool],
    /,
) -> tuple[Tensor | None, ...] | None: ...
def prepack(weight: Tensor, cell: str, recurrent: bool, num_heads: int, /) -> object | None: ...
def forget_packed() -> None: ...
