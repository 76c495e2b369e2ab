# SPDX-License-Identifier: Apache-2.0
"""Who draws tokens: a loop over torch.nn, a loop over ONNX Runtime, and our own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.providers_onnx import onnx_rows
from gru_fast import GRULanguageModel, Sampler, sampling
from gru_fast.packed import WEIGHTS

Draw = Callable[[int, bool], Tensor]
"""(T, greedy) to (B, T) tokens."""

STEADY = ("nn.GRU.loop", "onnxruntime.loop")
"""Take as long for the last token as for the first, and nothing besides."""


def nn_gru_loop(model: GRULanguageModel, B: int) -> Draw:
    """What one writes with torch.nn: five calls a token."""
    H = model.gru.hidden_size
    gru = nn.GRU(H, H, model.gru.num_layers)
    gru.load_state_dict(model.gru.state_dict())
    embedding, head = model.embedding, model.head
    assert embedding is not None

    @torch.inference_mode()
    def draw(T: int, greedy: bool) -> Tensor:
        x, h, tokens = torch.zeros(1, B, H), torch.zeros(gru.num_layers, B, H), []
        for _ in range(T):
            output, h = gru(x, h)
            logits = head(output[0])
            if greedy:
                token = logits.argmax(-1)
            else:
                token = torch.multinomial(torch.softmax(logits, -1), 1)[:, 0]
            tokens.append(token)
            x = embedding(token)[None]
        return torch.stack(tokens, 1)

    return draw


def onnxruntime_loop(model: GRULanguageModel, B: int) -> Draw:
    """A graph from inputs and state to logits and state; NumPy draws."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        step_graph(model, B), options, providers=["CPUExecutionProvider"]
    )
    H = model.gru.hidden_size
    generator = np.random.default_rng(0)

    def draw(T: int, greedy: bool) -> Tensor:
        h = np.zeros((1, B, H), np.float32)
        token = np.full(B, model.vocab_size)
        tokens = np.empty((B, T), np.int64)
        for t in range(T):
            logits, h = session.run(None, {"token": token, "h": h})
            if greedy:
                token = logits.argmax(-1)
            else:
                cdf = np.exp(logits - logits.max(-1, keepdims=True)).cumsum(-1)
                u = generator.random((B, 1), np.float32) * cdf[:, -1:]
                token = (cdf <= u).sum(-1)
            tokens[:, t] = token
        return torch.from_numpy(tokens)

    return draw


def step_graph(model: GRULanguageModel, B: int) -> bytes:
    """Gather, GRU and Gemm; the row after the last token is the zero vector."""
    from onnx import TensorProto, helper, numpy_helper

    H, V, weights = model.gru.hidden_size, model.vocab_size, model.gru
    assert model.embedding is not None
    bias = [onnx_rows(weights.bias_ih_l0.detach()), onnx_rows(weights.bias_hh_l0.detach())]
    constants = {
        "E": nn.functional.pad(model.embedding.weight.detach(), (0, 0, 0, 1)),
        "W": onnx_rows(weights.weight_ih_l0.detach())[None],
        "R": onnx_rows(weights.weight_hh_l0.detach())[None],
        "B": torch.cat(bias)[None],
        "head": model.head.weight.detach(),
        "c": model.head.bias.detach(),
        "shape": torch.tensor([1, B, H]),
        "flat": torch.tensor([B, H]),
    }
    nodes = [
        helper.make_node("Gather", ["E", "token"], ["rows"]),
        helper.make_node("Reshape", ["rows", "shape"], ["x"]),
        helper.make_node(
            "GRU", ["x", "W", "R", "B", "", "h"], ["", "h_n"],
            hidden_size=H, linear_before_reset=1,
        ),
        helper.make_node("Reshape", ["h_n", "flat"], ["top"]),
        helper.make_node("Gemm", ["top", "head", "c"], ["logits"], transB=1),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "step",
        [
            helper.make_tensor_value_info("token", TensorProto.INT64, [B]),
            helper.make_tensor_value_info("h", TensorProto.FLOAT, [1, B, H]),
        ],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, [B, V]),
            helper.make_tensor_value_info("h_n", TensorProto.FLOAT, [1, B, H]),
        ],
        [numpy_helper.from_array(t.contiguous().numpy(), n) for n, t in constants.items()],
    )
    opset = [helper.make_opsetid("", 17)]
    made = helper.make_model(graph, opset_imports=opset, ir_version=8)
    serialised: bytes = made.SerializeToString()
    return serialised


def drawing(generate: Callable[..., Any], B: int, **options: Any) -> Draw:
    """B sequences by a function with the arguments of `GRULanguageModel.generate`."""

    def draw(T: int, greedy: bool) -> Tensor:
        tokens = generate(
            max_new_tokens=T, num_return_sequences=B, do_sample=not greedy, seed=0, **options
        )
        assert isinstance(tokens, Tensor)
        return tokens

    return draw


def gru_fast_loop(model: GRULanguageModel, B: int) -> Draw:
    """Our loop of PyTorch operations, which `generate` uses where the native one cannot."""
    return drawing(partial(sampling.generate, model), B, loop=sampling.generate_loop)


def gru_fast_generate(model: GRULanguageModel, B: int) -> Draw:
    """`model.generate`, which packs the weights in every call."""
    return drawing(model.generate, B)


def gru_fast_sampler(weights: str, model: GRULanguageModel, B: int) -> Draw:
    """One native call with weights packed in advance."""
    return drawing(Sampler(model, weights).generate, B)


def providers() -> dict[tuple[str, str], tuple[str, Callable[[GRULanguageModel, int], Draw]]]:
    """(name, dtype) to (version, prepare); the baseline first."""
    ours = version("gru_fast")
    found = {("nn.GRU.loop", "float32"): (torch.__version__, nn_gru_loop)}
    if find_spec("onnxruntime") and find_spec("onnx"):
        found["onnxruntime.loop", "float32"] = (version("onnxruntime"), onnxruntime_loop)
    found["gru_fast.loop", "float32"] = (ours, gru_fast_loop)
    found["gru_fast.generate", "float32"] = (ours, gru_fast_generate)
    for weights in WEIGHTS:
        found["gru_fast.sampler", weights] = (ours, partial(gru_fast_sampler, weights))
    return found
