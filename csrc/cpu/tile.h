// SPDX-License-Identifier: Apache-2.0
// The register-blocked product under every kernel, and the order-of-summation contract:
// each output adds k = 0 ... K-1 in one chain (fused where the instruction set is, pairs of k where
// it multiplies bfloat16) within blocks of a fixed length, and the blocks in order. Rows per tile,
// tiles abreast, threads and time chunks change nothing of that, so they change no bit.
#pragma once
#include <type_traits>

#include "vec.h"

namespace gru_fast {
namespace GRU_FAST_ISA {
namespace {

constexpr int64_t kSumBlock = 256;
// Sums over T * B rows are compared with torch's, which adds one short product per step; those that
// end up in bfloat16 lose more digits there than any order could.
template <class Real>
constexpr int64_t kGradSumBlock = kPack<Real> > 1 ? kSumBlock : 32;
constexpr int kMaxTileVectors = 24;

// The left operand: rows of `a`. Rows may have any stride, and so may the words of a row, each of
// which holds kPack neighbouring k.
template <class Real>
struct Operand {
  const Real* a;
  int64_t row_stride;
  int64_t word_stride = kPack<Real>;
  int64_t sum_block = kSumBlock;
};

// sum += weight * the word at `a`
template <class Real>
GRU_INLINE void multiply_add(Vec<Real>& sum, Vec<Real> weight, Real a) {
  sum += weight * a;
}
#if defined(__AVX512BF16__)
template <class Real>
GRU_INLINE void multiply_add(Vec<float>& sum, Vec<float> weight, uint32_t word) {
  sum = reinterpret_cast<Vec<float>>(
      _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(weight),
                       reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(word)))));
}
#endif

template <class Real>
GRU_INLINE Real word_at(const Real* a) {
  return *a;
}
GRU_INLINE uint32_t word_at(const BFloat16* a) {
  uint32_t word;
  std::memcpy(&word, a, sizeof word);
  return word;
}
// The last word of an odd number of k.
GRU_INLINE uint32_t half_word_at(const BFloat16* a) { return a->bits; }

// Rows of the panels: K, rounded up to whole words.
template <class Real>
constexpr int64_t packed_k(int64_t K) {
  return (K + kPack<Real> - 1) / kPack<Real> * kPack<Real>;
}

// How far ahead many rows ask for three gates' weights, which beyond the first level come in a
// single stream: a processor with registers of half a line asks for too little of it by itself.
template <int ROWS, int NV>
constexpr int kBytesAhead = kVecBytes == 32 && ROWS == kRowBlock && NV == 3 ? 1536 : 0;

// Weights of a unit tile, packed for the product: [word][NV][lanes]; tiles lie one after the other.
// out[(i * NT + tile) * NV + v] = sum_k a[row + i][k] * panel[tile][k][v]
template <class Real, int ROWS, int NT, int NV>
void product(Operand<Real> operand, int64_t row, const Real* panels, int64_t K, Vec<Real>* out) {
  constexpr int W = kLanes<Real>;
  constexpr int N = NT * NV;
  constexpr int P = kPack<Real>;
  static_assert(ROWS * N <= kMaxTileVectors);
  const int64_t panel_stride = packed_k<Real>(K) * NV * W;
  const int64_t row_stride = operand.row_stride;
  const Real* a = operand.a + row * row_stride;
  int64_t k = 0;
  bool first = true;
  do {
    const int64_t stop = K - k > operand.sum_block ? k + operand.sum_block : K;
    Vec<Real> sum[ROWS][N] = {};
    auto add = [&](auto word) GRU_MEMBER_LAMBDA {
      const Real* ak = a + k / P * operand.word_stride;
      const Real* pk = panels + k * (NV * W);
      Vec<Real> weight[N];
#pragma GCC unroll 12
      for (int n = 0; n < N; ++n) {
        weight[n] = load_words(pk + (n / NV) * panel_stride + (n % NV) * (W * P));
      }
      if constexpr (kBytesAhead<ROWS, NV> != 0) {
        const char* ahead = reinterpret_cast<const char*>(pk) + kBytesAhead<ROWS, NV>;
        for (int byte = 0; byte < N * kVecBytes; byte += 64) __builtin_prefetch(ahead + byte);
      }
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i) {
        const auto value = word(ak + i * row_stride);
#if defined(__aarch64__)
        if (i > 0) load_after(ak, sum[i - 1]);
#endif
#pragma GCC unroll 12
        for (int n = 0; n < N; ++n) multiply_add<Real>(sum[i][n], weight[n], value);
      }
    };
    for (; k + P <= stop; k += P) {
      add([](const Real* at) GRU_MEMBER_LAMBDA { return word_at(at); });
    }
    if constexpr (P > 1) {
      if (k < stop) add([](const Real* at) GRU_MEMBER_LAMBDA { return half_word_at(at); });
      k = stop;
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 12
      for (int n = 0; n < N; ++n) {
        out[i * N + n] = first ? sum[i][n] : out[i * N + n] + sum[i][n];
      }
    }
    first = false;
  } while (k < K);
}

