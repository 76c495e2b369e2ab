// SPDX-License-Identifier: Apache-2.0
// The backward pass of the layer-normalised GRU, chunk by chunk of steps from the end. A step is:
// gate gradients of each unit; the norm's backward, which needs them of the whole row; the product
// that carries the result into the state before, whose epilogue begins the step before.
#pragma once
#include "carry.h"
#include "column_panels.h"
#include "norm_weight_grads.h"

namespace gru_fast {
namespace GRU_FAST_ISA {
namespace {

template <class Real>
class NormBackwardScan {
 public:
  static constexpr int W = kLanes<Real>;
  using V = Vec<Real>;

  NormBackwardScan(const NormBackward<Real>& f, const NormChunk<Real>& chunk, Layout& layout,
                   int threads, int member)
      : f_(f),
        p_(f.in),
        c_(chunk),
        carry_(f, c_.units, layout, threads),
        panels_{p_.weight_hh.own, p_.H, p_.H, c_.units, p_.H, {0, 1, 2}, 3, nullptr, nullptr} {
    panels_.take(p_.G, p_.T - carry_.first_product() <= 1, layout, threads, member);
  }

  // Packs W_hh by columns and starts the carry from grad_h_n.
  void begin(int members, int member) {
    share_ = share_of(member, members, p_.G, p_.B, c_.tiles, 3 * c_.units,
                      panels_.packed == nullptr, false);
    batch_ = rows_of(share_, p_.B);
    panels_.pack(p_.G, members, member);
    carry_.begin(share_);
  }

  void run(Team& team, int member) {
    share_.each_tile(p_.B, [&](int64_t g, int64_t row, int64_t tile) {
      gate_gradients(g, c_.end - 1, batch_.begin + row, tile);
    });
    for (int64_t step = c_.end - 1; step >= c_.begin; --step) {
      if (share_.waits) team.barrier(member);
      for (int64_t g = share_.groups.begin; g < share_.groups.end; ++g) {
        for (int64_t b = batch_.begin; b < batch_.end; ++b) through_norm(g, step, b);
      }
      if (step < carry_.first_product()) break;
      if (share_.waits) team.barrier(member);
      for (int64_t g = share_.groups.begin; g < share_.groups.end; ++g) through_state(g, step);
    }
  }

  void finish() const { carry_.finish(share_); }

 private:
  // P and D(gates_x) of a step from the gradient of its state: equations (7) to (9), (11). What
  // the state passes on directly stays in the carry.
  GRU_MEMBER void gate_gradients(int64_t g, int64_t step, int64_t b, int64_t tile) const {
    const int64_t t = c_.rows.time(g, step), row = c_.row_of(step, b);
    const int lanes = lanes_of<Real>(tile, p_.H);
    Real* to = c_.grad_products(g, row) + tile * W;
    auto give = [&](V r, V z, V n, V q) GRU_MEMBER_LAMBDA {
      store(to, r);
      store(to + c_.units, z);
      store(to + 2 * c_.units, q);
      if (f_.grad_gates_x == nullptr) return;
      Real* rows = f_.grad_gates_x + ((t * p_.B + b) * p_.G + g) * 3 * p_.H + tile * W;
      store_n(rows, r, lanes);
      store_n(rows + p_.H, z, lanes);
      store_n(rows + 2 * p_.H, n, lanes);
    };
    if (is_held(p_, t, b)) {
      give(V{}, V{}, V{}, V{});
      return;
    }
    const Real* saved = c_.gates(g, row, t, b) + tile * W;
    auto slot = [&](int i) GRU_MEMBER_LAMBDA { return load_n(saved + i * p_.H, lanes); };
    const int64_t candidate = 2 * p_.H + tile * W;
    const V q = slot(2) * load_n(f_.gamma + g * 3 * p_.H + candidate, lanes) +
                load_or_zero(p_.bias_hh[g], candidate, lanes);
    const V r = slot(3), z = slot(4), n = slot(5);
    const V previous = load_or_zero(c_.previous(g, t, b), tile * W, lanes);
    const int64_t out = ((t * p_.B + b) * p_.G + g) * p_.H + tile * W;
    Real* const carried = carry_.at(g, b - batch_.begin, tile);
    const V dh = load(carried) + load_or_zero(f_.grad_output, out, lanes);
    const V an = dh * (Real(1) - z) * (Real(1) - n * n);
    const V az = dh * (previous - n) * z * (Real(1) - z);
    const V ar = an * q * r * (Real(1) - r);
    store(carried, dh * z);
    give(ar, az, an, an * r);
  }

