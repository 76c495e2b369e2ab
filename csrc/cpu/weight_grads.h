// SPDX-License-Identifier: Apache-2.0
// From D of a chunk, equations (15) and (16): the gradients of the input (D W_ih), of the weights
// (D^T x, D^T s) and of the biases (column sums). Rows are added in the order of the scan's chunks,
// whatever the threads.
#pragma once
#include "chunk.h"
#include "column_panels.h"
#include "team.h"
#include "tile.h"

namespace gru_fast {
namespace GRU_FAST_ISA {
namespace {

// A gradient that chunks add to: in the result itself, or, where that would round each sum, in
// memory of its own until the last chunk.
template <class Real>
struct ChunkSum {
  Groups<Real> result;
  Groups<Compute<Real>> so_far;

  // Of `gates` gates with rows of `columns`.
  GRU_MEMBER ChunkSum(Groups<Real> to, const Problem<Real>& p, int64_t gates, int64_t columns,
                      bool one_chunk, Layout& layout)
      : result(to) {
    if constexpr (std::is_same_v<Real, Compute<Real>>) {
      so_far = to;
    } else if (to && !one_chunk) {
      const int64_t rows = p.layout.gate_rows == p.H ? gates * p.H : p.H;
      so_far = {layout.template take<Compute<Real>>(p.G * gates * p.H * columns), rows * columns};
    }
  }
  GRU_MEMBER void add(int64_t g, int64_t at, Vec<Real> sum, int lanes, bool first,
                      bool last) const {
    if (!first) sum += load_n(so_far[g] + at, lanes);
    if (last) {
      store_n(result[g] + at, sum, lanes);
    } else {
      store_n(so_far[g] + at, sum, lanes);
    }
  }
};

constexpr int64_t kOuterRows = 2;  // that outer_product() adds at most
static_assert(kOuterRows <= kGradSumBlock<float>);

// As sweep() with one vector a tile, for so few k that nothing is gained by many sums at a time:
// the results are written row after row, add(row, column, sum, lanes).
template <int WORDS, class Real, class Add>
GRU_INLINE void outer_product(Operand<Real> operand, int64_t rows, const Real* panels,
                              int64_t columns, Add add) {
  constexpr int W = kLanes<Real>;
  const int64_t whole = columns / W;
  for (int64_t i = 0; i < rows; ++i) {
    decltype(word_at(operand.a)) words[WORDS];
    for (int k = 0; k < WORDS; ++k) {
      words[k] = word_at(operand.a + i * operand.row_stride + k * operand.word_stride);
    }
    auto at = [&](int64_t tile, int lanes) GRU_MEMBER_LAMBDA {
      Vec<Real> sum{};
#pragma GCC unroll 2
      for (int k = 0; k < WORDS; ++k) {
        const Real* panel = panels + (tile * WORDS + k) * kPack<Real> * W;
        multiply_add<Real>(sum, load_words(panel), words[k]);
      }
      add(i, tile * W, sum, lanes);
    };
    for (int64_t tile = 0; tile < whole; ++tile) at(tile, W);
    if (columns > whole * W) at(whole, static_cast<int>(columns - whole * W));
  }
}

template <class Real>
class WeightGrads {
 public:
  static constexpr int W = kLanes<Real>;
  using V = Vec<Real>;
  using Number = Compute<Real>;
  static constexpr int P = kPack<Real>;

  WeightGrads(const Backward<Real>& f, const Chunk<Real>& chunk, Layout& layout, int threads,
              int member)
      : f_(f),
        p_(f.in),
        c_(chunk),
        input_tiles_(tiles_of<Real>(p_.I)),
        input_slot_(p_.cell == Cell::kResetAfter ? 1 : 0),
        unit_blocks_((p_.H + kRowBlock - 1) / kRowBlock),
        weight_ih_(f.grad_weight_ih, p_, c_.gates, p_.I, c_.only(), layout),
        weight_hh_(f.grad_weight_hh, p_, c_.gates, p_.H, c_.only(), layout),
        bias_ih_(f.grad_bias_ih, p_, c_.gates, 1, c_.only(), layout),
        bias_hh_(f.grad_bias_hh, p_, c_.gates, 1, c_.only(), layout) {
    const int64_t rows = packed_k<Real>(c_.capacity);
    auto take = [&](bool wanted, int64_t count) {
      return wanted ? layout.template take<Real>(count) : nullptr;
    };
    if (wants_grad_x() && p_.weight_ih) {
      input_panels_ = {
          p_.weight_ih.own, p_.layout.gate_rows, p_.H, c_.units, p_.I, {0, 1, 2}, c_.gates, nullptr,
          nullptr};
      input_panels_.take(p_.G, c_.only(), layout, threads, member);
    }
    x_ = take(bool(f.grad_weight_ih), input_tiles_ * rows * W);
    state_ = take(bool(f.grad_weight_hh), c_.tiles * rows * W);
    gated_ = take(f.grad_weight_hh && has_second_product(p_.cell), c_.tiles * rows * W);
    block_ = layout.template take<Real>(threads * rows * kRowBlock) + member * rows * kRowBlock;
  }

