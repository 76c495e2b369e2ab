# SPDX-License-Identifier: Apache-2.0
"""Keras' GRU layer on its torch backend."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.problem import WEIGHTS, Problem
from benchmarks.providers import Prepared, Provider
from benchmarks.providers_onnx import onnx_rows

BACKEND = "torch"


class Keras(Provider):
    """`keras.layers.GRU`, eager; its inputs lie batch first already."""

    name = "keras.torch"

    def version(self) -> str:
        return version("keras")

    def why_not(self, problem: Problem) -> str | None:
        if problem.device != "cpu":
            return "Keras takes part on the CPU"
        return "the Keras layer has no resets" if problem.case.resets else None

    def prepare(self, problem: Problem, threads: int) -> Prepared:
        os.environ["KERAS_BACKEND"] = BACKEND
        # A GPU would be taken by itself.
        os.environ["KERAS_TORCH_DEVICE"] = "cpu"
        import keras

        if keras.backend.backend() != BACKEND:
            raise RuntimeError(f"keras was imported with the backend {keras.backend.backend()}")
        case, tensors = problem.case, problem.tensors
        dtype = str(tensors["x"].dtype).removeprefix("torch.")
        layer = keras.layers.GRU(
            case.H, return_sequences=True, return_state=True, reset_after=True, dtype=dtype
        )
        layer.build((case.B, case.T, case.I))
        rows = {name: onnx_rows(tensors[name]) for name in WEIGHTS}
        values = (
            rows["weight_ih_l0"].T,
            rows["weight_hh_l0"].T,
            torch.stack([rows["bias_ih_l0"], rows["bias_hh_l0"]]),
        )
        parameters = [variable.value for variable in layer.trainable_weights]
        with torch.no_grad():
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value)
        x = tensors["x"].transpose(0, 1).contiguous().requires_grad_(problem.training)
        h0 = tensors["h0"][0].clone().requires_grad_(problem.training)

        def infer() -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                output, h_n = layer(x, initial_state=h0)
            return output, h_n

        def forward_results(out: Any) -> dict[str, Tensor]:
            return {"output": out[0].transpose(0, 1), "h_n": out[1][None]}

        if not problem.training:
            return Prepared(infer, forward_results)
        gradients = (tensors["grad_output"].transpose(0, 1).contiguous(), tensors["grad_h_n"][0])

        def train() -> Any:
            out = layer(x, initial_state=h0)
            return out, torch.autograd.grad(out, [x, h0, *parameters], gradients)

        def results(returned: Any) -> dict[str, Tensor]:
            out, (of_x, of_h0, of_kernel, of_recurrent, of_bias) = returned
            found = forward_results(out)
            found |= {"grad_x": of_x.transpose(0, 1), "grad_h0": of_h0[None]}
            # The same exchange of rows leads back.
            weights = (of_kernel.T, of_recurrent.T, of_bias[0], of_bias[1])
            for name, gradient in zip(WEIGHTS, weights, strict=True):
                found[f"grad_{name}"] = onnx_rows(gradient)
            return {name: t.detach() for name, t in found.items()}

        return Prepared(train, results)


def providers() -> list[Provider]:
    """Nothing where keras is not installed, or is loaded with another backend already."""
    loaded = sys.modules.get("keras")
    if find_spec("keras") is None or (loaded and loaded.backend.backend() != BACKEND):
        return []
    return [Keras()]
