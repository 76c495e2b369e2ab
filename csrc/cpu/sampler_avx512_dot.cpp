// SPDX-License-Identifier: Apache-2.0
#define GRU_FAST_ISA avx512_dot
#define GRU_FAST_ISA_NAME "avx512_dot"
#include "sampler_kernels.h"
