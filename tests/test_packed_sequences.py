# SPDX-License-Identifier: Apache-2.0
"""Packed sequences that `torch.nn.utils.rnn` does not make: sizes that do not fit, no rows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import gru_fast

LAYERS = {"GRU": gru_fast.GRU, "LayerNormGRU": gru_fast.LayerNormGRU}
Make = Callable[..., nn.Module]

# Batch sizes and the number of rows that come with them.
MALFORMED = {
    "zero inside": ([1, 0, 1], 2, ">= 1, got 0 at step 1"),
    "zeros inside": ([2, 0, 0, 2], 4, ">= 1, got 0 at step 1"),
    "zero at the end": ([2, 1, 0], 3, ">= 1, got 0 at step 2"),
    "zero first": ([0, 2], 2, ">= 1, got 0 at step 0"),
    "negative": ([2, -1, 1], 2, ">= 1, got -1 at step 1"),
    "negative first": ([-1, 3], 2, ">= 1, got -1 at step 0"),
    "rise": ([1, 2, 1], 4, "never rise, 1 or less, got 2 at step 1"),
    "too many rows": ([2, 1], 4, "rows of data, 4, got the sum 3"),
    "too few rows": ([2, 1], 2, "rows of data, 2, got the sum 3"),
    "no rows": ([1], 0, "rows of data, 0, got the sum 1"),
    "far too many": ([2**62], 3, f"rows of data, 3, got the sum {2**62}"),
    "sum without 64 bits": ([2**62] * 4, 3, f"rows of data, 3, got the sum {2**64}"),
}


@pytest.fixture(params=LAYERS)
def make(request: pytest.FixtureRequest) -> Make:
    made: Make = LAYERS[request.param]
    return made


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", MALFORMED)
def test_batch_sizes_that_do_not_fit_are_refused(make: Make, name: str, grad: bool) -> None:
    sizes, rows, message = MALFORMED[name]
    given = PackedSequence(torch.randn(rows, 3), torch.tensor(sizes))
    match = f"^batch_sizes: expected values .*{message}$"
    for layer in (make(3, 4), make(3, 4, 2, bidirectional=True, dropout=0.5)):
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=match):
            layer(given)


@pytest.mark.parametrize(
    ("sizes", "got"),
    [
        (torch.tensor([2, 1]).int(), r"\(2,\) of torch.int32"),
        (torch.tensor([[2], [1]]), r"\(2, 1\)"),
    ],
)
def test_batch_sizes_are_a_vector_of_int64(make: Make, sizes: torch.Tensor, got: str) -> None:
    with pytest.raises(RuntimeError, match=f"batch_sizes: expected .* int64, got shape {got}"):
        make(3, 4)(PackedSequence(torch.randn(3, 3), sizes))


def test_batch_sizes_that_change_before_backward_are_refused() -> None:
    sizes = torch.tensor([2, 1, 1])
    output, _ = gru_fast.GRU(3, 4)(PackedSequence(torch.randn(4, 3), sizes))
    sizes[:] = torch.tensor([2, 0, 2])
    if type(output.data.grad_fn).__name__ == "GRULayerBackward":  # else they were read before
        with pytest.raises(RuntimeError, match="batch_sizes: expected values >= 1, got 0 at step"):
            output.data.sum().backward()


OPTIONS = (
    {},
    {"num_layers": 3, "dropout": 0.5},
    {"bidirectional": True, "batch_first": True},
    {"num_layers": 2, "bidirectional": True, "dropout": 0.5},
)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("sizes", [[0], [0, 0]], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_rows_are_what_they_are_to_nn_gru(
    make: Make, options: dict[str, Any], sizes: list[int], grad: bool
) -> None:
    results = []
    for layer in (make(3, 4, **options), nn.GRU(3, 4, **options)):
        data = torch.randn(0, 3, requires_grad=True)
        states = layer.num_layers * (1 + layer.bidirectional)
        hx = torch.randn(states, 0, 4, requires_grad=True)
        indices = torch.zeros(0).long()
        for given in (
            (PackedSequence(data, torch.tensor(sizes)),),
            (PackedSequence(data, torch.tensor(sizes), indices, indices), hx),
        ):
            before = torch.get_rng_state()
            with torch.set_grad_enabled(grad):
                output, h_n = layer(*given)
            assert torch.equal(torch.get_rng_state(), before)
            assert output.batch_sizes.tolist() == sizes
            assert (output.sorted_indices is None) == (len(given) == 1)
            results.append([output.data, h_n])
            if grad:
                leaves = [data, *given[1:], *list(layer.parameters())[:2]]
                results[-1] += torch.autograd.grad(output.data.sum() + h_n.sum(), leaves)
    torch.testing.assert_close(results[:2], results[2:])


# Dynamo looks at all attributes of a tensor with which it goes on after a break.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_with_a_break_in_the_graph(make: Make, fresh_compiler: None) -> None:
    """The sizes are values: they are read, and refused, between two graphs."""
    layer = make(3, 4, 2, bidirectional=True)
    compiled = torch.compile(layer, backend="aot_eager")
    for lengths in ([5, 2, 3], [4, 4, 1]):
        x = torch.randn(5, 3, 3)
        given = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
        data = given.data.requires_grad_()
        results = [(output.data, h_n) for output, h_n in (layer(given), compiled(given))]
        leaves = [data, *layer.parameters()]
        grads = [torch.autograd.grad(r[0].square().sum() + r[1].sum(), leaves) for r in results]
        torch.testing.assert_close(results[1], results[0])
        torch.testing.assert_close(grads[1], grads[0])
    with pytest.raises(RuntimeError, match="batch_sizes: expected values >= 1, got 0 at step 1"):
        compiled(PackedSequence(torch.randn(4, 3), torch.tensor([2, 0, 2])))


def test_one_graph_is_refused_with_what_takes_its_place(make: Make, fresh_compiler: None) -> None:
    layer = make(3, 4)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x, lengths = torch.randn(5, 3, 3), torch.tensor([5, 3, 2])
    with pytest.raises(torch._dynamo.exc.Unsupported, match="lengths= instead"):
        compiled(pack_padded_sequence(x, lengths))
    torch.testing.assert_close(compiled(x, lengths=lengths), layer(x, lengths=lengths))
