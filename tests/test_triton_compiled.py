# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels compiled for GPUs that are not there: they assemble, fit, and do not spill."""

import re
from dataclasses import astuple, replace
from importlib.util import find_spec
from itertools import product
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cases import CELLS, Case, layer_inputs

if find_spec("triton") is None:
    pytest.skip("triton is not installed: pip install triton", allow_module_level=True)

import triton

from gru_fast import kernels
from gru_fast.kernels import generate_tables, problem, tables, tiling
from repository_tools import ROOT, load_script
from triton_support import compiled, known_spills, resources, resources_generate

ARCHITECTURES = tuple(compiled.DEVICES)
VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
WARPGROUPS_OF_8_ROWS = VERSION >= (3, 8)


def launches(
    arch: int | str,
    kernel: str | None,
    case: Case,
    dtype: torch.dtype,
    device: tiling.Device | None = None,
) -> list[compiled.Launch]:
    """What one training step of a layer launches."""
    inputs = layer_inputs(case, dtype)
    mode = (case.cell, list(case.reverse), False)
    with compiled.dry_launches(arch, device) as found:
        output, h_n, workspace = kernels.layer(*inputs.arguments(), kernel=kernel)
        kernels.layer_backward(
            output, h_n, None, *inputs.arguments()[:10], output, workspace, *mode, [True] * 8,
            kernel=kernel,
        )  # fmt: skip
    return list({id(launch.compiled): launch for launch in found}.values())


def check_meetings(launch: compiled.Launch, arrivals: int, waits: int) -> None:
    """Memory order and caches, of which the interpreter knows nothing; the order is the text's."""
    marks = re.findall(
        r"bar\.sync|\b(?:red|atom)\.\S+|\.gpu\.acquire\b|ld\.global\.cg|cp\.async\.c[ag]",
        launch.compiled.asm["ptx"],
    )
    arriving = [at for at, mark in enumerate(marks) if ".gpu.release." in mark]
    waiting = [at for at, mark in enumerate(marks) if mark == ".gpu.acquire"]
    assert (len(arriving), len(waiting)) == (arrivals, waits)
    assert "cp.async.ca" not in marks
    assert all(marks[at - 1] == "bar.sync" for at in arriving)
    for at, after in zip(waiting, [*waiting[1:], len(marks)], strict=True):
        assert marks[at + 1] == "bar.sync"
        assert {"ld.global.cg", "cp.async.cg"} & set(marks[at:after])


@pytest.mark.parametrize("cell", ["reset_after", "reset_before"])
@pytest.mark.parametrize("B, ahead", [(8, False), (3000, True)], ids=["on_chip", "loaded_ahead"])
def test_programs_that_meet_see_what_the_others_stored(B, ahead, cell):
    found = launches(90, "grid", Case(cell, T=3, B=B, H=128), torch.bfloat16)
    scans = [launch for launch in found if launch.kernel in ("forward_grid", "backward_grid")]
    assert len(scans) == 2
    meetings = 2 if cell == "reset_before" else 1
    for scan in scans:
        assert ("cp.async" in scan.compiled.asm["ptx"]) == ahead
        # Forward also arrives before its first step.
        check_meetings(scan, meetings + (scan.kernel == "forward_grid"), meetings)


@pytest.mark.parametrize("cell", ["reset_after", "reset_before"])
def test_programs_that_generate_see_what_the_others_stored(cell):
    with compiled.dry_launches(90) as found:
        kernels.generate(
            zero_weights(cell, 256, V=65), *some_prompts(), kernels.Rules(), 1, form="grid"
        )
    # Of the layer, the head and the draw.
    meetings = 4 if cell == "reset_before" else 3
    check_meetings(found[0], meetings, meetings)


