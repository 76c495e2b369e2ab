// SPDX-License-Identifier: Apache-2.0
// The order of the steps, which rows are held or reset at a step, and who computes what.
#pragma once
#include "panels.h"
#include "problem.h"

namespace gru_fast {
namespace GRU_FAST_ISA {
namespace {

template <class Real>
GRU_INLINE Vec<Real> load_or_zero(const Real* p, int64_t offset, int n) {
  return p ? load_n(p + offset, n) : Vec<Real>{};
}

// Which rows are valid at a step (`alive`), and the state p that each of them starts from.
template <class Real>
struct Schedule {
  const Problem<Real>& p;

  GRU_MEMBER int64_t time(int64_t g, int64_t step) const {
    return p.reverse[g] ? p.T - 1 - step : step;
  }
  GRU_MEMBER int64_t length(int64_t b) const { return p.lengths ? p.lengths[b] : p.T; }
  // Rows are computed by rank, the longest first: those alive at a time are the first ranks, and
  // the others cost nothing.
  GRU_MEMBER int64_t row(int64_t rank) const { return p.order ? p.order[rank] : rank; }
  GRU_MEMBER int64_t alive(int64_t t) const {
    return p.order ? p.alive_before[t + 1] - p.alive_before[t] : p.B;
  }
  GRU_MEMBER int64_t alive_at(int64_t g, int64_t step) const { return alive(time(g, step)); }
  // How many (step, row) pairs of these steps are not padding.
  GRU_MEMBER int64_t alive(int64_t g, int64_t begin, int64_t end) const {
    if (p.order == nullptr) return (end - begin) * p.B;
    return p.reverse[g] ? p.alive_before[p.T - begin] - p.alive_before[p.T - end]
                        : p.alive_before[end] - p.alive_before[begin];
  }
  GRU_MEMBER int64_t first_step(int64_t g, int64_t b) const {
    return p.reverse[g] ? p.T - length(b) : 0;
  }
  GRU_MEMBER bool last(int64_t g, int64_t t, int64_t b) const {
    return p.reverse[g] ? t == 0 : t + 1 == length(b);
  }
  // A valid step before which the state is replaced.
  GRU_MEMBER bool reset(int64_t g, int64_t t, int64_t b) const {
    const uint8_t* const mask = resets(g, t);
    return mask != nullptr && mask[b] != 0 && (p.reverse[g] ? t + 1 : t) < length(b);
  }
  // Of a time, for all b, or null: whether the state is replaced before that step, if the step is
  // valid and, in reverse, not the row's first.
  GRU_MEMBER const uint8_t* resets(int64_t g, int64_t t) const {
    const int64_t from = p.reverse[g] ? t + 1 : t;
    return p.reset_mask == nullptr || from == p.T ? nullptr : p.reset_mask + from * p.B;
  }
  // Whether no row of the group, whatever its length, has a step before or after time t.
  GRU_MEMBER bool begins(int64_t g, int64_t t) const {
    return p.reverse[g] ? t + 1 == p.T : t == 0;
  }
  GRU_MEMBER bool ends(int64_t g, int64_t t) const { return p.reverse[g] ? t == 0 : t + 1 == p.T; }
  GRU_MEMBER const Real* reset_row(int64_t g, int64_t b) const {
    return p.reset_state ? p.reset_state + (g * p.B + b) * p.H : nullptr;
  }
  // The state that a valid step starts from; null means zero.
  GRU_MEMBER const Real* previous(const Real* output, int64_t g, int64_t t, int64_t b) const {
    if (reset(g, t, b)) return reset_row(g, b);
    const bool first = p.reverse[g] ? t + 1 == length(b) : t == 0;
    if (first) return p.h0 + (g * p.B + b) * p.H;
    const int64_t before = p.reverse[g] ? t + 1 : t - 1;
    return output + ((before * p.B + b) * p.G + g) * p.H;
  }
  // Of a tile, scaled as the recurrent product reads it.
  GRU_MEMBER Vec<Real> scaled_previous(const Real* output, int64_t g, int64_t t, int64_t b,
                                       int64_t tile) const {
    constexpr int W = kLanes<Real>;
    const int n = lanes_of<Real>(tile, p.H);
    const Vec<Real> h = load_or_zero(previous(output, g, t, b), tile * W, n);
    return p.h_scale ? h * load_n(p.h_scale + (b * p.G + g) * p.H + tile * W, n) : h;
  }
  GRU_MEMBER const Real* input_row(int64_t g, int64_t t, int64_t b) const {
    return p.x + t * p.x_stride_t + b * p.x_stride_b + g * p.x_stride_g;
  }
};

struct Range {
  int64_t begin, end;
  GRU_MEMBER int64_t size() const { return end - begin; }
};

// Part `index` of `parts` of n items in multiples of `grain`.
GRU_INLINE Range part_of(int64_t n, int64_t index, int64_t parts, int64_t grain = 1) {
  const int64_t grains = (n + grain - 1) / grain;
  const int64_t begin = grains * index / parts * grain;
  const int64_t end = grains * (index + 1) / parts * grain;
  return {begin < n ? begin : n, end < n ? end : n};
}

// Ranks first, first + stride, ... below end.
struct Ranks {
  int64_t first, stride, end;
  GRU_MEMBER int64_t operator[](int64_t i) const { return first + i * stride; }
  // How many of them lie below a limit.
  GRU_MEMBER int64_t below(int64_t limit) const {
    limit = limit < end ? limit : end;
    return limit > first ? (limit - first + stride - 1) / stride : 0;
  }
};

// One member's share of the recurrence. When hidden units are split, every member has to wait for
// the others after each step.
struct Share {
  Range groups;
  Ranks ranks;
  Range tiles;
  bool waits;