  // Packs W_ih by columns, in the order of the input slots of D, and clears what padding gets.
  void pack(int members, int member) const {
    clear_padding(part_of(p_.B, member, members));
    input_panels_.pack(p_.G, members, member);
  }

  void run(Team& team, int member) const {
    for (int64_t g = 0; g < p_.G; ++g) {
      const Range rows = part_of(c_.row_count(g), member, team.size(), kRowBlock);
      if (input_panels_.on_the_fly == nullptr) {
        input_gradient(g, rows, {0, input_tiles_});
      } else {
        // Each panel is packed by one member.
        input_gradient(g, {0, c_.row_count(g)}, part_of(input_tiles_, member, team.size()));
      }
      for (int64_t row = rows.begin; row < rows.end; row += P) pack_rows(g, row);
      team.barrier(member);
      const Range tasks = part_of(c_.slots * unit_blocks_, member, team.size());
      for (int64_t i = tasks.begin; i < tasks.end; ++i) {
        weight_gradient(g, static_cast<int>(i / unit_blocks_), i % unit_blocks_);
      }
      team.barrier(member);
    }
  }

 private:
  bool wants_grad_x() const { return f_.grad_x != nullptr || f_.grad_shared_x != nullptr; }

  void clear_padding(Range batch) const {
    if (f_.grad_x == nullptr || p_.lengths == nullptr || p_.packed) return;
    const int64_t width = !p_.weight_ih ? p_.G * c_.gates * p_.H : p_.x_shared ? p_.I : p_.G * p_.I;
    for (int64_t b = batch.begin; b < batch.end; ++b) {
      for (int64_t t = p_.lengths[b]; t < p_.T; ++t) {
        fill_zero(f_.grad_x + (t * p_.B + b) * width, width);
      }
    }
  }

  void input_gradient(int64_t g, Range rows, Range tiles) const {
    if (!wants_grad_x()) return;
    if (!p_.weight_ih) {
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        Real* to = f_.grad_x + (c_.place(g, row).index * p_.G + g) * c_.gates * p_.H;
        for (int gate = 0; gate < c_.gates; ++gate) {
          std::memcpy(to + gate * p_.H, c_.d(g, row) + (input_slot_ + gate) * c_.units,
                      static_cast<size_t>(p_.H) * sizeof(Real));
        }
      }
      return;
    }
    input_panels_.multiply(
        {c_.d(g, rows.begin) + input_slot_ * c_.units, c_.ld}, rows.size(), g, tiles, false,
        row_by_row<Real>([&](int64_t i, int64_t tile, const V* sums) GRU_MEMBER_LAMBDA {
          const int64_t index = c_.place(g, rows.begin + i).index;
          const int lanes = lanes_of<Real>(tile, p_.I);
          if (f_.grad_shared_x != nullptr) {
            Number* to = f_.grad_shared_x + index * p_.I + tile * W;
            store_n(to, load_n(to, lanes) + sums[0], lanes);
          } else {
            const int64_t at = p_.x_shared ? index : index * p_.G + g;
            store_n(f_.grad_x + at * p_.I + tile * W, sums[0], lanes);
          }
        }));
  }

  // A word of rows of x and of the state as right-hand operands: [tile][word][lanes].
  void pack_rows(int64_t g, int64_t first) const {
    const int64_t rows = c_.row_count(g), padded = packed_k<Real>(rows);
    Place at[P] = {};
    const int count = rows - first < P ? static_cast<int>(rows - first) : P;
    for (int i = 0; i < count; ++i) at[i] = c_.place(g, first + i);
    auto pack = [&](Real* to, int64_t tile, auto value) GRU_MEMBER_LAMBDA {
      V word[P] = {};
      for (int i = 0; i < count; ++i) word[i] = value(i);
      store_rows(to + (tile * padded + first) * W, word);
    };
    if (x_ != nullptr) {
      for (int64_t tile = 0; tile < input_tiles_; ++tile) {
        const int lanes = lanes_of<Real>(tile, p_.I);
        pack(x_, tile, [&](int i) GRU_MEMBER_LAMBDA {
          return load_n(c_.rows.input_row(g, at[i].t, at[i].b) + tile * W, lanes);
        });
      }
    }
    if (state_ == nullptr) return;
    for (int64_t tile = 0; tile < c_.tiles; ++tile) {
      const int lanes = lanes_of<Real>(tile, p_.H);
      auto state = [&](int i)
                       GRU_MEMBER_LAMBDA { return c_.scaled_previous(g, at[i].t, at[i].b, tile); };
      pack(state_, tile, state);
      if (gated_ == nullptr) continue;
      pack(gated_, tile, [&](int i) GRU_MEMBER_LAMBDA {
        return load_n(c_.gate_row(g, first + i, at[i].index) + tile * W, lanes) * state(i);
      });
    }
  }

