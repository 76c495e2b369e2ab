// SPDX-License-Identifier: Apache-2.0
// sigmoid and tanh on a register, to about one unit in the last place; NaN stays NaN.
#pragma once
#include "vec.h"

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

// exp(x) = scale * (1 + fraction), with |fraction| < 0.42 accurate also where it is tiny.
template <class Real>
struct ScaledExp {
  Vec<Real> scale, fraction;
};

template <class Real>
GRU_INLINE ScaledExp<Real> scaled_exp(Vec<Real> x) {
  using C = ExpConstants<Real>;
  const Vec<Real> limit = broadcast<Real>(C::limit);
  x = x > limit ? limit : x;
  x = x < -limit ? -limit : x;
  const Vec<Real> shifted = x * C::log2e + C::magic;
  const Vec<Real> n = shifted - C::magic;
  Vec<Real> r = x - n * C::ln2_high;
  r = r - n * C::ln2_low;
  Vec<Real> tail = broadcast<Real>(static_cast<Real>(kInverseFactorial[C::terms]));
#pragma GCC unroll 16
  for (int i = C::terms - 1; i >= 2; --i) {
    tail = tail * r + static_cast<Real>(kInverseFactorial[i]);
  }
  const VecBits<Real> power = reinterpret_cast<VecBits<Real>>(shifted) + C::bias;
  return {reinterpret_cast<Vec<Real>>(power << C::mantissa_bits), r + r * r * tail};
}

template <class Real>
GRU_INLINE Vec<Real> sigmoid(Vec<Real> x) {
  const ScaledExp<Real> e = scaled_exp<Real>(-x);
  return Real(1) / ((e.scale * e.fraction + e.scale) + Real(1));
}

// tanh(x) = m / (m + 2), m = exp(2 x) - 1
template <class Real>
GRU_INLINE Vec<Real> tanh(Vec<Real> x) {
  const Vec<Real> limit = broadcast<Real>(20);
  x = x > limit ? limit : x;
  x = x < -limit ? -limit : x;
  const ScaledExp<Real> e = scaled_exp<Real>(x + x);
  const Vec<Real> m = e.scale * e.fraction + (e.scale - Real(1));
  return m / (m + Real(2));
}

}  // namespace
}  // namespace GRU_FAST_ISA
}  // namespace gru_fast