  // Calls body(g, rank, tile) for its tiles of the first `count` ranks.
  template <class Body>
  GRU_MEMBER void each_tile(int64_t count, Body body) const {
    for (int64_t g = groups.begin; g < groups.end; ++g) {
      for (int64_t i = 0; i < ranks.below(count); ++i) {
        for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) body(g, ranks[i], tile);
      }
    }
  }
};

// Cuts groups x batch x unit tiles into a grid of members: the cheapest grid, where a row costs its
// products, few rows cost as much as kFewRows (they wait for the weights), and a barrier costs each
// member kBarrierCost products of one tile with one k for each that has to come. A single step
// (`once`) has hardly a barrier, and every member packs the weights of its tiles, which costs as
// much as kPackedRows. Ranks that die one after the other (`dealt`) are dealt out, others cut into
// blocks.
GRU_INLINE Share share_of(int member, int members, int64_t G, int64_t B, int64_t tiles, int64_t H,
                          bool once, bool dealt) {
  constexpr int64_t kFewRows = 3;
  constexpr int64_t kPackedRows = 12;
  constexpr int64_t kBarrierCost = 200;
  int best_groups = 1, best_batch = 1, best_tiles = 1;
  int64_t best = -1;
  for (int by_group = 1; by_group <= members && by_group <= G; ++by_group) {
    for (int by_batch = 1; by_group * by_batch <= members && by_batch <= B; ++by_batch) {
      int64_t by_tile = members / (by_group * by_batch);
      by_tile = by_tile < tiles ? by_tile : tiles;
      int64_t rows = (B + by_batch - 1) / by_batch;
      rows = (rows > kFewRows ? rows : kFewRows) + (once ? kPackedRows : 0);
      const int64_t cost =
          ((G + by_group - 1) / by_group) * rows * ((tiles + by_tile - 1) / by_tile) * H +
          (by_tile > 1 && !once ? kBarrierCost * by_group * by_batch * by_tile : 0);
      if (best < 0 || cost < best) {
        best = cost;
        best_groups = by_group;
        best_batch = by_batch;
        best_tiles = static_cast<int>(by_tile);
      }
    }
  }
  const int used = best_groups * best_batch * best_tiles;
  if (member >= used) return {{0, 0}, {0, 1, 0}, {0, 0}, best_tiles > 1};
  const int part = member / best_tiles % best_batch;
  const Range block = part_of(B, part, best_batch, B >= 8 * best_batch ? 4 : 1);
  return {part_of(G, member / (best_batch * best_tiles), best_groups),
          dealt ? Ranks{part, best_batch, B} : Ranks{block.begin, 1, block.end},
          part_of(tiles, member % best_tiles, best_tiles), best_tiles > 1};
}

}  // namespace
}  // namespace GRU_FAST_ISA
}  // namespace gru_fast
