// SPDX-License-Identifier: Apache-2.0
// The order in which kernels go through rows of different length: the longest first, as in a
// PackedSequence, so that those alive at a time are the first.
#pragma once
#include <cstdint>
#include <vector>

namespace gru_fast {

struct RowOrder {
  std::vector<int64_t> ranks;         // (B): rows by falling length
  std::vector<int64_t> alive_before;  // (T + 1): (t, b) pairs before time t that are not padding
};

// Of B lengths from 0 to T.
inline RowOrder order_by_length(const int64_t* lengths, int64_t B, int64_t T) {
  RowOrder order;
  std::vector<int64_t>& alive_before = order.alive_before;
  alive_before.assign(static_cast<size_t>(T) + 1, 0);
  std::vector<int64_t> place(static_cast<size_t>(T) + 1, 0);  // by length: of its first row
  for (int64_t b = 0; b < B; ++b) ++place[static_cast<size_t>(lengths[b])];
  int64_t longer = 0;
  for (size_t length = place.size(); length-- > 0;) {
    const int64_t rows = place[length];
    place[length] = longer;
    if (length + 1 < place.size()) alive_before[length + 1] = longer;
    longer += rows;
  }
  for (size_t t = 1; t < alive_before.size(); ++t) alive_before[t] += alive_before[t - 1];
  order.ranks.resize(static_cast<size_t>(B));
  for (int64_t b = 0; b < B; ++b) {
    order.ranks[static_cast<size_t>(place[static_cast<size_t>(lengths[b])]++)] = b;
  }
  return order;
}

}  // namespace gru_fast
