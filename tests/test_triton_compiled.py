# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels compiled for GPUs that are not there: they assemble, fit, and do not spill."""

from importlib.util import find_spec

import pytest
import torch

from cases import CELLS, Case, layer_inputs

if find_spec("triton") is None:
    pytest.skip("triton is not installed: pip install triton", allow_module_level=True)

from gru_fast import kernels
from gru_fast.kernels import problem
from triton_support import compiled

ARCHITECTURES = tuple(compiled.DEVICES)


def launches(arch: int | str, kernel: str, case: Case, dtype: torch.dtype) -> list[compiled.Launch]:
    """What one training step of a layer launches."""
    inputs = layer_inputs(case, dtype)
    mode = (case.cell, list(case.reverse), False)
    with compiled.dry_launches(arch) as found:
        output, h_n, workspace = kernels.layer(*inputs.arguments(), kernel=kernel)
        kernels.layer_backward(
            output, h_n, None, *inputs.arguments()[:10], output, workspace, *mode, [True] * 8,
            kernel=kernel,
        )  # fmt: skip
    return list({id(launch.compiled): launch for launch in found}.values())


def check(arch: int, kernel: str, case: Case, dtype: torch.dtype) -> None:
    for launch in launches(arch, kernel, case, dtype):
        used = compiled.resources(launch, arch)
        what = f"{launch.kernel} for sm_{arch}, {dtype}, {case}: {used}"
        assert used.spilled_bytes == 0, what
        assert used.shared_bytes <= compiled.DEVICES[arch].shared_bytes, what


@pytest.mark.parametrize("arch, dtype", [(90, torch.bfloat16), (75, torch.float16)], ids=str)
def test_step(arch, dtype):
    check(arch, "step", Case(CELLS[0], T=3, B=64, H=256), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_step_everywhere(arch, cell, monkeypatch):
    case = Case(cell, "everything", (False, True), T=3, B=64, H=256)
    check(arch, "step", case, torch.float16)
    for precision in ("tf32", "tf32x3") if arch >= 80 else ("ieee",):
        monkeypatch.setattr(problem, "dot_precision", lambda tensor, p=precision: p)
        check(arch, "step", case, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
def test_amd_compiles(cell):
    """Compiled only; nobody has run it."""
    assert launches("gfx942", "step", Case(cell, T=3, B=64, H=256), torch.bfloat16)


def test_sizes_do_not_recompile():
    binaries = set()
    for T, B in ((2, 16), (3, 17), (5, 1)):
        for launch in launches(90, "step", Case(T=T, B=B, H=32), torch.bfloat16):
            binaries.add((launch.kernel, id(launch.compiled)))
    names = [name for name, _ in binaries]
    assert names.count("forward_step") == 2
    assert names.count("backward_step") == 3
