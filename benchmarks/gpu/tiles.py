# SPDX-License-Identifier: Apache-2.0
"""Which tiles are fastest: `python -m benchmarks.gpu.tiles --out DIR`, on a GPU.

Times the scans alone, launched with tiles that `gru_fast.kernels.tables` may not hold, and writes
DIR/tiles.json: microseconds per step of each, launch included, and how far its results are from
those of the first tiles. What a device cannot launch is listed with the reason.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import program
from benchmarks.cases import DTYPES
from benchmarks.machine import processors
from benchmarks.precision import float32_as
from gru_fast import kernels
from gru_fast.kernels import registry
from gru_fast.kernels.problem import Chunk, Problem, problem_of
from gru_fast.kernels.tiling import Config

ROUNDS = 9


@dataclass(frozen=True)
class Candidate:
    """One kernel with tiles to try."""

    kernel: str
    dtype: str
    H: int
    config: Config
    direction: str


def candidates() -> Iterator[Candidate]:
    """Those of one scan one after the other: the first is what the others are compared with."""
    for kernel, dtype, H, configs in TRIED:
        for direction in ("forward", "backward"):
            for config in configs:
                yield Candidate(kernel, dtype, H, config, direction)


def _cta(H: int, *tiles: tuple[int, ...]) -> list[Config]:
    return [Config(BLOCK_B, H, 0, *launch) for BLOCK_B, *launch in tiles]


def _grid(*tiles: tuple[int, ...]) -> list[Config]:
    return [Config(*sizes) for sizes in tiles]


def _streamed(*tiles: tuple[int, ...]) -> list[Config]:
    return [Config(*sizes, RESIDENT=False) for sizes in tiles]


TRIED: list[tuple[str, str, int, list[Config]]] = [
    ("cta", "bfloat16", 64, _cta(64, (8, 4), (16, 4), (16, 8))),
    ("cta", "bfloat16", 128, _cta(128, (8, 8), (8, 4), (16, 8))),
    ("cta", "tf32", 64, _cta(64, (8, 4, 3), (8, 4), (8, 8, 3), (16, 4, 3), (16, 8))),
    ("cta", "tf32", 128, _cta(128, (8, 8, 2), (8, 8), (16, 8))),
    (
        "grid", "bfloat16", 256,
        _grid((8, 64, 128, 4), (8, 32, 128, 4), (16, 64, 128, 4), (16, 64, 256, 4))
        + _streamed((64, 64, 64, 8, 3), (32, 64, 64, 8, 4), (64, 32, 64, 8, 4)),
    ),
    (
        "grid", "bfloat16", 512,
        _grid((8, 64, 128, 4), (16, 16, 128, 4), (32, 16, 128, 4))
        + _streamed(
            (64, 64, 64, 8, 3), (64, 64, 64, 8, 4), (32, 64, 64, 8, 4), (128, 64, 64, 16, 3),
            (64, 32, 64, 8, 4), (64, 32, 128, 8, 3),
        ),
    ),
    (
        "grid", "bfloat16", 1024,
        _grid((32, 16, 128, 8), (32, 16, 128, 4), (16, 16, 128, 8))
        + _streamed(
            (64, 64, 64, 8, 3), (64, 64, 64, 8, 4), (32, 64, 64, 8, 4), (128, 64, 64, 16, 3),
            (128, 64, 64, 8, 3),
        ),
    ),
    (
        "grid", "tf32", 256,
        _grid((8, 64, 64, 4), (16, 16, 64, 4), (32, 16, 64, 4))
        + _streamed((64, 64, 32, 8, 3), (32, 64, 32, 8, 3), (64, 32, 32, 8, 3)),
    ),
    (
        "grid", "tf32", 512,
        _grid((16, 16, 64, 4), (8, 32, 64, 8), (32, 16, 64, 4))
        + _streamed((64, 64, 32, 8, 3), (32, 64, 32, 8, 3), (64, 32, 32, 8, 3)),
    ),
]  # fmt: skip


def problem(dtype: str, H: int, B: int, T: int, device: str) -> Problem:
    """A plain scan, the same for every candidate."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        values = torch.randn(shape, generator=generator, device=device) * scale
        return values.to(DTYPES[dtype])

    return problem_of(
        normal(T, B, 1, 3 * H), normal(1, B, H), normal(1, 3 * H, H, scale=H**-0.5),
        normal(1, 3 * H), None, None, None, None, "reset_after", [False],
    )  # fmt: skip


