// SPDX-License-Identifier: Apache-2.0
#include "pool.h"

#include <torch/csrc/stable/ops.h>

#include <atomic>
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace gru_fast {
namespace {

std::atomic<bool> forked{false};
#if defined(__unix__) || defined(__APPLE__)
[[maybe_unused]] const int watching =
    pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });
#endif

}  // namespace

int pool_threads() {
  if (forked.load(std::memory_order_relaxed)) return 1;
  return static_cast<int>(torch::stable::get_num_threads());
}

void run_parts(int parts, const std::function<void(int64_t, int64_t)>& part) {
  if (parts == 1) {
    part(0, parts);
  } else {
    torch::stable::parallel_for(0, parts, 1, part);
  }
}

}  // namespace gru_fast
