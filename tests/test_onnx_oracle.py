# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime's GRU operator as an independent oracle for both places of the reset gate."""

import numpy as np
import pytest
import torch

import gru_fast

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def to_onnx_rows(weight):
    """PyTorch stores r, z, n; ONNX stores z, r, h."""
    r, z, n = weight.detach().chunk(3)
    return torch.cat([z, r, n])


def onnx_gru(module, x, hx, lengths):
    """Output (T, B, D * H) and h_n of a one-node graph with the weights of a one-layer module."""
    suffixes = ("_l0", "_l0_reverse") if module.bidirectional else ("_l0",)

    def stacked(name):
        return torch.stack([to_onnx_rows(getattr(module, name + s)) for s in suffixes])

    inputs = {
        "X": x,
        "W": stacked("weight_ih"),
        "R": stacked("weight_hh"),
        "B": torch.cat([stacked("bias_ih"), stacked("bias_hh")], 1) if module.bias else None,
        "sequence_lens": None if lengths is None else lengths.to(torch.int32),
        "initial_h": hx,
    }
    arrays = {name: value.numpy() for name, value in inputs.items() if value is not None}
    node = onnx.helper.make_node(
        "GRU",
        [name if name in arrays else "" for name in inputs],
        ["Y", "Y_h"],
        hidden_size=module.hidden_size,
        direction="bidirectional" if module.bidirectional else "forward",
        linear_before_reset=int(module.cell == "reset_after"),
    )
    types = {np.dtype("float32"): onnx.TensorProto.FLOAT, np.dtype("int32"): onnx.TensorProto.INT32}
    graph = onnx.helper.make_graph(
        [node],
        "gru",
        [
            onnx.helper.make_tensor_value_info(name, types[a.dtype], a.shape)
            for name, a in arrays.items()
        ],
        [
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, axes)
            for name, axes in (("Y", list("TDBH")), ("Y_h", list("DBH")))
        ],
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 14)], ir_version=8
    )
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    y, y_h = session.run(None, arrays)
    y = torch.from_numpy(y)  # (T, D, B, H)
    return y.transpose(1, 2).flatten(2), torch.from_numpy(y_h)


@pytest.mark.parametrize("cell", ["reset_after", "reset_before"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("with_hx", [False, True])
@pytest.mark.parametrize("with_lengths", [False, True])
def test_the_operator_agrees(cell, bidirectional, bias, with_hx, with_lengths):
    module = gru_fast.GRU(5, 7, bias=bias, bidirectional=bidirectional, cell=cell)
    T, B, D = 6, 4, 2 if bidirectional else 1
    x = torch.randn(T, B, 5)
    hx = torch.randn(D, B, 7) if with_hx else None
    lengths = torch.tensor([6, 2, 1, 4]) if with_lengths else None
    with torch.no_grad():
        output, h_n = module(x, hx, lengths=lengths)
    expected, expected_h_n = onnx_gru(module, x, hx, lengths)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(h_n, expected_h_n)


def test_the_oracle_tells_the_two_cells_apart():
    after = gru_fast.GRU(5, 7, cell="reset_after")
    before = gru_fast.GRU(5, 7, cell="reset_before")
    before.load_state_dict(after.state_dict())
    x = torch.randn(6, 4, 5)
    with torch.no_grad():
        wrong = before(x)[0]
    assert (onnx_gru(after, x, None, None)[0] - wrong).abs().max() > 1e-2


def test_the_oracle_tells_the_gates_apart():
    module = gru_fast.GRU(5, 7)
    x = torch.randn(6, 4, 5)
    with torch.no_grad():
        output = module(x)[0]
        for p in module.parameters():
            r, z, n = p.chunk(3)
            p.copy_(torch.cat([z, r, n]))
    assert (onnx_gru(module, x, None, None)[0] - output).abs().max() > 1e-2
