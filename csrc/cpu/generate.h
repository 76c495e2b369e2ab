// SPDX-License-Identifier: Apache-2.0
// The whole generation loop. A member of the team holds up to kMostRows sequences and steps them
// together; one that ends hands its row to the next sequence that waits. With fewer sequences than
// members the hidden units are split instead, and every member draws the same token for itself.
// A sequence's numbers depend on nothing but its own inputs, so none of this shows in the result.
#pragma once
#include "draw.h"
#include "share.h"
#include "stack.h"

namespace gru_fast {
namespace GRU_FAST_ISA {
namespace {

constexpr int64_t kMostRows = 64;
// Logits computed before they are drawn from: they should stay in the cache.
constexpr int64_t kMostLogits = 1 << 16;
// Products of a head that is worth splitting: it costs one more meeting a step.
constexpr int64_t kSplitHead = 1 << 13;
// Products between two looks at the outside world, about a tenth of a millisecond.
constexpr int64_t kProductsPerPoll = int64_t{1} << 22;

template <Weights P>
class Generator {
 public:
  Generator(const Snapshot& s, const Generation& g, GenerationState& state, bool split,
            Layout shared, Layout mine)
      : s_(s),
        g_(g),
        state_(state),
        split_(split),
        most_rows_(g.B < kMostRows ? g.B : kMostRows),
        logit_rows_(rows_of_logits(s, most_rows_)),
        slots_(mine.take<Slot>(most_rows_)),
        stack_(s, most_rows_, split ? shared : mine, mine),
        draw_(s.shape.outputs, mine),
        logits_((split && splits_head(s) ? shared : mine)
                    .take<float>(logit_rows_ * s.padded_outputs())),
        products_(products(s)),
        shared_bytes_(shared.used()),
        bytes_(mine.used()) {}

  int64_t shared_bytes() const { return shared_bytes_; }
  int64_t bytes() const { return bytes_; }

  void run(Team& team, int member) {
    const int members = team.size();
    split_ = split_ && members > 1;
    writes_ = !split_ || member == 0;
    crew_ = {split_ ? &team : nullptr, member,
             split_ ? part_of(s_.tiles, member, members) : Range{0, s_.tiles}};
    split_head_ = split_ && splits_head(s_);
    head_ = split_head_ ? part_of(s_.head.tiles, member, members) : Range{0, s_.head.tiles};
    if (!split_) {
      const int64_t share = (g_.B + members - 1) / members;
      most_rows_ = share < most_rows_ ? share : most_rows_;
    }
    for (int64_t turn = 0;; ++turn) {
      refill();
      if (active_ == 0) return;
      // Those who split a sequence leave it at the same step.
      if (split_ && member == 0) state_.agreed_stop[turn & 1] = stopped();
      if (ready_ == 0) {
        feed_prompts();
      } else {
        step();
      }
      if (split_ ? state_.agreed_stop[turn & 1] != 0 || failed_ : stopped()) return;
    }
  }

 private:
  // The sequences in rows [0, ready) draw after their next step; those up to `active` have more
  // inputs to be fed first.
  struct Slot {
    int64_t sequence, made;
    const int32_t* input;
    int64_t inputs_left;
    int32_t token;
    bool done;
  };

  static int64_t rows_of_logits(const Snapshot& s, int64_t most_rows) {
    const int64_t rows = kMostLogits / (s.padded_outputs() + 1) / kRowBlock * kRowBlock;
    const int64_t wanted = rows < kRowBlock ? kRowBlock : rows;
    return wanted < most_rows ? wanted : most_rows;
  }
  static bool splits_head(const Snapshot& s) { return s.shape.outputs * s.shape.H >= kSplitHead; }
  static int64_t products(const Snapshot& s) {
    return s.shape.H * s.gates * s.shape.H * (2 * s.shape.layers - 1) + s.shape.H * s.shape.outputs;
  }
  int32_t stopped() const { return __atomic_load_n(&state_.stop, __ATOMIC_RELAXED); }
  void stop() { __atomic_store_n(&state_.stop, 1, __ATOMIC_RELAXED); }

  int64_t next_sequence() {
    return split_ ? next_++ : __atomic_fetch_add(&state_.next_sequence, 1, __ATOMIC_RELAXED);
  }

  void refill() {
    while (active_ < most_rows_ && next_ < g_.B) {
      const int64_t b = next_sequence();
      if (b >= g_.B) {
        next_ = b;
        return;
      }
      // Another member may not be done with the row: its last sequence's state or logits.
      if (b >= most_rows_) crew_.wait();
      const int64_t begin = g_.input_begin[b];
      slots_[active_] = {b, 0, g_.inputs + begin, g_.input_begin[b + 1] - begin, 0, false};
      load_state(active_, b);
      promote(active_++);
    }
  }

  void load_state(int64_t row, int64_t b) {
    const int64_t H = s_.shape.H;
    for (int64_t l = 0; l < s_.shape.layers; ++l) {
      float* to = stack_.state(l, row);
      // Who splits the units of a row writes its own part of it.
      const Range units = {crew_.tiles.begin * kLanes<float>, crew_.tiles.end * kLanes<float>};
      for (int64_t i = units.begin; i < units.end; ++i) {
        to[i] = g_.h0 != nullptr && i < H ? g_.h0[(l * g_.B + b) * H + i] : 0;
      }
      stack_.state_written(l, row, crew_.tiles);
    }
    crew_.wait();
  }

