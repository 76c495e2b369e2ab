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
        user: A module that has imported from this one, and has to do so again.
    """

    name: str
    module: str
    old: str
    new: str
    cell: str = "reset_after"
    hangs: bool = False
    place: int | None = None
    user: str | None = None

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


GENERATE_MUTANTS = (
    Mutant("state-is-not-frozen", "generate_cta", "tl.where(alive[None, :], n + z * (p - n), p)",
           "n + z * (p - n)"),
    Mutant("prompts-are-not-fed", "generate_cta", "length, drawn, alive, P, V",
           "length * 0, drawn, alive, P, V"),
    Mutant("stream-of-the-tile", "generate_cta", "row.to(tl.int32)", "lane"),
    Mutant("layer-below-at-the-step-before", "generate_cta", "            x = p.to(dtype)",
           "            x = states[layer].to(dtype)"),
    Mutant("layer-does-not-wait", "generate_layers",
           "            wait(counter_ptr, arrivals)\n        a_n",
           "            pass\n        a_n", user="generate_grid"),
    Mutant("candidate-does-not-wait", "generate_layers",
           "            wait(counter_ptr, arrivals)\n        acc_r",
           "            pass\n        acc_r", "reset_before", user="generate_grid"),
    Mutant("one-buffer-of-states", "generate_layers", "((position + 1) % 2) * states",
           "(position % 2) * states", user="generate_grid"),
    Mutant("draw-does-not-wait", "generate_grid",
           "wait(counter_ptr, arrivals)\n                run_draw", "run_draw"),
    Mutant("token-is-not-waited-for", "generate_grid",
           "wait(counter_ptr, arrivals)\n                status", "status"),
    Mutant("head-does-not-wait", "generate_grid", "wait(counter_ptr, arrivals)\n            if",
           "pass\n            if"),
    Mutant("waits-for-too-many", "generate_grid", "arrivals += programs",
           "arrivals += programs + 1", hangs=True),
    Mutant("position-counts-from-the-launch", "generate_layers", "seed_high, position, row",
           "seed_high, position % 3, row", user="generate_grid"),
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
    user = sys.modules.pop(f"gru_fast.kernels.{mutant.user}", None)
    _forget_launchers()
    try:
        spec.loader.exec_module(module)
        yield
    finally:
        sys.modules[name] = original
        if user is not None:
            sys.modules[user.__name__] = user
        _forget_launchers()


def _forget_launchers() -> None:
    registry._launcher.cache_clear()
    sys.modules["gru_fast.kernels.generate"]._launcher.cache_clear()
