// SPDX-License-Identifier: Apache-2.0
// sigmoid and tanh on a register, to about one unit in the last place of the type that tensors
// have; NaN stays NaN, and infinity saturates: sigmoid at exp(-limit), the smallest normal number,
// where torch's reaches zero. Then the gates of reset_after, side by side: for samplers and for a
// single row of a layer. A layer's batch has them one after the other (forward.h).
#pragma once
#include "vec.h"
#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace gru_fast {
namespace GRU_FAST_ISA {
namespace {

template <class Real>
struct ExpConstants;

// Adding `magic` rounds to an integer that then sits in the low bits of the mantissa.
// ln 2 = ln2_high + ln2_low, where n * ln2_high is exact.
template <>
struct ExpConstants<float> {
  static constexpr float magic = 12582912.0f, limit = 87.0f;
  static constexpr float log2e = 1.44269504088896341f;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr int mantissa_bits = 23, bias = 127;
  static constexpr int terms = 7;
};
template <>
struct ExpConstants<double> {
  static constexpr double magic = 6755399441055744.0, limit = 708.0;
  static constexpr double log2e = 1.4426950408889634074;
  static constexpr double ln2_high = 6.93145751953125e-1, ln2_low = 1.42860682030941723212e-6;
  static constexpr int mantissa_bits = 52, bias = 1023;
  static constexpr int terms = 13;
};

constexpr double kInverseFactorial[] = {1.0,
                                        1.0,
                                        1.0 / 2,
                                        1.0 / 6,
                                        1.0 / 24,
                                        1.0 / 120,
                                        1.0 / 720,
                                        1.0 / 5040,
                                        1.0 / 40320,
                                        1.0 / 362880,
                                        1.0 / 3628800,
                                        1.0 / 39916800,
                                        1.0 / 479001600,
                                        1.0 / 6227020800.0};

// The smaller and the larger of two values; where the second is NaN, the second. Compilers make a
// comparison and a blend of the portable form.
template <class Real>
GRU_INLINE Vec<Real> smaller(Real limit, Vec<Real> x) {
  const Vec<Real> a = broadcast<Real>(limit);
#if defined(__AVX512F__)
  if constexpr (sizeof(Real) == 4) {
    return (Vec<Real>)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)x);
  } else {
    return (Vec<Real>)_mm512_maskz_min_pd(0xff, (__m512d)a, (__m512d)x);
  }
#elif defined(__AVX__)
  if constexpr (sizeof(Real) == 4) {
    return (Vec<Real>)_mm256_min_ps((__m256)a, (__m256)x);
  } else {
    return (Vec<Real>)_mm256_min_pd((__m256d)a, (__m256d)x);
  }
#else
  return a < x ? a : x;
#endif
}
template <class Real>
GRU_INLINE Vec<Real> larger(Vec<Real> a, Vec<Real> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Real) == 4) {
    return (Vec<Real>)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)x);
  } else {
    return (Vec<Real>)_mm512_maskz_max_pd(0xff, (__m512d)a, (__m512d)x);
  }
#elif defined(__AVX__)
  if constexpr (sizeof(Real) == 4) {
    return (Vec<Real>)_mm256_max_ps((__m256)a, (__m256)x);
  } else {
    return (Vec<Real>)_mm256_max_pd((__m256d)a, (__m256d)x);
  }
#else
  return a > x ? a : x;
#endif
}
template <class Real>
GRU_INLINE Vec<Real> larger(Real limit, Vec<Real> x) {
  return larger<Real>(broadcast<Real>(limit), x);
}

// What runs between the operations of a function that takes a `between`: other work, for the time
// that a chain of dependent operations waits.
struct Nothing {
  GRU_MEMBER void operator()() const {}
};

#define GRU_EACH(j) _Pragma("GCC unroll 16") for (int j = 0; j < N; ++j)

