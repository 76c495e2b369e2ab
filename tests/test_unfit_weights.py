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

Layer = type[gru_fast.GRU] | type[gru_fast.LayerNormGRU]


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


DIRECTIONS = [
    ("weight_ih_l0", "weight_ih_l0_reverse"),
    ("weight_hh_l1", "weight_hh_l1_reverse"),
    ("bias_ih_l0", "bias_ih_l0_reverse"),
    ("bias_hh_l1", "bias_hh_l1_reverse"),
]


@with_and_without_grad
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("first", "second"), DIRECTIONS)
def test_both_directions_have_one_dtype(
    first: str, second: str, packed: bool, dtype: torch.dtype, grad: bool
) -> None:
    rnn = with_weight(gru_fast.GRU(I, H, 2, bidirectional=True), second, lambda w: w.to(dtype))
    theirs = nn.GRU(I, H, 2, bidirectional=True)
    with_weight(theirs, second, lambda w: w.to(dtype))
    x: Any = rows() if packed else torch.randn(5, 2, I)
    with pytest.raises(RuntimeError):
        theirs(x)
    message = f"{first} and {second}: expected one dtype, got torch.float32 and {dtype}"
    with torch.set_grad_enabled(grad), refused(message):
        rnn(x)


@pytest.mark.parametrize("cls", [gru_fast.GRU, gru_fast.LayerNormGRU])
def test_a_whole_direction_of_another_dtype(cls: Layer) -> None:
    rnn = cls(I, H, bidirectional=True)
    for name, _ in list(rnn.named_parameters()):
        if name.endswith("_reverse"):
            with_weight(rnn, name, Tensor.half)
    with pytest.raises(RuntimeError, match=r"^weight_ih_l0 and weight_ih_l0_reverse: expected one"):
        rnn(torch.randn(5, 2, I))


def test_a_gain_of_another_dtype() -> None:
    rnn = gru_fast.LayerNormGRU(I, H, bidirectional=True, bias=False)
    with_weight(rnn, "gamma_hh_l0_reverse", Tensor.half)
    with pytest.raises(RuntimeError, match=r"^gamma_hh_l0 and gamma_hh_l0_reverse: expected one"):
        rnn(torch.randn(5, 2, I))


def test_under_autocast_the_dtypes_of_directions_may_differ() -> None:
    """As those of nn.GRU may, whose products cast them."""
    rnn = gru_fast.GRU(I, H, bidirectional=True)
    theirs = nn.GRU(I, H, bidirectional=True)
    theirs.load_state_dict(rnn.state_dict())
    x = torch.randn(5, 2, I)
    for module in (rnn, theirs):
        for name, _ in list(module.named_parameters()):
            if name.endswith("_reverse"):
                with_weight(module, name, Tensor.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(rnn(x)[0], theirs(x)[0], atol=0.05, rtol=0, check_dtype=False)


@with_and_without_grad
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("first", "second"), DIRECTIONS)
def test_both_directions_have_one_shape(first: str, second: str, packed: bool, grad: bool) -> None:
    rnn = with_weight(gru_fast.GRU(I, H, 2, bidirectional=True), first, lambda w: w[:9])
    whole = tuple(getattr(rnn, second).shape)
    message = f"{first} and {second}: expected one shape, got {(9, *whole[1:])} and {whole}"
    x: Any = rows() if packed else torch.randn(5, 2, I)
    with torch.set_grad_enabled(grad), refused(message):
        rnn(x)


@with_and_without_grad
@pytest.mark.parametrize("dims", [0, 1, 3])
@pytest.mark.parametrize("name", ["weight_ih", "weight_hh"])
def test_a_weight_that_is_no_matrix(name: str, dims: int, grad: bool) -> None:
    def changed(weight: Tensor) -> Tensor:
        return {0: weight[0, 0], 1: weight[:, 0], 3: weight[None]}[dims]

    message = ": expected 2 dimensions, got "
    x, h = torch.randn(5, 2, I), torch.randn(1, 2, H)
    with torch.set_grad_enabled(grad):
        with refused(f"{name}{message}{dims}"):
            with_weight(gru_fast.GRUCell(I, H), name, changed)(x[0], h[0])
        calls: list[Any] = [(x,), (x, h), (rows(),), (rows(), h)]
        for layer in range(2):
            rnn = with_weight(gru_fast.GRU(I, H, 2), f"{name}_l{layer}", changed)
            for input, *state in calls:
                states = [s.expand(2, 2, H) for s in state]
                with refused(f"{name}_l{layer}{message}{dims}"):
                    rnn(input, *states)


@with_and_without_grad
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kinds", [("weight_ih",), ("weight_ih", "weight_hh", "bias_ih")])
def test_a_later_layer_of_another_dtype_is_not_the_inputs_fault(
    kinds: tuple[str, ...], dtype: torch.dtype, grad: bool
) -> None:
    """A packed call raises what the others do."""
    rnn = gru_fast.GRU(I, H, 2)
    for kind in kinds:
        with_weight(rnn, f"{kind}_l1", lambda w: w.to(dtype))
    texts = []
    for x in (torch.randn(5, 2, I), rows()):
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError) as caught:
            rnn(x)
        texts.append(str(caught.value).splitlines()[0])
    assert "weight_ih: expected the dtype of the input" in texts[0]
    assert texts[1] == texts[0]


def test_a_later_layer_of_another_width_is_not_the_inputs_fault() -> None:
    rnn = with_weight(gru_fast.GRU(I, H, 2), "weight_ih_l1", lambda w: w[:, :3])
    for x in (torch.randn(5, 2, I), rows()):
        with pytest.raises(RuntimeError, match="weight_ih: expected shape"):
            rnn(x)


def test_one_graph_of_two_directions(fresh_compiler: None) -> None:
    rnn = gru_fast.GRU(I, H, 2, bidirectional=True)
    x = torch.randn(5, 2, I)
    compiled = torch.compile(rnn, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x)[0], rnn(x)[0])
    for name, _ in list(rnn.named_parameters()):
        if name.endswith("_reverse"):
            with_weight(rnn, name, Tensor.half)
    with pytest.raises(Exception, match="expected one dtype"):
        compiled(x)


def test_directions_under_vmap() -> None:
    modules = [gru_fast.GRU(I, H, bidirectional=True) for _ in range(2)]
    params, _ = torch.func.stack_module_state(modules)  # type: ignore[arg-type]
    params = {name: p.detach() for name, p in params.items()}
    x = torch.randn(5, 2, I)

    def call(weights: dict[str, Tensor]) -> Tensor:
        output: Tensor = torch.func.functional_call(modules[0], weights, (x,))[0]
        return output

    expected = torch.stack([m(x)[0] for m in modules])
    torch.testing.assert_close(torch.vmap(call)(params), expected)
    params["bias_hh_l0_reverse"] = params["bias_hh_l0_reverse"].half()
    with pytest.raises(RuntimeError, match=r"^bias_hh_l0 and bias_hh_l0_reverse: expected one"):
        torch.vmap(call)(params)


def test_functions_name_them_too() -> None:
    rnn = gru_fast.GRU(I, H, bidirectional=True)
    params = [w.detach() for w in rnn.parameters()]
    params[1] = params[1].to_sparse_csr()
    with refused(not_dense("weight_hh_l0", "sparse_csr")):
        functional.gru(torch.randn(5, 2, I), None, params, bidirectional=True)
