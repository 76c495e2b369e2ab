// SPDX-License-Identifier: Apache-2.0
#define GRU_FAST_ISA baseline
#include "norm_kernels.h"
