// SPDX-License-Identifier: Apache-2.0
#define GRU_FAST_ISA avx512_bf16
#include "kernels.h"
