# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime's GRU operator, inference in float32."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.problem import Problem
from benchmarks.providers import Prepared, Provider

SPINS_S = 0.06
"""Its threads spin for 20 to 50 ms after a call: what runs meanwhile takes twice to ten times as
long (docs/decisions.md)."""


def onnx_rows(weight: Tensor) -> Tensor:
    """From PyTorch's gate order r, z, n to ONNX's z, r, h."""
    r, z, n = weight.chunk(3)
    return torch.cat([z, r, n])


class OnnxRuntime(Provider):
    """A graph of one GRU node with its weights as constants, which the session packs once."""

    name = "onnxruntime"
    spins_s = SPINS_S

    def version(self) -> str:
        return version("onnxruntime")

    def why_not(self, problem: Problem) -> str | None:
        if problem.training:
            return "ONNX Runtime runs inference only"
        if problem.dtype != "float32":
            return "its GRU operator is float32 on the CPU"
        return "its GRU operator has no resets" if problem.case.resets else None

    def prepare(self, problem: Problem, threads: int) -> Prepared:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(
            graph(problem), options, providers=["CPUExecutionProvider"]
        )
        feeds = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(problem.tensors[source].numpy())
            for name, source in (("X", "x"), ("initial_h", "h0"))
        }

        def call() -> Any:
            return session.run_with_ort_values(["Y", "Y_h"], feeds)

        def results(returned: Any) -> dict[str, Tensor]:
            y, y_h = (torch.from_numpy(value.numpy()) for value in returned)
            return {"output": y[:, 0], "h_n": y_h}

        return Prepared(call, results)


def graph(problem: Problem) -> bytes:
    """The serialised model."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    tensors = problem.tensors
    bias = torch.cat([onnx_rows(tensors["bias_ih_l0"]), onnx_rows(tensors["bias_hh_l0"])])
    constants = {
        "W": onnx_rows(tensors["weight_ih_l0"]),
        "R": onnx_rows(tensors["weight_hh_l0"]),
        "B": bias,
    }
    node = helper.make_node(
        "GRU",
        ["X", "W", "R", "B", "", "initial_h"],
        ["Y", "Y_h"],
        hidden_size=problem.case.H,
        linear_before_reset=1,
    )

    def value(name: str, shape: list[Any]) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    case = problem.case
    body = helper.make_graph(
        [node],
        "gru",
        [value("X", [case.T, case.B, case.I]), value("initial_h", [1, case.B, case.H])],
        [value("Y", [case.T, 1, case.B, case.H]), value("Y_h", [1, case.B, case.H])],
        [numpy_helper.from_array(t.unsqueeze(0).numpy(), n) for n, t in constants.items()],
    )
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def providers() -> list[Provider]:
    """Nothing where onnx or onnxruntime is not installed."""
    return [OnnxRuntime()] if find_spec("onnx") and find_spec("onnxruntime") else []
