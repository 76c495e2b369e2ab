// SPDX-License-Identifier: Apache-2.0
#include "pool.h"

#include <torch/csrc/stable/ops.h>

namespace gru_fast {

int pool_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

void run_parts(int parts, const std::function<void(int64_t, int64_t)>& part) {
  if (parts == 1) {
    part(0, 1);
  } else {
    torch::stable::parallel_for(0, parts, 1, part);
  }
}

}  // namespace gru_fast
