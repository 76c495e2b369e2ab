// SPDX-License-Identifier: Apache-2.0
// What the parts of the backward pass of the layer-normalised GRU share: the chunk of steps at
// hand, its gates, and the gradients of its products, each one row for (step, b) and three slots of
// `units` columns: P before the norm's backward and Du after it (gru_fast/reference_norm.py).
#pragma once
#include "norm_forward.h"

namespace gru_fast {
namespace GRU_FAST_ISA {
namespace {

template <class Real>
struct NormChunk {
  static constexpr int W = kLanes<Real>;

  GRU_MEMBER NormChunk(const NormBackward<Real>& f, Layout& layout)
      : f(f),
        p(f.in),
        rows{f.in},
        tiles(tiles_of<Real>(p.H)),
        units(round_up(p.H, kUnitPad)),
        ld(3 * units + kUnitPad) {
    steps = steps_of_chunk(p);
    const int64_t all = p.G * steps * p.B;
    p_ = layout.take<Real>(all * ld);
    du_ = layout.take<Real>(all * ld);
    if (f.workspace != nullptr) return;
    gates_ = layout.take<Real>(all * kNormSlots * p.H);
    rstd_ = layout.take<Real>(all);
  }

  // Columns that no unit writes are read by the products: they must be zero.
  GRU_MEMBER void clear(int members, int member) const {
    const Range part = part_of(p.G * steps * p.B, member, members);
    fill_zero(p_ + part.begin * ld, part.size() * ld);
    fill_zero(du_ + part.begin * ld, part.size() * ld);
  }

  GRU_MEMBER int64_t row_count() const { return (end - begin) * p.B; }
  GRU_MEMBER int64_t row_of(int64_t step, int64_t b) const { return (step - begin) * p.B + b; }
  GRU_MEMBER Real* grad_products(int64_t g, int64_t row) const {
    return p_ + (g * steps * p.B + row) * ld;
  }
  GRU_MEMBER Real* du(int64_t g, int64_t row) const { return du_ + (g * steps * p.B + row) * ld; }
  GRU_MEMBER Real* rebuilt(int64_t g) const { return gates_ + g * steps * p.B * kNormSlots * p.H; }
  GRU_MEMBER Real* rebuilt_rstd(int64_t g) const { return rstd_ + g * steps * p.B; }
  // The slots of one step and row, saved or rebuilt, and the row's rstd.
  GRU_MEMBER const Real* gates(int64_t g, int64_t row, int64_t t, int64_t b) const {
    if (gates_ != nullptr) return rebuilt(g) + row * kNormSlots * p.H;
    return f.workspace + ((t * p.B + b) * p.G + g) * kNormSlots * p.H;
  }
  GRU_MEMBER Real rstd(int64_t g, int64_t row, int64_t t, int64_t b) const {
    return gates_ != nullptr ? rebuilt_rstd(g)[row] : f.rstd[(t * p.B + b) * p.G + g];
  }
  GRU_MEMBER const Real* previous(int64_t g, int64_t t, int64_t b) const {
    return rows.previous(f.output, g, t, b);
  }
  GRU_MEMBER Vec<Real> scaled_previous(int64_t g, int64_t t, int64_t b, int64_t tile) const {
    return rows.scaled_previous(f.output, g, t, b, tile);
  }

  const NormBackward<Real>& f;
  const Problem<Real>& p;
  const Schedule<Real> rows;
  const int64_t tiles, units, ld;
  int64_t steps;               // of a full chunk
  int64_t begin = 0, end = 0;  // steps of the chunk at hand

 private:
  Real *p_, *du_;
  Real *gates_ = nullptr, *rstd_ = nullptr;
};

// Gates that were not saved: as rebuild.h.
template <class Real>
class NormRebuild {
 public:
  static constexpr int W = kLanes<Real>;

  NormRebuild(const NormBackward<Real>& f, const NormChunk<Real>& chunk, Layout& layout,
              int threads)
      : f_(f), p_(f.in), c_(chunk), threads_(threads) {
    if (f.workspace != nullptr) return;
    const int64_t rows = c_.steps * p_.B;
    x_ = layout.template take<Real>(rows * 3 * p_.H);
    state_ = layout.template take<Real>(rows * p_.H);
    discarded_ = layout.template take<Real>(rows * p_.H);
    const NormForward<Real> largest = one_step(0, rows);
    scratch_ = layout.template take<char>(norm_forward_scratch_bytes(largest, threads));
  }

  void run(Team& team, int member) {
    for (int64_t g = 0; g < p_.G; ++g) {
      const Range rows = part_of(c_.row_count(), member, team.size());
      for (int64_t row = rows.begin; row < rows.end; ++row) gather(g, row);
      team.barrier(member);
      norm_forward(one_step(g, c_.row_count()), team, threads_, member, scratch_);
      team.barrier(member);
    }
  }

 private:
  void gather(int64_t g, int64_t row) const {
    const int64_t b = row % p_.B, t = c_.rows.time(g, c_.begin + row / p_.B), width = 3 * p_.H;
    if (is_held(p_, t, b)) {
      fill_zero(x_ + row * width, width);
      fill_zero(state_ + row * p_.H, p_.H);
      return;
    }
    std::memcpy(x_ + row * width, c_.rows.input_row(g, t, b),
                static_cast<size_t>(width) * sizeof(Real));
    for (int64_t tile = 0; tile < c_.tiles; ++tile) {
      store_n(state_ + row * p_.H + tile * W, c_.scaled_previous(g, t, b, tile),
              lanes_of<Real>(tile, p_.H));
    }
  }

  NormForward<Real> one_step(int64_t g, int64_t rows) const {
    static constexpr uint8_t kForward = 0;
    Problem<Real> step = p_;
    step.T = 1;
    step.B = rows;
    step.G = 1;
    step.reverse = &kForward;
    step.x = x_;
    step.x_stride_t = step.x_stride_g = 0;
    step.x_stride_b = 3 * p_.H;
    step.h0 = state_;
    step.weight_hh = p_.weight_hh.only(g);
    step.bias_hh = p_.bias_hh.only(g);
    step.lengths = nullptr;
    step.reset_mask = nullptr;
    step.reset_state = nullptr;
    step.h_scale = nullptr;
    return {step,          f_.gamma + g * 3 * p_.H, f_.eps, discarded_, discarded_,
            c_.rebuilt(g), c_.rebuilt_rstd(g)};
  }

  const NormBackward<Real>& f_;
  const Problem<Real>& p_;
  const NormChunk<Real>& c_;
  const int threads_;
  Real *x_ = nullptr, *state_ = nullptr, *discarded_ = nullptr;
  char* scratch_ = nullptr;
};

}  // namespace
}  // namespace GRU_FAST_ISA
}  // namespace gru_fast