// Every number of rows has a product of its own: two would read the weights twice. More than one
// block are about as large as each other, since a row alone takes as long as three.
GRU_INLINE int rows_in_block(int64_t rows_left) {
  if (rows_left <= kRowBlock || rows_left % kRowBlock == 0) {
    return rows_left < kRowBlock ? static_cast<int>(rows_left) : kRowBlock;
  }
  const int64_t blocks = rows_left / kRowBlock + 1;
  return static_cast<int>((rows_left + blocks - 1) / blocks);
}

// Few rows need several tiles abreast to hide the latency of the fma chain: so many vectors for one
// row, so many tiles at most.
constexpr int kMostVectorsAbreast = 12, kMostTilesAbreast = 8;
// Rows whose sums with six vectors stay in registers.
constexpr int kMostRowsOfSix = kRowBlock == 8 ? 3 : 2;

GRU_INLINE int tiles_abreast(int64_t rows, int vectors, int64_t tiles_left) {
  const int room = (rows > kMostRowsOfSix ? 3 : rows > 1 ? 6 : kMostVectorsAbreast) / vectors;
  const int want = room >= kMostTilesAbreast ? kMostTilesAbreast : room >= 4 ? 4 : room;
  // A tile alone would leave the multipliers waiting: the last four of many rows are two pairs.
  if (want == 3 && tiles_left == 4 && vectors == 1) return 2;
  if (tiles_left >= want) return want;
  return tiles_left >= 4 ? 4 : static_cast<int>(tiles_left);
}

template <class Real>
using Product = void (*)(Operand<Real>, int64_t, const Real*, int64_t, Vec<Real>*);

template <class Real, int ROWS>
Product<Real> pick_product(int tiles, int vectors) {
  if (vectors == 3) {
    if constexpr (ROWS == 1) {
      if (tiles == 4) return product<Real, ROWS, 4, 3>;
      if (tiles == 3) return product<Real, ROWS, 3, 3>;
    }
    if constexpr (ROWS <= kMostRowsOfSix) {
      if (tiles == 2) return product<Real, ROWS, 2, 3>;
    }
    return product<Real, ROWS, 1, 3>;
  }
  if (vectors == 2) {
    if constexpr (ROWS == 1) {
      if (tiles == 4) return product<Real, ROWS, 4, 2>;
    }
    if constexpr (ROWS <= kMostRowsOfSix) {
      if (tiles == 3) return product<Real, ROWS, 3, 2>;
      if (tiles == 2) return product<Real, ROWS, 2, 2>;
    }
    return product<Real, ROWS, 1, 2>;
  }
  if constexpr (ROWS == 1) {
    if (tiles == 8) return product<Real, ROWS, 8, 1>;
  }
  if constexpr (ROWS <= kMostRowsOfSix) {
    if (tiles == 4) return product<Real, ROWS, 4, 1>;
  }
  if (tiles == 3) return product<Real, ROWS, 3, 1>;
  if (tiles == 2) return product<Real, ROWS, 2, 1>;
  return product<Real, ROWS, 1, 1>;
}

