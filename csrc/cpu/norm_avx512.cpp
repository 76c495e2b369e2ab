// SPDX-License-Identifier: Apache-2.0
#define GRU_FAST_ISA avx512
#include "norm_kernels.h"
