// SPDX-License-Identifier: Apache-2.0
#include "arena.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

#include "huge_pages.h"

namespace gru_fast {
namespace {

constexpr size_t kAlign = 64;
constexpr size_t kKeepAtMost = size_t{64} << 20;

// One block per thread is kept, so no lock is taken and threads never share one.
struct Kept {
  void* data = nullptr;
  size_t bytes = 0;
  ~Kept() { std::free(data); }
};
thread_local Kept kept;
std::atomic<bool> poison{false};

}  // namespace

void set_scratch_poison(bool on) { poison.store(on, std::memory_order_relaxed); }

void poison_if_set(void* data, size_t bytes) {
  if (bytes > 0 && poison.load(std::memory_order_relaxed)) std::memset(data, 0xff, bytes);
}

Scratch::Scratch(size_t bytes) : bytes_((bytes + kAlign) / kAlign * kAlign) {
  if (kept.bytes >= bytes_) {
    data_ = kept.data;
    bytes_ = kept.bytes;
    kept.data = nullptr;
    kept.bytes = 0;
  } else {
    data_ = std::aligned_alloc(kAlign, bytes_);
    if (data_ == nullptr) throw std::bad_alloc();
    prefer_huge_pages(data_, bytes_);
  }
  poison_if_set(data_, bytes_);
}

Scratch::~Scratch() {
  if (bytes_ > kKeepAtMost || bytes_ < kept.bytes) {
    std::free(data_);
    return;
  }
  std::free(kept.data);
  kept.data = data_;
  kept.bytes = bytes_;
}

}  // namespace gru_fast
