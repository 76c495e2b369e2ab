// SPDX-License-Identifier: Apache-2.0
// Products of rows with packed weights of 32, 16 or 8 bits. Weights and the rows they meet lie in
// 32-bit words of 1, 2 or 4 neighbouring k, so one loop serves all three. float32 is product() of
// tile.h, and keeps its order of summation; bfloat16 adds k in order too, in one chain; int8 adds
// integers, exactly. So neither rows, tiles abreast nor threads change a bit.
#pragma once
#include "dot_pack.h"
#include "dot_word.h"
#include "tile.h"

namespace gru_fast {
namespace GRU_FAST_ISA {
namespace {

// Rows or tiles whose epilogues run side by side: what one waits for hides in the others.
constexpr int kItems = 4;

// sum[i][n] += half HALF of the words at `a` and at `panels`, as dot_tiles() has them.
template <Weights P, int HALF, int NV, int ROWS, int N>
GRU_INLINE void add_half(const uint32_t* a, int64_t row_stride, const uint32_t* panels,
                         int64_t panel_stride, Sum<P> (&sum)[ROWS][N]) {
  constexpr int W = kLanes<float>;
  // Each half reads the words anew, and the mask each time: compilers would keep them.
  asm("" : "+r"(a), "+r"(panels));
  auto half_of = [](Words word) GRU_MEMBER_LAMBDA {
    const Words* mask = &kHighHalves;
    asm("" : "+r"(mask));
    return Dot<P>::template half<HALF>(word, *mask);
  };
  Sum<P> weight[N];
#pragma GCC unroll 12
  for (int n = 0; n < N; ++n) {
    weight[n] = half_of(load_words(panels + (n / NV) * panel_stride + (n % NV) * W));
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
    // Compilers shift the number first, and then bring it from one kind of register to the other.
    Words word = a[i * row_stride] - Words{};
    asm("" : "+x"(word));
    const Sum<P> row = half_of(word);
#pragma GCC unroll 12
    for (int n = 0; n < N; ++n) sum[i][n] += weight[n] * row;
  }
}

// out[(i * NT + tile) * NV + v], as product() of tile.h.
template <Weights P, int ROWS, int NT, int NV>
void dot_tiles(const uint32_t* a, int64_t row_stride, const uint32_t* panels, int64_t words,
               Sum<P>* out) {
  if constexpr (P == Weights::kFloat32) {
    product<float, ROWS, NT, NV>({reinterpret_cast<const float*>(a), row_stride}, 0,
                                 reinterpret_cast<const float*>(panels), words, out);
  } else {
    constexpr int W = kLanes<float>;
    constexpr int N = NT * NV;
    const int64_t panel_stride = words * NV * W;
    Sum<P> sum[ROWS][N] = {};
    for (int64_t k = 0; k < words; ++k) {
      const uint32_t* at = panels + k * (NV * W);
      if constexpr (P == Weights::kBFloat16 && kHalfByHalf && ROWS > kMostRowsOfSix) {
        add_half<P, 0, NV>(a + k, row_stride, at, panel_stride, sum);
        add_half<P, 1, NV>(a + k, row_stride, at, panel_stride, sum);
        continue;
      }
      Words weight[N];
#pragma GCC unroll 12
      for (int n = 0; n < N; ++n) {
        weight[n] = load_words(at + (n / NV) * panel_stride + (n % NV) * W);
      }
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i) {
        const auto row = Dot<P>::ready(a[i * row_stride + k]);
#if defined(__aarch64__)
        if (i > 0) load_after(a, sum[i - 1]);
#endif
#pragma GCC unroll 12
        for (int n = 0; n < N; ++n) Dot<P>::add(sum[i][n], weight[n], row);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 12
      for (int n = 0; n < N; ++n) out[i * N + n] = sum[i][n];
    }
  }
}

template <Weights P>
using DotTiles = void (*)(const uint32_t*, int64_t, const uint32_t*, int64_t, Sum<P>*);

template <Weights P, int ROWS, int NV, int NT>
DotTiles<P> pick_tiles(int tiles) {
  if constexpr (NT > 1) {
    if (tiles < NT) return pick_tiles<P, ROWS, NV, NT - 1>(tiles);
  }
  return dot_tiles<P, ROWS, NT, NV>;
}

// Few rows need several tiles abreast to hide the latency of the sums; a single row of int8 no more
// than that, so that panels are small beside the first cache (see multiply).
template <Weights P>
constexpr int most_abreast(int rows, int vectors) {
  const int sums = rows > kMostRowsOfSix ? 3 : rows > 1 || P == Weights::kInt8 ? 6 : 12;
  return sums / vectors < 8 ? sums / vectors : 8;
}

template <Weights P, int NV>
DotTiles<P> pick_dot(int rows, int tiles) {
  return for_rows(rows, [=]<int ROWS>(std::integral_constant<int, ROWS>) {
    return pick_tiles<P, ROWS, NV, most_abreast<P>(ROWS, NV)>(tiles);
  });
}

// Which rows and tiles the N items of an epilogue are: neighbours in one of the two.
struct Items {
  int64_t row, tile;
  int row_step, tile_step;
  GRU_MEMBER int64_t row_of(int j) const { return row + j * row_step; }
  GRU_MEMBER int64_t tile_of(int j) const { return tile + j * tile_step; }
};

// values[v][j] is sum v of item j; the items lie `stride` sums apart.
template <Weights P, int N, int COUNT>
GRU_INLINE void value_items(const Panels& panels, const Sum<P>* sums, int64_t stride, Items items,
                            Vec<float> (&values)[COUNT][N]) {
  constexpr int W = kLanes<float>;
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) {
#pragma GCC unroll 3
    for (int v = 0; v < COUNT; ++v) {
      if constexpr (P == Weights::kInt8) {
        const int64_t at = (items.tile_of(j) * COUNT + v) * W;
        Ints sum = sums[j * stride + v];
        if (kBiasedBytes) {
          sum -= reinterpret_cast<Ints>(
              load_words(reinterpret_cast<const uint32_t*>(panels.offset + at)));
        }
        values[v][j] = __builtin_convertvector(sum, Vec<float>) * load(panels.scale + at);
      } else {
        values[v][j] = sums[j * stride + v];
      }
    }
  }
}

// epilogue(items, values) of value_items().
template <Weights P, int N, int COUNT, class Epilogue>
GRU_INLINE void finish_items(const Panels& panels, const Sum<P>* sums, int64_t stride, Items items,
                             Epilogue epilogue) {
  Vec<float> values[COUNT][N];
  value_items<P, N, COUNT>(panels, sums, stride, items, values);
  epilogue(items, values);
}

// The first `count` items from `items` on, as many at a time as there are left.
template <Weights P, int N, int COUNT, class Epilogue>
GRU_INLINE void finish_all(const Panels& panels, const Sum<P>* sums, int64_t stride, int count,
                           Items items, Epilogue epilogue) {
  int j = 0;
  for (; j + N <= count; j += N) {
    finish_items<P, N, COUNT>(panels, sums + j * stride, stride, items, epilogue);
    items.row += N * items.row_step;
    items.tile += N * items.tile_step;
  }
  if constexpr (N > 1) {
    finish_all<P, N / 2, COUNT>(panels, sums + j * stride, stride, count - j, items, epilogue);
  }
}

}  // namespace
}  // namespace GRU_FAST_ISA
}  // namespace gru_fast
