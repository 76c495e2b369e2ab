// SPDX-License-Identifier: Apache-2.0
// Numbers of 16 bits to float32, with what the instruction set has for it.
#pragma once
#include "narrow.h"
#include "vec.h"

namespace gru_fast {
namespace GRU_FAST_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kHalvesAtOnce = 16;
GRU_INLINE void widen_some(const uint16_t* from, float* to) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  _mm512_storeu_ps(to, _mm512_maskz_cvtph_ps(0xffff, halves));
}
#elif defined(__F16C__)
constexpr int kHalvesAtOnce = 8;
GRU_INLINE void widen_some(const uint16_t* from, float* to) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  _mm256_storeu_ps(to, _mm256_cvtph_ps(halves));
}
#else
constexpr int kHalvesAtOnce = 1;  // in a loop that the compiler makes vectors of
GRU_INLINE void widen_some(const uint16_t* from, float* to) { *to = float16_value(*from); }
#endif

// How far ahead numbers are asked for: weights come in one stream, which hardware prefetchers
// follow to the end of a page.
constexpr int64_t kWidenAhead = 4096;  // numbers, two pages

template <Narrow NUMBER>
GRU_INLINE float widened(uint16_t bits) {
  return NUMBER == Narrow::kFloat16 ? float16_value(bits) : value_of(BFloat16{bits});
}

template <Narrow NUMBER>
GRU_INLINE void widen_all(const uint16_t* from, float* to, int64_t count) {
  constexpr int kLine = 64 / sizeof(uint16_t);
  int64_t i = 0;
  for (; i + kLine <= count; i += kLine) {
    prefetch(from + i + kWidenAhead);
    if constexpr (NUMBER == Narrow::kFloat16) {
      for (int j = 0; j < kLine; j += kHalvesAtOnce) widen_some(from + i + j, to + i + j);
    } else {
      for (int j = 0; j < kLine; ++j) to[i + j] = widened<NUMBER>(from[i + j]);
    }
  }
  if constexpr (NUMBER == Narrow::kFloat16) {
    for (; i + kHalvesAtOnce <= count; i += kHalvesAtOnce) widen_some(from + i, to + i);
  }
  for (; i < count; ++i) to[i] = widened<NUMBER>(from[i]);
}

[[gnu::noinline]] inline void widen(Narrow number, const uint16_t* from, float* to, int64_t count) {
  if (number == Narrow::kFloat16) {
    widen_all<Narrow::kFloat16>(from, to, count);
  } else {
    widen_all<Narrow::kBFloat16>(from, to, count);
  }
}

}  // namespace
}  // namespace GRU_FAST_ISA
}  // namespace gru_fast
