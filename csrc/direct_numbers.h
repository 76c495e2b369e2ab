// SPDX-License-Identifier: Apache-2.0
// What the numbers of a call past the dispatcher are computed in, and how they get there: as they
// are, or, of 16 bits without kernels of their own, widened.
#pragma once
#include <algorithm>
#include <cstdint>
#include <tuple>

#include "direct_call.h"

namespace gru_fast {

template <class Real>
struct AsTheyAre {
  using Stored = Real;
  using Computed = Real;
  static constexpr bool kWidens = false;

  const KernelTable<Real>* table;

  void read(const Real* from, int64_t count, Real* to) const { std::copy_n(from, count, to); }
};

template <class Number>
struct Widened {
  using Stored = Number;
  using Computed = float;
  static constexpr bool kWidens = true;

  const KernelTable<float>* table;  // null where the numbers have kernels of their own
  const Conversions* conversions;

  void read(const Number* from, int64_t count, float* to) const {
    conversions->widen(kNarrow<Number>, &from->bits, to, count);
  }
  void write(const float* from, int64_t count, Number* to) const {
    conversions->narrow(kNarrow<Number>, from, &to->bits, count);
  }
  // Leaves what would come back of numbers that are written.
  void round(float* numbers, int64_t count) const {
    constexpr int64_t kSome = 512;
    Number some[kSome];
    for (int64_t i = 0; i < count; i += kSome) {
      const int64_t n = std::min(kSome, count - i);
      write(numbers + i, n, some);
      read(some, n, numbers + i);
    }
  }
};

// As by_number(), with a Widened for each type of 16 bits.
template <class Body>
PyObject* by_narrow_number(Body&& body) {
  return with_each(
      [] {
        const auto* const f32 = kernel_table<float>();
        const bool has_bfloat16 = kernel_table<BFloat16>() != nullptr;
        return std::tuple(Widened<Float16>{f32, &conversions()},
                          Widened<BFloat16>{has_bfloat16 ? nullptr : f32, &conversions()});
      },
      body);
}

}  // namespace gru_fast