// exp(x) = scale * (1 + fraction), with |fraction| < 0.42 accurate also where it is tiny; |x| at
// most ExpConstants::limit. N registers at once: a chain of dependent operations is longer than
// what a processor looks ahead.
template <class Real, int N, class Between = Nothing>
GRU_INLINE void scaled_exp(const Vec<Real> (&x)[N], Vec<Real> (&scale)[N], Vec<Real> (&fraction)[N],
                           Between between = {}) {
  using C = ExpConstants<Real>;
  Vec<Real> shifted[N], r[N], tail[N];
  GRU_EACH(j) shifted[j] = x[j] * C::log2e + C::magic;
  GRU_EACH(j) tail[j] = shifted[j] - C::magic;
  between();
  GRU_EACH(j) r[j] = x[j] - tail[j] * C::ln2_high;
  GRU_EACH(j) r[j] = r[j] - tail[j] * C::ln2_low;
  GRU_EACH(j) tail[j] = broadcast<Real>(static_cast<Real>(kInverseFactorial[C::terms]));
#pragma GCC unroll 16
  for (int i = C::terms - 1; i >= 2; --i) {
    between();
    GRU_EACH(j) tail[j] = tail[j] * r[j] + static_cast<Real>(kInverseFactorial[i]);
  }
  GRU_EACH(j) {
    const VecBits<Real> power = reinterpret_cast<VecBits<Real>>(shifted[j]) + C::bias;
    scale[j] = reinterpret_cast<Vec<Real>>(power << C::mantissa_bits);
  }
  GRU_EACH(j) fraction[j] = r[j] + r[j] * r[j] * tail[j];
}

template <class Real, int N, class Between = Nothing>
  requires(kPack<Real> == 1)
GRU_INLINE void sigmoid(Vec<Real> (&x)[N], Between between = {}) {
  constexpr Real limit = ExpConstants<Real>::limit;
  Vec<Real> scale[N], fraction[N];
  GRU_EACH(j) x[j] = larger<Real>(-limit, smaller<Real>(limit, -x[j]));
  scaled_exp<Real, N>(x, scale, fraction, between);
  between();
  GRU_EACH(j) x[j] = (scale[j] * fraction[j] + scale[j]) + Real(1);
  GRU_EACH(j) x[j] = Real(1) / x[j];
}

// tanh(x) = m / (m + 2), m = exp(2 x) - 1
template <class Real, int N, class Between = Nothing>
  requires(kPack<Real> == 1)
GRU_INLINE void tanh(Vec<Real> (&x)[N], Between between = {}) {
  Vec<Real> scale[N], fraction[N];
  GRU_EACH(j) x[j] = larger<Real>(-20, smaller<Real>(20, x[j]));
  GRU_EACH(j) x[j] = x[j] + x[j];
  scaled_exp<Real, N>(x, scale, fraction, between);
  between();
  GRU_EACH(j) x[j] = scale[j] * fraction[j] + (scale[j] - Real(1));
  GRU_EACH(j) x[j] = x[j] / (x[j] + Real(2));
}

template <class Real>
GRU_INLINE Vec<Real> sigmoid(Vec<Real> x) {
  Vec<Real> one[1] = {x};
  sigmoid<Real, 1>(one);
  return one[0];
}
template <class Real>
GRU_INLINE Vec<Real> tanh(Vec<Real> x) {
  Vec<Real> one[1] = {x};
  tanh<Real, 1>(one);
  return one[0];
}

#if defined(__AVX512BF16__)
// What is rounded to 8 bits needs no more than the 14 of the approximate reciprocal.

// 2^x = 2^whole * (1 + fraction). The polynomial is minimax in relative error (2.8e-6) over +-0.5.
struct ShortExp2 {
  __m512 whole, power;
  Vec<float> fraction;

