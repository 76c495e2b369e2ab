// SPDX-License-Identifier: Apache-2.0
#include "team.h"

#include <sched.h>

#include <algorithm>
#include <chrono>
#include <thread>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#endif

namespace gru_fast {
namespace {

constexpr uint64_t kClosed = uint64_t{1} << 63;
constexpr int kPartBits = 32;
constexpr int kSpinsBeforeYield = 100;
constexpr int kSpinsBeforeSleep = 1000;  // about 10 us
constexpr int kYieldsBeforeClosing = 500;
constexpr int kAllToAllMembers = 4;
// As long as torch's threads wait for each other before they sleep.
constexpr std::chrono::nanoseconds kStandBySpins = std::chrono::milliseconds(1);
constexpr std::chrono::nanoseconds kStandByAtMost = std::chrono::milliseconds(10);

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");  // about as long as pause; yield does nothing on most cores
#endif
}

// Returns once `word` is no longer what was seen, at the latest after a while; also sooner.
void sleep_while([[maybe_unused]] std::atomic<uint32_t>& word, [[maybe_unused]] uint32_t seen,
                 std::chrono::nanoseconds most) {
#if defined(__linux__)
  const timespec limit{static_cast<time_t>(most.count() / 1'000'000'000),
                       static_cast<long>(most.count() % 1'000'000'000)};
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, seen, &limit, nullptr, 0);
#else
  std::this_thread::sleep_for(
      std::min<std::chrono::nanoseconds>(most, std::chrono::milliseconds(1)));
#endif
}

void wake([[maybe_unused]] std::atomic<uint32_t>& word) {
#if defined(__linux__)
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
#endif
}

int members_of(uint64_t door) { return static_cast<int>((door & ~kClosed) >> kPartBits); }
int parts_of(uint64_t door) { return static_cast<int>(door & ((uint64_t{1} << kPartBits) - 1)); }

bool is_before(uint32_t phase, uint32_t target) { return static_cast<int32_t>(phase - target) < 0; }

}  // namespace

int Team::join(int first, int parts) {
  uint64_t door = door_.load(std::memory_order_relaxed);
  do {
    if (door & kClosed || members_of(door) == parts_) return -1;
  } while (!door_.compare_exchange_weak(door, door + (uint64_t{1} << kPartBits) + parts,
                                        std::memory_order_acq_rel));
  const int arrived = members_of(door);

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
  const int member = members_of(door) == parts_ ? first : arrived;
  if (member == 0) size_ = members_of(door);
  // Everybody reads size_ from now on: member 0 must have written it.
  if (members_of(door) > 1) barrier(member);
  return member;
}

// Who sleeps has said so before looking at the phase a last time, and who moves the phase on looks
// for sleepers after it: one of them sees the other.
void Team::announce(Flag& flag, uint32_t phase) {
  flag.phase.store(phase, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) > 0) wake(flag.phase);
}

void Team::wait_for(Flag& flag, uint32_t target) {
  for (int spins = 0; is_before(flag.phase.load(std::memory_order_acquire), target);) {
    if (spins < kSpinsBeforeSleep) {
      ++spins;
      relax();
      continue;
    }
#if defined(__linux__)
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    const uint32_t seen = flag.phase.load(std::memory_order_seq_cst);
    if (is_before(seen, target)) {
      syscall(SYS_futex, &flag.phase, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
    }
    sleepers_.fetch_sub(1, std::memory_order_relaxed);
#else
    sched_yield();
#endif
  }
}

// Who leaves and who stands by meet as in announce() and wait_for().
void Team::leave() {
  left_.fetch_add(1, std::memory_order_seq_cst);
  if (stands_by_.load(std::memory_order_seq_cst)) wake(left_);
}

void Team::stand_by(const std::function<void()>& meanwhile) {
  using Clock = std::chrono::steady_clock;
  const auto members = static_cast<uint32_t>(members_of(door_.load(std::memory_order_acquire)));
  const Clock::time_point came = Clock::now();
  uint32_t left;
  while ((left = left_.load(std::memory_order_seq_cst)) < members) {
    meanwhile();
    if (stands_by_.load(std::memory_order_relaxed)) {
      sleep_while(left_, left, kStandByAtMost);
    } else if (Clock::now() - came < kStandBySpins) {
      relax();
    } else {
      stands_by_.store(true, std::memory_order_seq_cst);
    }
  }
}

bool Team::goes_on(int64_t round, bool meets) {
  if (poll_ != nullptr && poll_(context_)) end();
  const bool ended = ended_.load(std::memory_order_relaxed);
  if (!meets) return !ended;
  if (ended) {
    // Others learn of it at a barrier of this round, so it comes before the next.
    int64_t open = std::numeric_limits<int64_t>::max();
    end_.compare_exchange_strong(open, size_ > 1 ? round + 1 : round, std::memory_order_relaxed);
  }
  return round < end_.load(std::memory_order_relaxed);
}

void Team::barrier(int member) {
  const uint64_t door = door_.load(std::memory_order_relaxed);
  const int members = members_of(door);
  if (members == 1) return;
  Flag& mine = arrived_[member];
  const uint32_t phase = mine.phase.load(std::memory_order_relaxed) + 1;
  announce(mine, phase);
  if (members <= kAllToAllMembers) {
    for (int other = 0; other < members; ++other) {
      if (other != member) wait_for(arrived_[other], phase);
    }
  } else if (member == 0) {
    for (int other = 1; other < members; ++other) wait_for(arrived_[other], phase);
    announce(released_, phase);
  } else {
    wait_for(released_, phase);
  }
}

}  // namespace gru_fast
