// SPDX-License-Identifier: Apache-2.0
// From the gradients of a chunk's products: those of weight_hh (Du^T s), of the gain (column sums
// of P * v) and of the bias (of P). Rows are added in the order of the scan's chunks, whatever the
// threads; gain and bias in double.
#pragma once
#include "norm_chunk.h"

namespace gru_fast {
namespace GRU_FAST_ISA {
namespace {

template <class Real>
class NormWeightGrads {
 public:
  static constexpr int W = kLanes<Real>;
  using V = Vec<Real>;

  NormWeightGrads(const NormBackward<Real>& f, const NormChunk<Real>& chunk, Layout& layout,
                  int threads, int member)
      : f_(f), p_(f.in), c_(chunk), unit_blocks_((p_.H + kRowBlock - 1) / kRowBlock) {
    const int64_t rows = c_.steps * p_.B;
    if (f.grad_weight != nullptr) state_ = layout.template take<Real>(c_.tiles * rows * W);
    block_ = layout.template take<Real>(threads * rows * kRowBlock) + member * rows * kRowBlock;
  }

  // `first`: no chunk came before, so the sums start here.
  void run(Team& team, int member, bool first) const {
    for (int64_t g = 0; g < p_.G; ++g) {
      const Range rows = part_of(c_.row_count(), member, team.size(), kRowBlock);
      for (int64_t row = rows.begin; row < rows.end; ++row) pack_row(g, row);
      team.barrier(member);
      const Range tasks = part_of(3 * unit_blocks_, member, team.size());
      for (int64_t i = tasks.begin; i < tasks.end; ++i) {
        const int gate = static_cast<int>(i / unit_blocks_);
        const int64_t unit = i % unit_blocks_ * kRowBlock;
        gain_and_bias(g, gate, unit, first);
        if (state_ != nullptr) weight_gradient(g, gate, unit, first);
      }
      team.barrier(member);
    }
  }

 private:
  GRU_MEMBER int valid_units(int64_t unit) const {
    return p_.H - unit < kRowBlock ? static_cast<int>(p_.H - unit) : kRowBlock;
  }

  // One row of the state as a right-hand operand: [tile][row][lanes].
  void pack_row(int64_t g, int64_t row) const {
    if (state_ == nullptr) return;
    const int64_t b = row % p_.B, t = c_.rows.time(g, c_.begin + row / p_.B);
    const bool held = is_held(p_, t, b);
    for (int64_t tile = 0; tile < c_.tiles; ++tile) {
      store(state_ + (tile * c_.row_count() + row) * W,
            held ? V{} : c_.scaled_previous(g, t, b, tile));
    }
  }

  // Equation (22) for kRowBlock units of one gate.
  void gain_and_bias(int64_t g, int gate, int64_t unit, bool first) const {
    if (f_.grad_gamma == nullptr && f_.grad_bias == nullptr) return;
    const int valid = valid_units(unit);
    double gain[kRowBlock] = {}, bias[kRowBlock] = {};
    for (int64_t row = 0; row < c_.row_count(); ++row) {
      const int64_t b = row % p_.B, t = c_.rows.time(g, c_.begin + row / p_.B);
      if (is_held(p_, t, b)) continue;
      const Real* from = c_.grad_products(g, row) + gate * c_.units + unit;
      const Real* v = c_.gates(g, row, t, b) + gate * p_.H + unit;
      for (int i = 0; i < valid; ++i) {
        bias[i] += from[i];
        gain[i] += static_cast<double>(from[i]) * v[i];
      }
    }
    auto add = [&](Real* to, double value) {
      *to = static_cast<Real>(first ? value : *to + value);
    };
    const int64_t at = (g * 3 + gate) * p_.H + unit;
    for (int i = 0; i < valid; ++i) {
      if (f_.grad_gamma != nullptr) add(f_.grad_gamma + at + i, gain[i]);
      if (f_.grad_bias != nullptr) add(f_.grad_bias + at + i, bias[i]);
    }
  }

  // Equation (24) for kRowBlock units of one gate.
  void weight_gradient(int64_t g, int gate, int64_t unit, bool first) const {
    const int64_t rows = c_.row_count();
    const int valid = valid_units(unit);
    for (int64_t row = 0; row < rows; ++row) {
      const Real* from = c_.du(g, row) + gate * c_.units + unit;
      std::memcpy(block_ + row * kRowBlock, from, kRowBlock * sizeof(Real));
    }
    sweep<Real>(
        {block_, 1, kRowBlock, kGradSumBlock<Real>}, kRowBlock, rows, 1, 0, c_.tiles, false,
        [&](int64_t tile, int) { return state_ + tile * rows * W; },
        row_by_row<Real>([&](int64_t i, int64_t tile, const V* sums) GRU_MEMBER_LAMBDA {
          if (i >= valid) return;
          const int lanes = lanes_of<Real>(tile, p_.H);
          Real* to = f_.grad_weight + ((g * 3 + gate) * p_.H + unit + i) * p_.H + tile * W;
          store_n(to, first ? sums[0] : load_n(to, lanes) + sums[0], lanes);
        }));
  }

  const NormBackward<Real>& f_;
  const Problem<Real>& p_;
  const NormChunk<Real>& c_;
  const int64_t unit_blocks_;
  Real* state_ = nullptr;
  Real* block_;
};

}  // namespace
}  // namespace GRU_FAST_ISA
}  // namespace gru_fast
