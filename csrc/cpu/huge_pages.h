// SPDX-License-Identifier: Apache-2.0
// Fresh memory in large pages: the first touch of each page costs the kernel 0.2 to 2 us, which is
// a tenth of a training step where pages have 4 KiB.
#pragma once
#include <cstddef>

namespace gru_fast {

// Asks for large pages in the part of a block that whole ones fit into. A hint, without effect
// where the system has none to give or GRU_FAST_HUGE_PAGES=0 is set.
void prefer_huge_pages(void* data, size_t bytes);

}  // namespace gru_fast
