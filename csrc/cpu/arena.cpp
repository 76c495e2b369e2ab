// SPDX-License-Identifier: Apache-2.0
#include "arena.h"

#include <atomic>
#include <cstdio>
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
  void* data;
  size_t bytes;
};
constinit thread_local Kept kept{};
// Frees what a thread leaves. Not ~Kept(): a destructor that runs later, of a static object that
// holds a module, may call a kernel once more, and must not find a block that is gone.
struct AtThreadEnd {
  ~AtThreadEnd() {
    std::free(kept.data);
    kept = {};
  }
};

class OutOfScratch : public std::bad_alloc {
 public:
  explicit OutOfScratch(size_t bytes) {
    std::snprintf(text_, sizeof text_, "cannot allocate %zu bytes of scratch memory", bytes);
  }
  const char* what() const noexcept override { return text_; }

 private:
  char text_[80];
};

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
    kept = {};
  } else {
    if (bytes_ <= kKeepAtMost) {  // it will be kept in the place of the one that is too small
      std::free(kept.data);
      kept = {};
    }
    data_ = std::aligned_alloc(kAlign, bytes_);
    if (data_ == nullptr) throw OutOfScratch(bytes_);
    prefer_huge_pages(data_, bytes_);
  }
  poison_if_set(data_, bytes_);
}

Scratch::~Scratch() {
  if (bytes_ > kKeepAtMost || bytes_ < kept.bytes) {
    std::free(data_);
    return;
  }
  static thread_local const AtThreadEnd at_thread_end;
  std::free(kept.data);
  kept = {data_, bytes_};
}

}  // namespace gru_fast
