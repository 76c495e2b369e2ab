// SPDX-License-Identifier: Apache-2.0
#define GRU_FAST_ISA avx2
#include "norm_kernels.h"