// pick(std::integral_constant<int, rows>) for the rows of a block.
template <class Pick>
auto for_rows(int rows, Pick pick) {
  if constexpr (kRowBlock == 8) {
    if (rows == 8) return pick(std::integral_constant<int, 8>{});
    if (rows == 7) return pick(std::integral_constant<int, 7>{});
    if (rows == 6) return pick(std::integral_constant<int, 6>{});
    if (rows == 5) return pick(std::integral_constant<int, 5>{});
  }
  if (rows == 4) return pick(std::integral_constant<int, 4>{});
  if (rows == 3) return pick(std::integral_constant<int, 3>{});
  if (rows == 2) return pick(std::integral_constant<int, 2>{});
  return pick(std::integral_constant<int, 1>{});
}

template <class Real>
Product<Real> pick_product(int rows, int tiles, int vectors) {
  return for_rows(rows, [=]<int ROWS>(std::integral_constant<int, ROWS>) {
    return pick_product<Real, ROWS>(tiles, vectors);
  });
}

// What an epilogue gets: the sums of `rows` neighbouring rows and one tile.
template <class Real>
struct Sums {
  int64_t row;
  int rows;
  int64_t tile;
  const Vec<Real>* first;
  int64_t stride;

  GRU_MEMBER const Vec<Real>* of(int i) const { return first + i * stride; }
};

// An epilogue of a row at a time: each(row, tile, sums).
template <class Real, class Each>
GRU_INLINE auto row_by_row(Each each) {
  return [each](const Sums<Real>& sums) GRU_MEMBER_LAMBDA {
    for (int i = 0; i < sums.rows; ++i) each(sums.row + i, sums.tile, sums.of(i));
  };
}

// An epilogue of N rows at a time, of half as many where no more are left, and so on:
// each.operator()<N>(sums).
template <int N, class Real, class Each>
GRU_INLINE void rows_together(const Sums<Real>& sums, Each each) {
  int i = 0;
  auto next = [&](int count) GRU_MEMBER_LAMBDA {
    const int first = i;
    i += count;
    return Sums<Real>{sums.row + first, count, sums.tile, sums.of(first), sums.stride};
  };
  while (i + N <= sums.rows) each.template operator()<N>(next(N));
  if constexpr (N > 1) rows_together<N / 2>(next(sums.rows - i), each);
}

// More rows take longer than the weights take to come, which forwards are fetched ahead.
constexpr int64_t kMostRowsBackwards = 16;

// Multiplies `rows` rows by tiles [tile_begin, tile_end) of `vectors` vectors each.
// panels(tile, count) gives the packed weights of `count` tiles, the last ones first if backwards;
// epilogue(sums) gets the `vectors` sums of each row of a block and a tile. Tiles are the outer
// loop: a panel is read once from afar.
template <class Real, class Panels, class Epilogue>
GRU_INLINE void sweep(Operand<Real> a, int64_t rows, int64_t K, int vectors, int64_t tile_begin,
                      int64_t tile_end, bool backwards, Panels panels, Epilogue epilogue) {
  if (rows <= 0) return;
  const bool turned = backwards && rows <= kMostRowsBackwards;
  Vec<Real> sums[kMaxTileVectors];
  for (int64_t left = tile_end - tile_begin; left > 0;) {
    const int tiles = tiles_abreast(rows, vectors, left);
    left -= tiles;
    const int64_t tile = turned ? tile_begin + left : tile_end - left - tiles;
    const Real* panel = panels(tile, tiles);
    for (int64_t row = 0; row < rows;) {
      const int block = rows_in_block(rows - row);
      pick_product<Real>(block, tiles, vectors)(a, row, panel, K, sums);
      for (int j = 0; j < tiles; ++j) {
        epilogue(Sums<Real>{row, block, tile + j, sums + j * vectors, tiles * vectors});
      }
      row += block;
    }
  }
}

}  // namespace
}  // namespace GRU_FAST_ISA
}  // namespace gru_fast
