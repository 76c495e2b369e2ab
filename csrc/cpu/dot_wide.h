// SPDX-License-Identifier: Apache-2.0
// Products of many rows with bfloat16 weights where taking words apart costs instructions of its
// own: rows become float32 once for all weights, the weights of a few tiles once for all rows. Each
// sum adds the same products in the same order as in dot.h, so this changes no bit either.
#pragma once
#include "dot.h"

namespace gru_fast {
namespace GRU_FAST_ISA {
namespace {

// Where it was measured to pay: on x86 without AVX-512.
#if defined(__SSE2__) && !defined(__AVX512F__)
template <Weights P>
constexpr bool kWidens = P == Weights::kBFloat16;
#else
template <Weights P>
constexpr bool kWidens = false;
#endif
// Fewer do not pay for writing the weights and reading them again; nor do nine, which are blocks of
// three, whose sums leave registers for the halves.
GRU_INLINE bool pays_to_widen(int64_t rows) { return rows >= 2 * kRowBlock && rows != 9; }

// A product of many rows has at most three vectors of weights side by side: see most_abreast().
constexpr int kWideVectors = 3;

// float32 copies of both sides of a product.
struct Widened {
  float* rows;
  int64_t row_stride;
  float* weights;  // [tile][k][gate][lane]
};

// Empty where nothing is widened.
template <Weights P>
using WideRoom = std::conditional_t<kWidens<P>, Widened, Nothing>;

// For up to `rows` rows of K numbers.
GRU_INLINE Widened take_widened(int64_t rows, int64_t K, Layout& layout) {
  const int64_t even = round_up(K, 2);
  // One line more than a power of two, lest the rows of a block meet in the same sets of a cache.
  Widened to{nullptr, round_up(even, kUnitPad) + kUnitPad, nullptr};
  to.rows = layout.take<float>(rows * to.row_stride);
  to.weights = layout.take<float>(even * kWideVectors * kLanes<float>);
  return to;
}

inline void widen_rows(const uint32_t* a, int64_t row_stride, int64_t rows, int64_t words,
                       const Widened& to) {
  for (int64_t row = 0; row < rows; ++row) {
    const uint32_t* __restrict from = a + row * row_stride;
    float* __restrict at = to.rows + row * to.row_stride;
    for (int64_t k = 0; k < words; ++k) {
      // One copy of both would keep compilers from using vectors.
      const uint32_t even = from[k] << 16, odd = from[k] & kHighHalves[0];
      std::memcpy(at + 2 * k, &even, sizeof even);
      std::memcpy(at + 2 * k + 1, &odd, sizeof odd);
    }
  }
}

// `words` is the number of k words of all tiles together, which lie one after the other.
template <Weights P, int COUNT>
GRU_INLINE void widen_weights(const uint32_t* from, int64_t words, float* to) {
  constexpr int W = kLanes<float>;
  for (int64_t k = 0; k < words; ++k) {
#pragma GCC unroll 3
    for (int n = 0; n < COUNT; ++n) {
      const Words word = load_words(from + (k * COUNT + n) * W);
      store(to + (2 * k * COUNT + n) * W, Dot<P>::template half<0>(word));
      store(to + ((2 * k + 1) * COUNT + n) * W, Dot<P>::template half<1>(word));
    }
  }
}

// As dot_tiles(). product() of tile.h, which takes any strides and blocks of k, is 5 to 8% slower.
template <int ROWS, int NT, int NV>
void wide_tiles(const float* a, int64_t row_stride, const float* panels, int64_t K,
                Vec<float>* out) {
  constexpr int W = kLanes<float>;
  constexpr int N = NT * NV;
  static_assert(N <= kWideVectors);
  Vec<float> sum[ROWS][N] = {};
  for (int64_t k = 0; k < K; ++k) {
    Vec<float> weight[N];
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) {
      weight[n] = load(panels + (n / NV * K + k) * (NV * W) + n % NV * W);
    }
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) {
      const float row = a[i * row_stride + k];
#pragma GCC unroll 3
      for (int n = 0; n < N; ++n) sum[i][n] += weight[n] * row;
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) out[i * N + n] = sum[i][n];
  }
}

using WideTiles = void (*)(const float*, int64_t, const float*, int64_t, Vec<float>*);

template <int NV>
WideTiles pick_wide(int rows, int tiles) {
  return for_rows(rows, [=]<int ROWS>(std::integral_constant<int, ROWS>) -> WideTiles {
    if constexpr (NV == 1) {
      if (tiles == 3) return wide_tiles<ROWS, 3, NV>;
      if (tiles == 2) return wide_tiles<ROWS, 2, NV>;
    }
    return wide_tiles<ROWS, 1, NV>;
  });
}

}  // namespace
}  // namespace GRU_FAST_ISA
}  // namespace gru_fast
