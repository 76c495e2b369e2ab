# SPDX-License-Identifier: Apache-2.0
"""`prepacked`: the same bits, packed once, and again when a weight has changed."""

import copy
import gc
import pickle
import sys
import threading
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import gru_fast
from cases import CELLS
from direct_spy import DTYPES, Spy
from gru_fast import direct
from prepack_stepper import H, I, Stepper

_C = pytest.importorskip("gru_fast._C", reason="gru_fast was built without its CPU kernels")


pytestmark = pytest.mark.usefixtures("no_gradients")


def users(weight: Tensor) -> int:
    """How many tensors share the memory of one."""
    count: Any = torch._C._storage_Use_Count  # type: ignore[attr-defined]
    return count(weight.untyped_storage()._cdata) - 1  # type: ignore[no-any-return]


@pytest.mark.parametrize("steps", [1, 2, 9])
@pytest.mark.parametrize("batch", [None, 1, 2, 3, 33])
@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_same_bits(
    spy: Spy, isa: str, cell: str, both: bool, layers: int, batch: int | None, steps: int
) -> None:
    for bias, batch_first in ((True, False), (False, True)):
        module = gru_fast.GRU(I, H, layers, bias, batch_first, bidirectional=both, cell=cell)
        rows = () if batch is None else (batch,)
        x = torch.randn(*((*rows, steps, I) if batch_first else (steps, *rows, I)))
        h = torch.randn(layers * (1 + both), *rows, H)
        expected = module(x, h)
        before, x_before, h_before = spy.taken, x.clone(), h.clone()
        with gru_fast.prepacked(module):
            first, again = module(x, h), module(x, h)
        assert spy.taken == before + 2
        for results in (first, again):
            for given, wanted in zip(results, expected, strict=True):
                assert torch.equal(given, wanted) and given.stride() == wanted.stride()
        assert torch.equal(x, x_before) and torch.equal(h, h_before)


@pytest.mark.parametrize("steps", [1, 9])
@pytest.mark.parametrize("batch", [None, 1, 2, 3, 33])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d is not torch.float32], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_other_dtypes(
    spy: Spy, isa: str, cell: str, dtype: torch.dtype, layers: int, batch: int | None, steps: int
) -> None:
    module = gru_fast.GRU(I, H, layers, cell=cell, dtype=dtype)
    rows = () if batch is None else (batch,)
    x = torch.randn(steps, *rows, I, dtype=dtype)
    h = torch.randn(layers, *rows, H, dtype=dtype)
    before = module(x, h)
    with gru_fast.prepacked(module):
        assert all(map(torch.equal, module(x, h), before))
        module.weight_hh_l0.data.mul_(2)  # not counted: shows whether it is packed
        assert all(map(torch.equal, module(x, h), before))
    after = module(x, h)
    assert not torch.equal(after[0], before[0])
    with gru_fast.prepacked(module):
        assert all(map(torch.equal, module(x, h), after))
        module.weight_hh_l0.mul_(0.5)
        assert all(map(torch.equal, module(x, h), before))


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0_reverse"])
def test_one_direction_that_changes(spy: Spy, name: str) -> None:
    module = gru_fast.GRU(I, H, bidirectional=True)
    weight, x = module.get_parameter(name), torch.randn(3, 2, I)
    before = module(x)
    with gru_fast.prepacked(module):
        assert all(map(torch.equal, module(x), before))
        weight.data.mul_(2)  # not counted: shows that it is packed
        assert all(map(torch.equal, module(x), before))
        weight.mul_(2)
        after = module(x)
        weight.mul_(0.25)
        assert all(map(torch.equal, module(x), before))
    weight.mul_(4)
    assert all(map(torch.equal, module(x), after)) and not torch.equal(after[0], before[0])
    assert spy.taken == 6


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0_reverse"])
def test_a_direction_that_is_not_packed(spy: Spy, name: str) -> None:
    """Another tensor in place of one that was: both are packed by the call."""
    module = gru_fast.GRU(I, H, bidirectional=True)
    x = torch.randn(3, 2, I)
    with gru_fast.prepacked(module):
        before = module(x)
        setattr(module, name, nn.Parameter(2 * module.get_parameter(name)))
        after = module(x)
    assert all(map(torch.equal, module(x), after)) and not torch.equal(after[0], before[0])
    assert spy.taken == 3


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_same_bits_where_units_and_threads_are_many(batch: int, threads: int) -> None:
    for cell in CELLS:
        module = gru_fast.GRU(300, 530, 2, cell=cell)
        x, h = torch.randn(7, batch, 300), torch.randn(2, batch, 530)
        output, h_n = module(x, h)
        state = h
        with gru_fast.prepacked(module):
            for given, wanted in zip(module(x, h), (output, h_n), strict=True):
                assert torch.equal(given, wanted)
            for t in range(7):
                step, state = module(x[t, None], state)
                assert torch.equal(step[0], output[t])
        assert torch.equal(state, h_n)


