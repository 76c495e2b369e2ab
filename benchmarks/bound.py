# SPDX-License-Identifier: Apache-2.0
"""The time that no program can beat on the machine whose peaks are given.

A product takes at least its operations over the multiply-add peak, and the bytes of its weights
over the read bandwidth of the cache level that they fit in. Time steps follow each other, so

    forward = product(W_ih, T * B rows) + T * product(W_hh, B rows)
    training = 3 * product(W_ih, T * B rows)       the input product, dx and dW_ih
             + operations of dW_hh / peak
             + 2 * T * product(W_hh, B rows)       the recurrence, forth and back

Nonlinear functions, stores and the weights' way into the cache are left out.
"""

from __future__ import annotations

from benchmarks.cases import Case
from benchmarks.probe import Peaks

BYTES = {"float32": 4, "tf32": 4, "float64": 8, "bfloat16": 2, "float16": 2}


def bandwidth_of(peaks: Peaks, bytes_per_thread: float) -> float | None:
    """B/s that all threads cannot exceed when they read that many bytes each, over and over.

    That of the next smaller working set that was measured, since fewer bytes are never read more
    slowly; or of a larger one, where a busy machine made that the better one.
    """
    smaller = [size for size in peaks.bandwidth if size <= bytes_per_thread]
    least = max(smaller, default=0)
    return max((rate for size, rate in peaks.bandwidth.items() if size >= least), default=None)


def lower_bound(case: Case, suite: str, dtype: str, threads: int, peaks: Peaks) -> float | None:
    """Seconds of one call at best, or None where a peak is unknown.

    Args:
        case: the sizes.
        suite: "train", "infer" or "step".
        dtype: a name of `cases.DTYPES`; without instructions of its own it counts at float32's
            operations and its own bytes.
        threads: that share the weights evenly.
        peaks: of that many threads.
    """
    peak = peaks.flops.get(dtype) or peaks.flops.get("float32")
    if peak is None or not peaks.bandwidth:
        return None

    def product(weights: int, rows: int) -> float:
        moved = weights * BYTES[dtype]
        rate = bandwidth_of(peaks, moved / threads)
        assert rate is not None
        return max(2 * weights * rows / peak, moved / rate)

    total, width = 0.0, case.I
    for _ in range(case.L):
        w_ih, w_hh = 3 * case.H * width, 3 * case.H * case.H
        project = product(w_ih, case.T * case.B)
        scan = case.T * product(w_hh, case.B)
        if suite == "train":
            total += 3 * project + 2 * w_hh * case.T * case.B / peak + 2 * scan
        else:
            total += project + scan
        width = case.H
    return total


def gpu_floor(case: Case, suite: str, dtype: str, matmul_flops: float, copy_bytes: float) -> float:
    """Seconds of one call at best on a GPU: operations or bytes, whichever takes longer.

    The steps' dependence on each other is left out, so a short or narrow case stays far from it.

    Args:
        case: the sizes.
        suite: "train", "infer" or "step".
        dtype: a name of `cases.DTYPES`.
        matmul_flops: measured on a large product in that dtype.
        copy_bytes: B/s of a large copy, read and written bytes counted.
    """
    flops, moved, width = 0.0, 0.0, case.I
    for _ in range(case.L):
        weights = 3 * case.H * (width + case.H)
        flops += 2 * weights * case.T * case.B
        moved += weights + case.T * case.B * (width + case.H) + 2 * case.B * case.H
        width = case.H
    passes = 3 if suite == "train" else 1
    # Training reads the inputs and output gradients again and writes a gradient per input.
    return max(passes * flops / matmul_flops, passes * moved * BYTES[dtype] / copy_bytes)
