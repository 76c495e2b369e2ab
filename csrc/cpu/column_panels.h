// SPDX-License-Identifier: Apache-2.0
// Weights as the right-hand operand of D W, the product of the gradients: packed by columns, gate
// after gate in the order of the slots of D. Where panels are used once, few rows of D are
// multiplied by the weights where they lie, and for many these are packed some tiles at a time.
#pragma once
#include "in_place.h"
#include "share.h"

namespace gru_fast {
namespace GRU_FAST_ISA {
namespace {

template <class Real>
struct ColumnPanels {
  static constexpr int W = kLanes<Real>;

  Groups<const Real> weight;  // rows of `columns`
  int64_t gate_rows, H, units, columns;
  int order[3];      // the gate that belongs to each slot
  int64_t slots;     // of D, `units` columns each
  Real* packed;      // (G, tiles) panels, or null: on the fly, for panels that are used once
  Real* on_the_fly;  // of this member

  GRU_MEMBER int64_t tiles() const { return tiles_of<Real>(columns); }
  GRU_MEMBER int64_t K() const { return slots * units; }
  GRU_MEMBER int64_t panel_size() const { return K() * W; }

  // Takes memory for the panels of G groups, or of what one member needs at a time.
  GRU_MEMBER void take(int64_t G, bool once, Layout& layout, int threads, int member) {
    packed = once ? nullptr : layout.template take<Real>(G * tiles() * panel_size());
    const int64_t own = kMostTilesAbreast * panel_size();
    on_the_fly = once ? layout.template take<Real>(threads * own) + member * own : nullptr;
  }

  // This member's part of all panels.
  GRU_MEMBER void pack(int64_t G, int members, int member) const {
    if (packed == nullptr) return;
    const Range part = part_of(G * tiles(), member, members);
    for (int64_t i = part.begin; i < part.end;) {
      const int64_t tile = i % tiles();
      int64_t count = part.end - i < kMostTilesAbreast ? part.end - i : int64_t{kMostTilesAbreast};
      count = tiles() - tile < count ? tiles() - tile : count;
      pack_tiles(i / tiles(), tile, count, packed + i * panel_size());
      i += count;
    }
  }

  GRU_MEMBER void pack_tiles(int64_t g, int64_t tile, int64_t count, Real* to) const {
    for (int64_t slot = 0; slot < slots; ++slot) {
      pack_columns(block(g, slot), H, columns, tile, count, units, to + slot * units * W,
                   panel_size());
    }
  }

  // Multiplies rows by the tiles of a group: see sweep() in tile.h.
  template <class Epilogue>
  GRU_MEMBER void multiply(Operand<Real> a, int64_t rows, int64_t g, Range range, bool backwards,
                           Epilogue epilogue) const {
    if (packed == nullptr && rows <= kMaxRowsByColumns) {
      // A tile that ends beyond the rows of the weights has no register to be read into.
      const int64_t whole = columns / W < range.end ? columns / W : range.end;
      const Real* blocks[3];
      for (int64_t slot = 0; slot < slots; ++slot) blocks[slot] = block(g, slot);
      sweep_by_columns<Real>(a, rows, blocks, slots, {H, units, columns}, range.begin, whole,
                             epilogue);
      range.begin = whole > range.begin ? whole : range.begin;
    }
    sweep<Real>(
        a, rows, K(), 1, range.begin, range.end, backwards,
        [&](int64_t tile, int count) { return get(g, tile, count); }, epilogue);
  }

 private:
  GRU_MEMBER const Real* block(int64_t g, int64_t slot) const {
    return weight[g] + order[slot] * gate_rows * columns;
  }
  GRU_MEMBER const Real* get(int64_t g, int64_t tile, int count) const {
    if (packed != nullptr) return packed + (g * tiles() + tile) * panel_size();
    pack_tiles(g, tile, count, on_the_fly);
    return on_the_fly;
  }
};

}  // namespace
}  // namespace GRU_FAST_ISA
}  // namespace gru_fast
