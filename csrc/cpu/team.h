// SPDX-License-Identifier: Apache-2.0
// The threads that work on one call together. A parallel region may run fewer parts at a time than
// it was asked for (nested regions, OMP_DYNAMIC, one core, a task pool), so the team is whoever
// checked in, and work is divided only after the doors are closed: no barrier ever waits for a
// missing thread.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>

namespace gru_fast {

class Team {
 public:
  // `poll`, if there is one, is asked by goes_on() on every member, with `context`: true ends the
  // work. It may say so on one thread only, always the same.
  explicit Team(int parts, bool (*poll)(void*) = nullptr, void* context = nullptr)
      : parts_(parts),
        poll_(poll),
        context_(context),
        arrived_(parts > 1 ? new Flag[parts] : nullptr) {}

  // Called once by each thread of the region with the parts it was handed: the number of the first
  // and how many. Returns the member's number, or -1 to one that comes after closing time, which
  // must return at once. Where each thread has one part and none is missing, the member's number is
  // the part's: a pool that hands the same part to the same thread in every call keeps the work,
  // and what it reads, on the same core. Otherwise members are numbered as they come.
  int join(int first, int parts);

  // The final number of members. Valid after join().
  int size() const { return size_; }

  // Called by each member when its work is done.
  void leave();

  // For one thread that has nothing left to do here, or came too late, and must not be deaf
  // meanwhile: calls `meanwhile` again and again until all members have left.
  void stand_by(const std::function<void()>& meanwhile);

  // Returns once every member has called it. Spins briefly, then sleeps.
  void barrier(int member);

  // Whether to begin another round of the work, asked by each member before each of its rounds,
  // which are counted from 0. Where every round has a barrier (`meets`), all members leave at the
  // same round; otherwise each leaves as soon as it asks, and no barrier may follow.
  bool goes_on(int64_t round, bool meets = true);

  // As if `poll` said true from now on; on any thread.
  void end() { ended_.store(true, std::memory_order_relaxed); }

 private:
#if defined(__aarch64__)
  static constexpr size_t kCacheLine = 128;  // Apple's; others have 64
#else
  static constexpr size_t kCacheLine = 64;
#endif
  struct alignas(kCacheLine) Flag {
    std::atomic<uint32_t> phase{0};
  };
  void announce(Flag& flag, uint32_t phase);
  void wait_for(Flag& flag, uint32_t phase);
  const int parts_;
  bool (*const poll_)(void*);
  void* const context_;
  int size_ = 0;
  std::atomic<uint64_t> door_{0};  // closed bit | members | parts
  const std::unique_ptr<Flag[]> arrived_;
  Flag released_;
  std::atomic<int> sleepers_{0};
  std::atomic<int64_t> end_{std::numeric_limits<int64_t>::max()};  // no round from here on
  std::atomic<bool> ended_{false};
  std::atomic<uint32_t> left_{0};
  std::atomic<bool> stands_by_{false};
};

}  // namespace gru_fast
