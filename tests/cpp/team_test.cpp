// SPDX-License-Identifier: Apache-2.0
// Teams of fewer threads than parts, late comers and many barriers. Exits non-zero on a fault.
#include "cpu/team.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <thread>
#include <vector>

using gru_fast::Team;

namespace {

void expect(bool holds, const char* what) {
  if (!holds) {
    std::fprintf(stderr, "fault: %s\n", what);
    std::exit(1);
  }
}

// `callers` threads share `parts` parts. Every member adds in turn; a lost barrier shows in the
// sums.
void run(int parts, int callers, int rounds) {
  Team team(parts);
  std::vector<int> counters(parts * 16, 0);
  std::vector<int> members(callers, -2);
  auto work = [&](int caller) {
    const int first = parts * caller / callers;
    const int member = team.join(first, parts * (caller + 1) / callers - first);
    members[caller] = member;
    if (member < 0) return;
    if (team.size() == parts) expect(member == first, "a part's member has another number");
    for (int round = 1; round <= rounds; ++round) {
      counters[member * 16] = round;
      team.barrier(member);
      for (int other = 0; other < team.size(); ++other) {
        expect(counters[other * 16] == round, "a member ran ahead of the barrier");
      }
      team.barrier(member);
    }
  };
  std::vector<std::thread> threads;
  for (int caller = 1; caller < callers; ++caller) threads.emplace_back(work, caller);
  work(0);
  for (std::thread& thread : threads) thread.join();
  int joined = 0;
  for (int member : members) joined += member >= 0;
  expect(joined == team.size(), "the team's size is not the number that checked in");
  expect(joined >= 1, "nobody checked in");
}

// A pool that runs the parts one after the other: the first caller closes the doors and does it
// all.
void one_after_the_other() {
  Team team(4);
  expect(team.join(3, 1) == 0 && team.size() == 1, "the first caller did not become the team");
  team.barrier(0);
  for (int late = 0; late < 3; ++late) expect(team.join(late, 1) == -1, "a late comer was let in");
}

// A late comer ends the work: all members leave at the same round, and it leaves after them.
void ended_from_outside(int callers) {
  Team team(callers + 1);
  std::atomic<int> came{0}, working{0};
  std::vector<int64_t> rounds(callers, -1);
  auto work = [&](int caller) {
    const int member = team.join(caller, 1);
    working += member >= 0;
    ++came;
    if (member < 0) return;
    for (rounds[caller] = 0; team.goes_on(rounds[caller]); ++rounds[caller]) team.barrier(member);
    --working;
    team.leave();
  };
  std::vector<std::thread> threads;
  for (int caller = 0; caller < callers; ++caller) threads.emplace_back(work, caller);
  while (came < callers) std::this_thread::yield();
  expect(team.join(callers, 1) == -1, "a late comer was let in");
  int looks = 0;
  team.stand_by([&] {
    if (++looks == 3) team.end();
  });
  expect(looks >= 3 && working == 0, "a late comer left before the members");
  for (std::thread& thread : threads) thread.join();
  int64_t last = -1;
  for (int64_t count : rounds) {
    if (count >= 0 && last < 0) last = count;
    expect(count < 0 || count == last, "members left at different rounds");
  }
}

// Members that do not meet leave as soon as the end is known, whichever their round; the one that
// has done its part stands by, and tells them.
void ended_by_a_member_that_is_done(int others) {
  Team team(others + 1);
  std::atomic<int> working{0};
  auto work = [&](int caller, int64_t rounds) {
    const int member = team.join(caller, 1);
    if (member < 0) return;
    ++working;
    for (int64_t round = 0; round < rounds && team.goes_on(round, false); ++round) {
      std::this_thread::yield();
    }
    --working;
    team.leave();
  };
  std::vector<std::thread> threads;
  for (int other = 0; other < others; ++other) {
    threads.emplace_back(work, other, std::numeric_limits<int64_t>::max());
  }
  work(others, 3);
  int looks = 0;
  team.stand_by([&] {
    if (++looks == 2000) team.end();
  });
  expect(working == 0, "a member that was done left before the others");
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

int main() {
  for (int round = 0; round < 50; ++round) {
    run(2, 2, 50);
    run(4, 2, 50);
    run(4, 1, 50);
    run(3, 3, 20);
    run(7, 6, 10);
  }
  one_after_the_other();
  for (int round = 0; round < 20; ++round) {
    for (int members = 1; members <= 6; ++members) {
      ended_from_outside(members);
      ended_by_a_member_that_is_done(members);
    }
  }
  std::puts("ok");
}
