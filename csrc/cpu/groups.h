// SPDX-License-Identifier: Apache-2.0
// Where the weights, or the gradients of the weights, of each group lie.
#pragma once
#include <cstdint>

#include "inline.h"

namespace gru_fast {

// One block of numbers a group, as far from each other as one wants: those of two directions lie in
// two tensors. Null where there are none.
template <class Number>
class Groups {
 public:
  Groups() = default;
  // One behind the other, of `count` numbers each.
  GRU_MEMBER Groups(Number* first, int64_t count)
      : first_(first), step_(first == nullptr ? 0 : count * int64_t{sizeof(Number)}) {}
  GRU_MEMBER static Groups of_one(Number* only) { return {only, 0}; }
  GRU_MEMBER static Groups of_two(Number* first, Number* second) {
    Groups both = of_one(first);
    both.step_ = static_cast<int64_t>(address(second) - address(first));
    return both;
  }

  GRU_MEMBER explicit operator bool() const { return first_ != nullptr; }
  GRU_MEMBER Number* operator[](int64_t g) const {
    return reinterpret_cast<Number*>(address(first_) + static_cast<uintptr_t>(g * step_));
  }
  // Each block from a number on.
  GRU_MEMBER Groups from(int64_t number) const {
    Groups rest = *this;
    if (first_ != nullptr) rest.first_ += number;
    return rest;
  }
  GRU_MEMBER Groups only(int64_t g) const { return of_one((*this)[g]); }

 private:
  GRU_MEMBER static uintptr_t address(Number* at) { return reinterpret_cast<uintptr_t>(at); }

  Number* first_ = nullptr;
  int64_t step_ = 0;  // bytes
};

}  // namespace gru_fast