class _NoReads(TorchDispatchMode):
    """Raises where the host would have to wait for values of a tensor on a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "equal"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kernel", ["cta", "grid", "step"])
def test_launchers_read_no_values(kernel: str) -> None:
    with _NoReads():
        assert launches(90, kernel, Case(features="everything"), torch.float32)
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            torch.ones(1).item()


def check(point: resources.Point, name: str, used: compiled.Resources) -> None:
    """Within the device's memory, no spills but those known, by warpgroup products where there are.

    Spills are known of the versions of Triton that have a snapshot.
    """
    if resources.SNAPSHOT.exists():
        assert used.spilled_bytes == known_spills.BYTES.get(name, 0), used
    assert used.shared_bytes <= compiled.DEVICES[point.arch].shared_bytes, used
    wide = point.config.BLOCK_H >= 64 and (point.config.BLOCK_B >= 16 or WARPGROUPS_OF_8_ROWS)
    if point.arch == 90 and "step" not in point.kernel and wide:
        assert used.warpgroup_products > 0, used


def test_spills_are_seen():
    """With 40 registers a thread, in the binary that Triton itself would launch."""
    point = next(p for p in resources.sample() if p.kernel == "cta" and p.arch == 90)
    squeezed = replace(point, config=replace(point.config, maxnreg=40))
    for used in resources.compile_point(squeezed).values():
        assert used.registers <= 40 and used.spilled_bytes > 0
        if resources.SNAPSHOT.exists():
            with pytest.raises(AssertionError):
                check(squeezed, str(squeezed), used)


@pytest.mark.parametrize("arch, names", [(90, "HGMMA"), (100, "UTCHMMA|UTCMMA")])
def test_warpgroup_products_reach_the_machine_code(arch, names):
    """What `resources` counts in the PTX; of tiles of 16 rows, which every version has."""
    found = launches(arch, "cta", Case(H=64, B=1300), torch.bfloat16)
    scan = next(launch for launch in found if launch.kernel == "forward_cta")
    counted = compiled.resources(scan).warpgroup_products
    assert counted == len(re.findall(rf"\b(?:{names})", compiled.machine_code(scan))) > 0


def check_compiled(point: resources.Point) -> None:
    snapshot = resources.read()
    for name, used in resources.compile_point(point).items():
        check(point, name, used)
        if snapshot:
            assert snapshot[name] == list(astuple(used))


@pytest.mark.parametrize("plain", [False, True], ids=["everything", "plain"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_a_call_takes_is_a_point(arch, plain):
    """Rows that no call takes are not compiled; whatever tiles a call takes are."""
    known = {
        (point.kernel, point.numbers, point.cell, point.direction, point.config)
        for point in resources.scans()
        if point.arch == arch and (plain or point.features == "everything")
    }
    numbers = ("16", "tf32", "tf32x3") if arch >= 80 else ("16", "ieee")
    sizes = product((1, 300, 4096, 10**5), (1, 32, 57, 64, 128, 200, 256, 300, 512, 1024, 2000))
    taken = set()
    for (B, H), kind, cell, way in product(
        sizes, numbers, ("reset_after", "reset_before"), ("forward", "backward")
    ):
        call = tiling.Sizes(9, B, 1, H, cell, resources.dtype_of(kind, arch), kind, plain)
        for kernel in ("cta", "grid", "step"):
            config = tables.config(kernel, compiled.DEVICES[arch], call, way)
            # Plain calls of the other cells are compiled with everything.
            if config is not None and (cell == "reset_after" or not plain):
                taken.add((kernel, kind, cell, way, config))
    assert taken <= known, taken - known
    assert len({kernel for kernel, *_ in taken}) == 3


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_rows_of_generate_are_points_with_all_their_layers(arch):
    known = {
        (point.row.form, point.row.numbers, point.row.config, point.cell, point.row.L)
        for point in resources_generate.points()
        if point.arch == arch
    }
    rows = [row for row in generate_tables.ROWS if row.fits(compiled.DEVICES[arch])]
    most = {generate_tables.ANY: resources_generate.MOST["L"]}
    expected = {
        (row.form, row.numbers, row.config, cell, most.get(row.L, row.L))
        for row in rows
        for cell in row.cells
    }
    assert rows and expected <= known, expected - known


@pytest.mark.skipif(triton.__version__ != "3.9.0", reason="the pages have the figures of 3.9.0")
@pytest.mark.parametrize(
    ("page", "function"), [("gpu-kernels", "markdown"), ("gpu-sampling", "generate_markdown")]
)
def test_the_page_has_the_table(page, function):
    table = getattr(load_script("gpu_resources"), function)()
    assert table in (ROOT / "docs" / f"{page}.md").read_text("utf-8")


def test_snapshot_is_whole_and_clean():
    snapshot = resources.read()
    if not snapshot:
        pytest.skip(f"no {resources.SNAPSHOT.name}")
    points = {str(point): point for point in resources.points()}
    assert {name.partition(" #")[0] for name in snapshot} == set(points)
    for name, used in snapshot.items():
        check(points[name.partition(" #")[0]], name, compiled.Resources(*used))
    assert set(known_spills.BYTES) <= set(snapshot)


@pytest.mark.parametrize("point", list(resources.sample()), ids=str)
def test_sample_of_rows(point):
    check_compiled(point)


@pytest.mark.slow
@pytest.mark.parametrize("point", list(resources.points()), ids=str)
def test_row(point):
    check_compiled(point)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kernel", ["cta", "step"])
def test_large_batches_fit_the_axes_of_a_launch(kernel, recompute):
    """CUDA takes 2**31 - 1 programs on the first axis of a launch and 65535 on the others."""
    case = Case("reset_before", "everything", T=1, B=65535 * 8 + 1, I=1, H=1)
    inputs = layer_inputs(case, torch.bfloat16)
    mode = (case.cell, list(case.reverse), recompute)
    with compiled.dry_launches(90) as found:
        output, _, workspace = kernels.layer(*inputs.arguments(), kernel=kernel)
        kernels.layer_backward(
            output, inputs.h0, None, *inputs.arguments()[:10], output, workspace, *mode,
            [True] * 8, kernel=kernel,
        )  # fmt: skip
    assert {f"forward_{kernel}", f"backward_{kernel}", "entering_states"} <= {
        launch.kernel for launch in found
    }
    for launch in found:
        first, *others = launch.grid
        assert first < 2**31 and all(size <= 65535 for size in others), (launch.kernel, launch.grid)


def check_wrappers(arch: int, sizes: list[tuple[int, int]], dtype: torch.dtype) -> set[str]:
    """Run what a user's call runs, up to the launch; the kernels that were chosen."""
    names = set()
    for B, H in sizes:
        for launch in launches(arch, None, Case(T=2, B=B, H=H, reverse=(False, True)), dtype):
            shared = launch.compiled.metadata.shared
            assert shared <= compiled.DEVICES[arch].shared_bytes, (launch.kernel, B, H, shared)
            names.add(launch.kernel.partition("_")[2])
    return names & set(kernels.KERNELS)


