// SPDX-License-Identifier: Apache-2.0
// What the steps of the forward scan read and write besides weights: where a row and tile find
// their numbers, and what becomes of a new state.
#pragma once
#include <type_traits>

#include "gate_panels.h"
#include "schedule.h"

namespace gru_fast {
namespace GRU_FAST_ISA {
namespace {

// The results of the call and the scratch memory that members share; each numbers its rows from 0.
// States are there twice, of the step at hand and of the next; `operand` is what products read of
// them.
template <class Real>
struct ForwardMemory {
  static constexpr int W = kLanes<Real>;
  using V = Vec<Real>;
  using Number = Compute<Real>;

  // `chunk` steps are projected together.
  ForwardMemory(const Forward<Real>& call, int64_t chunk, int threads)
      : f(call),
        p(call.in),
        rows{call.in},
        gates(gate_count(p.cell)),
        slots(slot_count(p.cell)),
        tiles(tiles_of<Real>(p.H)),
        ld(round_up(p.H, kUnitPad) + kUnitPad),
        chunk(chunk),
        states_(threads, p.B, 1, ld * static_cast<int64_t>(sizeof(Real))),
        inputs_(threads, p.B, chunk, input_row() * static_cast<int64_t>(sizeof(Number))) {}

  void take(Layout& layout) {
    const int64_t states = p.G * states_.group * ld;
    state = layout.take<Number>(2 * states);
    if constexpr (std::is_same_v<Real, Number>) operand = state;
    if (multiplies_copy()) operand = layout.take<Real>(2 * states);
    if (has_second_product(p.cell)) {
      gated = layout.take<Real>(states);
      update = layout.take<Number>(states);
    }
    projected = layout.take<Number>(p.G * inputs_.group * input_row());
  }
  void settle(const Share& share) {
    own = share.ranks.below(p.B);
    first_ = states_.first(share);
    first_input_ = inputs_.first(share);
  }

  const Forward<Real>& f;
  const Problem<Real>& p;
  const Schedule<Real> rows;
  const int gates, slots;
  const int64_t tiles, ld, chunk;  // ld: of a row
  int64_t own = 0;                 // rows of this member
  Number *state = nullptr, *update = nullptr, *projected = nullptr;
  Real *operand = nullptr, *gated = nullptr;

  // Whether the product reads a copy of the state: scaled, or rounded.
  GRU_MEMBER bool multiplies_copy() const { return kPack<Real> > 1 || p.h_scale != nullptr; }

  GRU_MEMBER int64_t at(int64_t g, int64_t row, int64_t tile) const {
    return (g * states_.group + first_ + row) * ld + tile * W;
  }
  GRU_MEMBER int64_t at(int64_t step, int64_t g, int64_t row, int64_t tile) const {
    return (step % 2 * p.G * states_.group) * ld + at(g, row, tile);
  }
  // What the input and the biases add to the gates of a row of the chunk.
  GRU_MEMBER Number* gates_x(int64_t g, int64_t row, int64_t tile) const {
    return projected + (g * inputs_.group + first_input_ + row) * input_row() + tile * gates * W;
  }
  GRU_MEMBER int64_t input_row() const { return tiles * gates * W; }
  // Of time t and row b: in units of H.
  GRU_MEMBER int64_t place(int64_t t, int64_t b, int64_t g) const {
    return (rows.start(t) + b) * p.G + g;
  }

  // Makes h, unless it is reset, the state p that `step` starts from, and its s of equation (1).
  GRU_MEMBER void enter(int64_t step, int64_t g, int64_t row, int64_t b, int64_t tile, V h) const {
    const int n = lanes_of<Real>(tile, p.H);
    const int64_t t = rows.time(g, step);
    if (rows.reset(g, t, b)) h = load_or_zero(rows.reset_row(g, b), tile * W, n);
    store(state + at(step, g, row, tile), h);
    if (p.h_scale != nullptr) h = scaled(h, p.h_scale + (b * p.G + g) * p.H + tile * W, n);
    if (multiplies_copy()) store_operand(operand + at(step, g, row, tile), h, n);
  }

  // As the backward pass will read it.
  GRU_MEMBER static V scaled(V h, const Real* scale, int n) {
    return as_stored<Real>(h) * load_n(scale, n);
  }

  // The last word of an odd H reaches a lane further. Its weight is zero, which is no use against
  // the NaN that padding becomes where an input is infinite.
  GRU_MEMBER static void store_operand(Real* to, V h, int n) {
    if constexpr (kPack<Real> > 1) h = first_lanes<Real>(h, n);
    store(to, h);
  }

 private:
  const RowsApart states_, inputs_;
  int64_t first_ = 0, first_input_ = 0;
};

// One step of a group. What lies where is worked out once for all rows and tiles: compilers, who
// have to assume that a vector that is stored changes any member, would do it anew for each, which
// takes as long as the gates. PLAIN: no lengths, resets or scales.
template <class Real, bool PLAIN>
class StepRows {
 public:
  static constexpr int W = kLanes<Real>;
  using V = Vec<Real>;
  using Number = Compute<Real>;

