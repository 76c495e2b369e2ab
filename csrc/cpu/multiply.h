// SPDX-License-Identifier: Apache-2.0
// Rows times packed weights, with an epilogue: the loop over tiles and blocks of rows.
#pragma once
#include "dot_wide.h"
#include "share.h"

namespace gru_fast {
namespace GRU_FAST_ISA {
namespace {

// Multiplies `rows` rows by the tiles of a range, of COUNT gates each; epilogue(items, values) gets
// the sums of several rows or tiles at once. Tiles are the outer loop: a panel is read once from
// afar. A caller that multiplies by the same weights again and again goes backwards every other
// time: what was read last is still in the cache, where another round would push it out before it
// is reached. `wide` has room for the rows.
template <Weights P, int COUNT, class Epilogue>
GRU_INLINE void multiply(const Panels& panels, const uint32_t* a, int64_t row_stride, int64_t rows,
                         Range range, bool backwards, const WideRoom<P>& wide, Epilogue epilogue) {
  constexpr int W = kLanes<float>;
  Sum<P> sums[kMaxTileVectors];
  const bool widened = kWidens<P> && pays_to_widen(rows);
  if constexpr (kWidens<P>) {
    if (widened) widen_rows(a, row_stride, rows, panels.K, wide);
  }
  const int64_t total = range.end - range.begin;
  const int most = most_abreast<P>(rows_in_block(rows), COUNT);
  const int64_t calls = (total + most - 1) / most;
  for (int64_t call = 0; call < calls; ++call) {
    const int64_t at = backwards ? calls - 1 - call : call;
    const int64_t tile = range.begin + at * total / calls;
    const int tiles = static_cast<int>(range.begin + (at + 1) * total / calls - tile);
    const uint32_t* words = panels.words + tile * panels.K * COUNT * W;
    if constexpr (kWidens<P>) {
      if (widened) widen_weights<P, COUNT>(words, tiles * panels.K, wide.weights);
    }
    for (int64_t row = 0; row < rows;) {
      const int block = rows_in_block(rows - row);
      if constexpr (kWidens<P>) {
        if (widened) {
          pick_wide<COUNT>(block, tiles)(wide.rows + row * wide.row_stride, wide.row_stride,
                                         wide.weights, Dot<P>::kPack * panels.K, sums);
        }
      }
      if (!widened) {
        pick_dot<P, COUNT>(block, tiles)(a + row * row_stride, row_stride, words, panels.K, sums);
      }
      if (block >= 4) {
        for (int j = 0; j < tiles; ++j) {
          finish_all<P, kItems, COUNT>(panels, sums + j * COUNT, tiles * COUNT, block,
                                       {row, tile + j, 1, 0}, epilogue);
        }
      } else {
        for (int i = 0; i < block; ++i) {
          finish_all<P, kItems, COUNT>(panels, sums + i * tiles * COUNT, COUNT, tiles,
                                       {row + i, tile, 0, 1}, epilogue);
        }
      }
      row += block;
    }
  }
}

}  // namespace
}  // namespace GRU_FAST_ISA
}  // namespace gru_fast
