// SPDX-License-Identifier: Apache-2.0
// Preloaded by test_sizes.py: blocks of more than 1 GiB get addresses of their own, but share 256
// MiB of memory, over and over. So a test can have tensors that no machine has memory for, as long
// as what it looks at does not fall on the same place.
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <mutex>
#include <unordered_map>

namespace {

constexpr size_t kLarge = size_t{1} << 30, kFold = size_t{1} << 28;

std::mutex mutex;
bool inside = false;  // the map below allocates too

std::unordered_map<void*, size_t>& blocks() {
  static auto* made = new std::unordered_map<void*, size_t>;
  return *made;
}

void* folded(size_t size) {
  size = (size + kFold - 1) / kFold * kFold;
  const int file = memfd_create("folded", 0);
  if (file < 0 || ftruncate64(file, kFold) != 0) return nullptr;
  void* whole = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (whole == MAP_FAILED) return nullptr;
  for (size_t at = 0; at < size; at += kFold) {
    if (mmap(static_cast<char*>(whole) + at, kFold, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
             file, 0) == MAP_FAILED) {
      return nullptr;
    }
  }
  const std::lock_guard<std::mutex> lock(mutex);
  inside = true;
  blocks()[whole] = size;
  inside = false;
  return whole;
}

}  // namespace

extern "C" {

int posix_memalign(void** to, size_t alignment, size_t size) {
  using Function = int (*)(void**, size_t, size_t);
  static const auto real = reinterpret_cast<Function>(dlsym(RTLD_NEXT, "posix_memalign"));
  if (size < kLarge) return real(to, alignment, size);
  *to = folded(size);
  return *to == nullptr ? ENOMEM : 0;
}

void free(void* block) {
  using Function = void (*)(void*);
  static const auto real = reinterpret_cast<Function>(dlsym(RTLD_NEXT, "free"));
  if (block != nullptr && reinterpret_cast<size_t>(block) % 4096 == 0 && !inside) {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = blocks().find(block);
    if (found != blocks().end()) {
      munmap(block, found->second);
      inside = true;
      blocks().erase(found);
      inside = false;
      return;
    }
  }
  real(block);
}
}
