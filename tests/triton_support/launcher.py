# SPDX-License-Identifier: Apache-2.0
"""Launches down to the driver: each that Triton has bound once is, byte for byte, what it would be.

Run by test_triton_launcher.py, with the libcuda of tests/cpp/cuda_stand_in.cpp.
"""

import ctypes
import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

LIBRARY = Path(os.environ["CUDA_STAND_IN"])
cuda = ctypes.CDLL(str(LIBRARY))  # who asks for libcuda.so.1 after this gets it
cuda.recorded.restype = ctypes.c_char_p

from triton import knobs  # noqa: E402
from triton.backends.nvidia import driver as nvidia  # noqa: E402
from triton.runtime import driver  # noqa: E402

from cases import Case  # noqa: E402
from gru_fast import kernels  # noqa: E402
from gru_fast.kernels import generate_step, step_backward, step_forward  # noqa: E402
from gru_fast.kernels.launch import MOST, Launches  # noqa: E402
from test_triton_launch import launches_of, run_generate, run_layer  # noqa: E402

COOPERATIVE = 2
"""CU_LAUNCH_ATTRIBUTE_COOPERATIVE."""

streams: dict[int, int] = {}
"""The current one of each device, if it is not the default."""


class Driver(nvidia.CudaDriver):
    """Triton's, but for what it asks of torch."""

    def __init__(self) -> None:
        self.utils = nvidia.CudaUtils()
        self.launcher_cls = nvidia.CudaLauncher
        self.get_device_capability = lambda device: (9, 0)
        self.get_current_device = cuda.current_device
        self.set_current_device = cuda.set_current_device
        self.get_current_stream = lambda device: streams.get(device, 0)


@pytest.fixture(scope="module", autouse=True)
def launcher() -> Iterator[None]:
    knobs.nvidia.libcuda_path = str(LIBRARY.parent)
    driver.set_active(Driver())
    yield
    driver._active = None


@pytest.fixture(autouse=True)
def nothing_recorded() -> Iterator[None]:
    recorded()
    yield
    cuda.set_current_device(0)
    cuda.fail_after(-1)
    streams.clear()


def recorded() -> list[dict[str, Any]]:
    """What was launched since the last call."""
    return [json.loads(line) for line in cuda.recorded().splitlines()]


def number(parameter: str) -> int:
    return int.from_bytes(bytes.fromhex(parameter), "little", signed=True)


class Twice(Launches):
    """After each launch Triton makes it once more, and the two must be the same."""

    direct = 0

    def __call__(self, *numbers: int, **variant: Any) -> None:
        recorded()
        super().__call__(*numbers, **variant)
        (ours,) = recorded()
        changed = dict(zip(self._changing, numbers, strict=True))
        self._kernel[self._grid](**self._arguments, **variant, **changed)
        assert recorded() == [ours]
        Twice.direct += tuple(variant.values()) in self._bound and max(numbers) <= MOST


@pytest.fixture
def twice(monkeypatch: pytest.MonkeyPatch) -> type[Twice]:
    for module in (step_forward, step_backward, generate_step):
        monkeypatch.setattr(module, "Launches", Twice)
    monkeypatch.setattr(Twice, "direct", 0)
    return Twice


def positions(launch: Any, *values: int) -> list[dict[str, Any]]:
    """What launches of the kernel of `launches_of` were."""
    recorded()
    for position in values:
        launch(position, BLOCK_K=32)
    return recorded()


@pytest.mark.parametrize(
    "case, dtype, direct",
    [
        (Case("reset_before", "everything", (False, True), T=4, B=5, H=17), torch.float32, 4 + 5),
        (Case("reset_after", reverse=(True,), T=4, B=1, H=16), torch.bfloat16, 2 + 2),
    ],
    ids=["reset_before", "reset_after"],
)
def test_layer(twice, case, dtype, direct):
    """The rest of its 17 and 9 launches are the first of each binary."""
    run_layer(case, dtype)
    assert twice.direct == direct


