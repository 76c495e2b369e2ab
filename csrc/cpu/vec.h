// SPDX-License-Identifier: Apache-2.0
// One SIMD register of float or double, as wide as the flags of this translation unit allow, and
// how tensors get into it. bfloat16 becomes float on the way. Included by the kernels_*, norm_*
// and sampler_*.cpp files only, each of which gives it a namespace of its own.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>

#include "inline.h"
#include "problem.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace gru_fast {
namespace GRU_FAST_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
#elif defined(__AVX__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRowBlock = 8;  // 32 registers: 8 rows x 3 vectors of accumulators
#else
constexpr int kRowBlock = 4;
#endif

template <class Real>
struct VecType;
template <>
struct VecType<float> {
  typedef float Reg __attribute__((vector_size(kVecBytes)));
  typedef float Unaligned __attribute__((vector_size(kVecBytes), aligned(4), may_alias));
  typedef float Half __attribute__((vector_size(kVecBytes / 2), aligned(4), may_alias));
  typedef int32_t Bits __attribute__((vector_size(kVecBytes)));
};
template <>
struct VecType<double> {
  typedef double Reg __attribute__((vector_size(kVecBytes)));
  typedef double Unaligned __attribute__((vector_size(kVecBytes), aligned(8), may_alias));
  typedef double Half __attribute__((vector_size(kVecBytes / 2), aligned(8), may_alias));
  typedef int64_t Bits __attribute__((vector_size(kVecBytes)));
};
template <>
struct VecType<BFloat16> {
  using Reg = VecType<float>::Reg;
  using Bits = VecType<float>::Bits;
  typedef float Unaligned __attribute__((vector_size(kVecBytes), aligned(2), may_alias));
  typedef float Half __attribute__((vector_size(kVecBytes / 2), aligned(2), may_alias));
};
template <class Real>
using Vec = typename VecType<Real>::Reg;
template <class Real>
using VecBits = typename VecType<Real>::Bits;
template <class Real>
constexpr int kLanes = kVecBytes / static_cast<int>(sizeof(Compute<Real>));
// A lane of a product multiplies words of this many neighbouring k.
template <class Real>
constexpr int kPack = static_cast<int>(sizeof(Compute<Real>) / sizeof(Real));

template <class Real>
GRU_INLINE Vec<Real> load(const Real* p) {
  return *reinterpret_cast<const typename VecType<Real>::Unaligned*>(p);
}
template <class Real>
GRU_INLINE void store(Real* p, Vec<Real> v) {
  *reinterpret_cast<typename VecType<Real>::Unaligned*>(p) = v;
}
template <class Real>
GRU_INLINE Vec<Real> broadcast(Compute<Real> value) {
  return value - Vec<Real>{};
}

#if defined(__AVX512BF16__)
// The masks of all lanes keep GCC 12 from warning about its own headers.
typedef uint32_t HalfWords __attribute__((vector_size(kVecBytes)));
GRU_INLINE HalfWords spread(__m256i halves) {
  return reinterpret_cast<HalfWords>(_mm512_maskz_cvtepu16_epi32(0xffff, halves));
}
GRU_INLINE Vec<float> widen(__m256i halves) {
  return reinterpret_cast<Vec<float>>(spread(halves) << 16);
}
GRU_INLINE __m256i narrow(Vec<float> v) {
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v)));
}
GRU_INLINE Vec<float> load(const BFloat16* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
GRU_INLINE void store(BFloat16* p, Vec<float> v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v));
}
GRU_INLINE Vec<float> load_n(const BFloat16* p, int n) {
  if (__builtin_expect(n == kLanes<float>, 1)) return load(p);
  return widen(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p));
}
GRU_INLINE void store_n(BFloat16* p, Vec<float> v, int n) {
  if (__builtin_expect(n == kLanes<float>, 1)) {
    store(p, v);
  } else {
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), narrow(v));
  }
}
#endif

#if defined(__aarch64__)
// Loads through `p` from here on come after the computation of `values`. Compilers load what all
// rows of a tile need before they multiply the first, and for that keep sums in memory.
template <class Number, class V, int N>
GRU_INLINE void load_after(const Number*& p, const V (&values)[N]) {
#pragma GCC unroll 12
  for (int n = 0; n < N; ++n) asm("" : "+r"(p) : "w"(values[n]));
}
#endif