  GRU_MEMBER explicit ShortExp2(Vec<float> x) {
    const __m512 given = reinterpret_cast<__m512>(x);
    whole =
        _mm512_maskz_roundscale_ps(0xffff, given, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Vec<float> f = reinterpret_cast<Vec<float>>(_mm512_sub_ps(given, whole));
    Vec<float> p = f * 0.009582852944731712f + 0.05590642988681793f;
    p = p * f + 0.24024099111557007f;
    p = p * f + 0.6931241750717163f;
    fraction = p * f;
    power = reinterpret_cast<__m512>(fraction + 1.0f);
  }
  // Saturates to 0 and infinity.
  GRU_MEMBER Vec<float> value() const {
    return reinterpret_cast<Vec<float>>(_mm512_maskz_scalef_ps(0xffff, power, whole));
  }
};

GRU_INLINE Vec<float> short_reciprocal(Vec<float> x) {
  return reinterpret_cast<Vec<float>>(_mm512_maskz_rcp14_ps(0xffff, reinterpret_cast<__m512>(x)));
}

template <>
GRU_MEMBER Vec<float> sigmoid<BFloat16>(Vec<float> x) {
  constexpr float log2e = ExpConstants<float>::log2e;
  return short_reciprocal(ShortExp2(x * -log2e).value() + 1.0f);
}

template <>
GRU_MEMBER Vec<float> tanh<BFloat16>(Vec<float> x) {
  constexpr float log2e = ExpConstants<float>::log2e;
  // min returns its second operand where one of them is NaN.
  const __m512 limited =
      _mm512_maskz_min_ps(0xffff, _mm512_set1_ps(60.0f), reinterpret_cast<__m512>(x * (2 * log2e)));
  const ShortExp2 exp(reinterpret_cast<Vec<float>>(limited));
  const Vec<float> e = exp.value();
  // Near zero nothing may cancel.
  const Vec<float> less = reinterpret_cast<Vec<float>>(exp.whole) == 0.0f ? exp.fraction : e - 1.0f;
  return less * short_reciprocal(e + 1.0f);
}

// Short chains need no company.
template <int N, class Between, class Gate>
GRU_INLINE void in_turn(Vec<float> (&x)[N], Between between, Gate gate) {
  GRU_EACH(j) {
    x[j] = gate(x[j]);
    between();
  }
}

template <class Real, int N, class Between>
  requires(kPack<Real> > 1)
GRU_INLINE void sigmoid(Vec<Real> (&x)[N], Between between) {
  in_turn(x, between, [](Vec<float> one) GRU_MEMBER_LAMBDA { return sigmoid<Real>(one); });
}

template <class Real, int N, class Between>
  requires(kPack<Real> > 1)
GRU_INLINE void tanh(Vec<Real> (&x)[N], Between between) {
  in_turn(x, between, [](Vec<float> one) GRU_MEMBER_LAMBDA { return tanh<Real>(one); });
}
#endif

// Chains of operations side by side that there are registers for.
constexpr int kMostChains = kRowBlock;

// sigmoid of N registers, SOME at a time.
template <class Real, int SOME, int N, class Between>
GRU_INLINE void sigmoid_some(Vec<Real> (&x)[N], Between between) {
  static_assert(N % SOME == 0);
#pragma GCC unroll 8
  for (int first = 0; first < N; first += SOME) {
    Vec<Real> some[SOME];
#pragma GCC unroll 8
    for (int j = 0; j < SOME; ++j) some[j] = x[first + j];
    sigmoid<Real, SOME>(some, between);
#pragma GCC unroll 8
    for (int j = 0; j < SOME; ++j) x[first + j] = some[j];
  }
}

// Equations (2) to (5a) for N neighbours side by side, whose products are `sums`: `rz` gets r of
// each, then z. gx(j, gate) is what the input and the biases add, bias_q(j) the bias within q.
template <class Real, int N, class GateX, class BiasQ, class Between = Nothing>
GRU_INLINE void reset_after_gates(const Vec<Real> (&sums)[3][N], GateX gx, BiasQ bias_q,
                                  Vec<Real> (&rz)[2 * N], Vec<Real> (&q)[N], Vec<Real> (&n)[N],
                                  Between between = {}) {
  GRU_EACH(j) rz[j] = sums[0][j] + gx(j, 0);
  GRU_EACH(j) rz[N + j] = sums[1][j] + gx(j, 1);
  GRU_EACH(j) q[j] = sums[2][j] + bias_q(j);
  constexpr int some = 2 * N < kMostChains ? 2 * N : kMostChains;
  sigmoid_some<Real, some>(rz, between);
  GRU_EACH(j) n[j] = gx(j, 2) + rz[j] * q[j];
  tanh<Real, N>(n, between);
}

}  // namespace
}  // namespace GRU_FAST_ISA
}  // namespace gru_fast
