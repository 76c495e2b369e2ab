# SPDX-License-Identifier: Apache-2.0
"""OpenVINO's GRUSequence, inference in float32."""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.problem import Problem
from benchmarks.providers import Prepared, Provider
from benchmarks.providers_onnx import onnx_rows


class OpenVino(Provider):
    """One node with constant weights, compiled for the CPU; its inputs lie batch first already."""

    name = "openvino"

    def version(self) -> str:
        return version("openvino")

    def why_not(self, problem: Problem) -> str | None:
        if problem.training:
            return "OpenVINO runs inference only"
        if problem.dtype != "float32":
            return "its GRUSequence is asked for in float32 only here"
        return "its GRUSequence has no resets" if problem.case.resets else None

    def prepare(self, problem: Problem, threads: int) -> Prepared:
        openvino = _openvino()
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            # Elsewhere it takes bfloat16 by itself where the processor has it.
            "INFERENCE_PRECISION_HINT": "f32",
        }
        compiled = _core().compile_model(model(problem), "CPU", settings)
        request = compiled.create_infer_request()
        inputs = [
            problem.tensors["x"].transpose(0, 1).contiguous(),
            problem.tensors["h0"].transpose(0, 1).contiguous(),
        ]
        for place, tensor in enumerate(inputs):
            request.set_input_tensor(place, openvino.Tensor(tensor.numpy(), shared_memory=True))

        def call(kept: list[Tensor] = inputs) -> Any:
            request.infer()
            return request

        def results(returned: Any) -> dict[str, Tensor]:
            y, y_h = (torch.tensor(returned.get_output_tensor(n).data) for n in range(2))
            return {"output": y[:, 0].transpose(0, 1), "h_n": y_h.transpose(0, 1)}

        return Prepared(call, results)


@cache
def _core() -> Any:
    """One for the life of the process.

    The CPU plugin gives the thread a stack for signals, which it frees with itself but does not
    take back: the next signal after that would end the process.
    """
    return _openvino().Core()


def _openvino() -> Any:
    """The package, without the one by which it reports its use over the network."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return import_module("openvino")


def model(problem: Problem) -> Any:
    """Inputs (B, T, I) and (B, 1, H); outputs (B, 1, T, H) and (B, 1, H)."""
    import numpy as np

    openvino = _openvino()
    from openvino import opset13 as ops

    case, tensors = problem.case, problem.tensors
    x = ops.parameter([case.B, case.T, case.I], np.float32)
    h0 = ops.parameter([case.B, 1, case.H], np.float32)
    given, hidden = (onnx_rows(tensors[f"bias_{side}_l0"]).chunk(3) for side in ("ih", "hh"))
    # The biases of z and r act together, those of the candidate on either side of the reset gate.
    bias = torch.cat([given[0] + hidden[0], given[1] + hidden[1], given[2], hidden[2]])
    constants = [
        onnx_rows(tensors["weight_ih_l0"])[None],
        onnx_rows(tensors["weight_hh_l0"])[None],
        bias[None],
    ]
    node = ops.gru_sequence(
        x,
        h0,
        ops.constant(np.full(case.B, case.T, np.int32)),
        *(ops.constant(constant.contiguous().numpy()) for constant in constants),
        case.H,
        "forward",
        linear_before_reset=True,
    )
    return openvino.Model(list(node.outputs()), [x, h0], "gru")


def providers() -> list[Provider]:
    """Nothing where openvino is not installed."""
    return [OpenVino()] if find_spec("openvino") else []
