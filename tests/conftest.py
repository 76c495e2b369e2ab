# SPDX-License-Identifier: Apache-2.0
"""Fixtures for all tests."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils import deterministic

from direct_spy import Spy
from gru_fast import direct, ops
from repository_tools import load
from torch_threads import torch_threads

if ops.HAS_CPU_KERNELS:
    from gru_fast import _C


def pytest_configure(config: pytest.Config) -> None:
    # torch's own forward-mode rules are scripted when they are first imported.
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit.script:DeprecationWarning")
    if not ops.HAS_CPU_KERNELS:
        message = "gru_fast has no compiled CPU kernels"
        config.addinivalue_line("filterwarnings", f"ignore:{message}:RuntimeWarning")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Every new tensor that is not initialised, and all scratch memory, holds NaN (or -1)."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = True
    if ops.HAS_CPU_KERNELS:
        _C.set_scratch_poison(True)
    yield
    if ops.HAS_CPU_KERNELS:
        _C.set_scratch_poison(False)
    deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(before)


ISAS = _C.cpu_isas() if ops.HAS_CPU_KERNELS else []
# Where the processor has dot products, samplers use them for AVX-512 and on ARM unless told
# otherwise.
DOT = "avx512" in ISAS or (ISAS and platform.machine() == "aarch64")
NO_DOT = [f"{ISAS[-1]} without dot products"] if DOT else []


@contextmanager
def forced_isa(name: str) -> Iterator[None]:
    before = _C.cpu_isa()
    _C.set_cpu_isa(name)
    yield
    _C.set_cpu_isa(before)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this processor, forced in turn."""
    with forced_isa(request.param):
        yield request.param


@pytest.fixture(params=[*ISAS, *NO_DOT])
def sampler_isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each set of instructions that the samplers can use here."""
    if request.param in NO_DOT:
        monkeypatch.setattr(_C, "PackedStack", partial(_C.PackedStack, plain=True))
    with forced_isa(request.param.split()[0]):
        yield request.param


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """No compiled code before or after."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    """Counts the steps that go past the dispatcher."""
    assert direct.native is not None, "this torch has no exchange API, or there are no kernels"
    spy = Spy(direct.native)
    monkeypatch.setattr(direct, "native", spy)
    return spy


@pytest.fixture
def backward_spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    """Counts the backward passes that went past the dispatcher."""
    spy = Spy(direct.native_backward)
    monkeypatch.setattr(direct, "native_backward", spy)
    return spy


@pytest.fixture(scope="session")
def quick_results(tmp_path_factory):
    """A folder with the results of quick runs of several benchmark suites."""
    if not ops.HAS_CPU_KERNELS:
        pytest.skip("no compiled CPU kernels")
    folder = tmp_path_factory.mktemp("results")
    for module, suite, more in (
        ("benchmarks.sweep", "sweep", []),
        ("benchmarks.scaling", "scaling", []),
        ("benchmarks.importing", "import", []),
        ("benchmarks.features.cli", "lm", []),
        ("benchmarks.features.cli", "features", ["--rows", "reset_mask/infer"]),
    ):
        arguments = ["--quick", *more, "--json", str(folder / f"cpu-{suite}.json")]
        assert load(module).main(suite, arguments) == 0
    return folder


@pytest.fixture(params=(1, 2), ids=("1thread", "2threads"))
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Each number of threads in turn."""
    with torch_threads(request.param):
        yield request.param


@pytest.fixture(scope="session")
def names_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Names for the command line to train on."""
    from cli_calls import write_names

    return write_names(tmp_path_factory.mktemp("corpus") / "names.txt")


@pytest.fixture(scope="session")
def names_run(names_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that `gru-fast train` wrote from them; only to be read."""
    from cli_calls import TINY, call

    out = tmp_path_factory.mktemp("runs") / "names"
    with torch_threads(1):
        call("train", names_file, "--lines", *TINY, "--out", out)
    return out


@pytest.fixture
def no_gradients() -> Iterator[None]:
    """Calls as in inference."""
    with torch.no_grad():
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """A single thread, whatever the machine has."""
    with torch_threads(1):
        yield


@pytest.fixture
def two_threads() -> Iterator[int]:
    """Two threads, whatever the machine has."""
    with torch_threads(2):
        yield 2
