# SPDX-License-Identifier: Apache-2.0
"""Rows that spill, which none should: bytes of stack, by the name of the point."""

import triton

BY_VERSION: dict[str, dict[str, int]] = {
    "3.6.0": {
        "sm_120 backward_cta tf32 reset_after everything to 64: B8 H64 K0 w4": 24,
        "sm_75 forward_grid 16 reset_after everything to 1024: B16 H32 K32 w4": 8,
        "sm_80 generate_grid tf32 reset_before filters L2 H1024 V1000: B8 H32 K32 w8": 8,
        "sm_90 backward_cta 16 reset_after plain to 128: B8 H128 K0 w8": 8,
        "sm_90 backward_cta tf32 reset_after everything to 128: B16 H128 K0 w8": 16,
        "sm_90 backward_grid 16 reset_after everything to 256: B32 H64 K64 w8": 8,
        "sm_90 forward_cta 16 reset_after plain to 128: B8 H128 K0 w8": 8,
        "sm_90 forward_cta tf32x3 reset_after plain to 64: B8 H64 K0 w8": 8,
        "sm_90 generate_cta 16 reset_after filters L1 H121 V128: B16 H128 K0 w8": 8,
        "sm_90 generate_grid 16 reset_after filters L1 H512 V50000: B8 H32 K128 w8": 8,
    },
    "3.9.0": {
        "sm_100 generate_cta 16 reset_after filters L1 H64 V128: B16 H64 K0 w8": 80,
        "sm_100 generate_step tf32x3 reset_after filters L2 H256 V1000: B16 H32 K32 w4 s2 #1": 8,
        "sm_120 backward_grid 16 reset_after everything to 512: B8 H16 K128 w4": 24,
        "sm_120 generate_cta 16 reset_after filters L1 H128 V128: B8 H128 K0 w8": 32,
        "sm_120 generate_cta 16 reset_after filters L1 H64 V128: B16 H64 K0 w8": 8,
        "sm_120 generate_cta 16 reset_after filters L2 H64 V128: B8 H64 K0 w8": 16,
        "sm_90 backward_cta 16 reset_before everything to 32: B16 H32 K0 w4": 16,
        "sm_90 backward_cta tf32 reset_before everything to 128: B16 H128 K0 w8": 32,
        "sm_90 backward_grid 16 reset_after everything to 256: B32 H64 K64 w8": 32,
        "sm_90 forward_grid tf32 reset_after everything to 256: B8 H64 K64 w4": 16,
        "sm_90 generate_cta 16 reset_before filters L1 H128 V128: B16 H128 K0 w8": 8,
        "sm_90 generate_step tf32 reset_after filters L2 H300 V1000: B16 H32 K32 w4 s3 #2": 8,
    },
}

BYTES = BY_VERSION.get(triton.__version__, {})
"""Those of the Triton that is imported."""
