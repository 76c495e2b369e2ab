// SPDX-License-Identifier: Apache-2.0
// The product of tile.h with weights where they lie: for a single step, which would use a packed
// panel once. Blocks of W x W weights are transposed in registers, so the order of summation is
// that of tile.h, bit for bit.
#pragma once
#include "panels.h"
#include "tile.h"

namespace gru_fast {
namespace GRU_FAST_ISA {
namespace {

// Measured: from 3 rows on, packing a tile once is as fast or faster.
constexpr int64_t kMaxRowsInPlace = 2;

// out[i * stride] = sum_k a[i * row_stride + k] * weight[lane * K + k] for the n lanes.
template <class Real, int ROWS>
void product_in_place(Operand<Real> operand, const Real* weight, int n, int64_t K, Vec<Real>* out,
                      int stride) {
  constexpr int W = kLanes<Real>;
  const Real* a = operand.a;
  int64_t k = 0;
  bool first = true;
  do {
    const int64_t stop = K - k > operand.sum_block ? k + operand.sum_block : K;
    Vec<Real> sum[ROWS] = {};
    for (; k < stop; k += W) {
      Vec<Real> block[W];
      const int columns = stop - k < W ? static_cast<int>(stop - k) : W;
      if (n == W && columns == W) {
        load_transposed(weight + k, K, block);
      } else {
        for (int lane = 0; lane < W; ++lane) {
          block[lane] = lane < n ? load_n(weight + lane * K + k, columns) : Vec<Real>{};
        }
        transpose<Real>(block);
      }
      if (columns == W) {
#pragma GCC unroll 16
        for (int j = 0; j < W; ++j) {
#pragma GCC unroll 2
          for (int i = 0; i < ROWS; ++i) sum[i] += block[j] * a[i * operand.row_stride + k + j];
        }
      } else {
        for (int j = 0; j < columns; ++j) {
          for (int i = 0; i < ROWS; ++i) sum[i] += block[j] * a[i * operand.row_stride + k + j];
        }
      }
    }
#pragma GCC unroll 2
    for (int i = 0; i < ROWS; ++i) out[i * stride] = first ? sum[i] : out[i * stride] + sum[i];
    first = false;
  } while (k < K);
}

// As sweep() of tile.h; weight(tile, v) is the first weight row of vector v of a tile, of whose
// rows lanes(tile) exist. The k of a row of the operand must be neighbours.
template <class Real, class Weight, class Lanes, class Epilogue>
GRU_INLINE void sweep_in_place(Operand<Real> a, int64_t rows, int64_t K, int vectors,
                               int64_t tile_begin, int64_t tile_end, Weight weight, Lanes lanes,
                               Epilogue epilogue) {
  static_assert(kMaxRowsInPlace == 2);
  if (rows <= 0) return;
  const auto multiply = rows == 2 ? product_in_place<Real, 2> : product_in_place<Real, 1>;
  Vec<Real> sums[kMaxTileVectors];
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const int n = lanes(tile);
    for (int v = 0; v < vectors; ++v) multiply(a, weight(tile, v), n, K, sums + v, vectors);
    for (int64_t i = 0; i < rows; ++i) epilogue(i, tile, sums + i * vectors);
  }
}

}  // namespace
}  // namespace GRU_FAST_ISA
}  // namespace gru_fast
