// SPDX-License-Identifier: Apache-2.0
// The products of tile.h with weights where they lie: for panels that would be used once. Rows of
// the forward product are transposed in registers, in blocks of W words of W rows; those of the
// gradients' product are added up as they stand. The order of summation is that of tile.h.
#pragma once
#include <type_traits>

#include "panels.h"
#include "tile.h"

namespace gru_fast {
namespace GRU_FAST_ISA {
namespace {

// Measured: from 3 rows on, packing a tile once is as fast or faster.
constexpr int64_t kMaxRowsInPlace = 2;

// Two tiles at a time: their blocks take turns, so that the transposes of the one fill the time
// that the chain of sums of the other takes. Beyond the second level of the cache more streams of
// rows take longer: so much for one row.
constexpr int64_t kWeightsForTwo = 1 << 20;

// out[(i * TILES + t) * stride] = sum_k a[i * row_stride + k] * weight[(t * W + lane) * K + k]; of
// the last tile's lanes n exist.
template <class Real, int ROWS, int TILES>
void product_in_place(Operand<Real> operand, const Real* weight, int n, int64_t K, Vec<Real>* out,
                      int stride) {
  constexpr int W = kLanes<Real>;
  constexpr int P = kPack<Real>;
  constexpr int kColumns = W * P;
  int64_t k = 0;
  bool first = true;
  do {
    const int64_t stop = K - k > operand.sum_block ? k + operand.sum_block : K;
    Vec<Real> sum[ROWS][TILES] = {};
    Vec<Real> block[W];
    auto add = [&](int tile, int j, auto word) GRU_MEMBER_LAMBDA {
      const Real* a = operand.a + k + j * P;
#pragma GCC unroll 2
      for (int i = 0; i < ROWS; ++i) {
        multiply_add<Real>(sum[i][tile], block[j], word(a + i * operand.row_stride));
      }
    };
    auto whole = [](const Real* at) GRU_MEMBER_LAMBDA { return word_at(at); };
    const int64_t whole_lanes = n == W ? stop : k;
    for (; k + kColumns <= whole_lanes; k += kColumns) {
#pragma GCC unroll 2
      for (int tile = 0; tile < TILES; ++tile) {
        load_transposed(weight + tile * W * K + k, K, block);
#pragma GCC unroll 16
        for (int j = 0; j < W; ++j) add(tile, j, whole);
      }
    }
    for (; k < stop; k += kColumns) {
      const int columns = stop - k < kColumns ? static_cast<int>(stop - k) : kColumns;
      for (int tile = 0; tile < TILES; ++tile) {
        const int lanes = tile + 1 == TILES ? n : W;
        for (int lane = 0; lane < W; ++lane) {
          block[lane] = lane < lanes ? load_some_words(weight + (tile * W + lane) * K + k, columns)
                                     : Vec<Real>{};
        }
        transpose<Real>(block);
        for (int j = 0; j < columns / P; ++j) add(tile, j, whole);
        if constexpr (P > 1) {
          if (columns % P > 0) {
            add(tile, columns / P,
                [](const Real* at) GRU_MEMBER_LAMBDA { return half_word_at(at); });
          }
        }
      }
    }
#pragma GCC unroll 2
    for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 2
      for (int tile = 0; tile < TILES; ++tile) {
        Vec<Real>& to = out[(i * TILES + tile) * stride];
        to = first ? sum[i][tile] : to + sum[i][tile];
      }
    }
    first = false;
  } while (k < K);
}

// As sweep() of tile.h; weight(tile, v) is the first weight row of vector v of a tile, of whose
// rows lanes(tile) exist; those of the next tile follow it. The k of a row of the operand must be
// neighbours.
template <class Real, class Weight, class Lanes, class Epilogue>
GRU_INLINE void sweep_in_place(Operand<Real> a, int64_t rows, int64_t K, int vectors,
                               int64_t tile_begin, int64_t tile_end, bool in_pairs, Weight weight,
                               Lanes lanes, Epilogue epilogue) {
  static_assert(kMaxRowsInPlace == 2);
  if (rows <= 0) return;
  const auto alone = rows == 2 ? product_in_place<Real, 2, 1> : product_in_place<Real, 1, 1>;
  const auto pair = rows == 2 ? product_in_place<Real, 2, 2> : product_in_place<Real, 1, 2>;
  Vec<Real> sums[kMaxTileVectors];
  for (int64_t tile = tile_begin; tile < tile_end;) {
    const int tiles = in_pairs && tile + 1 < tile_end ? 2 : 1;
    const auto multiply = tiles == 2 ? pair : alone;
    const int n = lanes(tile + tiles - 1);
    for (int v = 0; v < vectors; ++v) multiply(a, weight(tile, v), n, K, sums + v, vectors);
    for (int j = 0; j < tiles; ++j) {
      epilogue(
          Sums<Real>{0, static_cast<int>(rows), tile + j, sums + j * vectors, tiles * vectors});
    }
    tile += tiles;
  }
}

// Weights of the gradients' product: for each slot of the operand, `units` columns apart, H rows of
// `columns`.
struct ColumnSizes {
  int64_t H, units, columns;
};

// Adds DEPTH words of weight rows to the sums of `tiles` tiles, in order: sum[i][tile] +=
// sum_j a[i * row_stride + j] * weight[j * columns + tile * W]. `left` weight rows exist.
template <class Real, int DEPTH>
GRU_INLINE void add_rows(const Real* a, int64_t rows, int64_t row_stride, const Real* weight_rows,
                         int64_t columns, int64_t left, int64_t tiles, Vec<Real>* sum) {
  constexpr int W = kLanes<Real>;
  constexpr int P = kPack<Real>;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    Vec<Real> weight[DEPTH];
#pragma GCC unroll 8
    for (int j = 0; j < DEPTH; ++j) {
      weight[j] = row_words(weight_rows + j * P * columns + tile * W, columns, left - j * P);
    }
    for (int64_t i = 0; i < rows; ++i) {
      Vec<Real> total = sum[i * tiles + tile];
#pragma GCC unroll 8
      for (int j = 0; j < DEPTH; ++j) {
        multiply_add<Real>(total, weight[j], word_at(a + i * row_stride + j * P));
      }
      sum[i * tiles + tile] = total;
    }
  }
}

// As many sums as stay in the first level of the cache.
constexpr int64_t kSumsByColumns = 256;
constexpr int64_t kMaxTilesByColumns = 64;
constexpr int64_t kMaxRowsByColumns = 16;

// As sweep(), weights read along their rows; `blocks` has the first row of each slot. Padding of
// the operand multiplies nothing: it is zero, and no block of the sum begins within it.
template <class Real, class Epilogue>
GRU_INLINE void sweep_by_columns(Operand<Real> operand, int64_t rows, const Real* const* blocks,
                                 int64_t slots, ColumnSizes size, int64_t tile_begin,
                                 int64_t tile_end, Epilogue epilogue) {
  static_assert(kSumBlock % kUnitPad == 0);
  constexpr int W = kLanes<Real>;
  constexpr int P = kPack<Real>;
  constexpr int kDepth = 8;
  if (rows <= 0) return;
  const int64_t H = size.H, units = size.units, columns = size.columns;
  const int64_t room = kSumsByColumns / rows;
  const int64_t abreast = room < kMaxTilesByColumns ? room : kMaxTilesByColumns;
  Vec<Real> block[kSumsByColumns], total[kSumsByColumns];
  for (int64_t tile = tile_begin; tile < tile_end; tile += abreast) {
    const int64_t tiles = tile_end - tile < abreast ? tile_end - tile : abreast;
    const int64_t sums = rows * tiles;
    bool first = true;
    auto begin_block = [&]() GRU_MEMBER_LAMBDA {
      for (int64_t i = 0; i < sums; ++i) block[i] = Vec<Real>{};
    };
    auto end_block = [&]() GRU_MEMBER_LAMBDA {
      for (int64_t i = 0; i < sums; ++i) total[i] = first ? block[i] : total[i] + block[i];
      first = false;
    };
    begin_block();
    for (int64_t slot = 0; slot < slots; ++slot) {
      const Real* weight_rows = blocks[slot] + tile * W;
      const Real* a = operand.a + slot * units;
      int64_t j = 0;
      while (j < H) {
        const int64_t k = slot * units + j, in_block = kSumBlock - k % kSumBlock;
        if (k > 0 && in_block == kSumBlock) {
          end_block();
          begin_block();
        }
        const int64_t stop = H - j < in_block ? H : j + in_block;
        auto add = [&]<int DEPTH>(std::integral_constant<int, DEPTH>) GRU_MEMBER_LAMBDA {
          add_rows<Real, DEPTH>(a + j, rows, operand.row_stride, weight_rows + j * columns, columns,
                                stop - j, tiles, block);
          j += DEPTH * P;
        };
        while (j + kDepth * P <= stop) add(std::integral_constant<int, kDepth>{});
        while (j < stop) add(std::integral_constant<int, 1>{});
      }
    }
    end_block();
    for (int64_t j = 0; j < tiles; ++j) {
      epilogue(Sums<Real>{0, static_cast<int>(rows), tile + j, total + j, tiles});
    }
  }
}

}  // namespace
}  // namespace GRU_FAST_ISA
}  // namespace gru_fast
