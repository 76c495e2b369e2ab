# SPDX-License-Identifier: Apache-2.0
"""Rows of different length: kernels that compute no padding, and no look at values on a device.

The module's numbers beside PackedSequence are in test_forward.py.
"""

from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import gru_fast
from cases import CELLS, Case, LayerInputs, layer_inputs
from gru_fast import ops
from helpers import assert_parity
from op_calls import labels, run, run_specification
from torch_threads import torch_threads

needs_kernels = pytest.mark.skipif(not ops.HAS_CPU_KERNELS, reason="built without CPU kernels")

# Several chunks of the backward pass, if its rows are counted with or without the padding.
T, B = 140, 5
RAGGED = (
    [140, 3, 0, 77, 140],
    [0, 0, 0, 0, 0],
    [1, 0, 0, 0, 0],
    [0, 0, 0, 0, 140],
    [9, 8, 7, 6, 5],
)
GRADS = [
    torch.randn(s, generator=torch.Generator().manual_seed(5)) for s in ((T, B, 42), (2, B, 21))
]


@pytest.fixture(params=RAGGED, ids=str)
def lengths(request: pytest.FixtureRequest) -> torch.Tensor:
    return torch.tensor(request.param)


def ragged(cell: str, lengths: torch.Tensor, dtype: torch.dtype) -> LayerInputs:
    case = Case(cell, "everything", (False, True), T=T, B=B, I=6, H=21)
    inputs = layer_inputs(case, dtype, grad=True)
    inputs.lengths = lengths
    return inputs


@pytest.fixture
def threads() -> Iterator[tuple[int, ...]]:
    with torch_threads():
        yield (1, 2, 3)


@needs_kernels
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("cell", CELLS)
class TestKernels:
    def test_results_and_gradients(self, cell: str, lengths: torch.Tensor) -> None:
        inputs = ragged(cell, lengths, torch.float64)
        padding = torch.arange(T)[:, None] >= lengths
        garbage = torch.where(padding[..., None], torch.nan, inputs.x.detach()).requires_grad_()
        grads = [g.double() for g in GRADS]
        truth = run_specification("layer", inputs.arguments(), grads)
        for recompute in (False, True):
            found = run(ops.layer, inputs.arguments(x=garbage, recompute=recompute), grads)
            for name, a, b in zip(labels(inputs.arguments(), ops.layer), found, truth, strict=True):
                assert_parity(name, a, b, b)
            assert not found[0][padding].any() and not found[2][padding].any()
        workspace = ops.layer(*inputs.arguments(x=garbage))[2]
        assert workspace.isfinite().all() and not workspace[padding].any()

    def test_threads_change_no_bit(
        self, cell: str, lengths: torch.Tensor, threads: tuple[int, ...]
    ) -> None:
        inputs = ragged(cell, lengths, torch.float32)
        found = []
        for count in threads:
            torch.set_num_threads(count)
            found += [
                run(ops.layer, inputs.arguments(recompute=recompute), GRADS)
                for recompute in (False, True)
            ]
        for other in found[1:]:
            assert all(map(torch.equal, other, found[0]))

    def test_a_row_is_the_same_alone(self, cell: str, lengths: torch.Tensor) -> None:
        inputs = ragged(cell, lengths, torch.float32)
        output, h_n, _ = ops.layer(*inputs.arguments())
        for b in range(B):
            row = slice(b, b + 1)
            alone = ops.layer(
                *inputs.arguments(
                    x=inputs.x[:, row], h0=inputs.h0[:, row], lengths=lengths[row],
                    reset_mask=inputs.reset_mask[:, row], h_scale=inputs.h_scale[row],
                    reset_state=inputs.reset_state[:, row],
                )
            )  # fmt: skip
            assert torch.equal(alone[0], output[:, row]) and torch.equal(alone[1], h_n[:, row])


@pytest.mark.parametrize("bidirectional", [False, True])
def test_values_on_a_device_are_not_read(
    bidirectional: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fake tensors have none to read; test_triton_compiled.py looks at what launches kernels."""
    monkeypatch.setattr(torch.nn.RNNBase, "reset_parameters", lambda self: None)
    with torch.no_grad(), FakeTensorMode():
        rnn = gru_fast.GRU(3, 8, bidirectional=bidirectional, device="cuda", backend="triton")
        x = torch.empty(6, 4, 3, device="cuda")
        mask = torch.empty(6, 4, dtype=torch.bool, device="cuda")
        lengths = torch.empty(4, dtype=torch.int64, device="cuda")
        output, h_n = rnn(x, lengths=lengths, reset_mask=mask)
    assert output.device.type == h_n.device.type == "cuda"


def test_lengths_of_another_device() -> None:
    """As a loader gives them, beside an input that was moved to the GPU."""
    lengths = torch.tensor([1, 0])
    for rnn in (gru_fast.GRU(3, 4, device="meta"), gru_fast.LayerNormGRU(3, 4, device="meta")):
        assert rnn(torch.empty(5, 2, 3, device="meta"), lengths=lengths)[0].is_meta
