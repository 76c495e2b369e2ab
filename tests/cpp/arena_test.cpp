// SPDX-License-Identifier: Apache-2.0
// The scratch block that a thread keeps: when it is handed out again, when it is given back, and
// that what runs after the thread's own destructors gets a block of its own. Exits non-zero on a
// fault; leaks and uses of freed memory are for AddressSanitizer to find.
#include "cpu/arena.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>

using gru_fast::Scratch;

namespace {

void expect(bool right, const char* what) {
  if (right) return;
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

void* fill(const Scratch& scratch, size_t bytes) {
  expect(reinterpret_cast<uintptr_t>(scratch.data()) % 64 == 0, "not aligned");
  std::memset(scratch.data(), 1, bytes);
  return scratch.data();
}

void* use(size_t bytes) { return fill(Scratch(bytes), bytes); }

// Destroyed after the objects of the main thread.
struct Last {
  ~Last() {
    use(1000);
    use(100);
  }
} last;

}  // namespace

int main() {
  void* const first = use(1000);
  expect(use(10) == first && use(1000) == first, "a block that fits is not handed out again");
  {
    const Scratch outer(1000), inner(1000);
    expect(fill(outer, 1000) != fill(inner, 1000), "one block is handed out twice");
  }
  std::thread([] { use(5000); }).join();
  constexpr size_t kMost = size_t{64} << 20;
  use(kMost + 64);  // Not kept.
  use(0);
  std::puts("ok");
}
