// SPDX-License-Identifier: Apache-2.0
// Numbers of 16 bits that are computed in float32: what they are, and where such weights lie.
#pragma once
#include <cstdint>
#include <type_traits>

#include "bfloat16.h"
#include "float16.h"
#include "groups.h"

namespace gru_fast {

enum class Narrow : int { kNone, kFloat16, kBFloat16 };

template <class Stored>
constexpr Narrow kNarrow = std::is_same_v<Stored, Float16> ? Narrow::kFloat16 : Narrow::kBFloat16;

// What an instruction set has to convert `count` of them, to the nearest, ties to even.
struct Conversions {
  void (*widen)(Narrow, const uint16_t* from, float* to, int64_t count);
  void (*narrow)(Narrow, const float* from, uint16_t* to, int64_t count);
};

// A weight of all groups in the type that it is multiplied in or, where that is float32, in 16
// bits, which the forward scan widens as it reads them.
template <class Real>
struct StoredWeight {
  Groups<const Real> own;
  Groups<const uint16_t> narrow;
  Narrow number = Narrow::kNone;  // of `narrow`

  StoredWeight() = default;
  GRU_MEMBER StoredWeight(Groups<const Real> weight) : own(weight) {}
  GRU_MEMBER StoredWeight(const Real* first, int64_t count) : own(first, count) {}
  GRU_MEMBER StoredWeight(Groups<const uint16_t> weight, Narrow kind)
      : narrow(weight), number(kind) {}

  GRU_MEMBER explicit operator bool() const { return own || narrow; }
  GRU_MEMBER bool is_narrow() const { return std::is_same_v<Real, float> && narrow; }
  // Each block from a number on.
  GRU_MEMBER StoredWeight from(int64_t count) const {
    StoredWeight rest = *this;
    rest.own = own.from(count);
    rest.narrow = narrow.from(count);
    return rest;
  }
  GRU_MEMBER StoredWeight only(int64_t g) const {
    return narrow ? StoredWeight(narrow.only(g), number) : StoredWeight(own.only(g));
  }
};

}  // namespace gru_fast
