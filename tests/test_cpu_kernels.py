# SPDX-License-Identifier: Apache-2.0
"""What the C++ kernels promise beyond parity: the order of summation, instruction sets, threads."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cases import CELLS, FEATURES, Case, LayerInputs, layer_inputs
from conftest import forced_isa
from gru_fast import ops, reference
from helpers import assert_parity
from torch_threads import torch_threads

_C = pytest.importorskip("gru_fast._C", reason="gru_fast was built without its CPU kernels")

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def forward(inputs: LayerInputs, **changes: object) -> tuple[Tensor, Tensor, Tensor]:
    return ops.layer(*inputs.arguments(**changes))


def backward(
    inputs: LayerInputs,
    output: Tensor,
    workspace: Tensor,
    function: Callable[..., tuple[Tensor, ...]] = ops.layer_backward,
    wanted: Sequence[bool] = (True,) * 8,
    **changes: object,
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(7)

    def normal(shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(output.dtype)

    arguments = inputs.arguments(**changes)
    return function(
        normal(output.shape), normal(inputs.h0.shape), None,
        *arguments[:10], output, workspace, *arguments[10:], list(wanted),
    )  # fmt: skip


def rows_of(inputs: LayerInputs, rows: slice) -> LayerInputs:
    """The same problem for some rows of the batch."""

    def cut(tensor: Tensor | None, dim: int) -> Tensor | None:
        return None if tensor is None else tensor[(slice(None),) * dim + (rows,)]

    return replace(
        inputs,
        x=cut(inputs.x, 1),
        h0=cut(inputs.h0, 1),
        lengths=cut(inputs.lengths, 0),
        reset_mask=cut(inputs.reset_mask, 1),
        reset_state=cut(inputs.reset_state, 1),
        h_scale=cut(inputs.h_scale, 0),
    )


def assert_same_bits(name: str, a: Tensor, b: Tensor) -> None:
    assert torch.equal(a, b), f"{name}: {int((a != b).sum())} of {a.numel()} elements differ"


def assert_same_with_threads(inputs: LayerInputs, counts: tuple[int, ...]) -> None:
    """Results and gradients, to the bit, with each number of threads."""
    results = []
    for threads in counts:
        with torch_threads(threads):
            output, h_n, workspace = forward(inputs)
            results.append((output, h_n, workspace, *backward(inputs, output, workspace)))
    for other in results[1:]:
        for i, (a, b) in enumerate(zip(results[0], other, strict=True)):
            assert_same_bits(f"result {i}", a, b)


# Longer than a block of the sum, so that blocks are under test too.
WIDE = {"I": 300, "H": 270}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
class TestOrderOfSummation:
    """Batch and threads never change a bit."""

    @pytest.mark.parametrize("features", ("plain", "everything"))
    @pytest.mark.parametrize("size", ({"I": 5, "H": 19}, WIDE), ids=("narrow", "wide"))
    def test_batch_slices(
        self, isa: str, cell: str, features: str, size: dict[str, int], dtype: torch.dtype
    ) -> None:
        inputs = layer_inputs(Case(cell, features, (False, True), T=3, B=28, **size), dtype)
        output, h_n, workspace = forward(inputs)
        for begin, end in ((0, 1), (1, 3), (3, 6), (6, 10), (10, 15), (15, 21), (21, 28)):
            part = rows_of(inputs, slice(begin, end))
            some, some_h_n, some_workspace = forward(part)
            assert_same_bits("output", some, output[:, begin:end])
            assert_same_bits("h_n", some_h_n, h_n[:, begin:end])
            assert_same_bits("workspace", some_workspace, workspace[:, begin:end])

    @pytest.mark.parametrize("T, B", ((12, 1), (12, 3), (12, 40), (1, 3), (1, 40)))
    def test_threads(self, isa: str, cell: str, dtype: torch.dtype, T: int, B: int) -> None:
        inputs = layer_inputs(Case(cell, reverse=(False, True), T=T, B=B, **WIDE), dtype)
        assert_same_with_threads(inputs, (1, 2, 3))

    # A single step of up to 16 rows reads weights where they lie; of more it packs them.
    @pytest.mark.parametrize(
        "case, cuts",
        (
            (Case(T=40, B=9, I=6, H=21), (0, 1, 9)),
            (Case(T=1, B=37, **WIDE), (0, 1, 4, 20, 37)),
        ),
        ids=("steps", "step"),
    )
    def test_gradients_of_batch_slices(
        self, isa: str, cell: str, dtype: torch.dtype, case: Case, cuts: tuple[int, ...]
    ) -> None:
        inputs = layer_inputs(replace(case, cell=cell), dtype)
        output, _, workspace = forward(inputs)
        ones = torch.ones_like(output)

        def grads(some: LayerInputs, output: Tensor, workspace: Tensor) -> tuple[Tensor, Tensor]:
            mask = [True, True] + [False] * 6
            arguments = some.arguments()
            both = ops.layer_backward(
                torch.ones_like(output), None, None,
                *arguments[:10], output, workspace, *arguments[10:], mask,
            )  # fmt: skip
            return both[0], both[1]

        grad_x, grad_h0 = grads(inputs, output, workspace)
        assert grad_x.shape == inputs.x.shape and ones.shape == output.shape
        for rows in map(slice, cuts, cuts[1:]):
            some_x, some_h0 = grads(rows_of(inputs, rows), output[:, rows], workspace[:, rows])
            assert_same_bits("grad_x", some_x, grad_x[:, rows])
            assert_same_bits("grad_h0", some_h0, grad_h0[:, rows])


# More weights than the second level of the cache holds: the next tile is asked for ahead, and in
# bfloat16 two blocks of the sum, with a rest, take turns.
FAR = ({"I": 660, "H": 210}, {"I": 1030, "H": 210}, {"I": 1540, "H": 120})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", FAR, ids=str)
def test_weights_from_afar(isa: str, size: dict[str, int], dtype: torch.dtype) -> None:
    """A single step of one or two rows reads them where they lie, of four packs them."""
    inputs = layer_inputs(Case(T=1, B=4, **size), dtype)
    output, _, _ = forward(inputs)
    for rows in (slice(0, 1), slice(1, 3)):
        assert_same_bits("output", forward(rows_of(inputs, rows))[0], output[:, rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_few_steps_with_weights_from_afar(isa: str, cell: str, dtype: torch.dtype) -> None:
    """Up to four steps of one or two rows, or two of more, do not pack them; five do."""
    inputs = layer_inputs(Case(cell, T=5, B=5, I=20, H=850), dtype)
    output, _, _ = forward(inputs)
    for steps, rows in ((4, slice(0, 1)), (4, slice(1, 3)), (2, slice(0, 5)), (3, slice(0, 5))):
        part = rows_of(inputs, rows)
        some, _, _ = forward(part, x=part.x[:steps])
        assert_same_bits("output", some, output[:steps, rows])


@pytest.mark.parametrize("B, reverse", ((8, (False,)), (3, (False, True))), ids=str)
@pytest.mark.parametrize("features", ("plain", "everything"))
@pytest.mark.parametrize("cell", CELLS)
def test_many_threads(cell: str, features: str, B: int, reverse: tuple[bool, ...]) -> None:
    """Four split rows, or groups, and units too; five meet in another way than fewer."""
    inputs = layer_inputs(Case(cell, features, reverse, T=12, B=B, **WIDE), torch.float32)
    assert_same_with_threads(inputs, (1, 4, 5))


# Not in bfloat16: a state is rounded where it leaves a call, and where it is saved.
EXACT = (torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("B", (1, 2, 3))
def test_time_chunks_keep_every_bit(isa: str, cell: str, dtype: torch.dtype, B: int) -> None:
    inputs = layer_inputs(Case(cell, T=7, B=B, **WIDE), dtype)
    output, h_n, _ = forward(inputs)
    for chunks in ((1,) * 7, (2, 1, 4)):
        state, begin = inputs.h0, 0
        for length in chunks:
            x = inputs.x[begin : begin + length]
            some, state, _ = forward(inputs, x=x, h0=state)
            assert_same_bits("output", some, output[begin : begin + length])
            begin += length
        assert_same_bits("h_n", state, h_n)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("features", ("plain", "everything"))
def test_recompute_keeps_every_bit(isa: str, cell: str, features: str, dtype: torch.dtype) -> None:
    if dtype is torch.bfloat16 and not _C.multiplies_bfloat16():
        pytest.skip("forward multiplies states that are not rounded yet")
    inputs = layer_inputs(Case(cell, features, (False, True), T=70, B=5, I=6, H=21), dtype)
    output, _, workspace = forward(inputs)
    saved = backward(inputs, output, workspace)
    rebuilt = backward(inputs, output, workspace.new_empty(0), recompute=True)
    for i, (a, b) in enumerate(zip(saved, rebuilt, strict=True)):
        assert_same_bits(f"gradient {i}", a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_before_the_first_step(
    isa: str, cell: str, features: str, dtype: torch.dtype, threads: int
) -> None:
    """Where none of them is asked for, their product is left out; the others keep every bit."""
    h0, reset_state, h_scale = 1, 6, 7
    for T, B in ((1, 3), (1, 20), (2, 3), (2, 20), (5, 3)):
        inputs = layer_inputs(Case(cell, features, (False, True), T=T, B=B, I=6, H=37), dtype)
        output, _, workspace = forward(inputs)
        every = backward(inputs, output, workspace)
        for asked in ((), (h0,), (reset_state,), (h_scale,)):
            wanted = [i in asked or i not in (h0, reset_state, h_scale) for i in range(8)]
            some = backward(inputs, output, workspace, wanted=wanted)
            for i, (a, b) in enumerate(zip(some, every, strict=True)):
                if wanted[i]:
                    assert_same_bits(f"gradient {i}", a, b)


@pytest.mark.parametrize("features", ("plain", "everything"))
@pytest.mark.parametrize("cell", CELLS)
def test_every_instruction_set(
    isa: str, cell: str, features: str, threads: int, poisoned_memory: None
) -> None:
    for H, B, T in ((1, 40, 30), (7, 3, 50), (33, 18, 4), (65, 2, 9)):
        exact = layer_inputs(Case(cell, features, (False, True), T=T, B=B, I=11, H=H))
        single = exact.to(torch.float32)
        truth = reference.layer(*exact.arguments())
        theirs = reference.layer(*single.arguments())
        ours = forward(single)
        for i, name in enumerate(("output", "h_n", "workspace")):
            assert_parity(name, ours[i], theirs[i], truth[i])
        names = (
            "x",
            "h0",
            "weight_ih",
            "weight_hh",
            "bias_ih",
            "bias_hh",
            "reset_state",
            "h_scale",
        )
        gradients = zip(
            names,
            backward(single, theirs[0], theirs[2]),
            backward(single, theirs[0], theirs[2], reference.layer_backward),
            backward(exact, truth[0], truth[2], reference.layer_backward),
            strict=True,
        )
        for name, mine, single_reference, exact_reference in gradients:
            assert_parity(f"grad {name}", mine, single_reference, exact_reference)


def test_chosen_by_environment() -> None:
    env = {**os.environ, "GRU_FAST_CPU_ISA": "baseline"}
    run = subprocess.run(
        [sys.executable, "-c", "from gru_fast import _C; print(_C.cpu_isa())"],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "baseline"


def test_unknown_instruction_set() -> None:
    with pytest.raises(ValueError, match=r"^instruction set: expected one .*baseline.* got 'mmx'"):
        _C.set_cpu_isa("mmx")
    code = """if True:
        import torch, gru_fast
        thrown_by_operators = RuntimeError if torch.__version__ >= (2, 15) else ValueError
        gru = gru_fast.GRU(2, 3)
        for context in torch.no_grad(), torch.enable_grad():  # both go past the dispatcher
            with context:
                try:
                    gru(torch.zeros(1, 1, 2), torch.zeros(1, 1, 3))
                except ValueError as error:
                    print(error)
        try:
            gru(torch.zeros(1, 1, 2), torch.zeros(1, 1, 3), lengths=torch.ones(1, dtype=int))
        except thrown_by_operators as error:
            print(error)
    """
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "GRU_FAST_CPU_ISA": "mmx"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    named = "GRU_FAST_CPU_ISA: expected an instruction set that this CPU can run (baseline"
    assert run.stdout.count(named) == run.stdout.count("), got 'mmx'") == 3


def test_bfloat16_is_multiplied_as_it_is_where_the_cpu_does() -> None:
    """The products round the state to bfloat16; elsewhere it enters them in float32."""
    inputs = layer_inputs(Case(T=9, B=3, I=20, H=40), torch.bfloat16)
    outputs = {}
    for isa in _C.cpu_isas():
        with forced_isa(isa):
            outputs[_C.multiplies_bfloat16()] = forward(inputs)[0]
    if len(outputs) == 1:
        pytest.skip("this CPU does not multiply bfloat16")
    assert not torch.equal(outputs[True], outputs[False])
    with forced_isa("avx2"):
        assert not _C.multiplies_bfloat16()


def test_gradients_of_a_shared_input_are_rounded_once() -> None:
    """Many groups read one input: their gradients are added in float32."""
    case = Case(T=2, B=3, I=4, H=2, reverse=(False,) * 300)
    inputs = layer_inputs(case, torch.bfloat16)
    exact = inputs.to(torch.float64)
    output, _, workspace = reference.layer(*exact.arguments())
    truth = backward(exact, output, workspace, reference.layer_backward)[0]
    ours = backward(inputs, output.bfloat16(), workspace.bfloat16())[0]
    rounding = torch.finfo(torch.bfloat16).eps * truth.abs().max()
    assert (ours - truth).abs().max() < rounding


@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_gates_of_any_size(isa: str, dtype: torch.dtype) -> None:
    """Sigmoid and tanh up to where they saturate, and beyond."""
    H = 400
    x = torch.cat([torch.linspace(-s, s, H // 4) for s in (1e-3, 1.0, 30.0, 1000.0)]).to(dtype)
    h0, weight = torch.zeros(1, 1, H, dtype=dtype), torch.zeros(1, 2 * H, H, dtype=dtype)
    gates_x = torch.cat((x, x)).view(1, 1, 1, 2 * H)
    z, n = ops.scan(gates_x, h0, weight, *[None] * 5, "no_reset", [False], False)[2].chunk(2, -1)
    for ours, exact in ((z, x.double().sigmoid()), (n, x.double().tanh())):
        error = (ours.flatten().double() - exact).abs()
        assert bool((error <= 4 * torch.finfo(dtype).eps * exact.abs() + 1e-37).all())


def test_small_values_keep_their_digits_in_bfloat16() -> None:
    gru = __import__("gru_fast").GRU(1, 1, bias=False, dtype=torch.bfloat16)
    for parameter in gru.parameters():
        torch.nn.init.ones_(parameter)
    with torch.no_grad():
        for value in (1e-2, 1e-4, 1e-6, 1e-8):
            output, _ = gru(torch.full((1, 1, 1), value, dtype=torch.bfloat16))
            assert abs(output.item() / (value / 2) - 1) < 0.02


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_input_features(dtype: torch.dtype) -> None:
    """What is left is the recurrence."""
    inputs = layer_inputs(replace(Case(T=3, B=2, H=5), I=1), dtype)
    some = replace(inputs, x=inputs.x[..., :0], weight_ih=inputs.weight_ih[..., :0])
    output, h_n, workspace = forward(some)
    expected = forward(inputs, x=torch.zeros_like(inputs.x))
    assert_same_bits("output", output, expected[0])
    assert_same_bits("h_n", h_n, expected[1])
    zero = replace(inputs, x=torch.zeros_like(inputs.x))
    gradients = backward(some, output, workspace)
    others = backward(zero, output, workspace)
    assert gradients[0].shape == (3, 2, 0)
    for k in (1, 3, 4, 5):
        assert_same_bits(f"gradient {k}", gradients[k], others[k])


def test_fast_path_fires() -> None:
    gru = __import__("gru_fast").GRU(4, 5, num_layers=2, bidirectional=True)
    x = torch.randn(3, 2, 4)
    before = _C.launches()
    output, _ = gru(x)
    assert _C.launches() == before + 2
    output.sum().backward()
    assert _C.launches() == before + 4


FEWER_THREADS = """
import torch
from cases import Case, layer_inputs
from gru_fast import ops
torch.set_num_threads({asked})
for B in (1, 40):
    inputs = layer_inputs(Case(T=50, B=B, I=64, H=256), torch.float32)
    for _ in range(20):
        output, h_n, workspace = ops.layer(*inputs.arguments())
    print(output.double().sum().item().hex(), h_n.double().sum().item().hex())
