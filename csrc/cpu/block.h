// SPDX-License-Identifier: Apache-2.0
// Zeroed memory that belongs to one owner, aligned to 64 bytes.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace gru_fast {

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Block = std::unique_ptr<void, Free>;

inline Block zeroed(int64_t bytes) {
  const size_t size = (static_cast<size_t>(bytes) + 64) / 64 * 64;
  Block block(std::aligned_alloc(64, size));
  if (!block) throw std::bad_alloc();
  std::memset(block.get(), 0, size);
  return block;
}

}  // namespace gru_fast
