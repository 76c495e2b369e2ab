// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <cstring>

#include "inline.h"

namespace gru_fast {

// A float16 as it lies in memory.
struct Float16 {
  uint16_t bits;
};

// Without branches and without float32's denormals, which the processor may be told to flush.
GRU_INLINE float float16_value(uint16_t half) {
  constexpr uint32_t kRebias = 112u << 23, kLeastNormal = 1u << 10, kInfinity = 0x7c00;
  const uint32_t magnitude = half & 0x7fffu;
  const float denormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
  uint32_t small, bits = (magnitude << 13) + kRebias;
  std::memcpy(&small, &denormal, sizeof small);
  bits += magnitude >= kInfinity ? kRebias : 0;
  bits = magnitude < kLeastNormal ? small : bits;
  bits |= static_cast<uint32_t>(half & 0x8000u) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// float32 to float16, to the nearest, ties to even.
GRU_INLINE uint16_t float16_bits(float value) {
  constexpr uint32_t kRebias = 112u << 23, kLeastNormal = 113u << 23, kInfinity = 0x7f800000;
  constexpr uint32_t kTooLarge = 0x47800000;  // 2^16
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  float absolute;
  std::memcpy(&absolute, &magnitude, sizeof absolute);
  const float shifted = absolute + 0.5f;  // whose last bit is that of a denormal
  uint32_t denormal, half;
  std::memcpy(&denormal, &shifted, sizeof denormal);
  denormal -= 0x3f000000u;
  half = (magnitude - kRebias + 0xfff + (magnitude >> 13 & 1)) >> 13;
  half = magnitude < kLeastNormal ? denormal : half;
  half = magnitude >= kTooLarge ? 0x7c00u : half;
  half = magnitude > kInfinity ? 0x7e00u : half;
  return static_cast<uint16_t>(sign | half);
}

}  // namespace gru_fast
