// SPDX-License-Identifier: Apache-2.0
// Runs a kernel on a team of torch's threads.
#pragma once
#include <functional>

#include "cpu/arena.h"
#include "cpu/parallel.h"
#include "cpu/stats.h"
#include "cpu/team.h"
#include "pool.h"
#include "signals.h"

namespace gru_fast {

// Runs work(member) on every member of a team of as many of torch's threads. Only the thread that
// Python called can look for signals, also where it came too late for the team or has done its
// part: it calls end() once a handler has raised.
template <class Work, class End>
void run_members(Team& team, int threads, Signals& signals, Work work, End end) {
  auto part = [&](int64_t first, int64_t last) {
    const int member = team.join(static_cast<int>(first), static_cast<int>(last - first));
    if (member >= 0) {
      work(member);
      team.leave();
    }
    if (!signals.is_mine()) return;
    team.stand_by([&] {
      if (Signals::poll(&signals)) end();
    });
  };
  run_parts(threads, std::ref(part));
}

// Runs kernel(call, team, threads, member, scratch) on every member of a team, of as many threads
// as the call is worth. `passes`: see threads_worth(). A KeyboardInterrupt ends the call; what it
// was to compute is undefined then.
template <class Call>
void run_on_team(const Call& call, int passes, int64_t (*scratch_bytes)(const Call&, int),
                 void (*kernel)(const Call&, Team&, int, int, void*)) {
  const int threads = threads_worth(call.in, passes, pool_threads());
  const Scratch scratch(static_cast<size_t>(scratch_bytes(call, threads)));
  Signals signals;
  Team team(threads, Signals::poll, &signals);
  run_members(
      team, threads, signals,
      [&](int member) { kernel(call, team, threads, member, scratch.data()); },
      [&] { team.end(); });
  signals.rethrow();
  launches.fetch_add(1, std::memory_order_relaxed);
}

}  // namespace gru_fast
