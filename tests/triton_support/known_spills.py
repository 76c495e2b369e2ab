# SPDX-License-Identifier: Apache-2.0
"""Rows that spill, which none should: bytes of stack, by the name of the point, and why."""

import triton

BY_VERSION: dict[str, dict[str, int]] = {
    "3.6.0": {
        # The assembler stops at 128 registers; more would be a row for one cell and one Triton.
        "sm_100 forward_grid tf32 reset_before everything to 256: B8 H32 K64 w8": 8,
        "sm_120 forward_grid tf32 reset_before everything to 256: B8 H16 K64 w4": 8,
        # k of 16 ends it, with twice the waits for weights.
        "sm_80 backward_grid tf32 reset_before everything to 1024: B16 H64 K32 w8": 24,
        "sm_86 backward_grid tf32 reset_before everything to 1024: B16 H64 K32 w8": 24,
        "sm_89 backward_grid tf32 reset_before everything to 1024: B16 H64 K32 w8": 24,
        # Fewer than 80 registers: as many programs stand on a processor.
        "sm_120 forward_step 16 reset_before everything to 256: B16 H32 K64 w4 #1": 8,
        "sm_75 forward_step 16 reset_after everything to 300: B16 H32 K16 w4": 8,
        "sm_75 generate_step ieee no_reset filters L2 H256 V1000: B16 H32 K16 w4 #1": 8,
        "sm_86 backward_step 16 reset_before everything to 256: B16 H32 K64 w4 #3": 8,
        "sm_89 backward_step 16 reset_before everything to 256: B16 H32 K64 w4 #3": 8,
        # 255 registers are taken whatever the limit; without one two layers of H = 1024 spill 80.
        "sm_80 generate_grid tf32 reset_after filters L4 H256 V50000: B8 H32 K32 w8": 16,
        "sm_86 generate_grid tf32 reset_after filters L4 H256 V50000: B8 H32 K32 w8": 16,
        "sm_89 generate_grid tf32 reset_after filters L4 H256 V50000: B8 H32 K32 w8": 16,
        # 255 registers are taken; computed anew it is 16 and 168 registers.
        "sm_120 generate_grid tf32 reset_before filters L1 H256 V1000: B8 H16 K64 w4": 8,
        "sm_86 generate_grid tf32 reset_after filters L1 H256 V50000: B8 H16 K64 w4": 8,
        "sm_86 generate_grid tf32 reset_before filters L1 H256 V1000: B8 H16 K64 w4": 8,
        "sm_89 generate_grid tf32 reset_after filters L1 H256 V50000: B8 H16 K64 w4": 8,
        "sm_89 generate_grid tf32 reset_before filters L1 H256 V1000: B8 H16 K64 w4": 8,
        # Rows of an odd H are read one element at a time; `step` has a launch a step instead.
        "sm_75 backward_cta 16 reset_after everything to 25: B16 H32 K0 w4": 104,
        "sm_75 backward_cta 16 reset_after everything to 57: B8 H64 K0 w4": 96,
        "sm_75 backward_norm 16 reset_after everything to 57: B8 H64 K0 w4": 120,
        "sm_75 backward_norm ieee reset_after everything to 57: B8 H64 K0 w4": 32,
        "sm_75 forward_cta 16 reset_after everything to 57: B8 H64 K0 w4": 8,
        "sm_75 forward_norm ieee reset_after everything to 57: B8 H64 K0 w4": 24,
        # At 128 registers four programs stand on a processor.
        "sm_120 generate_step tf32x3 reset_before filters L2 H256 V1000: B16 H32 K32 w4 s2": 8,
        # Registers and shared memory are full; tiles of 8 rows would halve the batch of a program.
        "sm_90 backward_cta tf32 reset_after everything to 128: B16 H128 K0 w8": 16,
        # 184 registers end it: one program on a processor in place of two.
        "sm_90 forward_cta tf32x3 reset_after plain to 64: B8 H64 K0 w8": 8,
        # Instead `step` has three launches a token.
        "sm_90 generate_grid 16 no_reset filters L2 H1024 V1000: B16 H32 K64 w8": 8,
        "sm_90 generate_grid 16 no_reset filters L2 H1024 V1000: B8 H32 K64 w8": 8,
        "sm_90 generate_grid 16 no_reset filters L2 H64 V256: B8 H32 K64 w8": 8,
        "sm_90 generate_grid 16 no_reset filters L4 H512 V1000: B16 H32 K64 w8": 16,
        "sm_90 generate_grid 16 reset_after filters L2 H1024 V1000: B16 H32 K64 w8": 8,
        "sm_90 generate_grid 16 reset_after filters L2 H64 V256: B8 H32 K64 w8": 8,
        "sm_90 generate_grid tf32 no_reset filters L1 H256 V1000: B8 H32 K64 w8": 8,
        "sm_90 generate_grid tf32 no_reset filters L1 H512 V1000: B8 H32 K64 w8": 8,
        "sm_90 generate_grid tf32 reset_after filters L2 H64 V256: B8 H32 K32 w8": 8,
        "sm_90 generate_grid tf32 reset_after filters L4 H128 V1000: B8 H32 K32 w8": 8,
        "sm_90 generate_grid tf32 reset_before filters L1 H256 V1000: B8 H32 K64 w8": 8,
        "sm_90 generate_grid tf32 reset_before filters L1 H512 V1000: B8 H32 K64 w8": 8,
    },
    "3.7.1": {
        # Rows of an odd H are read one element at a time; `step` has a launch a step instead.
        "sm_75 backward_cta 16 reset_after everything to 25: B16 H32 K0 w4": 112,
        "sm_75 backward_cta 16 reset_after everything to 57: B8 H64 K0 w4": 112,
        "sm_75 backward_norm 16 reset_after everything to 57: B8 H64 K0 w4": 128,
        "sm_75 backward_norm ieee reset_after everything to 57: B8 H64 K0 w4": 32,
        "sm_75 forward_cta 16 reset_after everything to 57: B8 H64 K0 w4": 24,
        "sm_75 forward_norm ieee reset_after everything to 57: B8 H64 K0 w4": 24,
        # The assembler stops there by itself; more registers would be a row for one Triton.
        "sm_100 forward_grid 16 reset_before everything to 512: B8 H32 K128 w8": 8,
        "sm_100 generate_step tf32x3 reset_after filters L2 H256 V1000: B16 H32 K32 w4 s2 #1": 8,
        "sm_120 backward_grid 16 reset_after everything to 512: B8 H16 K64 w4": 24,
        "sm_120 backward_grid 16 reset_before everything to 256: B8 H32 K64 w4": 24,
        "sm_120 forward_norm 16 reset_after everything to 64: B8 H64 K0 w4": 8,
        "sm_120 generate_grid tf32 no_reset filters L1 H256 V1000: B8 H16 K64 w4": 40,
        "sm_120 generate_grid tf32 reset_after filters L1 H128 V50000: B8 H16 K64 w4": 24,
        "sm_120 generate_grid tf32 reset_after filters L1 H256 V1000: B8 H16 K64 w4": 24,
        "sm_120 generate_grid tf32 reset_after filters L1 H256 V50000: B8 H16 K64 w4": 40,
        "sm_120 generate_grid tf32 reset_before filters L1 H128 V1000: B8 H16 K64 w4": 8,
        "sm_120 generate_grid tf32 reset_before filters L1 H256 V1000: B8 H16 K64 w4": 16,
        "sm_120 generate_step tf32x3 reset_before filters L2 H256 V1000: B16 H32 K32 w4 s2": 24,
        "sm_75 forward_grid ieee reset_after everything to 1024: B16 H16 K16 w4": 8,
        "sm_75 forward_grid ieee reset_after everything to 300: B16 H16 K16 w4": 8,
        "sm_86 backward_grid tf32 reset_before everything to 256: B8 H16 K64 w4": 24,
        "sm_86 forward_grid 16 reset_before everything to 512: B8 H16 K128 w4": 8,
        "sm_86 forward_grid tf32 reset_after everything to 256: B8 H16 K64 w4": 8,
        "sm_89 backward_grid tf32 reset_before everything to 256: B8 H16 K64 w4": 24,
        "sm_89 forward_grid 16 reset_before everything to 512: B8 H16 K128 w4": 8,
        "sm_89 forward_grid tf32 reset_after everything to 256: B8 H16 K64 w4": 8,
        "sm_90 backward_cta 16 reset_after everything to 128: B8 H128 K0 w8": 8,
        # All registers are taken; there are no more.
        "sm_100 backward_grid 16 reset_after everything to 256: B8 H64 K128 w4": 8,
        "sm_100 backward_grid 16 reset_before everything to 256: B8 H64 K128 w4": 8,
        "sm_100 backward_norm tf32 reset_after everything to 64: B8 H64 K0 w4": 24,
        "sm_100 backward_norm tf32x3 reset_after everything to 64: B8 H64 K0 w8": 24,
        "sm_100 generate_grid 16 reset_after filters L1 H512 V50000: B8 H32 K128 w8": 32,
        "sm_80 generate_grid tf32 reset_after filters L4 H256 V50000: B8 H32 K32 w8": 8,
        "sm_86 generate_grid tf32 reset_after filters L1 H256 V50000: B8 H16 K64 w4": 8,
        "sm_86 generate_grid tf32 reset_after filters L4 H256 V50000: B8 H32 K32 w8": 8,
        "sm_89 generate_grid tf32 reset_after filters L1 H256 V50000: B8 H16 K64 w4": 8,
        "sm_89 generate_grid tf32 reset_after filters L4 H256 V50000: B8 H32 K32 w8": 8,
        "sm_90 forward_grid 16 reset_after everything to 512: B32 H64 K64 w8": 32,
        "sm_90 generate_cta 16 reset_after filters L3 H64 V128: B8 H64 K0 w8": 16,
    },
    "3.8.0": {
        # Rows of an odd H are read one element at a time; `step` has a launch a step instead.
        "sm_75 backward_cta 16 reset_after everything to 25: B16 H32 K0 w4": 80,
        "sm_75 backward_cta 16 reset_after everything to 57: B8 H64 K0 w4": 80,
        "sm_75 backward_norm 16 reset_after everything to 57: B8 H64 K0 w4": 104,
        "sm_75 forward_cta 16 reset_after everything to 57: B8 H64 K0 w4": 16,
        "sm_75 forward_norm ieee reset_after everything to 57: B8 H64 K0 w4": 8,
        # The assembler stops there by itself; more registers would be a row for one Triton.
        "sm_100 backward_step tf32x3 reset_before everything to 256: B16 H32 K32 w4 #3": 8,
        "sm_100 forward_grid 16 reset_before everything to 512: B8 H32 K128 w8": 8,
        "sm_120 backward_step tf32x3 reset_after everything to 300: B16 H32 K32 w4 #1": 32,
        "sm_120 generate_cta 16 no_reset filters L2 H64 V128: B8 H64 K0 w8": 40,
        "sm_75 forward_grid ieee reset_after everything to 300: B16 H16 K16 w4": 8,
        "sm_80 generate_cta tf32 no_reset filters L1 H64 V128: B8 H64 K0 w8": 16,
        "sm_86 backward_step tf32x3 reset_after everything to 256: B16 H32 K32 w4 #1": 8,
        "sm_86 forward_grid 16 reset_before everything to 512: B8 H16 K128 w4": 8,
        "sm_86 forward_grid tf32 reset_after everything to 256: B8 H16 K64 w4": 8,
        "sm_86 forward_step tf32x3 reset_after everything to 256: B16 H32 K32 w4": 8,
        "sm_86 generate_cta tf32 no_reset filters L1 H64 V128: B8 H64 K0 w8": 16,
        "sm_89 backward_step tf32x3 reset_after everything to 256: B16 H32 K32 w4 #1": 8,
        "sm_89 forward_grid 16 reset_before everything to 512: B8 H16 K128 w4": 8,
        "sm_89 forward_grid tf32 reset_after everything to 256: B8 H16 K64 w4": 8,
        "sm_89 forward_step tf32x3 reset_after everything to 256: B16 H32 K32 w4": 8,
        "sm_89 generate_cta tf32 no_reset filters L1 H64 V128: B8 H64 K0 w8": 16,
        "sm_90 backward_step tf32x3 reset_after everything to 300: B16 H32 K32 w4 #1": 8,
        "sm_90 generate_grid 16 no_reset filters L1 H512 V1000: B8 H32 K128 w8": 16,
        # All registers are taken; there are no more.
        "sm_80 forward_grid tf32x3 reset_after everything to 1024: B16 H32 K32 w8": 8,
        "sm_80 generate_grid tf32 reset_after filters L4 H256 V50000: B8 H32 K32 w8": 16,
        "sm_86 generate_grid tf32 reset_after filters L4 H256 V50000: B8 H32 K32 w8": 8,
        "sm_89 generate_grid tf32 reset_after filters L4 H256 V50000: B8 H32 K32 w8": 8,
        "sm_90 forward_grid 16 reset_after everything to 512: B32 H64 K64 w8": 32,
        "sm_90 forward_grid 16 reset_before everything to 512: B8 H64 K64 w8": 16,
        "sm_90 forward_grid tf32 reset_after everything to 256: B8 H64 K64 w8": 8,
        "sm_90 forward_grid tf32 reset_after plain to 256: B8 H64 K64 w8": 8,
        "sm_90 forward_grid tf32 reset_before everything to 256: B8 H64 K64 w8": 8,
        "sm_90 forward_grid tf32x3 reset_after everything to 1024: B16 H32 K32 w8": 8,
        "sm_90 generate_cta 16 reset_after filters L3 H64 V128: B8 H64 K0 w8": 8,
        "sm_90 generate_cta 16 reset_before filters L3 H64 V128: B8 H64 K0 w8": 8,
    },
    "3.9.0": {
        # With any V, and more where computed anew; `grid` instead meets four times a token.
        "sm_120 generate_cta 16 no_reset filters L1 H128 V128: B8 H128 K0 w8": 16,
        "sm_120 generate_cta 16 reset_after filters L1 H128 V128: B8 H128 K0 w8": 32,
        "sm_120 generate_cta 16 reset_before filters L1 H128 V128: B8 H128 K0 w8": 32,
        # 255 registers are taken whatever the limit; without one two layers of H = 1024 spill 80.
        "sm_80 generate_grid tf32 reset_after filters L4 H256 V50000: B8 H32 K32 w8": 16,
        "sm_86 generate_grid tf32 reset_after filters L4 H256 V50000: B8 H32 K32 w8": 8,
        "sm_89 generate_grid tf32 reset_after filters L4 H256 V50000: B8 H32 K32 w8": 8,
        # A limit of 255 ends it, and makes 16 at H = 256.
        "sm_120 generate_grid tf32 reset_after filters L1 H128 V50000: B8 H16 K64 w4": 24,
        # Rows of an odd H are read one element at a time; `step` has a launch a step instead.
        "sm_75 backward_cta 16 reset_after everything to 25: B16 H32 K0 w4": 112,
        "sm_75 backward_cta 16 reset_after everything to 57: B8 H64 K0 w4": 136,
        "sm_75 backward_cta ieee reset_after everything to 25: B16 H32 K0 w4": 144,
        "sm_75 backward_norm 16 reset_after everything to 57: B8 H64 K0 w4": 96,
        "sm_75 backward_norm ieee reset_after everything to 57: B8 H64 K0 w4": 112,
        "sm_75 forward_cta 16 reset_after everything to 57: B8 H64 K0 w4": 8,
        "sm_75 forward_norm ieee reset_after everything to 57: B8 H64 K0 w4": 8,
        # At 128 registers four programs stand on a processor.
        "sm_100 backward_step tf32x3 reset_before everything to 300: B16 H32 K32 w4 #2": 8,
        "sm_100 forward_step tf32x3 reset_after everything to 300: B16 H32 K32 w4 #1": 8,
        "sm_90 backward_step tf32x3 reset_before everything to 300: B16 H32 K32 w4 #2": 8,
        "sm_90 forward_step tf32x3 reset_after everything to 300: B16 H32 K32 w4 #1": 8,
        # At 128 registers; `ieee` products are none of the tensor cores, and far slower.
        "sm_75 forward_grid ieee reset_after everything to 300: B16 H16 K16 w4": 8,
        # One stage less ends it, and then nothing is loaded ahead.
        "sm_120 backward_cta tf32 reset_before everything to 64: B8 H64 K0 w4": 24,
        # k of 32 ends it, and makes 16 for reset_after.
        "sm_120 backward_grid 16 reset_before everything to 512: B8 H16 K64 w4": 16,
        # 186 registers end it: two programs on a processor in place of three.
        "sm_90 backward_cta 16 reset_before everything to 32: B16 H32 K0 w4": 16,
        # Registers and shared memory are full; tiles of 8 rows would halve the batch of a program.
        "sm_90 backward_cta tf32 reset_before everything to 128: B16 H128 K0 w8": 32,
        # Eight warps end it; four are what was measured.
        "sm_90 forward_grid tf32 reset_after everything to 256: B8 H64 K64 w4": 16,
    },
}

BYTES = BY_VERSION.get(triton.__version__, {})
"""Those of the Triton that is imported."""
