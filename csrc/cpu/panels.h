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

// to[k * to_stride + lane] = rows[lane][k], zero in the lanes from n on.
template <class Real>
void pack_transposed(const Real* rows, int64_t row_stride, int n, int64_t K, Real* to,
                     int64_t to_stride) {
  constexpr int W = kLanes<Real>;
  int64_t k = 0;
  if (n == W) {
    for (; k + W <= K; k += W) {
      Vec<Real> block[W];
      load_transposed(rows + k, row_stride, block);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) store(to + (k + i) * to_stride, block[i]);
    }
  }
  for (; k < K; ++k) {
    Vec<Real> column{};
    for (int lane = 0; lane < n; ++lane) column[lane] = rows[lane * row_stride + k];
    store(to + k * to_stride, column);
  }
}

// The weight rows of one unit tile for `count` gates, side by side: [K][count][lanes].
template <class Real>
void pack_gates(const Real* weight, int64_t H, int64_t K, const int* gates, int count, int64_t tile,
                Real* panel) {
  constexpr int W = kLanes<Real>;
  for (int i = 0; i < count; ++i) {
    pack_transposed(weight + (gates[i] * H + tile * W) * K, K, lanes_of<Real>(tile, H), K,
                    panel + i * W, count * W);
  }
}

// One column tile of a row-major block (rows, columns): [rows][lanes].
template <class Real>
void pack_columns(const Real* block, int64_t rows, int64_t columns, int64_t tile, Real* panel) {
  constexpr int W = kLanes<Real>;
  const int n = lanes_of<Real>(tile, columns);
  for (int64_t k = 0; k < rows; ++k)
    store(panel + k * W, load_n(block + k * columns + tile * W, n));
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
