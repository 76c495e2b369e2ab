// SPDX-License-Identifier: Apache-2.0
// The products of tile.h with weights where they lie: for panels that would be used once. Rows of
// the forward product are transposed in registers, in blocks of W words of W rows; those of the
// gradients' product are added up as they stand. Numbers of 16 bits that are computed in float32
// become so after that. The order of summation is that of tile.h.
#pragma once
#include <type_traits>

#include "half_columns.h"
#include "panels.h"
#include "processor.h"
#include "tile.h"

namespace gru_fast {
namespace GRU_FAST_ISA {
namespace {

// Measured: from 3 rows on, packing a tile once is as fast or faster.
constexpr int64_t kMaxRowsInPlace = 2;

// A row's chain of sums takes longer than the transposes of what it adds, where these are quick:
// two chains take turns there. From afar it helps more to ask for the next weights, in the order of
// memory. Which of it a processor gains by is measured.
enum class Pace {
  kTwoTiles,
  kTwoBlocks,  // of the sum, for the longer chains of bfloat16, unless rows are long
  kOneAhead,   // one tile, while the next is asked for
  kTwoAhead,   // the same of two tiles
};
// As much as the second level of the cache holds.
constexpr int64_t kNearWeights = 1 << 20;
constexpr int64_t kLongRowBytes = 3072;
// Longer rows of a multiple of this fall into two sets of the first cache, which hold no more than
// one tile of them.
constexpr int64_t kCrowdBytes = 2048;

template <class Real>
Pace pace_of(Narrow number, int64_t rows, int64_t weight_rows, int64_t row_bytes) {
  // With AVX2 two tiles fill a register of halves.
  if (number == Narrow::kFloat16) return Pace::kTwoAhead;
  const bool near = rows * weight_rows * row_bytes <= kNearWeights;
  if constexpr (kVecBytes < 64) {
    if (rows > 1) return near ? Pace::kTwoTiles : Pace::kOneAhead;
    const bool crowd = row_bytes > kCrowdBytes && row_bytes % kCrowdBytes == 0;
    return crowd ? Pace::kOneAhead : Pace::kTwoAhead;
  } else {
    if (!shuffles_two_wide_registers()) return Pace::kOneAhead;
    if (near) return Pace::kTwoTiles;
    return kPack<Real> > 1 && row_bytes < kLongRowBytes ? Pace::kTwoBlocks : Pace::kOneAhead;
  }
}

// W weight rows of K columns, numbers of the type that is computed in or, where that is float32, of
// 16 bits.
struct RowsInPlace {
  const void* first;
  int64_t K, stride;  // from one row to the next
  const void* next;   // what is to be multiplied after them
};

// sum += weight * what lies at `a`, of as many k as a word of weights has.
template <class Real, class Stored>
GRU_INLINE void add_word(Vec<Real>& sum, Vec<Stored> weight, const Real* a) {
  if constexpr (std::is_same_v<Real, Stored>) {
    multiply_add<Real>(sum, weight, word_at(a));
  } else {
    const auto bits = reinterpret_cast<VecBits<Real>>(weight);
    multiply_add<Real>(sum, reinterpret_cast<Vec<Real>>(bits << 16), a[0]);
    multiply_add<Real>(sum, reinterpret_cast<Vec<Real>>(bits >> 16 << 16), a[1]);
  }
}

// Strands are products that take turns: how far the weights and the operand of each lie from those
// of the one before.
struct Strands {
  int64_t weight, operand;
};

// sum[i][strand] += sum_k a[i * row_stride + k] * weight[lane * stride + k], k from `begin` on in
// whole blocks of W lanes, up to `stop`. Returns the k that come next.
template <bool ASK_AHEAD, class Stored, class Real, int ROWS, int STRANDS>
GRU_INLINE int64_t add_whole_blocks(Operand<Real> operand, const RowsInPlace& weight, Strands step,
                                    int64_t begin, int64_t stop, Vec<Real> (&sum)[ROWS][STRANDS]) {
  constexpr int W = kLanes<Real>;
  constexpr int P = kPack<Stored>;
  const auto* const first = static_cast<const Stored*>(weight.first);
  constexpr int kColumns = W * P;
  int64_t k = begin;
  for (; k + kColumns <= stop; k += kColumns) {
    if constexpr (ASK_AHEAD) {
      constexpr int kBytes = STRANDS * W * kVecBytes;
      const char* ahead = static_cast<const char*>(weight.next) + k / P * (STRANDS * kVecBytes);
#pragma GCC unroll 16
      for (int byte = 0; byte < kBytes; byte += 64) prefetch(ahead + byte);
    }
#pragma GCC unroll 2
    for (int strand = 0; strand < STRANDS; ++strand) {
      Vec<Stored> block[W];
      load_transposed<Stored>(first + strand * step.weight + k, weight.stride, block);
      const Real* a = operand.a + strand * step.operand + k;
#pragma GCC unroll 16
      for (int j = 0; j < W; ++j) {
#pragma GCC unroll 2
        for (int i = 0; i < ROWS; ++i) {
          add_word<Real, Stored>(sum[i][strand], block[j], a + i * operand.row_stride + j * P);
        }
      }
    }
  }
  return k;
}

// The same for what is left: any k, and n of the W lanes. Not inlined, so that the loop over whole
// blocks keeps its addresses in registers.
template <class Real, int ROWS>
[[gnu::noinline]] void add_columns(Operand<Real> operand, const Real* weight, int64_t weight_stride,
                                   int n, int64_t begin, int64_t stop, Vec<Real>* sum, int stride) {
  constexpr int W = kLanes<Real>;
  constexpr int P = kPack<Real>;
  constexpr int kColumns = W * P;
  Vec<Real> total[ROWS];
  for (int i = 0; i < ROWS; ++i) total[i] = sum[i * stride];
  for (int64_t k = begin; k < stop; k += kColumns) {
    const int columns = stop - k < kColumns ? static_cast<int>(stop - k) : kColumns;
    Vec<Real> block[W];
    load_some_transposed(weight + k, weight_stride, n, columns, block);
    auto add = [&](int j, auto word) GRU_MEMBER_LAMBDA {
      const Real* a = operand.a + k + j * P;
#pragma GCC unroll 2
      for (int i = 0; i < ROWS; ++i) {
        multiply_add<Real>(total[i], block[j], word(a + i * operand.row_stride));
      }
    };
    const int words = columns / P;
#pragma GCC unroll 16
    for (int j = 0; j < W; ++j) {
      if (j < words) add(j, [](const Real* at) GRU_MEMBER_LAMBDA { return word_at(at); });
    }
    if constexpr (P > 1) {
      if (columns % P > 0) {
        add(columns / P, [](const Real* at) GRU_MEMBER_LAMBDA { return half_word_at(at); });
      }
    }
  }
  for (int i = 0; i < ROWS; ++i) sum[i * stride] = total[i];
}

#if defined(__F16C__)
// As add_whole_blocks(), of float16, for so many tiles that their rows fill registers of halves.
template <bool ASK_AHEAD, int ROWS, int TILES>
GRU_INLINE int64_t add_whole_halves(Operand<float> operand, const RowsInPlace& weight,
                                    int64_t begin, int64_t stop, Vec<float> (&sum)[ROWS][TILES]) {
  constexpr int kTiles = kHalfRows / kLanes<float>;
  static_assert(TILES % kTiles == 0);
  constexpr int kAll = TILES * kLanes<float>;
  const auto* const first = static_cast<const Float16*>(weight.first);
  int64_t k = begin;
  for (; k + kHalfColumns <= stop; k += kHalfColumns) {
    if constexpr (ASK_AHEAD) {
      const auto* ahead = static_cast<const Float16*>(weight.next) + k * kAll;
#pragma GCC unroll 16
      for (int line = 0; line < kHalfColumns * kAll; line += 32) prefetch(ahead + line);
    }
#pragma GCC unroll 2
    for (int tile = 0; tile < TILES; tile += kTiles) {
      __m256i columns[kHalfColumns];
      load_columns(first + tile * kLanes<float> * weight.stride + k, weight.stride, columns);
#pragma GCC unroll 8
      for (int j = 0; j < kHalfColumns; ++j) {
        Vec<float> wide[kTiles];
        widen_column(columns[j], wide);
#pragma GCC unroll 2
        for (int i = 0; i < ROWS; ++i) {
          const float value = operand.a[i * operand.row_stride + k + j];
          for (int n = 0; n < kTiles; ++n) multiply_add<float>(sum[i][tile + n], wide[n], value);
        }
      }
    }
  }
  return k;
}
#endif

// As add_columns(), of numbers of 16 bits that are widened a block at a time.
template <int ROWS, class Stored>
[[gnu::noinline]] void add_narrow_columns(Operand<float> operand, const Stored* weight,
                                          int64_t weight_stride, int n, int64_t begin, int64_t stop,
                                          Vec<float>* sum, int stride) {
  constexpr int W = kLanes<float>;
  float wide[W * W];
  for (int64_t k = begin; k < stop; k += W) {
    const int64_t columns = stop - k < W ? stop - k : W;
    for (int lane = 0; lane < n; ++lane) {
      widen_all<kNarrow<Stored>>(&weight[lane * weight_stride + k].bits, wide + lane * W, columns);
    }
    Operand<float> rest = operand;
    rest.a += k;
    add_columns<float, ROWS>(rest, wide, W, n, 0, columns, sum, stride);
  }
}

// Whole blocks of tiles side by side; returns the k that come next, `begin` if there are none here.
template <bool ASK_AHEAD, class Stored, class Real, int ROWS, int TILES>
GRU_INLINE int64_t add_tiles(Operand<Real> operand, const RowsInPlace& weight, int64_t begin,
                             int64_t stop, Vec<Real> (&sum)[ROWS][TILES]) {
  constexpr int W = kLanes<Real>;
  if constexpr (!std::is_same_v<Stored, Float16>) {
    return add_whole_blocks<ASK_AHEAD, Stored>(operand, weight, {W * weight.stride, 0}, begin, stop,
                                               sum);
#if defined(__F16C__)
  } else if constexpr (TILES * W % kHalfRows == 0) {
    return add_whole_halves<ASK_AHEAD>(operand, weight, begin, stop, sum);
#endif
  } else {
    return begin;
  }
}

// out[(i * TILES + t) * stride] = sum_k a[i * row_stride + k] * weight[(t * W + lane) *
// weight.stride + k]; of the last tile's lanes n exist. From block k of the sum on: the ones before
// it are in `out`.
template <class Stored, class Real, int ROWS, int TILES, bool ASK_AHEAD = false>
void product_in_place(Operand<Real> operand, const RowsInPlace& weight, int n, Vec<Real>* out,
                      int stride, int64_t k) {
  constexpr int W = kLanes<Real>;
  const int64_t K = weight.K, tile_stride = W * weight.stride;
  do {
    const bool first = k == 0;
    const int64_t stop = K - k > operand.sum_block ? k + operand.sum_block : K;
    Vec<Real> sum[ROWS][TILES] = {};
    if (n == W) k = add_tiles<ASK_AHEAD, Stored>(operand, weight, k, stop, sum);
    if (k < stop) {
      Vec<Real> all[ROWS * TILES];
      std::memcpy(all, sum, sizeof all);
      for (int tile = 0; tile < TILES; ++tile) {
        const auto* const first = static_cast<const Stored*>(weight.first) + tile * tile_stride;
        const int lanes = tile + 1 == TILES ? n : W;
        if constexpr (std::is_same_v<Real, Stored>) {
          add_columns<Real, ROWS>(operand, first, weight.stride, lanes, k, stop, all + tile, TILES);
        } else {
          add_narrow_columns<ROWS>(operand, first, weight.stride, lanes, k, stop, all + tile,
                                   TILES);
        }
      }
      std::memcpy(sum, all, sizeof all);
      k = stop;
    }
#pragma GCC unroll 2
    for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 2
      for (int tile = 0; tile < TILES; ++tile) {
        Vec<Real>& to = out[(i * TILES + tile) * stride];
        to = first ? sum[i][tile] : to + sum[i][tile];
      }
    }
  } while (k < K);
}

// The same of one row and tile, two blocks of the sum at a time.
template <class Real>
void product_of_blocks(Operand<Real> operand, const RowsInPlace& weight, int n, Vec<Real>* out,
                       int stride, int64_t k) {
  const int64_t size = operand.sum_block;
  for (; n == kLanes<Real> && weight.K - k >= 2 * size; k += 2 * size) {
    Vec<Real> sum[1][2] = {};
    add_whole_blocks<false, Real>(operand, weight, {size, size}, k, k + size, sum);
    *out = k == 0 ? sum[0][0] : *out + sum[0][0];
    *out += sum[0][1];
  }
  if (k < weight.K) product_in_place<Real, Real, 1, 1>(operand, weight, n, out, stride, k);
}

template <class Real>
using ProductInPlace = void (*)(Operand<Real>, const RowsInPlace&, int, Vec<Real>*, int, int64_t);

template <class Stored, class Real, int ROWS>
ProductInPlace<Real> pick_in_place(Pace pace, int tiles) {
  if constexpr ((ROWS == 1 && kVecBytes < 64) || std::is_same_v<Stored, Float16>) {
    if (tiles == 2 && pace == Pace::kTwoAhead) return product_in_place<Stored, Real, ROWS, 2, true>;
  }
  if (tiles == 2) return product_in_place<Stored, Real, ROWS, 2>;
  if (pace == Pace::kOneAhead) return product_in_place<Stored, Real, ROWS, 1, true>;
  if constexpr (ROWS == 1 && std::is_same_v<Real, Stored>) {
    if (pace == Pace::kTwoBlocks) return product_of_blocks<Real>;
  }
  return product_in_place<Stored, Real, ROWS, 1>;
}

template <class Stored, class Real>
ProductInPlace<Real> pick_in_place(Pace pace, int tiles, int64_t rows) {
  return rows == 2 ? pick_in_place<Stored, Real, 2>(pace, tiles)
                   : pick_in_place<Stored, Real, 1>(pace, tiles);
}
template <class Real>
ProductInPlace<Real> pick_in_place(Narrow number, Pace pace, int tiles, int64_t rows) {
  if constexpr (std::is_same_v<Real, float>) {
    if (number == Narrow::kFloat16) return pick_in_place<Float16, Real>(pace, tiles, rows);
    if (number == Narrow::kBFloat16) return pick_in_place<BFloat16, Real>(pace, tiles, rows);
  }
  return pick_in_place<Real, Real>(pace, tiles, rows);
}

// How weights lie: rows of K numbers, `stride` apart, and how they are gone through.
struct InPlace {
  int64_t K, stride;
  Narrow number;
  Pace pace;
};

// As sweep() of tile.h; weight(tile, v) is the first weight row of vector v of a tile, of whose
// rows lanes(tile) exist; those of the next tile follow it. The k of a row of the operand must be
// neighbours.
template <class Real, class Weight, class Lanes, class Epilogue>
GRU_INLINE void sweep_in_place(Operand<Real> a, int64_t rows, const InPlace& in, int vectors,
                               int64_t tile_begin, int64_t tile_end, Weight weight, Lanes lanes,
                               Epilogue epilogue) {
  static_assert(kMaxRowsInPlace == 2);
  if (rows <= 0) return;
  Vec<Real> sums[kMaxTileVectors];
  for (int64_t tile = tile_begin; tile < tile_end;) {
    const bool pair = tile + 1 < tile_end && lanes(tile + 1) == kLanes<Real>;
    const int tiles = (in.pace == Pace::kTwoTiles || in.pace == Pace::kTwoAhead) && pair ? 2 : 1;
    const auto multiply = pick_in_place<Real>(in.number, in.pace, tiles, rows);
    const int n = lanes(tile + tiles - 1);
    for (int v = 0; v < vectors; ++v) {
      const void* const next = v + 1 < vectors           ? weight(tile, v + 1)
                               : tile + tiles < tile_end ? weight(tile + tiles, 0)
                                                         : weight(tile, v);
      multiply(a, {weight(tile, v), in.K, in.stride, next}, n, sums + v, vectors, 0);
    }
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
