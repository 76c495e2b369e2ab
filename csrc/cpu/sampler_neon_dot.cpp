// SPDX-License-Identifier: Apache-2.0
#define GRU_FAST_ISA neon_dot
#define GRU_FAST_ISA_NAME "neon_dot"
#include "sampler_kernels.h"
