// SPDX-License-Identifier: Apache-2.0
// Runs a kernel on a team of torch's threads.
#pragma once
#include <torch/csrc/stable/ops.h>

#include "cpu/arena.h"
#include "cpu/parallel.h"
#include "cpu/stats.h"
#include "cpu/team.h"

namespace gru_fast {

// Runs kernel(call, team, threads, member, scratch) on every member of a team, of as many threads
// as the call is worth. `passes`: see threads_worth().
template <class Call>
void run_on_team(const Call& call, int passes, int64_t (*scratch_bytes)(const Call&, int),
                 void (*kernel)(const Call&, Team&, int, int, void*)) {
  const int available = static_cast<int>(torch::stable::get_num_threads());
  const int threads = threads_worth(call.in, passes, available);
  const Scratch scratch(static_cast<size_t>(scratch_bytes(call, threads)));
  Team team(threads);
  auto part = [&](int64_t begin, int64_t end) {
    const int member = team.join(static_cast<int>(end - begin));
    if (member >= 0) kernel(call, team, threads, member, scratch.data());
  };
  if (threads == 1) {
    part(0, 1);
  } else {
    torch::stable::parallel_for(0, threads, 1, part);
  }
  launches.fetch_add(1, std::memory_order_relaxed);
}

}  // namespace gru_fast
