// SPDX-License-Identifier: Apache-2.0
// What the parts of the backward pass share: the chunk of steps at hand, its gates and its D.
#pragma once
#include "schedule.h"

namespace gru_fast {
namespace GRU_FAST_ISA {
namespace {

// A row of what has (T, B) in front: time, row of the batch, and where it lies.
struct Place {
  int64_t t, b, index;
};

// D holds the gradients of the gate pre-activations, one row for each (step, rank) of the chunk
// that is not padding and one slot of `units` columns for each workspace slot: q, r, z, n | r, z, n
// | z, n (reference.py).
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
    steps = steps_of_chunk(p);
    capacity = steps * p.B;
    if (p.order != nullptr) {  // may be fewer in all
      const int64_t every = p.alive_before[p.T] > 1 ? p.alive_before[p.T] : 1;
      capacity = capacity < every ? capacity : every;
    }
    d_ = layout.take<Real>(p.G * capacity * ld);
    gates_ = f.workspace == nullptr ? layout.take<Real>(p.G * capacity * slots * p.H) : nullptr;
    places_ = layout.take<Place>(p.G * capacity);
  }

  // Whether there is no other chunk.
  GRU_MEMBER bool only() const {
    return steps == p.T || (p.order != nullptr && p.alive_before[p.T] <= capacity);
  }

  // Makes it the chunk that ends before a step: as many steps as have room for their rows.
  GRU_MEMBER void end_before(int64_t step) {
    end = step;
    begin = (end - 1) / steps * steps;
    auto has_room = [&](int64_t from) {
      for (int64_t g = 0; g < p.G; ++g) {
        if (rows.alive(g, from, end) > capacity) return false;
      }
      return true;
    };
    while (p.order != nullptr && begin > 0 && has_room(begin - 1)) --begin;
  }

  // Notes where the rows of the chunk lie: part of the work of each member.
  GRU_MEMBER void locate(int members, int member) const {
    for (int64_t g = 0; g < p.G; ++g) {
      const Range part = part_of(row_count(g), member, members);
      int64_t step = begin;
      for (int64_t row = part.begin; row < part.end; ++row) {
        while (first_row(g, step + 1) <= row) ++step;
        const int64_t t = rows.time(g, step), b = rows.row(row - first_row(g, step));
        places_[g * capacity + row] = {t, b, rows.start(t) + b};
      }
    }
  }

  // Columns of D that no unit writes are read by the products: they must be zero.
  GRU_MEMBER void clear(int members, int member) const {
    const Range part = part_of(p.G * capacity, member, members);
    fill_zero(d_ + part.begin * ld, part.size() * ld);
  }

  GRU_MEMBER int64_t first_row(int64_t g, int64_t step) const { return rows.alive(g, begin, step); }
  GRU_MEMBER int64_t row_count(int64_t g) const { return first_row(g, end); }
  GRU_MEMBER Place place(int64_t g, int64_t row) const { return places_[g * capacity + row]; }
  GRU_MEMBER Real* d(int64_t g, int64_t row) const { return d_ + (g * capacity + row) * ld; }
  GRU_MEMBER Real* d(int64_t g, int64_t step, int64_t rank, int slot, int64_t tile) const {
    return d(g, first_row(g, step) + rank) + slot * units + tile * W;
  }
  GRU_MEMBER Real* rebuilt(int64_t g, int64_t row) const {
    return gates_ + (g * capacity + row) * slots * p.H;
  }
  // The slots of a row, saved or rebuilt.
  GRU_MEMBER const Real* gate_row(int64_t g, int64_t row, int64_t index) const {
    if (gates_ != nullptr) return rebuilt(g, row);
    return f.workspace + (index * p.G + g) * slots * p.H;
  }
  GRU_MEMBER const Real* previous(int64_t g, int64_t t, int64_t b) const {
    return rows.previous(f.output, g, t, b);
  }
  GRU_MEMBER Vec<Real> scaled_previous(int64_t g, int64_t t, int64_t b, int64_t tile) const {
    return rows.scaled_previous(f.output, g, t, b, tile);
  }
  // The weight row block that a slot's gradient belongs to, input side.
  GRU_MEMBER int gate_of(int slot) const {
    return p.cell == Cell::kResetAfter ? (slot == 0 ? 2 : slot - 1) : slot;
  }

  const Backward<Real>& f;
  const Problem<Real>& p;
  const Schedule<Real> rows;
  const int gates, slots;
  const int64_t tiles, units, ld;
  int64_t steps, capacity;     // steps of a full chunk without padding, and its rows
  int64_t begin = 0, end = 0;  // steps of the chunk at hand

 private:
  Real* d_;
  Real* gates_;
  Place* places_;  // (G, capacity)
};

}  // namespace
}  // namespace GRU_FAST_ISA
}  // namespace gru_fast
