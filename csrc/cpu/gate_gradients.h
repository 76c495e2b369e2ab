// SPDX-License-Identifier: Apache-2.0
// D of one step from the gradient of its state: equations (7), (8), and (9) and (11) of
// reset_after.
#pragma once
#include "carry.h"
#include "chunk.h"

namespace gru_fast {
namespace GRU_FAST_ISA {
namespace {

// As StepRows of the forward scan (forward_rows.h), what lies where is worked out once.
template <class Real>
class GateGradients {
 public:
  static constexpr int W = kLanes<Real>;
  using V = Vec<Real>;
  using Number = Compute<Real>;

  GRU_MEMBER GateGradients(const Chunk<Real>& c, const Carry<Real>& carry, const Ranks& ranks,
                           bool prefetches, int64_t g, int64_t step) {
    const Problem<Real>& p = c.p;
    const int64_t t = c.rows.time(g, step), start = c.rows.start(t), first = c.first_row(g, step);
    H_ = p.H;
    units_ = c.units;
    slots_ = c.slots;
    reset_after_ = p.cell == Cell::kResetAfter;
    ranks_ = ranks;
    order_ = p.order;
    d_ = c.d(g, first);
    d_row_ = c.ld;
    // Rebuilt gates lie as D does, saved ones as the results.
    rebuilt_ = c.f.workspace == nullptr;
    saved_ = c.gate_row(g, first, start);
    row_ = p.G * H_;
    saved_row_ = (rebuilt_ ? H_ : row_) * slots_;
    carried_ = carry.at(g, 0, 0);
    const int64_t out = start * row_ + g * H_;
    grad_output_ = c.f.grad_output == nullptr ? nullptr : c.f.grad_output + out;
    grad_saved_ = c.f.grad_workspace == nullptr ? nullptr : c.f.grad_workspace + out * slots_;
    begins_ = c.rows.begins(g, t);
    // To the rows of the step before; beyond the first there are none.
    const int64_t ahead = begins_ ? 0 : c.rows.start(p.reverse[g] ? t + 1 : t - 1) - start;
    h0_ = p.h0 + p.layout.state(g, 0);
    h0_row_ = p.layout.state_row;
    before_ = c.f.output + out + ahead * row_;
    lengths_ = p.reverse[g] ? p.lengths : nullptr;
    after_ = t + 1;
    reset_ = c.rows.resets(g, t);
    reset_state_ = c.rows.reset_row(g, 0);
    away_ = ahead * row_;
    prefetches_ = prefetches;
  }

  // The gradient that the state has received so far, of a row of this member and a tile.
  GRU_MEMBER Number* carried(int64_t row, int64_t tile) const {
    return carried_ + row * units_ + tile * W;
  }

  // D of a row and tile from the gradient of its state. What the state passes on directly stays in
  // the carry.
  GRU_MEMBER void add(int64_t row, int64_t tile, V grad) const {
    const int lanes = lanes_of<Real>(tile, H_);
    const int64_t rank = ranks_[row];
    const int64_t b = order_ ? order_[rank] : rank, out = b * row_ + tile * W;
    Real* const to = d_ + rank * d_row_ + tile * W;
    const Real* const saved = saved_ + (rebuilt_ ? rank : b) * saved_row_ + tile * W;
    const Real* const grad_saved =
        grad_saved_ == nullptr ? nullptr : grad_saved_ + b * row_ * slots_ + tile * W;
    if (prefetches_) prefetch_step_before(saved, out);
    auto slot = [&](int i) GRU_MEMBER_LAMBDA { return load_n(saved + i * H_, lanes); };
    auto grad_slot = [&](int i)
                         GRU_MEMBER_LAMBDA { return load_or_zero(grad_saved, i * H_, lanes); };
    const int z_slot = slots_ - 2, n_slot = slots_ - 1;
    const V z = slot(z_slot), n = slot(n_slot);
    const V dh = grad + load_or_zero(grad_output_, out, lanes);
    const V dn = dh * (Number(1) - z) + grad_slot(n_slot);
    const V dz = dh * (previous(b, tile, out, lanes) - n) + grad_slot(z_slot);
    const V da_n = dn * (Number(1) - n * n);
    store(to + n_slot * units_, da_n);
    store(to + z_slot * units_, dz * z * (Number(1) - z));
    store(carried(row, tile), dh * z);
    if (reset_after_) {
      const V q = slot(0), r = slot(1);
      const V dr = da_n * q + grad_slot(1);
      store(to, da_n * r + grad_slot(0));
      store(to + units_, dr * r * (Number(1) - r));
    }
  }

 private:
  // The state that the step starts from, as Schedule::previous() has it.
  GRU_MEMBER V previous(int64_t b, int64_t tile, int64_t out, int lanes) const {
    const bool late = lengths_ != nullptr && lengths_[b] == after_;
    if (reset_ != nullptr && reset_[b] != 0 && !late) {
      return load_or_zero(reset_state_, b * H_ + tile * W, lanes);
    }
    if (begins_ || late) return load_n(h0_ + b * h0_row_ + tile * W, lanes);
    return load_n(before_ + out, lanes);
  }

  // What the step before will read of a row and tile lies a step away in memory, in lines that no
  // hardware prefetcher finds.
  GRU_MEMBER void prefetch_step_before(const Real* saved, int64_t out) const {
    for (int i = 0; i < slots_; ++i) prefetch(saved + away_ * slots_ + i * H_);
    if (grad_output_ != nullptr) prefetch(grad_output_ + out + away_);
    prefetch(before_ + out + away_);
  }

  Ranks ranks_;
  int64_t H_, units_, row_, d_row_, saved_row_, h0_row_, after_, away_;
  const int64_t *order_, *lengths_;
  const uint8_t* reset_;
  Real* d_;
  const Real *saved_, *grad_output_, *grad_saved_, *h0_, *before_, *reset_state_;
  Number* carried_;
  int slots_;
  bool reset_after_, rebuilt_, begins_, prefetches_;
};

}  // namespace
}  // namespace GRU_FAST_ISA
}  // namespace gru_fast
