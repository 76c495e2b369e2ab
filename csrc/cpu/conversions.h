// SPDX-License-Identifier: Apache-2.0
// Numbers of 16 bits from and to float32, for the numbers that are no weights.
#pragma once
#include "widen.h"

namespace gru_fast {
namespace GRU_FAST_ISA {
namespace {

#if defined(__AVX512F__)
GRU_INLINE void narrow_some(const float* from, uint16_t* to) {
  const __m256i halves = _mm512_maskz_cvtps_ph(0xffff, _mm512_loadu_ps(from), 0);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves);
}
#elif defined(__F16C__)
GRU_INLINE void narrow_some(const float* from, uint16_t* to) {
  const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from), 0);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), halves);
}
#else
GRU_INLINE void narrow_some(const float* from, uint16_t* to) { *to = float16_bits(*from); }
#endif

void narrow(Narrow number, const float* from, uint16_t* to, int64_t count) {
  if (number == Narrow::kBFloat16) {
    for (int64_t i = 0; i < count; ++i) to[i] = bfloat16_bits(from[i]);
    return;
  }
  int64_t i = 0;
  for (; i + kHalvesAtOnce <= count; i += kHalvesAtOnce) narrow_some(from + i, to + i);
  for (; i < count; ++i) to[i] = float16_bits(from[i]);
}

constexpr Conversions kConversions = {widen, narrow};

}  // namespace
}  // namespace GRU_FAST_ISA
}  // namespace gru_fast
