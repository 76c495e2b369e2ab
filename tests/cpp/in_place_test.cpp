// SPDX-License-Identifier: Apache-2.0
// Products with weights where they lie: at every pace, of which a processor takes one or two, they
// have the bits of the product of packed weights, and read nothing beyond either operand. Exits
// non-zero on a fault.
#define GRU_FAST_ISA tested
#include "cpu/in_place.h"

#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

using namespace gru_fast;
using namespace gru_fast::tested;

namespace {

std::mt19937 generator(1);

template <class Real>
std::vector<Real> normal(int64_t count) {
  std::normal_distribution<float> draw;
  std::vector<Real> values;
  for (int64_t i = 0; i < count; ++i) {
    if constexpr (std::is_same_v<Real, BFloat16>) {
      values.push_back({bfloat16_bits(draw(generator))});
    } else if constexpr (std::is_same_v<Real, Float16>) {
      values.push_back({float16_bits(draw(generator))});
    } else {
      values.push_back(draw(generator));
    }
  }
  return values;
}

template <class Real, class Stored>
void compare(int64_t rows, int vectors, int64_t H, int64_t K) {
  constexpr int W = kLanes<Real>;
  using Number = Compute<Real>;
  const int64_t tiles = tiles_of<Real>(H), width = tiles * vectors * W;
  constexpr bool kNarrower = !std::is_same_v<Real, Stored>;
  const std::vector<Real> operand = normal<Real>(rows * K);
  const Operand<Real> a{operand.data(), K};
  // Weight rows, one behind the other, and as they lie: not all of them so.
  const std::vector<Stored> rows_given = normal<Stored>(vectors * H * K);
  std::vector<Real> weight(rows_given.size());
  const int64_t stride = K + H % 3;
  std::vector<Stored> lying((vectors * H - 1) * stride + K);
  for (int64_t row = 0; row < vectors * H; ++row) {
    for (int64_t k = 0; k < K; ++k) {
      const Stored number = lying[row * stride + k] = rows_given[row * K + k];
      if constexpr (kNarrower) {
        widen(kNarrow<Stored>, &number.bits, &weight[row * K + k], 1);
      } else {
        weight[row * K + k] = number;
      }
    }
  }

  auto into = [&](std::vector<Number>& sums) {
    return row_by_row<Real>([&](int64_t row, int64_t tile, const Vec<Real>* from) {
      for (int v = 0; v < vectors; ++v) {
        const int64_t at = row * width + (tile * vectors + v) * W;
        store_n(sums.data() + at, from[v], lanes_of<Real>(tile, H));
      }
    });
  };
  std::vector<Number> expected(rows * width);
  std::vector<Real> panels(kMostTilesAbreast * packed_k<Real>(K) * vectors * W);
  sweep<Real>(
      a, rows, K, vectors, 0, tiles, false,
      [&](int64_t tile, int count) {
        const int64_t size = packed_k<Real>(K) * vectors * W;
        for (int i = 0; i < count; ++i) {
          pack_gates(weight.data(), H, H, K, vectors, tile + i, panels.data() + i * size);
        }
        return panels.data();
      },
      into(expected));
  for (Pace pace : {Pace::kTwoTiles, Pace::kTwoBlocks, Pace::kOneAhead, Pace::kTwoAhead}) {
    std::vector<Number> found(rows * width);
    sweep_in_place<Real>(
        a, rows, {K, stride, kNarrower ? kNarrow<Stored> : Narrow::kNone, pace}, vectors, 0, tiles,
        [&](int64_t tile, int v) { return lying.data() + (v * H + tile * W) * stride; },
        [&](int64_t tile) { return lanes_of<Real>(tile, H); }, into(found));
    if (std::memcmp(expected.data(), found.data(), found.size() * sizeof(Number)) == 0) continue;
    std::fprintf(stderr, "other bits: %zu bytes a number, pace %d, rows %d, vectors %d, %d x %d\n",
                 sizeof(Stored), static_cast<int>(pace), static_cast<int>(rows), vectors,
                 static_cast<int>(H), static_cast<int>(K));
    std::exit(1);
  }
}

template <class Real, class Stored = Real>
void compare_sizes() {
  for (int64_t K : {1, 7, 16, 31, 33, 100, 255, 256, 257, 300, 512, 530, 800, 1024, 1061}) {
    for (int64_t H : {1, 8, 16, 17, 32, 40, 64, 79}) {
      for (int vectors = 1; vectors <= 3; ++vectors) {
        for (int64_t rows = 1; rows <= kMaxRowsInPlace; ++rows)
          compare<Real, Stored>(rows, vectors, H, K);
      }
    }
  }
}

}  // namespace

int main() {
  compare_sizes<float>();
  compare_sizes<float, BFloat16>();
  compare_sizes<float, Float16>();
  compare_sizes<double>();
#ifdef __AVX512BF16__
  compare_sizes<BFloat16>();
#endif
  std::puts("ok");
}
