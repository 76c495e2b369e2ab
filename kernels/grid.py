# SPDX-License-Identifier: Apache-2.0
"""What the forward and backward `grid` kernels share: the barrier and the shape of a launch.

The hidden units of a batch tile are split over programs, which have to meet once a step, twice for
reset_before. A tile has one counter, to which every program of the tile adds 1 when it arrives.
The launch is cooperative: it fails, instead of waiting for ever, if not all programs can run at
once, so a call with more tiles than fit is several launches.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .problem import Problem
from .tile import load_weight
from .tiling import Config, cdiv, device_of


@triton.jit
def arrive(
    counter_ptr,  # of this batch tile
):
    """Make what this program stored visible, and say so.

    The barrier brings in the stores of all its threads, the release of one publishes them.
    """
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def wait(
    counter_ptr,  # of this batch tile
    arrivals,
):
    """Wait for so many arrivals at the tile since the launch, this program's own included.

    Adding 0 with acquire compiles to an acquiring load. Loads of what others stored must go past
    the L1 cache: cache_modifier=".cg".
    """
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < arrivals:
        pass
    tl.debug_barrier()


@triton.jit
def load_rows(
    rows_ptr,  # (..., B, G, K*H) or (G, B, H), stored by other programs
    at,
    stride,
    k,
    lane,
    in_rows,
    H: tl.constexpr,
):
    """Units k of every row of the tile, (k, rows)."""
    mask = (k[:, None] < H) & in_rows[None, :]
    tile = lane[None, :] * stride + k[:, None]
    return tl.load(rows_ptr + at + tile, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def load_panels(
    weight_ptr,  # (H, H), one gate, or that transposed
    units,
    H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    """The rows `units` of one gate as a tuple of tiles (units, BLOCK_K).

    Several tiles, since one over the whole of H would need as many registers for the state that it
    is multiplied by. Empty unless RESIDENT.
    """
    panels = ()
    if RESIDENT:
        for block in tl.static_range((H + BLOCK_K - 1) // BLOCK_K):
            k = block * BLOCK_K + tl.arange(0, BLOCK_K)
            panels += (load_weight(weight_ptr, units, k, H),)
    return panels


@dataclass(frozen=True)
class GridLaunch:
    """One cooperative launch: groups and batch tiles of it, and a zero counter for each tile."""

    grid: tuple[int, int, int]
    first_group: int
    reverse_bits: int
    first_tile: int
    counters: Tensor


def new_counters(count: int, like: Tensor) -> Tensor:
    """Zeros for one launch: parts of a tensor are not aligned, for which kernels compile anew."""
    return torch.zeros(count, dtype=torch.int32, device=like.device)


def grid_launches(problem: Problem, config: Config) -> Iterator[GridLaunch]:
    """Launches of which each fits the device."""
    programs = device_of(problem.h0).processors
    unit_tiles = cdiv(problem.H, config.BLOCK_H)
    batch_tiles = cdiv(problem.B, config.BLOCK_B)
    for first_group, groups, reverse_bits in problem.launches(max(1, programs // unit_tiles)):
        most = max(1, programs // (unit_tiles * groups))
        for first_tile in range(0, batch_tiles, most):
            grid = (min(most, batch_tiles - first_tile), unit_tiles, groups)
            counters = new_counters(grid[0] * groups, problem.h0)
            yield GridLaunch(grid, first_group, reverse_bits, first_tile, counters)
