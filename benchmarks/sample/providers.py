# SPDX-License-Identifier: Apache-2.0
"""Who draws tokens: loops over torch.nn, a loop over ONNX Runtime, and our own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.providers_onnx import onnx_rows
from benchmarks.providers_torch import CELL_WEIGHTS
from benchmarks.sample.gate import SEED, Draw
from gru_fast import GRU, GRULanguageModel, Sampler
from gru_fast.packed import WEIGHTS

BASELINE = "nn.GRU.loop"
STEADY = (BASELINE, "nn.GRUCell.loop", "onnxruntime.loop", "gru_fast.loop")
"""Take as long for the last token as for the first, and nothing besides."""


def _drawn(logits: Tensor, greedy: bool) -> Tensor:
    if greedy:
        return logits.argmax(-1)
    return torch.multinomial(torch.softmax(logits, -1), 1)[:, 0]


def _fed(prompts: Tensor | None) -> tuple[Tensor, ...]:
    """The tokens of the prompts, position by position."""
    return () if prompts is None else prompts.unbind(1)


def nn_gru_loop(model: GRULanguageModel, B: int) -> Draw:
    """What one writes with torch.nn: five calls a token."""
    H = model.gru.hidden_size
    gru = nn.GRU(H, H, model.gru.num_layers)
    gru.load_state_dict(model.gru.state_dict())
    embedding, head = model.embedding, model.head
    assert embedding is not None

    @torch.inference_mode()
    def draw(T: int, greedy: bool, prompts: Tensor | None = None) -> Tensor:
        x, h, tokens = torch.zeros(1, B, H), torch.zeros(gru.num_layers, B, H), []
        for token in _fed(prompts):
            h = gru(x, h)[1]
            x = embedding(token)[None]
        for _ in range(T):
            output, h = gru(x, h)
            token = _drawn(head(output[0]), greedy)
            tokens.append(token)
            x = embedding(token)[None]
        return torch.stack(tokens, 1)

    return draw


def cell_of(gru: GRU, layer: int) -> nn.GRUCell:
    """torch's cell with the weights of a layer, where these are."""
    weights = {name: getattr(gru, f"{name}_l{layer}") for name in CELL_WEIGHTS}
    weight = weights["weight_ih"]
    like = {"device": weight.device, "dtype": weight.dtype}
    cell = nn.GRUCell(weight.shape[1], gru.hidden_size, **like)
    cell.load_state_dict(weights)
    return cell


def nn_gru_cell_loop(model: GRULanguageModel, B: int) -> Draw:
    """The same with nn.GRUCell, which has less to do around a single step."""
    H, gru = model.gru.hidden_size, model.gru
    cell, embedding, head = cell_of(gru, 0), model.embedding, model.head
    assert embedding is not None and gru.num_layers == 1

    @torch.inference_mode()
    def draw(T: int, greedy: bool, prompts: Tensor | None = None) -> Tensor:
        x, h, tokens = torch.zeros(B, H), torch.zeros(B, H), []
        for token in _fed(prompts):
            h = cell(x, h)
            x = embedding(token)
        for _ in range(T):
            h = cell(x, h)
            token = _drawn(head(h), greedy)
            tokens.append(token)
            x = embedding(token)
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

    def draw(T: int, greedy: bool, prompts: Tensor | None = None) -> Tensor:
        h = np.zeros((1, B, H), np.float32)
        token = np.full(B, model.vocab_size)
        tokens = np.empty((B, T), np.int64)
        for after in _fed(prompts):
            _, h = session.run(None, {"token": token, "h": h})
            token = after.numpy()
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

    def draw(T: int, greedy: bool, prompts: Tensor | None = None) -> Tensor:
        tokens = generate(
            prompts, max_new_tokens=T, num_return_sequences=B if prompts is None else 1,
            do_sample=not greedy, seed=SEED, **options,
        )  # fmt: skip
        assert isinstance(tokens, Tensor)
        return tokens if prompts is None else tokens[:, prompts.shape[1] :]

    return draw


def gru_fast_loop(model: GRULanguageModel, B: int) -> Draw:
    """What `generate` does where the native loop cannot: here the model has a hook."""
    hooked = copy.deepcopy(model)
    hooked.gru.register_forward_hook(lambda *_: None)
    return drawing(hooked.generate, B)


def gru_fast_generate(model: GRULanguageModel, B: int) -> Draw:
    """`model.generate`, which packs the weights in every call."""
    return drawing(model.generate, B)


def gru_fast_sampler(weights: str, model: GRULanguageModel, B: int) -> Draw:
    """One native call with weights packed in advance."""
    return drawing(Sampler(model, weights).generate, B)


def providers() -> dict[tuple[str, str], tuple[str, Callable[[GRULanguageModel, int], Draw]]]:
    """(name, dtype) to (version, prepare); the baseline first."""
    ours = version("gru_fast")
    found = {(BASELINE, "float32"): (torch.__version__, nn_gru_loop)}
    found["nn.GRUCell.loop", "float32"] = (torch.__version__, nn_gru_cell_loop)
    if find_spec("onnxruntime") and find_spec("onnx"):
        found["onnxruntime.loop", "float32"] = (version("onnxruntime"), onnxruntime_loop)
    found["gru_fast.loop", "float32"] = (ours, gru_fast_loop)
    found["gru_fast.generate", "float32"] = (ours, gru_fast_generate)
    for weights in WEIGHTS:
        found["gru_fast.sampler", weights] = (ours, partial(gru_fast_sampler, weights))
    return found
