// SPDX-License-Identifier: Apache-2.0
#define GRU_FAST_ISA avx2
#define GRU_FAST_ISA_NAME "avx2"
#include "sampler_kernels.h"
