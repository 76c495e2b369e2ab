// SPDX-License-Identifier: Apache-2.0
// What must be compiled into its caller: a copy of its own would be one for all instruction sets.
#pragma once

#define GRU_INLINE static inline __attribute__((always_inline))
#define GRU_MEMBER inline __attribute__((always_inline))
#define GRU_MEMBER_LAMBDA __attribute__((always_inline))