  GRU_MEMBER StepRows(const ForwardMemory<Real>& m, const Ranks& ranks, int64_t g, int64_t step,
                      int64_t in_chunk) {
    const Problem<Real>& p = m.p;
    const int64_t t = m.rows.time(g, step), start = m.place(t, 0, g);
    ranks_ = ranks;
    // Those of other calls are dealt out.
    if (PLAIN) ranks_.stride = 1;
    H_ = p.H;
    ld_ = m.ld;
    gates_x_ = m.gates_x(g, in_chunk * m.own, 0);
    gates_x_row_ = m.input_row();
    gates_ = m.gates;
    state_ = m.state + m.at(step, g, 0, 0);
    next_ = m.state + m.at(step + 1, g, 0, 0);
    operand_ = m.operand + m.at(step, g, 0, 0);
    next_operand_ = m.multiplies_copy() ? m.operand + m.at(step + 1, g, 0, 0) : nullptr;
    if (has_second_product(p.cell)) {
      gated_ = m.gated + m.at(g, 0, 0);
      update_ = m.update + m.at(g, 0, 0);
    }
    output_ = m.f.output + start * H_;
    output_row_ = p.G * H_;
    saved_ = m.f.workspace == nullptr ? nullptr : m.f.workspace + start * m.slots * H_;
    saved_row_ = output_row_ * m.slots;
    h_n_ = m.f.h_n + p.layout.state(g, 0);
    h_n_row_ = p.layout.state_row;
    last_ = m.rows.ends(g, t);
    if constexpr (PLAIN) return;
    order_ = p.order;
    lengths_ = p.reverse[g] ? nullptr : p.lengths;
    after_ = t + 1;
    reset_ = last_ ? nullptr : m.rows.resets(g, m.rows.time(g, step + 1));
    reset_state_ = m.rows.reset_row(g, 0);
    h_scale_ = p.h_scale == nullptr ? nullptr : p.h_scale + g * H_;
  }

  GRU_MEMBER const Number* gates_x(int64_t row, int64_t tile) const {
    return gates_x_ + row * gates_x_row_ + tile * gates_ * W;
  }

  GRU_MEMBER void save(int64_t row, int64_t tile, int slot, V value) const {
    if (saved_ == nullptr) return;
    Real* const to = saved_ + row_of(ranks_[row]) * saved_row_ + slot * H_ + tile * W;
    store_n(to, value, lanes_of<Real>(tile, H_));
  }

  // reset_after: all that follows the gates.
  GRU_MEMBER void leave(int64_t row, int64_t tile, V q, V r, V z, V n) const {
    save(row, tile, 0, q);
    save(row, tile, 1, r);
    save(row, tile, 2, z);
    save(row, tile, 3, n);
    finish(row, tile, z, n);
  }

  // reset_before: what the candidate's product reads, and z for after it.
  GRU_MEMBER void gate(int64_t row, int64_t tile, V r, V z) const {
    const int64_t at = row * ld_ + tile * W;
    store(gated_ + at, r * load(operand_ + at));
    store(update_ + at, z);
  }
  GRU_MEMBER V update(int64_t row, int64_t tile) const {
    return load(update_ + row * ld_ + tile * W);
  }

  // Equation (6): the new state of a row and tile, where it goes, and what the next step starts
  // from, as ForwardMemory::enter() has it.
  GRU_MEMBER void finish(int64_t row, int64_t tile, V z, V n) const {
    const int lanes = lanes_of<Real>(tile, H_);
    const int64_t b = row_of(ranks_[row]), at = row * ld_ + tile * W;
    const V previous = load(state_ + at);
    V h = n + z * (previous - n);
    store_n(output_ + b * output_row_ + tile * W, h, lanes);
    if (last_ || (!PLAIN && lengths_ != nullptr && lengths_[b] == after_)) {
      store_n(h_n_ + b * h_n_row_ + tile * W, h, lanes);
      return;
    }
    if (!PLAIN && reset_ != nullptr && reset_[b] != 0) {
      h = load_or_zero(reset_state_, b * H_ + tile * W, lanes);
    }
    store(next_ + at, h);
    if (kPack<Real> == 1 && (PLAIN || next_operand_ == nullptr)) return;
    if (!PLAIN && h_scale_ != nullptr) {
      h = ForwardMemory<Real>::scaled(h, h_scale_ + b * output_row_ + tile * W, lanes);
    }
    ForwardMemory<Real>::store_operand(next_operand_ + at, h, lanes);
  }

 private:
  GRU_MEMBER int64_t row_of(int64_t rank) const {
    return !PLAIN && order_ != nullptr ? order_[rank] : rank;
  }

  Ranks ranks_;
  const int64_t *order_, *lengths_;
  const uint8_t* reset_;
  const Number *gates_x_, *state_;
  const Real *operand_, *reset_state_, *h_scale_;
  Number *next_, *update_ = nullptr;
  Real *next_operand_, *gated_ = nullptr, *output_, *saved_, *h_n_;
  int64_t H_, ld_, gates_x_row_, output_row_, saved_row_, h_n_row_, after_;
  int gates_;
  bool last_;
};

}  // namespace
}  // namespace GRU_FAST_ISA
}  // namespace gru_fast
