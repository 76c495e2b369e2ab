// SPDX-License-Identifier: Apache-2.0
// Rows of different length, as kernels want them described.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "exchange.h"
#include "row_order.h"

namespace gru_fast {

// What calls past the dispatcher bring: the batch sizes of a PackedSequence, or lengths. All but
// the questions may throw std::bad_alloc.
class RaggedRows {
 public:
  // False unless these are the batch sizes of a PackedSequence.
  bool read_batch_sizes(PyObject* object) {
    Dense<int64_t> sizes;
    if (!is_plain(object) || !read(object, sizes) || sizes.ndim != 1) return false;
    std::vector<int64_t>& before = order_.alive_before;
    before.reserve(static_cast<size_t>(sizes.width()) + 1);
    before.assign(1, 0);
    int64_t most = std::numeric_limits<int64_t>::max();
    for (int64_t t = 0; t < sizes.width(); ++t) {
      const int64_t size = sizes.data[t];
      const int64_t room = std::numeric_limits<int64_t>::max() - before.back();
      if (size < 1 || size > most || size > room) return false;
      before.push_back(before.back() + size);
      most = size;
    }
    packed_ = true;
    return true;
  }
  // False unless it is a plain vector of them.
  bool read_lengths(PyObject* object) {
    Dense<int64_t> given;
    if (!is_plain(object) || !read(object, given) || given.ndim != 1) return false;
    lengths_.assign(given.data, given.data + given.width());
    return std::ranges::all_of(lengths_, [](int64_t length) { return length >= 0; });
  }

  bool packed() const { return packed_; }
  // Of packed rows.
  int64_t steps() const { return static_cast<int64_t>(order_.alive_before.size()) - 1; }
  int64_t batch() const { return order_.alive_before[1]; }
  int64_t count() const { return order_.alive_before.back(); }
  // Whether B rows of up to T steps may have these lengths.
  bool fit(int64_t T, int64_t B) const {
    return static_cast<int64_t>(lengths_.size()) == B && std::ranges::max(lengths_) <= T;
  }

  // To be called once a tensor has been seen to have so many rows.
  template <class Real>
  void describe(Problem<Real>& p) {
    if (order_.ranks.empty() && packed_) order_packed();
    if (order_.ranks.empty()) order_ = order_by_length(lengths_.data(), p.B, p.T);
    p.lengths = lengths_.data();
    p.order = order_.ranks.data();
    p.alive_before = order_.alive_before.data();
    p.packed = packed_;
  }

 private:
  void order_packed() {
    order_.ranks.resize(static_cast<size_t>(batch()));
    std::iota(order_.ranks.begin(), order_.ranks.end(), 0);
    for (int64_t t = steps(); t > 0; --t) {
      const auto at = static_cast<size_t>(t);
      const std::vector<int64_t>& before = order_.alive_before;
      lengths_.resize(static_cast<size_t>(before[at] - before[at - 1]), t);
    }
  }

  bool packed_ = false;
  std::vector<int64_t> lengths_;
  RowOrder order_;
};

}  // namespace gru_fast