@pytest.mark.parametrize("batch", [None, 1, 2, 3, 33])
@pytest.mark.parametrize("cell", CELLS)
def test_cells(spy: Spy, isa: str, cell: str, batch: int | None) -> None:
    module = gru_fast.GRUCell(I, H, cell=cell)
    rows = () if batch is None else (batch,)
    x, h = torch.randn(*rows, I), torch.randn(*rows, H)
    expected = module(x, h)
    with gru_fast.prepacked(module):
        assert torch.equal(module(x, h), expected)
    assert spy.taken == 2


def test_every_layer_inside_a_module() -> None:
    model = nn.Sequential(nn.ModuleDict({"a": gru_fast.GRU(I, H), "b": gru_fast.GRUCell(I, H)}))
    with gru_fast.prepacked(model):
        for name, weight in model.named_parameters():
            assert users(weight) == (2 if "weight" in name else 1)
    assert all(users(weight) == 1 for weight in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_smaller_instruction_set_inside(dtype: torch.dtype) -> None:
    step, best = Stepper(), _C.cpu_isa()
    step.module.to(dtype)
    step.x, step.h = step.x.to(dtype), step.h.to(dtype)
    try:
        with gru_fast.prepacked(step.module):
            for isa in (*_C.cpu_isas(), best):
                _C.set_cpu_isa(isa)
                assert torch.equal(step(), step.expected())
    finally:
        _C.set_cpu_isa(best)


def test_nested_and_ended_in_any_order() -> None:
    step = Stepper()
    before = step()
    first, second = ExitStack(), ExitStack()
    first.enter_context(gru_fast.prepacked(step.module))
    second.enter_context(gru_fast.prepacked(nn.Sequential(step.module)))
    step()
    step.module.weight_hh_l0.data.mul_(2)  # not counted: shows what is packed
    first.close()
    assert torch.equal(step(), before)
    second.close()
    assert torch.equal(step(), step.expected())


def test_a_weight_that_has_moved_when_an_inner_block_opens() -> None:
    step = Stepper()
    with gru_fast.prepacked(step.module):
        step()
        step.module.weight_hh_l0.data = torch.randn(3 * H, H)
        with gru_fast.prepacked(step.module):
            assert torch.equal(step(), step.expected())
        assert torch.equal(step(), step.expected())


def test_ends_after_an_exception_and_keeps_nothing_alive() -> None:
    step = Stepper()
    weight = step.module.weight_hh_l0
    with pytest.raises(KeyError), gru_fast.prepacked(step.module):
        step()
        assert users(weight) == 2
        raise KeyError
    assert users(weight) == 1


def test_memory_that_is_given_up_is_kept_so_that_no_other_tensor_gets_its_address() -> None:
    step = Stepper()
    with gru_fast.prepacked(step.module):
        step()
        address = step.module.weight_hh_l0.data_ptr()
        step.module.weight_hh_l0 = nn.Parameter(torch.zeros(3 * H, H))
        gc.collect()
        others = [torch.empty(3 * H, H) for _ in range(100)]
        assert address not in [t.data_ptr() for t in others]
        assert torch.equal(step(), step.expected())


def test_memory_that_is_moved_to_be_shared_is_not_taken_for_what_lies_there_then() -> None:
    module, other = gru_fast.GRU(I, H), gru_fast.GRU(I, H)
    x, h = torch.randn(1, I), torch.randn(1, H)
    names = ("weight_ih_l0", "weight_hh_l0")
    places = {name: module.get_parameter(name).numpy().copy() for name in names}
    for name, place in places.items():
        setattr(module, name, nn.Parameter(torch.from_numpy(place)))
    with gru_fast.prepacked(module):
        before = module(x, h)
        module.share_memory()
        for name, place in places.items():
            place[:] = other.get_parameter(name).numpy()
            setattr(other, name, nn.Parameter(torch.from_numpy(place)))
        inside = other(x, h)
        assert all(map(torch.equal, module(x, h), before))
    assert all(map(torch.equal, inside, other(x, h)))


def test_a_weight_that_comes_back_to_memory_that_it_gave_up_is_read_again() -> None:
    step = Stepper()
    place = torch.randn(3 * H, H).numpy()
    step.module.weight_hh_l0 = nn.Parameter(torch.from_numpy(place))
    with gru_fast.prepacked(step.module):
        step()
        step.module.share_memory()
        place[:] += 1
        step.module.weight_hh_l0.data = torch.from_numpy(place)
        assert torch.equal(step(), step.expected())


def test_copies_made_inside_are_plain() -> None:
    step = Stepper()
    with gru_fast.prepacked(step.module):
        step()
        copies = [copy.deepcopy(step.module), pickle.loads(pickle.dumps(step.module))]
        for module in copies:
            assert users(module.weight_hh_l0) == 1
            assert torch.equal(module(step.x, step.h)[0], step())


def test_threads_that_step_while_a_block_opens_and_closes() -> None:
    step = Stepper()
    expected, wrong, stop = step(), [], threading.Event()

    def run() -> None:
        with torch.no_grad():
            while not stop.is_set():
                if not torch.equal(step(), expected):
                    wrong.append(1)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(300):
        with gru_fast.prepacked(step.module):
            step()
            step.module.weight_hh_l0.mul_(1)  # counted: packed again
            step()
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("options", [{"num_heads": 2}, {"num_layers": 9}], ids=str)
def test_what_is_not_served_is_as_outside(options: dict[str, Any]) -> None:
    module = gru_fast.GRU(I, 2 * H, **options)
    x, h = torch.randn(3, 2, I), torch.randn(module.num_layers, 2, 2 * H)
    expected = module(x, h)
    with gru_fast.prepacked(module):
        assert torch.equal(module(x, h)[0], expected[0])


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("batch", [None, 1, 4])
def test_a_learned_state_is_served(spy: Spy, batch: int | None, layers: int) -> None:
    module = gru_fast.GRU(I, H, layers, learn_h0=True)
    module.h0.normal_()
    rows = () if batch is None else (batch,)
    x = torch.randn(2, *rows, I)
    with direct.turned_off():
        expected = module(x)
    with gru_fast.prepacked(module):
        assert all(map(torch.equal, module(x), expected))
        module.weight_hh_l0.data.mul_(2)  # not counted: shows whether it is packed
        assert all(map(torch.equal, module(x), expected))
    assert spy.taken == 2


def test_with_gradients_it_is_as_outside(spy: Spy) -> None:
    step = Stepper()
    with torch.enable_grad():
        expected = torch.autograd.grad(step().sum(), list(step.module.parameters()))
        with gru_fast.prepacked(step.module):
            step.module.weight_hh_l0.data.mul_(2)  # not counted: shows what would be packed
            doubled = step()
            step.module.weight_hh_l0.data.div_(2)
            given = torch.autograd.grad(step().sum(), list(step.module.parameters()))
    assert all(map(torch.equal, given, expected))
    assert not torch.equal(doubled, step()) and spy.taken == 4


def test_sequences_that_are_not_plain_go_by_the_ops(spy: Spy) -> None:
    module = gru_fast.GRU(I, H)
    x, h = torch.randn(4, 2, 2 * I)[:, :, ::2], torch.randn(1, 2, H)
    lengths = torch.tensor([4, 2], dtype=torch.int32)
    expected = module(x, h), module(x, h, lengths=lengths)
    with gru_fast.prepacked(module):
        given = module(x, h), module(x, h, lengths=lengths)
    assert spy.taken == 0
    for results, wanted in zip(given, expected, strict=True):
        assert all(map(torch.equal, results, wanted))


def test_layers_of_which_some_are_not_packed(spy: Spy) -> None:
    module = gru_fast.GRU(I, H, 2)
    one, several, h = torch.randn(1, 2, I), torch.randn(3, 2, I), torch.randn(2, 2, H)
    expected = module(one, h), module(several, h)
    spy.taken = 0
    with gru_fast.prepacked(module):
        module.weight_hh_l1 = nn.Parameter(module.weight_hh_l1.clone())
        given = module(one, h), module(several, h)
    assert spy.taken == 2
    for results, wanted in zip(given, expected, strict=True):
        assert all(map(torch.equal, results, wanted))


def test_modules_that_share_memory_have_their_own_panels(spy: Spy) -> None:
    """One weight in several cells, on both sides of one module, and a part of it in two others."""
    after, before, update = (gru_fast.GRU(H, H, cell=cell) for cell in CELLS)
    tied, small = gru_fast.GRU(H, H, cell="reset_before"), gru_fast.GRU(7, 7)
    memory = after.weight_hh_l0
    before.weight_hh_l0 = tied.weight_ih_l0 = tied.weight_hh_l0 = memory
    update.weight_hh_l0 = nn.Parameter(memory[: 2 * H])
    small.weight_hh_l0 = nn.Parameter(memory.view(-1)[: 3 * 49].view(21, 7))
    modules = [after, before, update, tied, small]
    x, h = torch.randn(3, 2, H), torch.randn(1, 2, H)

    def outputs() -> list[Tensor]:
        sizes = [m.hidden_size for m in modules]
        given = [(x[..., :n].contiguous(), h[..., :n].contiguous()) for n in sizes]
        return [m(*inputs)[0] for m, inputs in zip(modules, given, strict=True)]

    expected = outputs()
    for some in (modules, modules[::-1], [tied]):
        with gru_fast.prepacked(nn.ModuleList(some)):
            assert all(map(torch.equal, outputs(), expected))
    assert spy.taken == 20


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"module: expected an nn.Module, got function"):
        with gru_fast.prepacked(lambda x: x):  # type: ignore[arg-type]
            pass
    with torch.inference_mode():
        cell = gru_fast.GRUCell(I, H)
    with pytest.raises(RuntimeError, match=r"0.weight_ih: expected a tensor made outside of"):
        with gru_fast.prepacked(nn.Sequential(cell)):
            pass


