// SPDX-License-Identifier: Apache-2.0
// The rows of a PackedSequence, as kernels want them described.
#pragma once
#include <limits>
#include <numeric>
#include <vector>

#include "exchange.h"

namespace gru_fast {

class PackedRows {
 public:
  // False unless these are the batch sizes of a PackedSequence. This and describe() may throw
  // std::bad_alloc.
  bool read(PyObject* batch_sizes) {
    Dense<int64_t> sizes;
    if (!gru_fast::read(batch_sizes, sizes) || sizes.ndim != 1) return false;
    alive_before_.reserve(static_cast<size_t>(sizes.width()) + 1);
    alive_before_.assign(1, 0);
    int64_t most = std::numeric_limits<int64_t>::max();
    for (int64_t t = 0; t < sizes.width(); ++t) {
      const int64_t size = sizes.data[t], before = alive_before_.back();
      if (size < 1 || size > most || size > std::numeric_limits<int64_t>::max() - before) {
        return false;
      }
      alive_before_.push_back(before + size);
      most = size;
    }
    return true;
  }

  int64_t steps() const { return static_cast<int64_t>(alive_before_.size()) - 1; }
  int64_t batch() const { return alive_before_[1]; }
  int64_t rows() const { return alive_before_.back(); }

  // To be called once a tensor has been seen to have so many rows.
  template <class Real>
  void describe(Problem<Real>& p) {
    if (order_.empty()) order_rows();
    p.lengths = lengths_.data();
    p.order = order_.data();
    p.alive_before = alive_before_.data();
    p.packed = true;
  }

 private:
  void order_rows() {
    order_.resize(static_cast<size_t>(batch()));
    std::iota(order_.begin(), order_.end(), 0);
    for (int64_t t = steps(); t > 0; --t) {
      const auto at = static_cast<size_t>(t);
      lengths_.resize(static_cast<size_t>(alive_before_[at] - alive_before_[at - 1]), t);
    }
  }

  std::vector<int64_t> alive_before_, lengths_, order_;
};

}  // namespace gru_fast
