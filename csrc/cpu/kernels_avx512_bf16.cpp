// SPDX-License-Identifier: Apache-2.0
#define GRU_FAST_ISA avx512_bf16
#define GRU_FAST_BFLOAT16
#include "kernels.h"
