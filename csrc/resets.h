// SPDX-License-Identifier: Apache-2.0
// Steps that begin a new episode, as kernels want them described.
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>

#include "exchange.h"

namespace gru_fast {

// A copy of the mask of a call past the dispatcher, whose strides do not matter then.
class Resets {
 public:
  // False unless it is a plain (T, B), (B, T) if turned, or (T). May throw std::bad_alloc.
  bool read(PyObject* object, bool turned) {
    Rows<bool> given;
    if (!is_plain(object) || !read_strided(object, given) || given.ndim > 2) return false;
    ndim_ = given.ndim;
    const int t_dim = ndim_ == 2 && turned ? 1 : 0, b_dim = 1 - t_dim;
    steps_ = given.shape[t_dim];
    batch_ = ndim_ == 2 ? given.shape[b_dim] : 1;
    const int64_t stride_b = ndim_ == 2 ? given.strides[b_dim] : 0;
    mask_.resize(static_cast<size_t>(steps_ * batch_));
    uint8_t* to = mask_.data();
    for (int64_t t = 0; t < steps_; ++t) {
      const bool* from = given.data + t * given.strides[t_dim];
      for (int64_t b = 0; b < batch_; ++b) std::memcpy(to++, from + b * stride_b, 1);
    }
    return true;
  }
  // Whether an input of (T, B, I), or (T, I), has such a mask.
  bool fit(int input_ndim, int64_t T, int64_t B) const {
    return ndim_ + 1 == input_ndim && steps_ == T && batch_ == B;
  }
  const uint8_t* data() const { return mask_.data(); }

 private:
  int ndim_ = 0;
  int64_t steps_ = 0, batch_ = 0;
  std::vector<uint8_t> mask_;
};

}  // namespace gru_fast
