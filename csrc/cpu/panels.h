// SPDX-License-Identifier: Apache-2.0
// Packing weights and rows into panels for product() (tile.h).
#pragma once
#include "vec.h"

namespace gru_fast {
namespace GRU_FAST_ISA {
namespace {

constexpr int64_t kUnitPad = 16;  // padded rows hold a multiple of this many units

constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
template <class Real>
constexpr int64_t tiles_of(int64_t units) {
  return (units + kLanes<Real> - 1) / kLanes<Real>;
}
// How many of the lanes of a tile are real units.
template <class Real>
GRU_INLINE int lanes_of(int64_t tile, int64_t units) {
  const int64_t left = units - tile * kLanes<Real>;
  return left < kLanes<Real> ? static_cast<int>(left) : kLanes<Real>;
}

// to[word * to_stride + lane] = word `word` of rows[lane], zero in the lanes from n on and in the
// half of the last word that no k fills. to_stride is in elements.
template <class Real>
void pack_transposed(const Real* rows, int64_t row_stride, int n, int64_t K, Real* to,
                     int64_t to_stride) {
  constexpr int W = kLanes<Real>;
  constexpr int P = kPack<Real>;
  int64_t k = 0;
  if (n == W) {
    for (; k + W * P <= K; k += W * P) {
      Vec<Real> block[W];
      load_transposed(rows + k, row_stride, block);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) store_words(to + (k / P + i) * to_stride, block[i]);
    }
  }
  for (; k < K; k += W * P) {
    const int columns = K - k < W * P ? static_cast<int>(K - k) : W * P;
    Vec<Real> block[W];
    load_some_transposed(rows + k, row_stride, n, columns, block);
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      if (i * P < columns) store_words(to + (k / P + i) * to_stride, block[i]);
    }
  }
}

// The n weight rows of one unit tile for one of `count` gates, which are side by side:
// [word][count][lanes].
template <class Real>
GRU_INLINE void pack_gate(const Real* rows, int64_t stride, int n, int64_t K, int count, int gate,
                          Real* panel) {
  constexpr int kWords = kLanes<Real> * kPack<Real>;
  pack_transposed(rows, stride, n, K, panel + gate * kWords, count * kWords);
}
// The same for all gates, gate_rows apart.
template <class Real>
void pack_gates(const Real* weight, int64_t gate_rows, int64_t H, int64_t K, int count,
                int64_t tile, Real* panel) {
  const int n = lanes_of<Real>(tile, H);
  for (int i = 0; i < count; ++i) {
    pack_gate(weight + (i * gate_rows + tile * kLanes<Real>)*K, K, n, K, count, i, panel);
  }
}

// The words that stand for kPack neighbouring rows of a row-major block, of which `rows` exist.
template <class Real>
GRU_INLINE Vec<Real> row_words(const Real* p, int64_t, int64_t) {
  return load(p);
}
#if defined(__AVX512BF16__)
GRU_INLINE Vec<BFloat16> row_words(const BFloat16* p, int64_t row_stride, int64_t rows) {
  HalfWords words = spread(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  if (rows > 1) {
    words |= spread(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + row_stride))) << 16;
  }
  return reinterpret_cast<Vec<BFloat16>>(words);
}
#endif

// Writes the words that stand for kPack rows of a right-hand operand: [word][lanes].
template <class Real>
GRU_INLINE void store_rows(Real* to, const Vec<Real> (&rows)[kPack<Real>]) {
  store(to, rows[0]);
}
#if defined(__AVX512BF16__)
GRU_INLINE void store_rows(BFloat16* to, const Vec<BFloat16> (&rows)[2]) {
  const HalfWords words = spread(narrow(rows[0])) | spread(narrow(rows[1])) << 16;
  store_words(to, reinterpret_cast<Vec<float>>(words));
}
#endif

// `count` column tiles of a row-major block (rows, columns), tile_stride apart: [word][lanes], zero
// from `rows` to padded_rows. Tiles are the inner loop, so that the block is read along its rows.
template <class Real>
void pack_columns(const Real* block, int64_t rows, int64_t columns, int64_t first_tile,
                  int64_t count, int64_t padded_rows, Real* to, int64_t tile_stride) {
  constexpr int W = kLanes<Real>;
  constexpr int P = kPack<Real>;
  const int last_lanes = lanes_of<Real>(first_tile + count - 1, columns);
  for (int64_t k = 0; k < padded_rows; k += P) {
    const Real* row = block + k * columns + first_tile * W;
    for (int64_t tile = 0; tile < count; ++tile) {
      const int n = tile + 1 == count ? last_lanes : W;
      Real* const at = to + tile * tile_stride + k * W;
      if (n == W && k < rows) {
        store_words(at, row_words(row + tile * W, columns, rows - k));
        continue;
      }
      Vec<Real> word[P] = {};
      for (int i = 0; i < P && k + i < rows; ++i) word[i] = load_n(row + i * columns + tile * W, n);
      store_rows(at, word);
    }
  }
}

template <class Real>
void fill_zero(Real* to, int64_t count) {
  std::memset(to, 0, static_cast<size_t>(count) * sizeof(Real));
}

// Hands out consecutive pieces of the scratch block, each aligned to 64 bytes.
class Layout {
 public:
  GRU_MEMBER explicit Layout(void* base) : base_(reinterpret_cast<uintptr_t>(base)) {}
  template <class Real>
  GRU_MEMBER Real* take(int64_t count) {
    Real* piece = reinterpret_cast<Real*>(base_ + used_);
    used_ += round_up(count * static_cast<int64_t>(sizeof(Real)), 64);
    return piece;
  }
  GRU_MEMBER int64_t used() const { return used_; }

 private:
  uintptr_t base_;
  int64_t used_ = 0;
};

}  // namespace
}  // namespace GRU_FAST_ISA
}  // namespace gru_fast
