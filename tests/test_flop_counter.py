# SPDX-License-Identifier: Apache-2.0
"""`torch.utils.flop_counter` counts what it counts for torch's own modules."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

import gru_fast

PAIRS: dict[str, tuple[Callable[..., nn.Module], Callable[..., nn.Module], Any]] = {
    "layers": (nn.GRU, gru_fast.GRU, {"num_layers": 2, "bidirectional": True}),
    "cell": (nn.GRUCell, gru_fast.GRUCell, {}),
}


def counted(module: nn.Module, x: torch.Tensor | PackedSequence, backward: bool) -> int:
    counter = FlopCounterMode(display=False)
    with counter, torch.set_grad_enabled(backward):
        result = module(x)
        output = result[0] if isinstance(result, tuple) else result
        if backward:
            output.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_as_torchs(name: str, backward: bool) -> None:
    torchs, ours, options = PAIRS[name]
    x = torch.randn(7, 3) if name == "cell" else torch.randn(4, 7, 3)
    theirs, own = torchs(3, 5, **options), ours(3, 5, **options)
    own.load_state_dict(theirs.state_dict())
    expected = counted(theirs, x, backward)
    assert counted(own, x, backward) == expected > 0


def test_packed_rows_are_counted_as_padded_ones() -> None:
    x, lengths = torch.randn(10, 2, 8), torch.tensor([10, 1])
    packed, own = pack_padded_sequence(x, lengths), gru_fast.GRU(8, 16)
    assert counted(own, packed, False) == counted(own, x, False) == 2 * 10 * 2 * 48 * (8 + 16)
    theirs = counted(nn.GRU(8, 16), packed, False)
    assert gru_fast.explain(own, packed).flops == theirs == 2 * 11 * 48 * (8 + 16)


def test_meta_and_layer_norm() -> None:
    x = torch.randn(4, 7, 3, device="meta")
    plain, normed = gru_fast.GRU(3, 5, device="meta"), gru_fast.LayerNormGRU(3, 5, device="meta")
    assert counted(normed, x, False) == counted(plain, x, False) == 2 * 4 * 7 * 15 * (3 + 5)


def test_a_named_backend_is_left_to_it() -> None:
    if "cpu" not in gru_fast.available_backends():
        pytest.skip("no CPU kernels")
    assert counted(gru_fast.GRU(3, 5, backend="cpu"), torch.randn(4, 7, 3), False) == 0