// Into the second level of the cache: it is read later than the first would keep it.
GRU_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// Words as they lie, whatever they stand for.
template <class Real>
GRU_INLINE Vec<Real> load_words(const Real* p) {
  return *reinterpret_cast<const typename VecType<Real>::Unaligned*>(p);
}
// Of `count` numbers, zero beyond: nothing behind them is read.
template <class Real>
GRU_INLINE Vec<Real> load_some_words(const Real* p, int count) {
#if defined(__AVX512F__)
  const uint64_t mask = (uint64_t{1} << count) - 1;
  if constexpr (sizeof(Real) == 2) {
    return reinterpret_cast<Vec<Real>>(_mm512_maskz_loadu_epi16(static_cast<__mmask32>(mask), p));
  } else if constexpr (sizeof(Real) == 4) {
    return reinterpret_cast<Vec<Real>>(_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p));
  } else {
    return reinterpret_cast<Vec<Real>>(_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), p));
  }
#elif defined(__AVX2__)
  static_assert(sizeof(Real) >= sizeof(int32_t));
  alignas(64) static constexpr int32_t masks[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  const int32_t* const mask = masks + 8 - count * static_cast<int>(sizeof(Real) / sizeof(int32_t));
  return reinterpret_cast<Vec<Real>>(_mm256_maskload_epi32(
      reinterpret_cast<const int*>(p), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(mask))));
#else
  Vec<Real> v{};
  std::memcpy(&v, p, static_cast<size_t>(count) * sizeof(Real));
  return v;
#endif
}

// The first n lanes; the others read as zero, and are left alone by store_n.
template <class Real>
GRU_INLINE Vec<Real> load_n(const Real* p, int n) {
  return __builtin_expect(n == kLanes<Real>, 1) ? load(p) : load_some_words(p, n);
}
template <class Real>
GRU_INLINE void store_n(Real* p, Vec<Real> v, int n) {
  if (__builtin_expect(n == kLanes<Real>, 1)) {
    store(p, v);
    return;
  }
#if defined(__AVX512F__)
  const unsigned mask = (1u << n) - 1;
  if constexpr (sizeof(Real) == 4) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>(mask), reinterpret_cast<__m512>(v));
  } else {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>(mask), reinterpret_cast<__m512d>(v));
  }
#else
  std::memcpy(p, &v, static_cast<size_t>(n) * sizeof(Real));
#endif
}
// As load_n() at p + offset; zero if p is null.
template <class Real>
GRU_INLINE Vec<Real> load_or_zero(const Real* p, int64_t offset, int n) {
  return p ? load_n(p + offset, n) : Vec<Real>{};
}

// v with zero in the lanes from n on.
template <class Real>
GRU_INLINE Vec<Real> first_lanes(Vec<Real> v, int n) {
  if (__builtin_expect(n == kLanes<Real>, 1)) return v;
#if defined(__AVX512F__)
  if constexpr (sizeof(Compute<Real>) == 4) {
    const auto mask = static_cast<__mmask16>((1u << n) - 1);
    return reinterpret_cast<Vec<Real>>(_mm512_maskz_mov_ps(mask, reinterpret_cast<__m512>(v)));
  }
#endif
  Compute<Real> lanes[kLanes<Real>];
  store(lanes, v);
  return load_n(lanes, n);
}

// What comes back when v is stored and loaded.
template <class Real>
GRU_INLINE Vec<Real> as_stored(Vec<Real> v) {
  if constexpr (kPack<Real> == 1) {
    return v;
  } else {
#if defined(__AVX512BF16__)
    return widen(narrow(v));
#endif
  }
}