def test_generate(twice, monkeypatch):
    rules = kernels.Rules(temperature=0.9, top_k=5, top_p=0.9, min_p=0.1, eos=1, seed=-3)
    monkeypatch.setattr(kernels, "Rules", lambda: rules)
    run_generate("reset_after")
    assert twice.direct == (5 - 1) * 2 + (3 - 1) + (5 - 1)


def test_what_arrives():
    head, operand = torch.zeros(40, 32), torch.zeros(2, 1, 3, 32)
    launch, _ = launches_of(head_ptr=head, operand_ptr=operand)
    values = (MOST + 1, 0, 1, 16, MOST, MOST + 1, 2, -1)
    launches = positions(launch, *values)
    for value, made in zip(values, launches, strict=True):
        assert made["grid"] == [1, 2, 1] and made["block"] == [128, 1, 1]
        pointers, numbers = made["parameters"][:3], made["parameters"][3:]
        assert [number(p) for p in pointers[:2]] == [head.data_ptr(), operand.data_ptr()]
        # The last two are scratch memory, of which there is none.
        assert [number(n) for n in numbers] == [value, 3, 40, 0, 0]
    functions = [made["function"] for made in launches]
    assert len(set(functions)) == 2
    assert [other == functions[0] for other in functions] == [value > MOST for value in values]


@pytest.mark.parametrize("grid", [(3,), (3, 2), (3, 2, 4)], ids=str)
@pytest.mark.parametrize("cooperative", [False, True])
def test_grid_and_attributes(grid, cooperative):
    given, kernel = launches_of(launch_cooperative_grid=cooperative)
    launches = positions(Launches(kernel, grid, given._arguments, "position"), 0, 1, 2)
    assert [made["grid"] for made in launches] == [[*grid, 1, 1][:3]] * 3
    assert [made["attributes"] for made in launches] == [[[COOPERATIVE, 1]] * cooperative] * 3


def test_stream_and_device_of_each_call():
    functions = set()
    for device, stream in ((0, 0), (1, 2**63 + 8), (1, 24), (0, 24), (0, 0)):
        cuda.set_current_device(device)
        streams[device] = stream
        launches = positions(launches_of()[0], 0, 1, 2)
        assert [(made["device"], made["stream"]) for made in launches] == [(device, stream)] * 3
        functions.add((device, *(made["function"] for made in launches)))
    assert len(functions) == 2


def test_hooks_are_called_by_the_launcher():
    called: list[tuple[str, int]] = []

    def enter(metadata: Any) -> None:
        called.append(("enter", metadata.get()["stream"]))

    def leave(metadata: Any) -> None:
        called.append(("leave", len(recorded())))

    streams[0] = 8
    launch, _ = launches_of()
    knobs.runtime.launch_enter_hook.add(enter)
    knobs.runtime.launch_exit_hook.add(leave)
    try:
        positions(launch, 0, 1, 2)
    finally:
        knobs.runtime.launch_enter_hook.remove(enter)
        knobs.runtime.launch_exit_hook.remove(leave)
    assert called == [("enter", 8), ("leave", 1)] * 3


@pytest.mark.parametrize("before", range(3))
def test_a_launch_that_fails(before):
    launch, _ = launches_of()
    cuda.fail_after(before)
    for position in range(before):
        launch(position, BLOCK_K=32)
    with pytest.raises(RuntimeError, match="as asked for"):
        launch(before, BLOCK_K=32)
    assert [number(made["parameters"][3]) for made in positions(launch, 7, 8)] == [7, 8]


def test_a_binary_that_triton_has_forgotten():
    """It stays loaded for the call that has bound it; the next call gets another."""
    launch, kernel = launches_of()
    *_, bound = positions(launch, 0, 1, 2)
    kernel.device_caches.clear()
    gc.collect()
    (still,) = positions(launch, 3)
    *_, other = positions(launches_of()[0], 0, 1, 2)
    assert still["function"] == bound["function"] != other["function"]
