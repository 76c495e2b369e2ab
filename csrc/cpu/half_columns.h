// SPDX-License-Identifier: Apache-2.0
// Rows of float16 as columns of float32: they are transposed while they have 16 bits, and widened
// after it.
#pragma once
#include "widen.h"

namespace gru_fast {
namespace GRU_FAST_ISA {
namespace {

#if defined(__F16C__)
// Rows of halves that one register has of the same k, and k that it has of such a row.
constexpr int kHalfRows = 16, kHalfColumns = 8;

GRU_INLINE __m128i load_halves(const Float16* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}
// columns[k] = number k of kHalfRows rows, in their order.
GRU_INLINE void load_columns(const Float16* p, int64_t stride, __m256i (&columns)[kHalfColumns]) {
  __m256i a[kHalfColumns], b[kHalfColumns];
#pragma GCC unroll 8
  for (int i = 0; i < kHalfColumns; ++i) {  // rows i and i + 8
    a[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(load_halves(p + i * stride)),
                                   load_halves(p + (i + kHalfRows / 2) * stride), 1);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kHalfColumns; i += 2) {
    b[i] = _mm256_unpacklo_epi16(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_epi16(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kHalfColumns; i += 4) {  // four rows of k 0, 1; 2, 3; 4, 5; 6, 7
    a[i] = _mm256_unpacklo_epi32(b[i], b[i + 2]);
    a[i + 1] = _mm256_unpackhi_epi32(b[i], b[i + 2]);
    a[i + 2] = _mm256_unpacklo_epi32(b[i + 1], b[i + 3]);
    a[i + 3] = _mm256_unpackhi_epi32(b[i + 1], b[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kHalfColumns / 2; ++i) {
    columns[2 * i] = _mm256_unpacklo_epi64(a[i], a[i + 4]);
    columns[2 * i + 1] = _mm256_unpackhi_epi64(a[i], a[i + 4]);
  }
}
GRU_INLINE void widen_column(__m256i column, Vec<float> (&wide)[kHalfRows / kLanes<float>]) {
#if defined(__AVX512F__)
  wide[0] = reinterpret_cast<Vec<float>>(_mm512_maskz_cvtph_ps(0xffff, column));
#else
  wide[0] = reinterpret_cast<Vec<float>>(_mm256_cvtph_ps(_mm256_castsi256_si128(column)));
  wide[1] = reinterpret_cast<Vec<float>>(_mm256_cvtph_ps(_mm256_extracti128_si256(column, 1)));
#endif
}
#endif

}  // namespace
}  // namespace GRU_FAST_ISA
}  // namespace gru_fast
