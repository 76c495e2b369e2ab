// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <atomic>
#include <cstdint>

namespace gru_fast {

// Calls that the kernels of this library served, so that a test can see a silent fall-back.
inline std::atomic<int64_t> launches{0};

}  // namespace gru_fast