  // kRowBlock units of one slot: their weight rows and biases.
  void weight_gradient(int64_t g, int slot, int64_t unit_block) const {
    const bool first = c_.end == p_.T, last = c_.begin == 0;
    const int64_t rows = c_.row_count(g), padded = packed_k<Real>(rows);
    const int64_t unit = unit_block * kRowBlock;
    const int valid = p_.H - unit < kRowBlock ? static_cast<int>(p_.H - unit) : kRowBlock;
    double total[kRowBlock] = {};  // many rows, one chain: float alone would lose digits
    for (int64_t row = 0; row < rows; ++row) {
      const Real* from = c_.d(g, row) + slot * c_.units + unit;
      Real* to = block_ + row / P * (kRowBlock * P) + row % P;
      for (int i = 0; i < kRowBlock; ++i) {
        to[i * P] = from[i];
        total[i] += value_of(from[i]);
      }
    }
    if (padded > rows) {
      Real* to = block_ + (padded - P) * kRowBlock + rows % P;
      for (int i = 0; i < kRowBlock; ++i) to[i * P] = Real{};
    }
    const bool after = p_.cell == Cell::kResetAfter;
    const bool input_side = !(after && slot == 0), hidden_side = !(after && slot == 3);
    const int64_t first_row = c_.gate_of(slot) * p_.layout.gate_rows + unit;
    Number sums[W > kRowBlock ? W : kRowBlock] = {};
    for (int i = 0; i < valid; ++i) sums[i] = static_cast<Number>(total[i]);
    for (int i = 0; i < valid; i += W) {
      const int lanes = valid - i < W ? valid - i : W;
      const V sum = load(sums + i);
      if (input_side && bias_ih_.result) bias_ih_.add(g, first_row + i, sum, lanes, first, last);
      if (hidden_side && bias_hh_.result) bias_hh_.add(g, first_row + i, sum, lanes, first, last);
    }
    auto multiply = [&](const Real* panels, int64_t columns, const ChunkSum<Real>& grad) {
      auto add = [&](int64_t i, int64_t column, V sum, int lanes) GRU_MEMBER_LAMBDA {
        grad.add(g, (first_row + i) * columns + column, sum, lanes, first, last);
      };
      const Operand<Real> operand{block_, P, kRowBlock * P, kGradSumBlock<Real>};
      if (padded == P) return outer_product<1>(operand, valid, panels, columns, add);
      if constexpr (P < kOuterRows) {
        if (padded == kOuterRows) return outer_product<2>(operand, valid, panels, columns, add);
      }
      sweep<Real>(
          operand, kRowBlock, padded, 1, 0, tiles_of<Real>(columns), false,
          [&](int64_t tile, int) { return panels + tile * padded * W; },
          row_by_row<Real>([&](int64_t i, int64_t tile, const V* sum) GRU_MEMBER_LAMBDA {
            if (i < valid) add(i, tile * W, *sum, lanes_of<Real>(tile, columns));
          }));
    };
    if (input_side && x_ != nullptr) multiply(x_, p_.I, weight_ih_);
    if (hidden_side && state_ != nullptr) {
      const bool gated = gated_ != nullptr && slot == 2;
      multiply(gated ? gated_ : state_, p_.H, weight_hh_);
    }
  }

  const Backward<Real>& f_;
  const Problem<Real>& p_;
  const Chunk<Real>& c_;
  const int64_t input_tiles_;
  const int input_slot_;
  const int64_t unit_blocks_;
  const ChunkSum<Real> weight_ih_, weight_hh_, bias_ih_, bias_hh_;
  ColumnPanels<Real> input_panels_{};
  Real *x_, *state_, *gated_, *block_;
};

}  // namespace
}  // namespace GRU_FAST_ISA
}  // namespace gru_fast
