# SPDX-License-Identifier: Apache-2.0
"""The one block in which cuDNN reads its weights, on CPU tensors; no cuDNN is called."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import Case, layer_inputs
from gru_fast import GRU, cudnn, reference


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("reverse", [(False,), (False, True)])
def test_weights_reach_cudnn_in_its_order(monkeypatch, reverse, bias):
    """PyTorch's CPU recurrence stands in for cuDNN: it takes the same list of weights."""

    def stand_in(x, weights, stride, buffer, h0, c0, mode, H, P, layers, first, p, train, both, *_):
        assert (stride, mode, H, P, layers, first) == (4 if bias else 2, 3, 7, 0, 1, False)
        assert train and buffer is None and c0 is None
        assert h0.is_contiguous()  # cuDNN's operator checks it
        output, h_n = torch._VF.gru(x, h0, weights, bias, layers, p, train, both, first)
        return output, h_n, None, None, None

    monkeypatch.setattr(torch, "_cudnn_rnn", stand_in)
    inputs = layer_inputs(Case(reverse=reverse, bias=bias), grad=True)
    inputs = replace(inputs, h0=inputs.h0[:, :1].expand(inputs.h0.shape))
    output, h_n = cudnn.layer(*inputs.arguments()[:6], True)
    expected = reference.layer(*inputs.arguments())
    torch.testing.assert_close((output, h_n), expected[:2])


class TestBlock:
    """Found where the weights lie so already."""

    @staticmethod
    def block(*sizes):
        whole = nn.Parameter(torch.randn(sum(map(math.prod, sizes))))
        parts = whole.detach().split([math.prod(size) for size in sizes])
        return whole, [part.view(size) for part, size in zip(parts, sizes, strict=True)]

    def test_in_one_block(self):
        whole, weights = self.block((6, 4), (6, 2), (6,), (6,))
        weights = [nn.Parameter(w) for w in weights]
        found = cudnn.block_of([w.unsqueeze(0).unbind(0)[0] for w in weights])
        assert torch.equal(found, whole) and found.data_ptr() == whole.data_ptr()
        assert not found.requires_grad

    def test_elsewhere(self):
        _, weights = self.block((6, 4), (6, 2), (6,), (6,))
        assert cudnn.block_of([*weights[:2], weights[3], weights[2]]) is None
        assert cudnn.block_of([*weights[:3], weights[3].clone()]) is None
        assert cudnn.block_of([weights[0].t(), *weights[1:]]) is None
        _, weights = self.block((1,), (6, 4), (6, 2), (6,), (6,))
        assert cudnn.block_of(weights[1:]) is None  # 4 bytes into an allocation


@pytest.fixture
def flattened(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """CPU tensors claim to be on CUDA; a number for each block that PyTorch is asked for.

    The stand-in lays weights out as cuDNN does: all matrices, then all biases, which are always
    there.
    """
    asked: list[int] = []

    def flatten(weights, per, I, mode, H, P, layers, first, both):  # noqa: E741
        asked.append(per)
        matrices = [w for w in weights if w.dim() == 2]
        biases = [w for w in weights if w.dim() == 1]
        directions = 2 if both else 1
        block = torch.zeros(sum(w.numel() for w in matrices) + 6 * H * directions)
        end = 0
        for weight in (*matrices, *biases):
            place = block[end : end + weight.numel()].view_as(weight)
            weight.set_(place.copy_(weight.detach()))
            end += weight.numel()
        return block

    monkeypatch.setattr(torch, "_cudnn_rnn_flatten_weight", flatten)
    monkeypatch.setattr(Tensor, "is_cuda", True, raising=False)
    cudnn._order.cache_clear()
    yield asked
    cudnn._order.cache_clear()


class TestCopy:
    """Of weights that lie elsewhere."""

    @staticmethod
    def weights(bias: bool, directions: int) -> list[nn.Parameter]:
        module = GRU(4, 5, bias=bias, bidirectional=directions == 2)
        return list(module.parameters())

    @pytest.mark.parametrize("directions", [1, 2])
    @pytest.mark.parametrize("bias", [True, False])
    def test_in_cudnns_order(self, flattened, bias, directions):
        """PyTorch is asked once a size, not at each call."""
        per = 4 if bias else 2
        for _ in range(3):
            weights = self.weights(bias, directions)
            block = cudnn._weights_in_one_block(weights, per, directions == 2)
            parts = [w.detach().flatten() for kind in (2, 1) for w in weights if w.dim() == kind]
            biases = () if bias else (torch.zeros(30 * directions),)
            assert torch.equal(block, torch.cat([*parts, *biases]))
            assert not block.requires_grad
        assert flattened == [per]

    def test_of_weights_without_biases_in_a_buffer(self, flattened):
        """What follows there is something else."""
        buffer = torch.randn(15 * 9 + 30)
        weights = [buffer[:60].view(15, 4), buffer[60:135].view(15, 5)]
        block = cudnn._weights_in_one_block(weights, 2, False)
        assert torch.equal(block, torch.cat([buffer[:135], torch.zeros(30)]))

    def test_no_copy_where_they_lie_so(self, flattened):
        module = GRU(4, 5)
        weights = list(module.parameters())
        with torch.no_grad():
            cudnn._flatten(weights, 4, False)
        block = cudnn._weights_in_one_block(weights, 4, False)
        assert block.data_ptr() == weights[0].data_ptr() and block.numel() == 165
        assert flattened == [4, 4]

    def test_weights_with_gaps(self, flattened, monkeypatch):
        """PyTorch makes each copy then, of aliases: the parameters stay where they are."""
        flatten = torch._cudnn_rnn_flatten_weight

        def with_gaps(weights: list[Tensor], *rest: Any) -> Tensor:
            block = flatten(weights, *rest)
            weights[-1].set_(weights[-1].clone())
            return block

        monkeypatch.setattr(torch, "_cudnn_rnn_flatten_weight", with_gaps)
        monkeypatch.setattr(Tensor, "storage_offset", lambda self: 7)
        weights = self.weights(True, 1)
        before = [w.data_ptr() for w in weights]
        for _ in range(2):
            assert torch.equal(
                cudnn._weights_in_one_block(weights, 4, False),
                torch.cat([w.detach().flatten() for w in weights]),
            )
        assert flattened == [4, 4, 4] and [w.data_ptr() for w in weights] == before


def test_weights_of_several_dtypes_are_left_where_they_are(flattened):
    """As nn.GRU leaves them: autocast may bring them together in the call."""
    module = GRU(4, 5)
    module.bias_hh_l0 = nn.Parameter(module.bias_hh_l0.detach().double())
    module.flatten_parameters()
    assert not flattened
