# SPDX-License-Identifier: Apache-2.0
"""Arguments that no kernel can take: which one it is, what was expected, and what to do."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import gru_fast
from gru_fast import functional

I, H = 3, 4  # noqa: E741


def with_weight(module: Any, name: str, change: Callable[[Tensor], Tensor]) -> Any:
    """The module with one of its weights changed."""
    setattr(module, name, nn.Parameter(change(getattr(module, name).detach())))
    return module


def rows() -> PackedSequence:
    return pack_sequence([torch.randn(3, I), torch.randn(2, I)])


def refused(message: str) -> Any:
    return pytest.raises(RuntimeError, match=f"^{re.escape(message)}$")


def not_dense(name: str, layout: str) -> str:
    return f"{name}: expected a dense tensor, got torch.{layout}: call .to_dense() on it"


LAYOUTS = {
    "sparse_coo": Tensor.to_sparse,
    "sparse_csr": Tensor.to_sparse_csr,
    "sparse_csc": Tensor.to_sparse_csc,
    "_mkldnn": Tensor.to_mkldnn,
}
pytestmark = pytest.mark.filterwarnings("ignore:Sparse CS. tensor support is in beta")
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
with_and_without_grad = pytest.mark.parametrize("grad", [False, True])


@each_layout
@with_and_without_grad
@pytest.mark.parametrize("name", ["input", "hx", "weight_ih", "weight_hh", "bias_hh"])
def test_a_cell_names_what_is_not_dense(name: str, layout: str, grad: bool) -> None:
    if name == "bias_hh" and layout.startswith("sparse_cs"):
        pytest.skip("a vector has no such layout")
    cell, given = gru_fast.GRUCell(I, H), {"input": torch.eye(I), "hx": torch.ones(I, H)}
    change = LAYOUTS[layout]
    if name in given:
        given[name] = change(given[name])
    else:
        with_weight(cell, name, change)
    with torch.set_grad_enabled(grad), refused(not_dense(name, layout)):
        cell(**given)


@with_and_without_grad
@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr"])
@pytest.mark.parametrize("name", ["weight_ih_l1", "weight_hh_l1_reverse"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_stack_names_the_weight_that_is_not_dense(
    name: str, layout: str, packed: bool, grad: bool
) -> None:
    rnn = with_weight(gru_fast.GRU(I, H, 2, bidirectional=True), name, LAYOUTS[layout])
    x: Any = rows() if packed else torch.randn(5, 2, I)
    with torch.set_grad_enabled(grad), refused(not_dense(name, layout)):
        rnn(x)


@with_and_without_grad
@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr"])
@pytest.mark.parametrize("name", ["input", "hx", "reset_state"])
def test_a_stack_names_the_state_or_input_that_is_not_dense(
    name: str, layout: str, grad: bool
) -> None:
    # Unbatched, for a matrix is what every layout has.
    given = {"input": torch.randn(5, I), "hx": torch.ones(1, H), "reset_state": torch.ones(1, H)}
    given[name] = LAYOUTS[layout](given[name])
    with torch.set_grad_enabled(grad), refused(not_dense(name, layout)):
        gru_fast.GRU(I, H)(**given, reset_mask=torch.zeros(5, dtype=torch.bool))


def test_packed_rows_that_are_not_dense() -> None:
    data, *others = rows()
    with refused(not_dense("input", "sparse_coo")):
        gru_fast.GRU(I, H)(PackedSequence(data.to_sparse(), *others))


def test_a_layer_with_norms_names_its_gain() -> None:
    rnn = with_weight(gru_fast.LayerNormGRU(I, H), "gamma_hh_l0", Tensor.to_sparse)
    with refused(not_dense("gamma_hh_l0", "sparse_coo")):
        rnn(torch.randn(5, 2, I))


def test_functions_name_them_too() -> None:
    rnn = gru_fast.GRU(I, H, bidirectional=True)
    params = [w.detach() for w in rnn.parameters()]
    params[1] = params[1].to_sparse_csr()
    with refused(not_dense("weight_hh_l0", "sparse_csr")):
        functional.gru(torch.randn(5, 2, I), None, params, bidirectional=True)
