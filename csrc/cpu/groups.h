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

// How the rows of groups of H units lie. Those of a group by themselves are dense; heads share the
// rows of each gate, and the units of a state.
struct GroupLayout {
  int64_t gate_rows;    // from one gate to the next in a weight or bias, in rows
  int64_t state_row;    // from one row of the batch to the next in a state, in units
  int64_t state_group;  // from one group to the next in a state

  static GroupLayout of_groups(int64_t B, int64_t H) { return {H, H, B * H}; }
  static GroupLayout of_heads(int64_t heads, int64_t H) { return {heads * H, heads * H, H}; }
  GRU_MEMBER int64_t state(int64_t g, int64_t b) const { return g * state_group + b * state_row; }
};

}  // namespace gru_fast