  void promote(int64_t row) {
    if (slots_[row].inputs_left > 1) return;
    exchange(row, ready_++);
  }

  void exchange(int64_t a, int64_t b) {
    if (a == b) return;
    const Slot was = slots_[a];
    slots_[a] = slots_[b];
    slots_[b] = was;
    crew_.wait();
    stack_.swap_rows(a, b, crew_.tiles);
    crew_.wait();
  }

  void poll(int64_t rows) {
    unpolled_ += rows * products_;
    if (unpolled_ < kProductsPerPoll) return;
    unpolled_ = 0;
    if (g_.poll(g_.context)) stop();
  }

  // Every row has two inputs or more: as many steps at a time as fit.
  void feed_prompts() {
    int64_t T = stack_.most_steps(active_);
    for (int64_t row = 0; row < active_; ++row) {
      const int64_t most = slots_[row].inputs_left - 1;
      T = most < T ? most : T;
    }
    for (int64_t t = 0; t < T; ++t) {
      for (int64_t row = 0; row < active_; ++row) {
        stack_.feed(t, active_, row, slots_[row].input[t]);
      }
    }
    stack_.advance(T, active_, crew_);
    poll(T * active_);
    for (int64_t row = 0; row < active_; ++row) advance_slot(row, T);
  }

  void advance_slot(int64_t row, int64_t steps) {
    slots_[row].input += steps;
    slots_[row].inputs_left -= steps;
    promote(row);
  }

  void step() {
    for (int64_t row = 0; row < active_; ++row) {
      const Slot& slot = slots_[row];
      stack_.feed(0, active_, row, slot.inputs_left > 0 ? *slot.input : slot.token);
    }
    stack_.advance(1, active_, crew_);
    poll(active_);
    bool any_done = false;
    for (int64_t row = 0; row < ready_; row += logit_rows_) {
      const int64_t rows = ready_ - row < logit_rows_ ? ready_ - row : logit_rows_;
      stack_.logits(stack_.top(row), rows, logits_, head_);
      if (split_head_) crew_.wait();
      for (int64_t i = 0; i < rows; ++i) any_done |= draw(slots_[row + i], i);
      // The next rows' logits replace these.
      if (split_head_ && row + rows < ready_) crew_.wait();
      if (failed_) return;
    }
    if (ready_ < active_) {
      for (int64_t row = ready_; row < active_; ++row) {
        ++slots_[row].input;
        --slots_[row].inputs_left;
      }
    }
    if (any_done) {
      for (int64_t row = ready_ - 1; row >= 0; --row) {
        if (slots_[row].done) retire(row);
      }
    }
    for (int64_t row = ready_; row < active_; ++row) promote(row);
  }

  // Draws the next token of a sequence; true if it was the last.
  GRU_MEMBER bool draw(Slot& slot, int64_t row) {
    const int64_t b = slot.sequence, at = b * g_.capacity + slot.made;
    float log_prob;
    const int64_t token =
        draw_(g_.rules, logits_ + row * s_.padded_outputs(), g_.seed,
              static_cast<uint64_t>(g_.position[b]) + static_cast<uint64_t>(slot.made),
              static_cast<uint64_t>(g_.stream[b]),
              g_.log_probs != nullptr && writes_ ? &log_prob : nullptr);
    if (token < 0) {
      __atomic_store_n(&state_.bad_sequence, b + 1, __ATOMIC_RELAXED);
      failed_ = true;
      stop();
      return true;
    }
    if (writes_) {
      g_.tokens[at] = token;
      if (g_.log_probs != nullptr) g_.log_probs[at] = log_prob;
    }
    slot.token = static_cast<int32_t>(token);
    slot.inputs_left = 0;
    ++slot.made;
    slot.done = slot.made >= g_.limit[b];
    for (int64_t i = 0; i < g_.eos_count; ++i) slot.done |= token == g_.eos[i];
    return slot.done;
  }

  // Hands over what a sequence leaves, and closes its gap among the rows.
  void retire(int64_t row) {
    const int64_t b = slots_[row].sequence, H = s_.shape.H;
    if (writes_) g_.lengths[b] = slots_[row].made;
    for (int64_t l = 0; writes_ && g_.h_n != nullptr && l < s_.shape.layers; ++l) {
      std::memcpy(g_.h_n + (l * g_.B + b) * H, stack_.state(l, row),
                  static_cast<size_t>(H) * sizeof(float));
    }
    exchange(row, --ready_);
    exchange(ready_, --active_);
  }

  const Snapshot& s_;
  const Generation& g_;
  GenerationState& state_;
  bool split_;
  int64_t most_rows_;
  const int64_t logit_rows_;
  Slot* const slots_;
  Stack<P> stack_;
  Draw draw_;
  float* const logits_;
  const int64_t products_, shared_bytes_, bytes_;
  Crew crew_{};
  Range head_{};
  bool writes_ = true, split_head_ = false, failed_ = false;
  int64_t active_ = 0, ready_ = 0, next_ = 0, unpolled_ = 0;
};

}  // namespace
}  // namespace GRU_FAST_ISA
}  // namespace gru_fast
