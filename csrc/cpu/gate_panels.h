// SPDX-License-Identifier: Apache-2.0
// A layer's weights as the products of the forward scan read them: packed by the call, on the fly
// where each panel is used once, or packed for many calls before.
#pragma once
#include <type_traits>

#include "dot.h"
#include "in_place.h"
#include "share.h"
#include "widen.h"

namespace gru_fast {
namespace GRU_FAST_ISA {
namespace {

template <class Real>
constexpr Weights weights_of() {
  return std::is_same_v<Real, BFloat16> ? Weights::kBFloat16 : Weights::kFloat32;
}

// The weights of some gates of all groups. Where they are not packed, few rows are taken to where
// they lie, and for many they are packed tile by tile.
template <class Real>
struct GatePanels {
  int64_t gate_rows, H, K, tiles;
  int count;
  StoredWeight<Real> weight;  // rows of K, from the first of the gates on
  Real* on_the_fly;           // of this member
  Groups<const Real> packed;  // panels of `tiles` tiles, or null: on the fly
  Real* own;                  // where this call packs those of all groups, or null
  Real* widened = nullptr;    // of this member, with room for widened_size() if weights are narrow

  static GRU_MEMBER int64_t widened_size(int64_t K) { return kLanes<Real> * widened_stride(K); }
  GRU_MEMBER int64_t panel_size() const { return packed_k<Real>(K) * count * kLanes<Real>; }
  GRU_MEMBER int64_t size() const { return tiles * panel_size(); }  // of a group
  // Takes memory for the panels of G groups, to be packed by the call.
  GRU_MEMBER void take(int64_t G, Layout& layout) {
    own = layout.template take<Real>(G * size());
    packed = {own, size()};
  }
  GRU_MEMBER const Real* get(int64_t g, int64_t tile, int abreast) const {
    if (packed) return packed[g] + tile * panel_size();
    for (int i = 0; i < abreast; ++i) pack_tile(g, tile + i, on_the_fly + i * panel_size());
    return on_the_fly;
  }
  // Multiplies rows by the tiles of a group: see sweep() in tile.h.
  template <class Epilogue>
  GRU_MEMBER void multiply(Operand<Real> a, int64_t rows, int64_t g, Range range, bool backwards,
                           Epilogue epilogue) const {
    if (!packed && rows <= kMaxRowsInPlace) {
      const bool narrow = weight.is_narrow();
      const int64_t bytes = narrow ? sizeof(uint16_t) : sizeof(Real);
      const char* const first = narrow ? reinterpret_cast<const char*>(weight.narrow[g])
                                       : reinterpret_cast<const char*>(weight.own[g]);
      const Pace pace = pace_of<Real>(weight.number, rows, count * H, K * bytes);
      sweep_in_place<Real>(
          a, rows, {K, K, weight.number, pace}, count, range.begin, range.end,
          [&](int64_t tile, int v) { return first + (v * gate_rows + tile * W) * K * bytes; },
          [&](int64_t tile) { return lanes_of<Real>(tile, H); }, epilogue);
      return;
    }
    sweep<Real>(
        a, rows, K, count, range.begin, range.end, backwards,
        [&](int64_t tile, int abreast) { return get(g, tile, abreast); }, epilogue);
  }
  // Of one group, packed, as the products of the samplers have them.
  GRU_MEMBER Panels panels(int64_t g) const {
    return {reinterpret_cast<uint32_t*>(const_cast<Real*>(packed[g])),  // read only
            nullptr,
            nullptr,
            packed_k<Real>(K) / kPack<Real>,
            tiles,
            count};
  }
  // Packs some of the G * tiles panels, if this call has to.
  GRU_MEMBER void pack(Range range) const {
    if (own == nullptr) return;
    for (int64_t i = range.begin; i < range.end; ++i) {
      pack_tile(i / tiles, i % tiles, own + i * panel_size());
    }
  }

 private:
  static constexpr int W = kLanes<Real>;

  // From one widened row to the next: rows a power of two apart would share a few sets of the first
  // cache.
  static GRU_MEMBER int64_t widened_stride(int64_t K) { return round_up(K, kUnitPad) + kUnitPad; }

  GRU_MEMBER void pack_tile(int64_t g, int64_t tile, Real* panel) const {
    if (!weight.is_narrow()) {
      pack_gates(weight.own[g], gate_rows, H, K, count, tile, panel);
      return;
    }
    if constexpr (std::is_same_v<Real, float>) {
      const int64_t stride = widened_stride(K);
      const int n = lanes_of<Real>(tile, H);
      for (int gate = 0; gate < count; ++gate) {
        const uint16_t* const rows = weight.narrow[g] + (gate * gate_rows + tile * W) * K;
        for (int row = 0; row < n; ++row) {
          widen(weight.number, rows + row * K, widened + row * stride, K);
        }
        pack_gate(widened, stride, n, K, count, gate, panel);
      }
    }
  }
};

// The panels of weight_ih, or of weight_hh: for each of the heads those of the first product, then
// those of the second.
template <class Real>
int64_t packed_weight_size(const PackedWeight& w) {
  return w.heads * tiles_of<Real>(w.H) * gate_count(w.cell) * packed_k<Real>(w.K) * kLanes<Real>;
}
template <class Real>
void pack_weight(const PackedWeight& w, const Real* weight, Real* to) {
  const int64_t tiles = tiles_of<Real>(w.H), gate_rows = w.heads * w.H;
  const int first = w.recurrent ? first_gates(w.cell) : gate_count(w.cell);
  auto pack = [&](int64_t head, int gate, int count) {
    const auto rows = Groups<const Real>::of_one(weight + (gate * gate_rows + head * w.H) * w.K);
    const GatePanels<Real> panels{gate_rows, w.H, w.K, tiles, count, rows, nullptr, {}, to};
    panels.pack({0, tiles});
    to += panels.size();
  };
  for (int64_t head = 0; head < w.heads; ++head) {
    pack(head, 0, first);
    if (first < gate_count(w.cell)) pack(head, first, 1);
  }
}

}  // namespace
}  // namespace GRU_FAST_ISA
}  // namespace gru_fast
