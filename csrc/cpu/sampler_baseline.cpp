// SPDX-License-Identifier: Apache-2.0
#define GRU_FAST_ISA baseline
#define GRU_FAST_ISA_NAME "baseline"
#include "sampler_kernels.h"
