// SPDX-License-Identifier: Apache-2.0
// What one 32-bit word of packed weights, of 1, 2 or 4 neighbouring k, adds to a sum.
#pragma once
#include "sampler_problem.h"
#include "vec.h"
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace gru_fast {
namespace GRU_FAST_ISA {
namespace {

typedef uint32_t Words __attribute__((vector_size(kVecBytes)));
typedef uint32_t WordsUnaligned __attribute__((vector_size(kVecBytes), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(kVecBytes)));
typedef int16_t Shorts __attribute__((vector_size(kVecBytes)));

GRU_INLINE Words load_words(const uint32_t* p) {
  return *reinterpret_cast<const WordsUnaligned*>(p);
}

#if defined(__AVX512VNNI__)
constexpr bool kBiasedBytes = true;  // vpdpbusd: the bytes of a row are unsigned, 128 too large
#else
constexpr bool kBiasedBytes = false;
#endif

// What one word of weights adds to a sum. `Row` is a word of the left operand, made ready once for
// all the weights that it meets.
template <Weights P>
struct Dot;

template <>
struct Dot<Weights::kFloat32> {
  static constexpr int kPack = 1;
  using Sum = Vec<float>;
};

// Whether products of many rows of bfloat16 take the even k of all weights and then the odd ones:
// both are more than 16 registers hold beside the sums.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr bool kHalfByHalf = true;
#else
constexpr bool kHalfByHalf = false;
#endif

constexpr Words kHighHalves = Words{} + 0xffff0000u;

// Without the instruction: products of the two halves, each a float32 with 16 zero bits.
template <>
struct Dot<Weights::kBFloat16> {
  static constexpr int kPack = 2;
  using Sum = Vec<float>;
#if defined(__AVX512BF16__)
  using Row = Words;
  GRU_INLINE Row ready(uint32_t word) { return word - Words{}; }
  GRU_INLINE void add(Sum& sum, Words weight, Row row) {
    sum = reinterpret_cast<Sum>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum),
                                                 reinterpret_cast<__m512bh>(weight),
                                                 reinterpret_cast<__m512bh>(row)));
  }
#else
  struct Row {
    Vec<float> even, odd;
  };
  GRU_INLINE Row ready(uint32_t word) {
    const Words both = word - Words{};
    return {half<0>(both), half<1>(both)};
  }
  GRU_INLINE void add(Sum& sum, Words weight, Row row) {
    sum += half<0>(weight) * row.even;
    sum += half<1>(weight) * row.odd;
  }
  template <int HALF>
  GRU_INLINE Vec<float> half(Words words, const Words& high = kHighHalves) {
    return reinterpret_cast<Vec<float> >(HALF == 0 ? words << 16 : words & high);
  }
#endif
};

template <>
struct Dot<Weights::kInt8> {
  static constexpr int kPack = 4;
  using Sum = Ints;
#if defined(__AVX512VNNI__)
  using Row = Words;
  GRU_INLINE Row ready(uint32_t word) { return word - Words{}; }
  GRU_INLINE void add(Sum& sum, Words weight, Row row) {
    sum = reinterpret_cast<Sum>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum),
                                                    reinterpret_cast<__m512i>(row),
                                                    reinterpret_cast<__m512i>(weight)));
  }
#elif defined(__AVX2__) && !defined(__AVX512F__)
  // vpmaddubsw adds pairs in 16 bits with saturation: |row| * sign(weight) stays below
  // 2 * 127 * 127 = 32258, because neither ever holds -128.
  struct Row {
    __m256i value, magnitude;
  };
  GRU_INLINE Row ready(uint32_t word) {
    const __m256i value = _mm256_set1_epi32(static_cast<int>(word));
    return {value, _mm256_abs_epi8(value)};
  }
  GRU_INLINE void add(Sum& sum, Words weight, Row row) {
    const __m256i turned = _mm256_sign_epi8(reinterpret_cast<__m256i>(weight), row.value);
    const __m256i pairs = _mm256_maddubs_epi16(row.magnitude, turned);
    sum += reinterpret_cast<Ints>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
#elif defined(__aarch64__)
  using Row = Words;
  GRU_INLINE Row ready(uint32_t word) { return word - Words{}; }
  GRU_INLINE void add(Sum& sum, Words weight, Row row) {
    const int8x16_t w = reinterpret_cast<int8x16_t>(weight);
    const int8x16_t r = reinterpret_cast<int8x16_t>(row);
    const int32x4_t so_far = reinterpret_cast<int32x4_t>(sum);
#if defined(__ARM_FEATURE_DOTPROD)
    sum = reinterpret_cast<Sum>(vdotq_s32(so_far, w, r));
#else
    // The sum of two products fits 16 bits, because neither factor is ever -128.
    const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(r));
    const int16x8_t high = vmull_high_s8(w, r);
    sum = reinterpret_cast<Sum>(vpadalq_s16(so_far, vpaddq_s16(low, high)));
#endif
  }
#else
  // 16-bit products of the even and of the odd bytes.
  struct Row {
    Shorts even, odd;
  };
  GRU_INLINE Row ready(uint32_t word) { return halves(word - Words{}); }
  GRU_INLINE void add(Sum& sum, Words weight, Row row) {
    const Row w = halves(weight);
    sum += multiply_pairs(w.even, row.even) + multiply_pairs(w.odd, row.odd);
  }
  GRU_INLINE Row halves(Words bytes) {
    const Shorts both = reinterpret_cast<Shorts>(bytes);
    return {(both << 8) >> 8, both >> 8};
  }
  GRU_INLINE Ints multiply_pairs(Shorts a, Shorts b) {
#if defined(__AVX512F__)
    return reinterpret_cast<Ints>(
        _mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__SSE2__)
    return reinterpret_cast<Ints>(
        _mm_madd_epi16(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
    const Ints x = reinterpret_cast<Ints>(a), y = reinterpret_cast<Ints>(b);
    return ((x << 16) >> 16) * ((y << 16) >> 16) + (x >> 16) * (y >> 16);
#endif
  }
#endif
};

template <Weights P>
using Sum = typename Dot<P>::Sum;

}  // namespace
}  // namespace GRU_FAST_ISA
}  // namespace gru_fast
