# SPDX-License-Identifier: Apache-2.0
"""The operators `gru_fast::layer` and `gru_fast::scan` as nodes of ONNX's `GRU` operator.

Equations of ONNX: https://onnx.ai/onnx/operators/onnx__GRU.html. The gates are stored in the order
z, r, h there, and z has the sense of this library's. What the operator cannot say raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Optional, TypeAlias

import onnxscript
import torch
from onnxscript import opset18
from onnxscript.function_libs.torch_lib.registration import default_registry, torch_op

__all__ = ["register", "translation_table"]

if TYPE_CHECKING:
    Value: TypeAlias = Any
    Maybe: TypeAlias = Any
else:
    # onnxscript reads the annotations of what is registered, and knows no `Value | None`.
    from onnxscript.onnx_types import TensorType as Value

    Maybe = Optional[Value]  # noqa: UP045

_DIRECTIONS = {(False,): "forward", (True,): "reverse", (False, True): "bidirectional"}
_INT32, _BOOL = 6, 9  # of onnx.TensorProto
op: Any = opset18
# Its sigmoid is 1 in every float dtype, so a reset gate with this bias and no weights is always 1.
_OPEN = 50.0


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What `torch.onnx.export(..., custom_translation_table=)` takes for gru_fast's operators."""
    return {
        torch.ops.gru_fast.layer.default: layer,
        torch.ops.gru_fast.scan.default: scan,
    }


def register() -> None:
    """Make the table known to every `torch.onnx.export` of this process."""
    for name, function in (("gru_fast::layer", layer), ("gru_fast::scan", scan)):
        if name not in default_registry:
            torch_op(name, trace_only=True)(function)


class _Outputs(tuple[Value, ...]):
    """The outputs of a layer that ONNX has."""

    def __getitem__(self, index: Any) -> Any:
        if index == 2:
            raise ValueError(
                "return_gates: expected False, ONNX's GRU does not give the values of its gates"
            )
        return super().__getitem__(index)


def layer(
    x: Value,
    h0: Value,
    weight_ih: Value,
    weight_hh: Value,
    bias_ih: Maybe = None,
    bias_hh: Maybe = None,
    lengths: Maybe = None,
    reset_mask: Maybe = None,
    reset_state: Maybe = None,
    h_scale: Maybe = None,
    cell: str = "reset_after",
    reverse: Sequence[int] = (0,),
    recompute: bool = False,
) -> tuple[Value, Value]:
    """`gru_fast::layer`: one GRU node for one layer in one or both directions, else one a group.

    There is no third output, the workspace: that the graph uses it is an error.

    Raises:
        ValueError: The call has an `h_scale`, or a `reset_mask` and more than one step.
    """
    flags = tuple(bool(flag) for flag in reverse)
    if h_scale is not None:
        raise ValueError(
            "h_scale: expected None, ONNX's GRU cannot scale its state (recurrent dropout). "
            "Export the model in eval mode"
        )
    if reset_mask is not None:
        if x.shape[0] != 1:
            raise ValueError(
                "reset_mask: expected None for more than one step, ONNX's GRU cannot replace its "
                "state inside a sequence. Export the model with inputs of one step, T = 1"
            )
        h0 = _state_of_the_only_step(h0, lengths, reset_mask, reset_state, flags)
    tensors = (h0, weight_ih, weight_hh, bias_ih, bias_hh)
    if flags in _DIRECTIONS and len(x.shape) == 3:
        output, h_n = _node(x, tensors, lengths, cell, flags)
    else:
        outputs, finals = [], []
        for group, flag in enumerate(flags):
            own = [None if t is None else _slice(t, group, group + 1, 0) for t in tensors]
            own_x = x if len(x.shape) == 3 else op.Gather(x, _integers(group), axis=2)
            if len(x.shape) == 4:
                own_x = op.Squeeze(own_x, _integers(2))
            output, h_n = _node(own_x, own, lengths, cell, (flag,))
            outputs.append(output)
            finals.append(h_n)
        output, h_n = op.Concat(*outputs, axis=2), op.Concat(*finals, axis=0)
    return _Outputs((output, h_n))


