// SPDX-License-Identifier: Apache-2.0
#include "team.h"

#include <sched.h>

namespace gru_fast {
namespace {

constexpr uint64_t kClosed = uint64_t{1} << 63;
constexpr int kPartBits = 32;
constexpr int kSpinsBeforeYield = 100;
constexpr int kYieldsBeforeClosing = 500;
constexpr int kAllToAllMembers = 4;

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int members_of(uint64_t door) { return static_cast<int>((door & ~kClosed) >> kPartBits); }
int parts_of(uint64_t door) { return static_cast<int>(door & ((uint64_t{1} << kPartBits) - 1)); }

void wait_for(const std::atomic<uint32_t>& phase, uint32_t target) {
  for (int spins = 0; static_cast<int32_t>(phase.load(std::memory_order_acquire) - target) < 0;) {
    if (++spins < kSpinsBeforeYield) {
      relax();
    } else {
      sched_yield();
    }
  }
}

}  // namespace

int Team::join(int parts) {
  uint64_t door = door_.load(std::memory_order_relaxed);
  do {
    if (door & kClosed || members_of(door) == parts_) return -1;
  } while (!door_.compare_exchange_weak(door, door + (uint64_t{1} << kPartBits) + parts,
                                        std::memory_order_acq_rel));
  const int member = members_of(door);

  int spins = 0;
  for (door = door_.load(std::memory_order_acquire); !(door & kClosed);
       door = door_.load(std::memory_order_acquire)) {
    if (parts_of(door) >= parts_ || spins > kSpinsBeforeYield + kYieldsBeforeClosing) {
      door_.compare_exchange_weak(door, door | kClosed, std::memory_order_acq_rel);
    } else if (++spins < kSpinsBeforeYield) {
      relax();
    } else {
      sched_yield();
    }
  }
  if (member == 0) size_ = members_of(door);
  // Everybody reads size_ from now on: member 0 must have written it.
  if (members_of(door) > 1) barrier(member);
  return member;
}

int Team::size_for_latecomer() const { return members_of(door_.load(std::memory_order_acquire)); }

void Team::barrier(int member) {
  const uint64_t door = door_.load(std::memory_order_relaxed);
  const int members = members_of(door);
  if (members == 1) return;
  std::atomic<uint32_t>& mine = arrived_[member].phase;
  const uint32_t phase = mine.load(std::memory_order_relaxed) + 1;
  mine.store(phase, std::memory_order_release);
  if (members <= kAllToAllMembers) {
    for (int other = 0; other < members; ++other) {
      if (other != member) wait_for(arrived_[other].phase, phase);
    }
  } else if (member == 0) {
    for (int other = 1; other < members; ++other) wait_for(arrived_[other].phase, phase);
    released_.phase.store(phase, std::memory_order_release);
  } else {
    wait_for(released_.phase, phase);
  }
}

}  // namespace gru_fast
