// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <cstring>

#include "inline.h"

namespace gru_fast {

// A bfloat16 as it lies in memory.
struct BFloat16 {
  uint16_t bits;
};

// float32 to bfloat16, to the nearest, ties to even.
GRU_INLINE uint16_t bfloat16_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace gru_fast
