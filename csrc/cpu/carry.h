// SPDX-License-Identifier: Apache-2.0
// The gradient that a state has received so far, carried back from step to step.
#pragma once
#include "schedule.h"

namespace gru_fast {
namespace GRU_FAST_ISA {
namespace {

template <class Real>
class Carry {
 public:
  static constexpr int W = kLanes<Real>;
  using V = Vec<Real>;
  using Number = Compute<Real>;

  // `f` is a Backward or a NormBackward; a row has `units` columns. Each member numbers its rows
  // from 0.
  template <class Call>
  Carry(const Call& f, int64_t units, Layout& layout, int threads)
      : p_(f.in),
        rows_{f.in},
        output_(f.output),
        grad_h_n_(f.grad_h_n),
        grad_h0_(f.grad_h0),
        grad_reset_state_(f.grad_reset_state),
        grad_h_scale_(f.grad_h_scale),
        units_(units),
        apart_(threads, p_.B, 1, units * static_cast<int64_t>(sizeof(Number))),
        sums_(layout.template take<Number>(p_.G * apart_.group * units)) {}

  GRU_MEMBER Number* at(int64_t g, int64_t row, int64_t tile) const {
    return sums_ + (g * apart_.group + first_ + row) * units_ + tile * W;
  }

  // The first step whose product has a reader: that of step 0 reaches what the first step starts
  // from, which nobody may ask for.
  int64_t first_product() const {
    return grad_h0_ != nullptr || grad_reset_state_ != nullptr || grad_h_scale_ != nullptr ? 0 : 1;
  }

  // Starts from grad_h_n, in what belongs to one member.
  void begin(const Share& share) {
    first_ = apart_.first(share);
    share.each_tile(p_.B, [&](int64_t g, int64_t row, int64_t tile) {
      const int64_t offset = p_.layout.state(g, rows_.row(share.ranks[row])) + tile * W;
      store(at(g, row, tile), load_or_zero(grad_h_n_, offset, lanes_of<Real>(tile, p_.H)));
    });
  }

  // Leaves what there is to grad_h0.
  void finish(const Share& share) const {
    if (grad_h0_ == nullptr) return;
    share.each_tile(p_.B, [&](int64_t g, int64_t row, int64_t tile) {
      const int64_t offset = p_.layout.state(g, rows_.row(share.ranks[row])) + tile * W;
      store_n(grad_h0_ + offset, load(at(g, row, tile)), lanes_of<Real>(tile, p_.H));
    });
  }

  // `grad` is a term of Ds: equation (13), of row b of the batch.
  GRU_MEMBER void add(int64_t g, int64_t t, int64_t row, int64_t b, int64_t tile, V grad) const {
    if (p_.h_scale != nullptr) {
      const int lanes = lanes_of<Real>(tile, p_.H);
      const int64_t scale = (b * p_.G + g) * p_.H + tile * W;
      if (grad_h_scale_ != nullptr) {
        const V previous = load_or_zero(rows_.previous(output_, g, t, b), tile * W, lanes);
        Number* to = grad_h_scale_ + scale;
        store_n(to, load_n(to, lanes) + grad * previous, lanes);
      }
      grad *= load_n(p_.h_scale + scale, lanes);
    }
    store(at(g, row, tile), load(at(g, row, tile)) + grad);
  }

  // Equation (14) at a reset.
  GRU_MEMBER void leave_to_reset_state(int64_t g, int64_t row, int64_t b, int64_t tile) const {
    if (grad_reset_state_ != nullptr) {
      const int lanes = lanes_of<Real>(tile, p_.H);
      Number* to = grad_reset_state_ + (g * p_.B + b) * p_.H + tile * W;
      store_n(to, load_n(to, lanes) + load(at(g, row, tile)), lanes);
    }
    store(at(g, row, tile), V{});
  }

 private:
  const Problem<Real>& p_;
  const Schedule<Real> rows_;
  const Real* const output_;
  const Real* const grad_h_n_;
  Real* const grad_h0_;
  Number* const grad_reset_state_;
  Number* const grad_h_scale_;
  const int64_t units_;
  const RowsApart apart_;
  Number* const sums_;
  int64_t first_ = 0;
};

}  // namespace
}  // namespace GRU_FAST_ISA
}  // namespace gru_fast