class Scan:
    """One direction of a scan with its results allocated."""

    def __init__(self, given: Problem, direction: str) -> None:
        T, B, H = given.T, given.B, given.H
        self.problem, self.direction = given, direction
        self.output = given.gates_x.new_empty(T, B, H)
        self.h_n = torch.empty_like(given.h0)
        self.workspace = given.gates_x.new_empty(T, B, 1, 4 * H)
        if direction == "backward":
            generator = torch.Generator(self.output.device).manual_seed(1)
            self.grad_output = torch.randn(
                self.output.shape, generator=generator, device=self.output.device
            ).to(self.output.dtype)
            self.grad_gates = torch.empty_like(given.gates_x)
            self.grad_q = torch.empty_like(self.output).unsqueeze(2)
            step = registry.tables.config(
                "step", registry.device_of(given.h0), registry.sizes_of(given), direction
            )
            kernels.KERNELS["step"].launch_forward(
                given, self.output, self.h_n, self.workspace, step
            )

    def launch(self, kernel: str, config: Config) -> None:
        chosen = kernels.KERNELS[kernel]
        if self.direction == "forward":
            chosen.launch_forward(self.problem, self.output, self.h_n, self.workspace, config)
            return
        self.grad_state = torch.zeros_like(self.problem.h0, dtype=torch.float32)
        chosen.launch_backward(
            Chunk(
                self.problem, self.grad_output, None, self.output, self.workspace,
                (0, self.problem.T), self.grad_gates, self.grad_q, self.grad_state, None, None,
            ),
            config,
        )  # fmt: skip

    def result(self) -> torch.Tensor:
        return (self.output if self.direction == "forward" else self.grad_gates).clone()


def prepare(candidate: Candidate) -> str | None:
    """Compile by a launch of one step; why it cannot run, or None."""
    try:
        with float32_as(candidate.dtype):
            given = problem(candidate.dtype, candidate.H, 4, 1, "cuda")
            Scan(given, candidate.direction).launch(candidate.kernel, candidate.config)
            torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
    return None


def microseconds(scan: Scan, candidate: Candidate) -> float:
    """Per step, the median of several launches."""
    found = []
    for _ in range(ROUNDS):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        scan.launch(candidate.kernel, candidate.config)
        last.record()
        last.synchronize()
        found.append(first.elapsed_time(last) * 1e3 / scan.problem.T)
    return statistics.median(found)


def write(out: Path, rows: list[dict[str, Any]]) -> None:
    (out / "tiles.json").write_text(json.dumps(rows, indent=1) + "\n")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.tiles", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--steps", type=int, default=512)
    parser.add_argument("--batches", default="64,1024")
    parser.add_argument("--only", default="", help="kernels, dtypes or sizes, e.g. grid,H512")
    options = parser.parse_args(arguments)
    try:
        program.make_folder(options.out)
    except ValueError as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        parser.error("there is no GPU here")
    wanted = set(filter(None, options.only.split(",")))
    every = [c for c in candidates() if wanted <= {c.kernel, c.dtype, f"H{c.H}", c.direction}]
    start = time.monotonic()
    workers = min(16, processors())
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        reasons = list(pool.map(prepare, every))
    print(f"{len(every)} candidates compiled in {time.monotonic() - start:.0f} s", flush=True)
    rows: list[dict[str, Any]] = []
    for B in (int(text) for text in options.batches.split(",")):
        place, scan, first = None, None, None
        for candidate, reason in zip(every, reasons, strict=True):
            here = (candidate.dtype, candidate.H, candidate.direction)
            row = {
                "kernel": candidate.kernel, "dtype": candidate.dtype, "H": candidate.H, "B": B,
                "direction": candidate.direction, "config": vars(candidate.config),
            }  # fmt: skip
            rows.append(row)
            if reason is not None:
                row["error"] = reason
                continue
            # Whoever cuts the run off has what was measured before.
            write(options.out, rows[:-1])
            with float32_as(candidate.dtype):
                if place != here:
                    place, first = here, None
                    given = problem(candidate.dtype, candidate.H, B, options.steps, "cuda")
                    scan = Scan(given, candidate.direction)
                assert scan is not None
                scan.launch(candidate.kernel, candidate.config)
                row["us_per_step"] = microseconds(scan, candidate)
                value = scan.result().float()
            first = value if first is None else first
            row["difference"] = float((value - first).abs().max() / first.abs().max())
            c = candidate.config
            print(
                f"{candidate.kernel:5} {candidate.dtype:8} H{candidate.H:<5} B{B:<5} "
                f"{candidate.direction:8} b{c.BLOCK_B:<3} h{c.BLOCK_H:<4} k{c.BLOCK_K:<4} "
                f"w{c.num_warps} s{c.num_stages} {'resident' if c.RESIDENT else 'streamed'} "
                f"{row['us_per_step']:8.3f} us/step  difference {row['difference']:.1e}",
                flush=True,
            )
            del value
    write(options.out, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
