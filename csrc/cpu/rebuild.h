// SPDX-License-Identifier: Apache-2.0
// Gates that were not saved, rebuilt for a whole chunk at once: every h_prev is known from the
// output, so the chunk is one forward step with a batch of all its rows.
#pragma once
#include "chunk.h"
#include "forward.h"

namespace gru_fast {
namespace GRU_FAST_ISA {
namespace {

template <class Real>
class Rebuild {
 public:
  static constexpr int W = kLanes<Real>;

  Rebuild(const Backward<Real>& f, const Chunk<Real>& chunk, Layout& layout, int threads)
      : p_(f.in), c_(chunk), threads_(threads), width_(p_.weight_ih ? p_.I : c_.gates * p_.H) {
    if (f.workspace != nullptr) return;
    const int64_t rows = c_.capacity;
    x_ = layout.template take<Real>(rows * width_);
    state_ = layout.template take<Real>(rows * p_.H);
    discarded_ = layout.template take<Real>(rows * p_.H);
    const Forward<Real> largest = one_step(0, rows);
    scratch_ =
        layout.template take<char>(ForwardScan<Real>(largest, threads, 0, nullptr).scratch_bytes());
  }

  void run(Team& team, int member) {
    for (int64_t g = 0; g < p_.G; ++g) {
      const int64_t count = c_.row_count(g);
      if (count == 0) continue;
      const Range rows = part_of(count, member, team.size());
      for (int64_t row = rows.begin; row < rows.end; ++row) gather(g, row);
      team.barrier(member);
      const Forward<Real> step = one_step(g, count);
      ForwardScan<Real>(step, threads_, member, scratch_).run(team, member);
      team.barrier(member);
    }
  }

 private:
  void gather(int64_t g, int64_t row) const {
    const auto [t, b, index] = c_.place(g, row);
    std::memcpy(x_ + row * width_, c_.rows.input_row(g, t, b),
                static_cast<size_t>(width_) * sizeof(Real));
    for (int64_t tile = 0; tile < c_.tiles; ++tile) {
      store_n(state_ + row * p_.H + tile * W, c_.scaled_previous(g, t, b, tile),
              lanes_of<Real>(tile, p_.H));
    }
  }

  Forward<Real> one_step(int64_t g, int64_t rows) const {
    static constexpr uint8_t kForward = 0;
    Problem<Real> step = p_;
    step.T = 1;
    step.B = rows;
    step.G = 1;
    step.layout.state_row = p_.H;
    step.reverse = &kForward;
    step.x = x_;
    step.x_stride_t = step.x_stride_g = 0;
    step.x_stride_b = width_;
    step.h0 = state_;
    step.weight_ih = p_.weight_ih.only(g);
    step.weight_hh = p_.weight_hh.only(g);
    step.bias_ih = p_.bias_ih.only(g);
    step.bias_hh = p_.bias_hh.only(g);
    step.lengths = step.order = step.alive_before = nullptr;
    step.packed = false;
    step.reset_mask = nullptr;
    step.reset_state = nullptr;
    step.h_scale = nullptr;
    return {step, discarded_, discarded_, c_.rebuilt(g, 0), {}, {}};
  }

  const Problem<Real>& p_;
  const Chunk<Real>& c_;
  const int threads_;
  const int64_t width_;
  Real *x_ = nullptr, *state_ = nullptr, *discarded_ = nullptr;
  char* scratch_ = nullptr;
};

}  // namespace
}  // namespace GRU_FAST_ISA
}  // namespace gru_fast