  // Equation (23) for one row and the tiles of this member.
  GRU_MEMBER void through_norm(int64_t g, int64_t step, int64_t b) const {
    const int64_t t = c_.rows.time(g, step), row = c_.row_of(step, b);
    Real* to = c_.du(g, row);
    if (is_held(p_, t, b)) {
      for (int gate = 0; gate < 3; ++gate) {
        Real* from = to + gate * c_.units + share_.tiles.begin * W;
        fill_zero(from, share_.tiles.size() * W);
      }
      return;
    }
    const Real* grad = c_.grad_products(g, row);
    const Real* v = c_.gates(g, row, t, b);
    const Real* gamma = f_.gamma + g * 3 * p_.H;
    V sum[3] = {}, moved[3] = {};
    for (int64_t tile = 0; tile < c_.tiles; ++tile) {
      const int n = lanes_of<Real>(tile, p_.H);
      for (int gate = 0; gate < 3; ++gate) {
        const int64_t at = gate * p_.H + tile * W;
        const V y = load(grad + gate * c_.units + tile * W) * load_n(gamma + at, n);
        sum[gate] += y;
        moved[gate] += y * load_n(v + at, n);
      }
    }
    const Real count = static_cast<Real>(3 * p_.H);
    const Real mean = sum_of_lanes<Real>(sum[0], sum[1], sum[2]) / count;
    const Real slope = sum_of_lanes<Real>(moved[0], moved[1], moved[2]) / count;
    const Real rstd = c_.rstd(g, row, t, b);
    for (int64_t tile = share_.tiles.begin; tile < share_.tiles.end; ++tile) {
      const int n = lanes_of<Real>(tile, p_.H);
      for (int gate = 0; gate < 3; ++gate) {
        const int64_t at = gate * p_.H + tile * W;
        const V y = load(grad + gate * c_.units + tile * W) * load_n(gamma + at, n);
        store_n(to + gate * c_.units + tile * W, (y - mean - load_n(v + at, n) * slope) * rstd, n);
      }
    }
  }

  // Equations (24), (13) and (14), then the gate gradients of the step before.
  void through_state(int64_t g, int64_t step) const {
    const int64_t t = c_.rows.time(g, step), first = batch_.begin;
    panels_.multiply(
        {c_.du(g, c_.row_of(step, first)), c_.ld}, batch_.size(), g, share_.tiles, step % 2 != 0,
        row_by_row<Real>([&](int64_t i, int64_t tile, const V* sums) GRU_MEMBER_LAMBDA {
          const int64_t b = first + i;
          if (!is_held(p_, t, b)) carry_.add(g, t, i, b, tile, sums[0]);
          if (c_.rows.reset(g, t, b)) carry_.leave_to_reset_state(g, i, b, tile);
          if (step > c_.begin) gate_gradients(g, step - 1, b, tile);
        }));
  }

  const NormBackward<Real>& f_;
  const Problem<Real>& p_;
  const NormChunk<Real>& c_;
  Carry<Real> carry_;
  ColumnPanels<Real> panels_;
  Share share_{};
  Range batch_{};
};

template <class Real>
class NormBackwardPass {
 public:
  NormBackwardPass(const NormBackward<Real>& f, int threads, int member, void* scratch)
      : f_(f),
        layout_(scratch),
        chunk_(f, layout_),
        rebuild_(f, chunk_, layout_, threads),
        scan_(f, chunk_, layout_, threads, member),
        grads_(f, chunk_, layout_, threads, member) {}

  int64_t scratch_bytes() const { return layout_.used(); }

  void run(Team& team, int member) {
    scan_.begin(team.size(), member);
    chunk_.clear(team.size(), member);
    team.barrier(member);
    int64_t round = 0;
    for (int64_t end = f_.in.T; end > 0; end = chunk_.begin) {
      if (!team.goes_on(round++)) return;
      chunk_.end = end;
      chunk_.begin = (end - 1) / chunk_.steps * chunk_.steps;
      if (f_.workspace == nullptr) rebuild_.run(team, member);
      scan_.run(team, member);
      team.barrier(member);
      grads_.run(team, member, end == f_.in.T);
    }
    scan_.finish();
  }

 private:
  const NormBackward<Real>& f_;
  Layout layout_;
  NormChunk<Real> chunk_;
  NormRebuild<Real> rebuild_;
  NormBackwardScan<Real> scan_;
  NormWeightGrads<Real> grads_;
};

template <class Real>
int64_t norm_backward_scratch_bytes(const NormBackward<Real>& f, int threads) {
  return NormBackwardPass<Real>(f, threads, 0, nullptr).scratch_bytes();
}

template <class Real>
void norm_backward(const NormBackward<Real>& f, Team& team, int threads, int member,
                   void* scratch) {
  NormBackwardPass<Real>(f, threads, member, scratch).run(team, member);
}

}  // namespace
}  // namespace GRU_FAST_ISA
}  // namespace gru_fast
