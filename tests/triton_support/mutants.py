# SPDX-License-Identifier: Apache-2.0
"""Kernels with a fault put into their source, to see the tests fail on it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from gru_fast.kernels import registry


@dataclass(frozen=True)
class Mutant:
    """Source text of a module of gru_fast.kernels, and what stands in its place.

    Attributes:
        name: What is wrong.
        module: The module's name.
        old: Text that is there.
        new: Text in its place.
        cell: A cell whose kernel has that text.
        hangs: Whether programs then wait for ever; else numbers come out wrong.
        place: Which of several places, from 0; None for all.
    """

    name: str
    module: str
    old: str
    new: str
    cell: str = "reset_after"
    hangs: bool = False
    place: int | None = None

    def __str__(self) -> str:
        return self.name


_GATED_WAIT = "wait(counter_ptr, (step * MEETINGS + 2) * programs)"
_STEP_WAIT = "wait(counter_ptr, (step * MEETINGS + 1) * programs)"
_BACK_WAIT = "wait(counter_ptr, arrivals)"

GRID_MUTANTS = (
    Mutant("forward-no-barrier", "grid_forward", _STEP_WAIT, "pass"),
    Mutant("forward-waits-for-too-few", "grid_forward", ") * programs)", ") * (programs - 1))"),
    Mutant(
        "forward-waits-for-too-many", "grid_forward", ") * programs)", ") * (programs + 1))",
        hangs=True,
    ),
    Mutant("forward-one-buffer", "grid_forward", "% 2) * states", "% 1) * states"),
    Mutant(
        "forward-no-barrier-after-reset", "grid_forward", _GATED_WAIT, "pass", "reset_before"
    ),
    Mutant(
        "forward-no-arrival-after-reset", "grid_forward", "arrive(counter_ptr)\n            wait",
        "wait", "reset_before", hangs=True,
    ),
    Mutant("backward-no-barrier", "grid_backward", _BACK_WAIT, "pass", place=0),
    Mutant(
        "backward-no-barrier-after-reset", "grid_backward", _BACK_WAIT, "pass", "reset_before",
        place=1,
    ),
    Mutant(
        "backward-waits-for-too-few", "grid_backward", "arrivals += programs",
        "arrivals += programs - 1",
    ),
    Mutant(
        "backward-waits-for-too-many", "grid_backward", "arrivals += programs",
        "arrivals += programs + 1", hangs=True,
    ),
)  # fmt: skip


@contextmanager
def installed(mutant: Mutant, folder: Path) -> Iterator[None]:
    """The kernel of that module is the mutant in the block; its source is written to the folder."""
    name = f"gru_fast.kernels.{mutant.module}"
    original = import_module(name)
    parts = Path(original.__file__).read_text().split(mutant.old)
    assert len(parts) > (mutant.place or 0) + 1, f"{mutant}: the source has changed"
    joints = [mutant.old if mutant.place is not None else mutant.new] * (len(parts) - 1)
    if mutant.place is not None:
        joints[mutant.place] = mutant.new
    source = folder / f"{mutant.module}.py"
    source.write_text(
        parts[0] + "".join(j + part for j, part in zip(joints, parts[1:], strict=True))
    )
    spec = spec_from_file_location(name, source)
    module = sys.modules[name] = module_from_spec(spec)
    registry._launcher.cache_clear()
    try:
        spec.loader.exec_module(module)
        yield
    finally:
        sys.modules[name] = original
        registry._launcher.cache_clear()
