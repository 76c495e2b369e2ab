# SPDX-License-Identifier: Apache-2.0
"""Launches that Triton has bound once: they are what Triton's own next launch would be."""

import threading
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from cases import CELLS, Case, layer_inputs

if find_spec("triton") is None:
    pytest.skip("triton is not installed: pip install triton", allow_module_level=True)

from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from gru_fast import kernels
from gru_fast.kernels import generate_step, problem, step_backward, step_forward
from gru_fast.kernels.launch import MOST, Launches
from triton_support import compiled


@pytest.fixture
def made() -> Iterator[list[compiled.Launch]]:
    """The launches of a test, on the way to a GPU that is not there."""
    with compiled.recorded_launches(90) as launches:
        yield launches


@pytest.fixture
def bound_by_triton(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels of the launches that Triton makes itself, binding all arguments."""
    names: list[str] = []
    run = JITFunction.run

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(self.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "run", counted)
    return names


def same(one: Any, other: Any) -> bool:
    return one is other or (not isinstance(one, torch.Tensor) and one == other)


@pytest.fixture
def twice(monkeypatch: pytest.MonkeyPatch, made: list[compiled.Launch]) -> list[str]:
    """After each launch Triton makes it once more, and the two must be the same; their kernels."""
    compared: list[str] = []

    class Twice(Launches):
        def __call__(self, *numbers: int, **variant: Any) -> None:
            before = len(made)
            super().__call__(*numbers, **variant)
            changed = dict(zip(self._changing, numbers, strict=True))
            self._kernel[self._grid](**self._arguments, **variant, **changed)
            one, other = made[before:]
            assert one.compiled is other.compiled
            assert (one.kernel, one.grid, one.stream) == (other.kernel, other.grid, other.stream)
            assert one.arguments.keys() == other.arguments.keys()
            for name, value in one.arguments.items():
                assert same(value, other.arguments[name]), name
            compared.append(one.kernel)

    for module in (step_forward, step_backward, generate_step):
        monkeypatch.setattr(module, "Launches", Twice)
    return compared


def run_layer(case: Case, dtype: torch.dtype = torch.bfloat16, offset: int = 0) -> None:
    inputs = layer_inputs(case, dtype)
    mode = (case.cell, list(case.reverse), False)
    given = [moved(t, offset) for t in inputs.arguments()[:10]]
    output, h_n, workspace = kernels.layer(*given, *mode, kernel="step")
    kernels.layer_backward(
        output, h_n, None, *given, output, workspace, *mode, [True] * 8, kernel="step"
    )


def moved(tensor: torch.Tensor | None, offset: int) -> torch.Tensor | None:
    """A copy that begins so many elements into its memory."""
    if tensor is None:
        return None
    memory = tensor.new_empty(offset + tensor.numel())
    return memory[offset:].view(tensor.shape).copy_(tensor)


def run_generate(cell: str, layers: int = 2) -> None:
    H, V, rows = 32, 40, problem.GATES[cell] * 32
    layer = [torch.zeros(rows, H)] * 2 + [torch.zeros(rows)] * 2
    weights = kernels.weights_of(
        cell, torch.zeros(V + 1, rows), [layer] * layers, torch.zeros(V, H), torch.zeros(V)
    )
    prompts, lengths = torch.zeros(3, 2).long(), torch.full((3,), 2)
    kernels.generate(weights, prompts, lengths, kernels.Rules(), 3, form="step")


@pytest.mark.parametrize("features", ["plain", "everything"])
@pytest.mark.parametrize("reverse", [(False,), (False, True)], ids=["one", "both"])
@pytest.mark.parametrize("cell", CELLS)
def test_as_triton_would(twice, cell, reverse, features):
    T, parts = 18, 2 if cell == "reset_before" else 1
    run_layer(Case(cell, features, T=T, B=5, H=17, reverse=reverse))
    assert twice.count("forward_step") == T * parts
    assert twice.count("backward_step") == T * parts + 1


@pytest.mark.parametrize("cell", CELLS)
def test_generate_as_triton_would(twice, cell):
    run_generate(cell)
    parts = 2 if cell == "reset_before" else 1
    names = ("generate_step_layer", "generate_step_head", "generate_step_draw")
    assert [twice.count(name) for name in names] == [5 * 2 * parts, 3, 5]


def test_triton_binds_once_for_each_binary(made, bound_by_triton):
    run_layer(Case("reset_before", T=9, B=2, H=16))
    assert bound_by_triton.count("forward_step") == 4  # first or not, gates or candidate
    assert bound_by_triton.count("backward_step") == 4
    assert [launch.kernel for launch in made].count("forward_step") == 18
    run_generate("reset_after", layers=3)
    assert bound_by_triton.count("generate_step_layer") == 2
    assert [launch.kernel for launch in made].count("generate_step_layer") == 15


def test_dtypes_and_alignments_have_binaries_of_their_own(made, twice):
    """Also where one call follows the other, and nothing but that has changed."""
    case = Case(T=4, B=2, H=16)
    binaries = []
    for dtype in (torch.bfloat16, torch.float32):
        for offset in (0, 1, 16, 0):
            del made[:]
            run_layer(case, dtype, offset)
            binaries.append({id(x.compiled) for x in made if x.kernel == "forward_step"})
    for four in (binaries[:4], binaries[4:]):
        assert four[0] == four[2] == four[3] and four[0].isdisjoint(four[1])
    assert binaries[0].isdisjoint(binaries[4])


def launches_of(**other: Any) -> tuple[Launches, Any]:
    """Those of a small kernel, and the kernel."""
    kernel: Any = generate_step.generate_step_head
    arguments = {
        "head_ptr": torch.zeros(40, 32), "head_bias_ptr": None,
        "operand_ptr": torch.zeros(2, 1, 3, 32), "logits_ptr": torch.zeros(3, 40),
        "B": 3, "V": 40, "L": 1, "H": 32, "BLOCK_T": 32, "BLOCK_B": 16, "PRECISION": "tf32",
        "num_warps": 4, "enable_fp_fusion": True,
    }  # fmt: skip
    return Launches(kernel, (1, 2), arguments | other, "position"), kernel


def test_a_number_of_another_type(made):
    """It has a binary of its own, and those after it have theirs again."""
    launch, _ = launches_of()
    for position in (0, 1, MOST, MOST + 1, 2, -1):
        launch(position, BLOCK_K=32)
    usual, *others = [x.compiled for x in made]
    assert [x is usual for x in others] == [True, True, False, True, True]
    assert [x.arguments["position"] for x in made] == [0, 1, MOST, MOST + 1, 2, -1]


def test_only_what_a_kernel_is_not_specialised_for(made):
    _, kernel = launches_of()
    launch = Launches(kernel, (1, 2), {}, "H")
    launch._binaries[(32,)] = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match="expected names in do_not_specialize"):
        launch(32, BLOCK_K=32)


def test_hooks(made, bound_by_triton):
    entered: list[str] = []
    seen: list[int] = []

    def enter(metadata: Any) -> None:
        entered.append(metadata.get()["name"])

    launch, kernel = launches_of()
    knobs.runtime.launch_enter_hook.add(enter)
    try:
        for position in range(3):
            launch(position, BLOCK_K=32)
    finally:
        knobs.runtime.launch_enter_hook.remove(enter)
    assert entered == ["generate_step_head"] * 3 and len(bound_by_triton) == 1

    launch, _ = launches_of()
    kernel.add_pre_run_hook(lambda *args, **given: seen.append(given["position"]))
    try:
        for position in range(3):
            launch(position, BLOCK_K=32)
    finally:
        kernel.pre_run_hooks.clear()
    assert seen == [0, 1, 2] and len(made) == 6


def test_each_thread_has_its_stream(made, monkeypatch):
    """And its own tensors; several threads may launch one kernel at a time."""
    own = threading.local()
    active: Any = driver.active
    monkeypatch.setattr(active, "get_current_stream", lambda device=0: own.stream)
    together = threading.Barrier(4)
    failures: list[BaseException] = []

    def run(stream: int) -> None:
        try:
            own.stream = stream
            launch, _ = launches_of(logits_ptr=torch.full((3, 40), stream))
            together.wait()
            for position in range(50):
                launch(position, BLOCK_K=32)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(stream,)) for stream in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for stream in range(4):
        mine = [x.arguments for x in made if x.stream == stream]
        assert [arguments["position"] for arguments in mine] == list(range(50))
        assert {int(arguments["logits_ptr"][0, 0]) for arguments in mine} == {stream}
