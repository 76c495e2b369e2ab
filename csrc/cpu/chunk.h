// SPDX-License-Identifier: Apache-2.0
// What the parts of the backward pass share: the chunk of steps at hand, its gates and its D.
#pragma once
#include "schedule.h"

namespace gru_fast {
namespace GRU_FAST_ISA {
namespace {

constexpr int64_t kChunkRows = 256;

// D holds the gradients of the gate pre-activations, one row for each (step, b) of the chunk and
// one slot of `units` columns for each workspace slot: q, r, z, n | r, z, n | z, n (reference.py).
template <class Real>
struct Chunk {
  static constexpr int W = kLanes<Real>;

  GRU_MEMBER Chunk(const Backward<Real>& f, Layout& layout)
      : f(f),
        p(f.in),
        rows{f.in},
        gates(gate_count(p.cell)),
        slots(slot_count(p.cell)),
        tiles(tiles_of<Real>(p.H)),
        units(round_up(p.H, kUnitPad)),
        ld(slots * units + kUnitPad) {
    steps = p.B >= kChunkRows ? 1 : (kChunkRows + p.B - 1) / p.B;
    steps = steps < p.T ? steps : p.T;
    d_ = layout.take<Real>(p.G * steps * p.B * ld);
    gates_ = f.workspace == nullptr ? layout.take<Real>(p.G * steps * p.B * slots * p.H) : nullptr;
  }

  // Columns of D that no unit writes are read by the products: they must be zero.
  GRU_MEMBER void clear(int members, int member) const {
    const Range part = part_of(p.G * steps * p.B, member, members);
    fill_zero(d_ + part.begin * ld, part.size() * ld);
  }

  GRU_MEMBER int64_t row_count() const { return (end - begin) * p.B; }
  GRU_MEMBER Real* d(int64_t g, int64_t row) const { return d_ + (g * steps * p.B + row) * ld; }
  GRU_MEMBER Real* d(int64_t g, int64_t step, int64_t b, int slot, int64_t tile) const {
    return d(g, (step - begin) * p.B + b) + slot * units + tile * W;
  }
  GRU_MEMBER Real* rebuilt(int64_t g, int64_t row) const {
    return gates_ + (g * steps * p.B + row) * slots * p.H;
  }
  // The slots of one step and row, saved or rebuilt.
  GRU_MEMBER const Real* gate_row(int64_t g, int64_t step, int64_t t, int64_t b) const {
    if (gates_ != nullptr) return rebuilt(g, (step - begin) * p.B + b);
    return f.workspace + ((t * p.B + b) * p.G + g) * slots * p.H;
  }
  GRU_MEMBER const Real* previous(int64_t g, int64_t t, int64_t b) const {
    return rows.previous(f.output, g, t, b);
  }
  GRU_MEMBER Vec<Real> scaled_previous(int64_t g, int64_t t, int64_t b, int64_t tile) const {
    const int n = lanes_of<Real>(tile, p.H);
    const Vec<Real> h = load_or_zero(previous(g, t, b), tile * W, n);
    return p.h_scale ? h * load_n(p.h_scale + (b * p.G + g) * p.H + tile * W, n) : h;
  }
  // The weight row block that a slot's gradient belongs to, input side.
  GRU_MEMBER int gate_of(int slot) const {
    return p.cell == Cell::kResetAfter ? (slot == 0 ? 2 : slot - 1) : slot;
  }
  GRU_MEMBER int reset_slot() const { return p.cell == Cell::kResetAfter ? 1 : 0; }

  const Backward<Real>& f;
  const Problem<Real>& p;
  const Schedule<Real> rows;
  const int gates, slots;
  const int64_t tiles, units, ld;
  int64_t steps;               // of a full chunk
  int64_t begin = 0, end = 0;  // steps of the chunk at hand

 private:
  Real* d_;
  Real* gates_;
};

}  // namespace
}  // namespace GRU_FAST_ISA
}  // namespace gru_fast
