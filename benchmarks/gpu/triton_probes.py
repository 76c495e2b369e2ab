# SPDX-License-Identifier: Apache-2.0
"""Two kernels without work: what a launch and a grid-wide barrier cost."""

import triton
import triton.language as tl


@triton.jit
def nothing(flag_ptr):
    tl.store(flag_ptr, 1)


@triton.jit(do_not_specialize=["rounds"])
def barriers(counter_ptr, rounds, PROGRAMS: tl.constexpr):
    """Every program waits for all others, that many times; all must be resident at once."""
    for k in tl.range(0, rounds):
        tl.debug_barrier()
        tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")
        while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < (k + 1) * PROGRAMS:
            pass
        tl.debug_barrier()