def scan(
    gates_x: Value,
    h0: Value,
    weight_hh: Value,
    bias_hh: Maybe = None,
    lengths: Maybe = None,
    reset_mask: Maybe = None,
    reset_state: Maybe = None,
    h_scale: Maybe = None,
    cell: str = "reset_after",
    reverse: Sequence[int] = (0,),
    recompute: bool = False,
) -> tuple[Value, Value]:
    """`gru_fast::scan`: ONNX projects the input itself, here by an identity matrix.

    Raises:
        ValueError: As `layer`.
    """
    groups, rows, _ = weight_hh.shape
    square = op.ConstantOfShape(_integers(rows, rows))
    identity = op.CastLike(op.EyeLike(square), weight_hh)
    weight_ih = op.Expand(op.Unsqueeze(identity, _integers(0)), _integers(groups, rows, rows))
    return layer(
        gates_x, h0, weight_ih, weight_hh, None, bias_hh, lengths, reset_mask, reset_state,
        h_scale, cell, reverse, recompute,
    )  # fmt: skip


def _state_of_the_only_step(
    h0: Value, lengths: Maybe, reset_mask: Value, reset_state: Maybe, flags: Sequence[bool]
) -> Value:
    """What the mask (1, B) leaves of h0; a reverse direction would reset after its only step."""
    if lengths is not None:
        reset_mask = op.And(reset_mask, op.Greater(lengths, op.CastLike(_integers(0), lengths)))
    mask = op.Unsqueeze(reset_mask, _integers(2))
    if any(flags):
        forward = op.Cast(_integers(*(not flag for flag in flags)), to=_BOOL)
        mask = op.And(mask, op.Unsqueeze(forward, _integers(1, 2)))
    return op.Where(mask, _scalar(0.0, h0) if reset_state is None else reset_state, h0)


def _node(
    x: Value, tensors: Sequence[Value], lengths: Value, cell: str, reverse: Sequence[bool]
) -> tuple[Value, Value]:
    """One GRU node over x (T, B, I), and its outputs in the shapes of `gru_fast::layer`."""
    h0, weight_ih, weight_hh, bias_ih, bias_hh = tensors
    H = weight_hh.shape[2]
    biases = None
    if cell == "no_reset" or bias_ih is not None or bias_hh is not None:
        groups, rows, _ = weight_hh.shape
        zeros = op.Expand(_scalar(0.0, weight_hh), _integers(groups, rows))
        input_side = _gates(zeros if bias_ih is None else bias_ih, H, cell, _OPEN)
        biases = op.Concat(
            input_side, _gates(zeros if bias_hh is None else bias_hh, H, cell), axis=1
        )
    y, y_h = op.GRU(
        x,
        _gates(weight_ih, H, cell),
        _gates(weight_hh, H, cell),
        biases,
        None if lengths is None else op.Cast(lengths, to=_INT32),
        h0,
        direction=_DIRECTIONS[tuple(reverse)],
        hidden_size=H,
        linear_before_reset=int(cell != "reset_before"),
    )
    if lengths is not None:
        # ONNX does not say what becomes of the state of an empty row; its runtime returns zeros.
        empty = op.Equal(lengths, op.CastLike(_integers(0), lengths))
        y_h = op.Where(op.Unsqueeze(empty, _integers(0, 2)), h0, y_h)
    output = op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), _integers(0, 0, len(reverse) * H))
    return output, y_h


def _gates(rows: Value, H: int, cell: str, open_gate: float = 0.0) -> Value:
    """(G, N*H, ...) in the order r, z, n to (G, 3H, ...) in ONNX's z, r, n.

    For `no_reset`, whose rows are z, n, the rows of r are filled with a value.
    """
    if cell == "no_reset":
        z, n = _slice(rows, 0, H, 1), _slice(rows, H, 2 * H, 1)
        r = op.Add(op.Mul(z, _scalar(0.0, z)), _scalar(open_gate, z))
    else:
        r, z, n = (_slice(rows, k * H, (k + 1) * H, 1) for k in range(3))
    return op.Concat(z, r, n, axis=1)


def _slice(value: Value, start: int, end: int, axis: int) -> Value:
    sliced = op.Slice(value, _integers(start), _integers(end), _integers(axis))
    if value.shape is not None:
        # Tracing infers no shapes, and the sizes of the weights are read off them.
        shape = list(value.shape)
        shape[axis] = end - start
        sliced.shape = onnxscript.ir.Shape(shape)
    return sliced


def _scalar(value: float, like: Value) -> Value:
    return op.CastLike(op.Constant(value_float=value), like)


def _integers(*values: int) -> Value:
    return op.Constant(value_ints=[int(value) for value in values])
