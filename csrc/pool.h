// SPDX-License-Identifier: Apache-2.0
// torch's threads for what is no operator: there is never a second pool.
#pragma once
#include <cstdint>
#include <functional>

namespace gru_fast {

// How many there are. One in a process that was forked: OpenMP, which torch is built with, waits
// for threads that did not come along.
int pool_threads();
// Calls part(begin, end) for the pieces of [0, parts), at the same time as far as the pool can.
// `parts`: at most pool_threads(), so that a forked process never gets to OpenMP.
void run_parts(int parts, const std::function<void(int64_t, int64_t)>& part);

}  // namespace gru_fast