def test_wrappers_within_limits():
    assert check_wrappers(86, [(5, 30), (5, 130)], torch.float16) == {"cta", "grid"}


@pytest.mark.slow
@pytest.mark.parametrize("numbers", ["16", "tf32", "tf32x3"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_wrappers_within_every_limit(arch, numbers, monkeypatch):
    if arch < 80 and numbers != "16":
        numbers = "ieee"
    if numbers != "16":
        monkeypatch.setattr(problem, "dot_precision", lambda tensor: numbers)
    sizes = [(1, 1), (5, 31), (5, 64), (5, 100), (5, 130), (5, 300), (5, 700), (3000, 1100)]
    dtype = resources.dtype_of(numbers, arch)
    assert check_wrappers(arch, sizes, dtype) == {"cta", "grid", "step"}


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("kernel, H", [("cta", 64), ("grid", 256), ("step", 256)])
def test_amd_compiles(kernel, H, cell):
    """Compiled only; nobody has run it."""
    assert launches("gfx942", kernel, Case(cell, T=3, B=64, H=H), torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("form, H", [("cta", 64), ("grid", 256), ("step", 256)])
def test_amd_compiles_generate(form, H, cell):
    """Compiled only; nobody has run it."""
    weights = zero_weights(cell, H, V=65)
    with compiled.dry_launches("gfx942") as launches:
        kernels.generate(weights, *some_prompts(), kernels.Rules(top_k=5), 1, form=form)
    assert {launch.kernel.split("_")[1] for launch in launches} == {form}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_amd_compiles_what_a_call_takes(dtype, monkeypatch):
    """`step` and exact products, whatever the size is; compiled only."""
    monkeypatch.setattr(problem, "dot_precision", lambda tensor: "ieee")
    device = tiling.Device(tiling.AMD, 64 * 1024, 304)
    found = launches("gfx942", None, Case(T=3, B=64, H=64), dtype, device)
    weights = zero_weights("reset_after", 64, V=65, dtype=dtype)
    with compiled.dry_launches("gfx942", device) as generating:
        kernels.generate(weights, *some_prompts(), kernels.Rules(top_k=5), 1)
    names = {launch.kernel for launch in [*found, *generating]}
    assert {"forward_step", "generate_step_layer"} <= names
    assert all("step" in name for name in names), names
    for launch in [*found, *generating]:
        assert launch.compiled.metadata.shared <= device.shared_bytes


@pytest.mark.parametrize(
    "kernel, forward, backward", [("cta", 1, 1), ("grid", 1, 1), ("step", 2, 3)]
)
def test_sizes_do_not_recompile(kernel, forward, backward):
    binaries = set()
    for T, B in ((2, 16), (3, 17), (5, 1)):
        for launch in launches(90, kernel, Case(T=T, B=B, H=32), torch.bfloat16):
            binaries.add((launch.kernel, id(launch.compiled)))
    names = [name for name, _ in binaries]
    assert names.count(f"forward_{kernel}") == forward
    assert names.count(f"backward_{kernel}") == backward


def test_launches_of_one_call_do_not_recompile():
    """Not where a batch takes several cooperative launches, whose counters are aligned alike."""
    B = 3000
    found = launches(90, "grid", Case(T=3, B=B, H=128), torch.bfloat16)
    scans = [launch for launch in found if launch.kernel.endswith("_grid")]
    assert sorted(launch.kernel for launch in scans) == ["backward_grid", "forward_grid"]
    assert all(launch.grid[0] * launch.arguments["BLOCK_B"] < B for launch in scans)

    prompts, lengths = torch.zeros(B, 0).long(), torch.zeros(B).long()
    with compiled.dry_launches(90) as generating:
        weights = zero_weights("reset_after", 128, V=65)
        kernels.generate(weights, prompts, lengths, kernels.Rules(), 1, form="grid")
    assert len(generating) > 1
    assert len({id(launch.compiled) for launch in generating}) == 1


def some_prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Four of three tokens."""
    return torch.zeros(4, 3).long(), torch.full((4,), 3)


def zero_weights(cell: str, H: int, V: int, dtype: torch.dtype = torch.bfloat16) -> Any:
    """One layer for `kernels.generate`."""
    rows = problem.GATES[cell] * H
    like = {"dtype": dtype}
    layer = [torch.zeros(rows, H, **like)] * 2 + [torch.zeros(rows, **like)] * 2
    return kernels.weights_of(
        cell, torch.zeros(V + 1, rows, **like), [layer], torch.zeros(V, H, **like),
        torch.zeros(V, **like),
    )  # fmt: skip


def test_sizes_and_rules_do_not_recompile_generate():
    """One binary whatever the batch, the prompts, the vocabulary within a tile and the seed are."""
    binaries = set()
    for B, P, V, seed in ((1, 1, 33, 0), (16, 4, 64, -1), (7, 0, 50, 2**63)):
        weights = zero_weights("reset_after", 32, V)
        prompts, lengths = torch.zeros(B, P).long(), torch.full((B,), P)
        rules = kernels.Rules(temperature=0.5 + B, min_p=0.1, eos=V - 1, seed=seed)
        with compiled.dry_launches(90) as launches:
            kernels.generate(weights, prompts, lengths, rules, B)
        binaries |= {(launch.kernel, id(launch.compiled)) for launch in launches}
    assert [name for name, _ in binaries] == ["generate_cta"]
