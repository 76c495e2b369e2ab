# SPDX-License-Identifier: Apache-2.0
"""Modules from the GRU nodes of ONNX graphs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import onnx
import onnx.inliner
import onnx.numpy_helper
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from gru_fast import functional, notations
from gru_fast.gru import GRU

__all__ = ["ReverseGRU", "from_node", "load_gru"]

_INPUTS = ("X", "W", "R", "B", "sequence_lens", "initial_h")
_DIRECTIONS = {"forward": 1, "reverse": 1, "bidirectional": 2}
_ACTIVATIONS = ("sigmoid", "tanh")
_KNOWN = {
    "activation_alpha", "activation_beta", "activations", "clip", "direction", "hidden_size",
    "layout", "linear_before_reset",
}  # fmt: skip


class ReverseGRU(nn.Module):
    """One layer that runs from the last step to the first: ONNX's `direction="reverse"`.

    Args:
        gru: The weights: one layer in one direction.

    Raises:
        ValueError: `gru` has more than one layer, direction or head, or recurrent dropout.
    """

    def __init__(self, gru: GRU) -> None:
        """See the class."""
        super().__init__()
        if gru.num_layers > 1 or gru.bidirectional:
            raise ValueError(
                "gru: expected one layer and one direction, got "
                f"num_layers={gru.num_layers}, bidirectional={gru.bidirectional}"
            )
        for option in ("recurrent_dropout", "num_heads"):
            given, expected = getattr(gru, option), getattr(GRU, option)
            if given != expected:
                raise ValueError(f"gru: expected {option}={expected}, got {given}")
        self.gru = gru

    def forward(
        self, input: Tensor, hx: Tensor | None = None, *, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run the layer over a sequence.

        Args:
            input: (T, B, I), or (B, T, I) with `batch_first`.
            hx: The state before the last step, (1, B, H); None means zeros, or the learned state.
            lengths: (B,), as in `gru_fast.GRU`: a row starts at its last valid step.

        Returns:
            `output` in the layout of `input`, and `h_n` (1, B, H), the state after step 0.

        Raises:
            ValueError: `input` is not 3-D.
            RuntimeError: A shape, dtype or device does not fit.
        """
        if input.dim() != 3:
            raise ValueError(f"input: expected 3 dimensions, got {input.dim()}")
        gru = self.gru
        x = input.transpose(0, 1) if gru.batch_first else input
        if hx is None and gru.learn_h0:
            hx = gru.h0.unsqueeze(1).expand(-1, x.shape[1], -1)
        output, h_n = functional.layer(
            x,
            x.new_zeros(1, x.shape[1], gru.hidden_size) if hx is None else hx,
            *[weight.unsqueeze(0) for weight in gru._flat_weights],
            lengths=lengths,
            cell=gru.cell,
            reverse=(True,),
            recompute=gru.recompute,
            backend=gru.backend,
        )
        return (output.transpose(0, 1) if gru.batch_first else output), h_n


