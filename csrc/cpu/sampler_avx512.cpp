// SPDX-License-Identifier: Apache-2.0
#define GRU_FAST_ISA avx512
#define GRU_FAST_ISA_NAME "avx512"
#include "sampler_kernels.h"