template <class Real>
GRU_INLINE Real value_of(Real number) {
  return number;
}
GRU_INLINE float value_of(BFloat16 number) {
  const uint32_t bits = static_cast<uint32_t>(number.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class Real>
GRU_INLINE void store_words(Real* p, Vec<Real> v) {
  *reinterpret_cast<typename VecType<Real>::Unaligned*>(p) = v;
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define GRU_FAST_SHUFFLEVECTOR 1
#endif
#endif

// Exchanges the off-diagonal blocks of size D of a pair of rows: one stage of a transpose.
template <class Real, int D, size_t... L>
GRU_INLINE void exchange(Vec<Real>& a, Vec<Real>& b, std::index_sequence<L...>) {
  constexpr int W = kLanes<Real>;
#ifdef GRU_FAST_SHUFFLEVECTOR
  const Vec<Real> low = __builtin_shufflevector(a, b, ((L / D) % 2 == 0 ? L : W + L - D)...);
  const Vec<Real> high = __builtin_shufflevector(a, b, ((L / D) % 2 == 0 ? L + D : W + L)...);
#else
  const VecBits<Real> low_mask = {((L / D) % 2 == 0 ? L : W + L - D)...};
  const VecBits<Real> high_mask = {((L / D) % 2 == 0 ? L + D : W + L)...};
  const Vec<Real> low = __builtin_shuffle(a, b, low_mask);
  const Vec<Real> high = __builtin_shuffle(a, b, high_mask);
#endif
  a = low;
  b = high;
}

// Lane i of the result is lane i ^ D.
template <class Real, int D, size_t... L>
GRU_INLINE Vec<Real> exchange_lanes(Vec<Real> v, std::index_sequence<L...>) {
#ifdef GRU_FAST_SHUFFLEVECTOR
  return __builtin_shufflevector(v, v, (L ^ D)...);
#else
  const VecBits<Real> mask = {(L ^ D)...};
  return __builtin_shuffle(v, mask);
#endif
}

template <class Real, int D>
GRU_INLINE void transpose_stage(Vec<Real> (&rows)[kLanes<Real>]) {
  constexpr int W = kLanes<Real>;
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    if ((i / D) % 2 == 0) exchange<Real, D>(rows[i], rows[i + D], std::make_index_sequence<W>{});
  }
  if constexpr (D > 1) transpose_stage<Real, D / 2>(rows);
}

// rows[i][j] <-> rows[j][i]
template <class Real>
GRU_INLINE void transpose(Vec<Real> (&rows)[kLanes<Real>]) {
  transpose_stage<Real, kLanes<Real> / 2>(rows);
}

#ifdef GRU_FAST_SHUFFLEVECTOR
template <class Real, size_t... L>
GRU_INLINE Vec<Real> load_halves(const Real* low, const Real* high, std::index_sequence<L...>) {
  using Half = typename VecType<Real>::Half;
  return __builtin_shufflevector(*reinterpret_cast<const Half*>(low),
                                 *reinterpret_cast<const Half*>(high), L...);
}
#endif

// rows[j][i] = word j of p + i * stride. Loads of half rows do the first stage of the transpose:
// the shuffles are what bounds it.
template <class Real>
GRU_INLINE void load_transposed(const Real* p, int64_t stride, Vec<Real> (&rows)[kLanes<Real>]) {
  constexpr int W = kLanes<Real>;
#ifdef GRU_FAST_SHUFFLEVECTOR
  if constexpr (W > 2) {
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) {
      constexpr int half = W / 2 * kPack<Real>;
      const Real* near = p + i * stride;
      const Real* far = near + W / 2 * stride;
      rows[i] = load_halves(near, far, std::make_index_sequence<W>{});
      rows[i + W / 2] = load_halves(near + half, far + half, std::make_index_sequence<W>{});
    }
    transpose_stage<Real, W / 4>(rows);
    return;
  }
#endif
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) rows[i] = load_words(p + i * stride);
  transpose<Real>(rows);
}
// The same of n rows and `columns` numbers of each; zero beyond.
template <class Real>
GRU_INLINE void load_some_transposed(const Real* p, int64_t stride, int n, int columns,
                                     Vec<Real> (&rows)[kLanes<Real>]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<Real>; ++i) {
    rows[i] = load_some_words(p + (i < n ? i * stride : 0), i < n ? columns : 0);
  }
  transpose<Real>(rows);
}

}  // namespace
}  // namespace GRU_FAST_ISA
}  // namespace gru_fast