"""


def test_fewer_threads_than_asked() -> None:
    """The team is whoever checked in: OMP_DYNAMIC, a thread limit and one core give fewer."""
    tests = os.path.dirname(__file__)
    outcomes = set()
    for asked, env, prefix in (
        (1, {}, []),
        (2, {}, []),
        (8, {"OMP_DYNAMIC": "true"}, []),
        (4, {"OMP_THREAD_LIMIT": "2"}, []),
        (2, {}, ["taskset", "-c", "0"]),
    ):
        run = subprocess.run(
            [*prefix, sys.executable, "-c", FEWER_THREADS.format(asked=asked)],
            env={**os.environ, "PYTHONPATH": tests, **env},
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        outcomes.add(run.stdout)
    assert len(outcomes) == 1


def test_concurrent_callers() -> None:
    """Python threads that call at the same time get what each gets alone."""
    from concurrent.futures import ThreadPoolExecutor

    inputs = [layer_inputs(Case(T=20, B=2, I=64, H=200), torch.float32, draw=i) for i in range(4)]
    alone = [forward(i)[0] for i in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            together = list(pool.map(lambda i: forward(i)[0], inputs))
            for a, b in zip(alone, together, strict=True):
                assert_same_bits("output", a, b)


def test_strided_input_is_read_in_place() -> None:
    inputs = layer_inputs(Case(T=6, B=5, I=4, H=9), torch.float32)
    batch_first = inputs.x.transpose(0, 1).contiguous().transpose(0, 1)
    wider = torch.zeros(6, 5, 10)
    wider[:, :, 3:7] = inputs.x
    for x in (batch_first, wider[:, :, 3:7], inputs.x.flip(2).flip(2)):
        assert_same_bits("output", forward(inputs, x=x)[0], forward(inputs)[0])