def test_the_native_function_checks_what_it_is_given() -> None:
    weight = torch.zeros(3 * H, H)
    for bad in (
        (None, "reset_after", True, 1),
        (weight, "lstm", True, 1),
        (weight[:-1], "reset_after", True, 1),
        (weight[:, :-1], "reset_after", False, 1),
        (weight.int(), "reset_after", False, 1),
        (torch.zeros(3 * H, H + 1), "reset_after", True, 1),
        (torch.zeros(3 * H), "reset_after", False, 1),
        (torch.zeros(0, H), "reset_after", False, 1),
        (weight.to("meta"), "reset_after", False, 1),
        (weight.to_sparse(), "reset_after", False, 1),
        (weight, "reset_after", True, 2),
        (weight, "reset_after", False, 0),
        (weight, "reset_after", False, 7),
        (torch.zeros(3 * 65, 1), "reset_after", True, 65),
    ):
        assert _C.prepack(*bad) is None
    with pytest.raises(TypeError, match="expected 4 arguments, got 1"):
        _C.prepack(weight)  # type: ignore[call-arg]
    assert _C.prepack(weight, "reset_after", True, 1) is not None


def test_no_optimizer_is_watched_afterwards() -> None:
    hooks = sys.modules[Optimizer.__module__]._global_optimizer_post_hooks
    before = len(hooks)
    with gru_fast.prepacked(gru_fast.GRU(I, H)):
        assert len(hooks) == before + 1
    assert len(hooks) == before