def load_gru(
    source: onnx.ModelProto | str | os.PathLike[str],
    name: str | Sequence[str] | None = None,
    *,
    ignore: str | Sequence[str] = (),
) -> GRU | ReverseGRU:
    """A module with the weights of a GRU node, wherever in an ONNX model the node is.

    `sequence_lens` is the module's `lengths=`, `initial_h` its `hx`, (D, B, H) with either layout;
    `output` is Y with the directions side by side, (T, B, D * H), and `h_n` is Y_h. `layout=1`
    makes a module with `batch_first`. A constant initial state that is the same for every row
    becomes the parameter `h0` of `learn_h0=True`.

    Args:
        source: Path of a model, or the model.
        name: Name of the node, or of its first output if it has none. Several names make one module
            of several layers. None: the only GRU node.
        ignore: `"initial_h"` or `"sequence_lens"`, or both: leave this input to the caller of the
            module even where the model has a constant for it.

    Returns:
        A `gru_fast.GRU`, or a `ReverseGRU` for `direction="reverse"`.

    Raises:
        ValueError: There is no such node or more than one, the node has an option that this
            library has not (`clip`, other activations), weights that are not constants or do not
            fit, or constant lengths or different initial states of the rows that are not ignored.
        FileNotFoundError: No such file.
    """
    ignore = (ignore,) if isinstance(ignore, str) else ignore
    unknown = set(ignore) - {"initial_h", "sequence_lens"}
    if unknown:
        raise ValueError(f"ignore: expected initial_h or sequence_lens, got {sorted(unknown)}")
    model = source if isinstance(source, onnx.ModelProto) else onnx.load(os.fspath(source))
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    nodes = list(_nodes(model.graph, {}))
    keys = [node.name or next(filter(None, node.output)) for node, _ in nodes]
    found = dict(zip(keys, nodes, strict=True))
    names = [name] if isinstance(name, str) else list(found if name is None else name)
    missing = [n for n in names if n not in found]
    if missing or not names or (name is None and len(nodes) > 1):
        raise ValueError(
            f"name: expected {'names' if missing else 'one or more'} of the model's GRU nodes "
            f"{sorted(keys)}, got {missing[0] if missing else name!r}"
        )
    for n in names:
        if keys.count(n) > 1:
            raise ValueError(f"name: expected one GRU node named {n!r}, got {keys.count(n)}")
    layers = []
    for n in names:
        node, scope = found[n]
        arrays = {}
        for key, value in zip(_INPUTS[1:], node.input[1:], strict=False):
            if not value or key in ignore:
                continue
            shapes = _shapes(model.graph) if key == "initial_h" else {}
            array = _constant(value, scope, model, shapes)
            if array is not None:
                arrays[key] = array
            elif key in ("W", "R", "B"):
                raise ValueError(f"{n}: expected a constant {key}, got one that is computed")
        state = arrays.pop("initial_h", np.zeros(0))
        layer = from_node(node, arrays)
        gru = layer.gru if isinstance(layer, ReverseGRU) else layer
        batch = 0 if gru.batch_first else 1
        rows_differ = state.any() and (state != state.take([0], batch)).any()
        for key, wrong in (
            ("initial_h", rows_differ),
            ("sequence_lens", "sequence_lens" in arrays),
        ):
            if wrong:
                raise ValueError(
                    f"{n}: {key} is a constant of the model. Give it to the module yourself (hx= "
                    f"or lengths=) and pass ignore=({key!r},)"
                )
        if state.any():
            gru.learn_h0 = True
            gru.h0 = nn.Parameter(torch.from_numpy(state.take(0, batch)))
        layers.append(layer)
    return layers[0] if len(layers) == 1 else _stacked(layers)


def from_node(node: onnx.NodeProto, arrays: Mapping[str, np.ndarray]) -> GRU | ReverseGRU:
    """`load_gru` for a node whose weights are at hand.

    Args:
        node: A node of the type GRU.
        arrays: "W", "R" and perhaps "B", as ONNX describes them.

    Returns:
        As `load_gru`.

    Raises:
        ValueError: As `load_gru`.
    """
    if node.op_type != "GRU" or node.domain not in ("", "ai.onnx"):
        raise ValueError(f"node: expected the type GRU, got {node.op_type}")
    where = node.name or "GRU"
    options = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    for key in options.keys() - _KNOWN:
        raise ValueError(f"{where}: unknown attribute {key}")
    direction = options.get("direction", b"forward").decode()
    if direction not in _DIRECTIONS:
        raise ValueError(f"{where}: direction: expected {sorted(_DIRECTIONS)}, got {direction!r}")
    if "clip" in options:
        raise ValueError(f"{where}: clip: expected none, got {options['clip']}")
    D = _DIRECTIONS[direction]
    activations = [a.decode() for a in options.get("activations", ())]
    if activations and [a.lower() for a in activations] != [*_ACTIVATIONS] * D:
        raise ValueError(
            f"{where}: activations: expected {['Sigmoid', 'Tanh'] * D}, got {activations}"
        )
    for key in ("activation_alpha", "activation_beta"):
        if options.get(key):
            raise ValueError(f"{where}: {key}: expected none, got {list(options[key])}")
    for key in ("W", "R"):
        if key not in arrays:
            raise ValueError(f"{where}: expected an array {key}, got {sorted(arrays)}")
    gru = notations.from_onnx(
        arrays["W"],
        arrays["R"],
        arrays.get("B"),
        linear_before_reset=bool(options.get("linear_before_reset", 0)),
        batch_first=bool(options.get("layout", 0)),
    )
    for key, given, stated in (
        ("directions", 1 + gru.bidirectional, D),
        ("hidden_size", gru.hidden_size, options.get("hidden_size", gru.hidden_size)),
    ):
        if given != stated:
            raise ValueError(f"{where}: W: expected {stated} {key}, got {given}")
    return ReverseGRU(gru) if direction == "reverse" else gru


