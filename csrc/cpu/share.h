// SPDX-License-Identifier: Apache-2.0
// Who computes what, and where the rows of each member lie.
#pragma once
#include "vec.h"

namespace gru_fast {
namespace GRU_FAST_ISA {
namespace {

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
  int part;        // of the batch
  int64_t before;  // ranks of the parts before it

  // Calls body(g, i, tile) for its tiles of those of its ranks that lie below `count`.
  template <class Body>
  GRU_MEMBER void each_tile(int64_t count, Body body) const {
    for (int64_t g = groups.begin; g < groups.end; ++g) {
      for (int64_t i = 0; i < ranks.below(count); ++i) {
        for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) body(g, i, tile);
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
  if (member >= used) return {{0, 0}, {0, 1, 0}, {0, 0}, best_tiles > 1, 0, 0};
  const int part = member / best_tiles % best_batch;
  const Range block = part_of(B, part, best_batch);
  const int64_t longer = B % best_batch;  // parts that have one rank more
  return {part_of(G, member / (best_batch * best_tiles), best_groups),
          dealt ? Ranks{part, best_batch, B} : Ranks{block.begin, 1, block.end},
          part_of(tiles, member % best_tiles, best_tiles),
          best_tiles > 1,
          part,
          dealt ? B / best_batch * part + (part < longer ? part : longer) : block.begin};
}

// How rows lie in scratch memory: those of a part of the batch together, a page from those of the
// next. Hardware prefetchers read on beyond what a member reads or writes: lines that another
// member is about to write would go from core to core and back.
struct RowsApart {
  static constexpr int64_t kPage = 4096;

  int64_t group = 0;  // rows from one group to the next

  // For at most `threads` members that share the ranks; rows have so many bytes.
  GRU_MEMBER RowsApart(int threads, int64_t ranks, int64_t rows_of_rank, int64_t bytes)
      : rows_(rows_of_rank), gap_((kPage + bytes - 1) / bytes) {
    const int64_t parts = threads < ranks ? threads : ranks;
    group = ranks * rows_ + (parts > 1 ? parts * gap_ : 0);
  }
  // Where the rows of a member begin.
  GRU_MEMBER int64_t first(const Share& share) const {
    return share.before * rows_ + share.part * gap_;
  }

 private:
  int64_t rows_, gap_;
};

}  // namespace
}  // namespace GRU_FAST_ISA
}  // namespace gru_fast
