# SPDX-License-Identifier: Apache-2.0
"""`torch.fx.symbolic_trace` keeps our modules whole, as it keeps torch's own."""

import pytest
import torch
from torch import Tensor, nn

import gru_fast


class Model(nn.Module):
    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"rnn": rnn})
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor, hx: Tensor) -> Tensor:
        output, h_n = self.block["rnn"](x, hx)
        return self.head(output) + h_n.sum()


class Resets(nn.Module):
    """Everything that a layer with layer norm takes."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = gru_fast.LayerNormGRU(3, 5)

    def forward(self, x: Tensor, lengths: Tensor, mask: Tensor, state: Tensor) -> Tensor:
        output, _ = self.rnn(x, lengths=lengths, reset_mask=mask, reset_state=state)
        return output


def operations(graph: torch.fx.GraphModule) -> list[tuple[str, str]]:
    return [(node.op, str(node.target)) for node in graph.graph.nodes]


@pytest.mark.parametrize("our_class", [gru_fast.GRU, gru_fast.LayerNormGRU])
def test_layers_are_leaves(our_class: type[nn.Module]) -> None:
    x, hx = torch.randn(4, 2, 3), torch.randn(1, 2, 5)
    expected = operations(torch.fx.symbolic_trace(Model(nn.GRU(3, 5))))
    model = Model(our_class(3, 5))
    graph = torch.fx.symbolic_trace(model)
    assert operations(graph) == expected
    assert ("call_module", "block.rnn") in expected
    assert graph.block.rnn is model.block["rnn"]
    torch.testing.assert_close(graph(x, hx), model(x, hx), rtol=0, atol=0)


def test_options_go_with_the_call() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = gru_fast.GRU(3, 5, learn_h0=True)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            output, _, gates = self.rnn(x, lengths=lengths, return_gates=True)
            return output + gates.z[0]

    model = Masked()
    graph = torch.fx.symbolic_trace(model)
    (node,) = [node for node in graph.graph.nodes if node.op == "call_module"]
    assert len(node.args) == 1 and set(node.kwargs) == {"lengths", "return_gates"}
    inputs = torch.randn(4, 2, 3), torch.tensor([4, 1])
    torch.testing.assert_close(graph(*inputs), model(*inputs), rtol=0, atol=0)


def test_resets_go_with_the_call() -> None:
    model = Resets()
    graph = torch.fx.symbolic_trace(model)
    (node,) = [node for node in graph.graph.nodes if node.op == "call_module"]
    assert set(node.kwargs) == {"lengths", "reset_mask", "reset_state"}
    mask = torch.tensor([[False, True], [True, False], [False, False]])
    inputs = torch.randn(3, 2, 3), torch.tensor([3, 2]), mask, torch.randn(1, 2, 5)
    torch.testing.assert_close(graph(*inputs), model(*inputs), rtol=0, atol=0)


def test_cells_are_leaves() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = gru_fast.GRUCell(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            h = self.cell(x)
            return self.cell(x, h)

    model, x = Loop(), torch.randn(2, 3)
    graph = torch.fx.symbolic_trace(model)
    assert [node.op for node in graph.graph.nodes].count("call_module") == 2
    torch.testing.assert_close(graph(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("rnn", [nn.GRU(3, 5), gru_fast.GRU(3, 5)])
def test_a_layer_alone_is_refused(rnn: nn.Module) -> None:
    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(rnn)