def _stacked(layers: list[GRU | ReverseGRU]) -> GRU:
    first = layers[0]
    if isinstance(first, ReverseGRU):
        raise ValueError("name: several layers need direction forward or bidirectional")
    options: dict[str, Any] = {
        key: getattr(first, key)
        for key in ("hidden_size", "bias", "batch_first", "bidirectional", "cell")
    }
    width = first.hidden_size * (1 + first.bidirectional)
    for k, above in enumerate(layers[1:], 1):
        same = isinstance(above, GRU) and all(getattr(above, n) == v for n, v in options.items())
        if not same or above.input_size != width:
            raise ValueError(
                f"name: layer {k} does not fit on the first, expected input size {width} and the "
                f"options of {first}, got {above}"
            )
    learned = any(isinstance(layer, GRU) and layer.learn_h0 for layer in layers)
    dtype = first.weight_ih_l0.dtype
    gru = GRU(first.input_size, num_layers=len(layers), dtype=dtype, learn_h0=learned, **options)
    state, states = {}, []
    for k, layer in enumerate(layers):
        own = layer.state_dict()
        states.append(own.pop("h0", torch.zeros(1 + first.bidirectional, first.hidden_size)))
        state.update({name.replace("_l0", f"_l{k}"): value for name, value in own.items()})
    gru.load_state_dict(state | ({"h0": torch.cat(states)} if learned else {}))
    return gru


Scope = dict[str, "onnx.NodeProto | onnx.TensorProto"]
"""What gives each value that is visible in a graph."""


def _nodes(graph: onnx.GraphProto, outer: Scope) -> Iterator[tuple[onnx.NodeProto, Scope]]:
    """The GRU nodes of a graph and of the graphs inside it."""
    scope: Scope = {**outer, **{tensor.name: tensor for tensor in graph.initializer}}
    for node in graph.node:
        scope.update(dict.fromkeys(node.output, node))
    for node in graph.node:
        if node.op_type == "GRU" and node.domain in ("", "ai.onnx"):
            yield node, scope
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner, scope)


def _shapes(graph: onnx.GraphProto) -> dict[str, list[int]]:
    """The inputs' shapes, 2 where a size is free."""
    return {
        value.name: [d.dim_value or 2 for d in value.type.tensor_type.shape.dim]
        for value in graph.input
        if value.type.tensor_type.HasField("shape")
    }


def _constant(
    name: str, scope: Scope, model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]]
) -> np.ndarray | None:
    """The value of that name, or None if it depends on an input other than by its shape here."""
    tensors: dict[str, onnx.TensorProto] = {}
    nodes: dict[int, onnx.NodeProto] = {}

    def visit(value: str) -> bool:
        source = scope.get(value)
        if source is None:
            return not value  # an optional input that is left out
        if isinstance(source, onnx.TensorProto):
            tensors[value] = source
        elif id(source) not in nodes:
            if any(a.HasField("g") or a.graphs for a in source.attribute):
                return False
            if source.op_type == "Shape" and source.input[0] in shapes:
                zeros = np.zeros(shapes[source.input[0]], np.float32)
                tensors[source.input[0]] = onnx.numpy_helper.from_array(zeros, source.input[0])
            elif not all(map(visit, source.input)):
                return False
            nodes[id(source)] = source  # after what it needs
        return True

    if not visit(name):
        return None
    array: np.ndarray
    if name in tensors:
        array = onnx.numpy_helper.to_array(tensors[name])
    else:
        output = onnx.ValueInfoProto(name=name)
        graph = onnx.helper.make_graph(list(nodes.values()), "", [], [output], [*tensors.values()])
        part = onnx.helper.make_model(graph, opset_imports=model.opset_import)
        part.ir_version = model.ir_version
        array = cast(list[np.ndarray], ReferenceEvaluator(part).run(None, {}))[0]
    # NumPy itself has no bfloat16.
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array
