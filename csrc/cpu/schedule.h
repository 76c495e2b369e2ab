// SPDX-License-Identifier: Apache-2.0
// The order of the steps, and which rows are held or reset at a step.
#pragma once
#include "panels.h"
#include "problem.h"
#include "share.h"

namespace gru_fast {
namespace GRU_FAST_ISA {
namespace {

// How many steps the backward pass goes back at a time: so many that have 256 rows, if there are.
template <class Real>
GRU_INLINE int64_t steps_of_chunk(const Problem<Real>& p) {
  constexpr int64_t kRows = 256;
  const int64_t steps = p.B >= kRows ? 1 : (kRows + p.B - 1) / p.B;
  return steps < p.T ? steps : p.T;
}

// Which rows are valid at a step (`alive`), and the state p that each of them starts from.
template <class Real>
struct Schedule {
  const Problem<Real>& p;

  GRU_MEMBER int64_t time(int64_t g, int64_t step) const {
    return p.reverse[g] ? p.T - 1 - step : step;
  }
  GRU_MEMBER int64_t length(int64_t b) const { return p.lengths ? p.lengths[b] : p.T; }
  // Rows are computed by rank, the longest first: those alive at a time are the first ranks, and
  // the others cost nothing.
  GRU_MEMBER int64_t row(int64_t rank) const { return p.order ? p.order[rank] : rank; }
  GRU_MEMBER int64_t alive(int64_t t) const {
    return p.order ? p.alive_before[t + 1] - p.alive_before[t] : p.B;
  }
  GRU_MEMBER int64_t alive_at(int64_t g, int64_t step) const { return alive(time(g, step)); }
  // How many (step, row) pairs of these steps are not padding.
  GRU_MEMBER int64_t alive(int64_t g, int64_t begin, int64_t end) const {
    if (p.order == nullptr) return (end - begin) * p.B;
    return p.reverse[g] ? p.alive_before[p.T - begin] - p.alive_before[p.T - end]
                        : p.alive_before[end] - p.alive_before[begin];
  }
  GRU_MEMBER int64_t first_step(int64_t g, int64_t b) const {
    return p.reverse[g] ? p.T - length(b) : 0;
  }
  GRU_MEMBER bool last(int64_t g, int64_t t, int64_t b) const {
    return p.reverse[g] ? t == 0 : t + 1 == length(b);
  }
  // Where the rows of a time begin in what has (T, B) in front.
  GRU_MEMBER int64_t start(int64_t t) const { return p.packed ? p.alive_before[t] : t * p.B; }
  // A valid step before which the state is replaced.
  GRU_MEMBER bool reset(int64_t g, int64_t t, int64_t b) const {
    const uint8_t* const mask = resets(g, t);
    return mask != nullptr && mask[b] != 0 && (p.reverse[g] ? t + 1 : t) < length(b);
  }
  // Of a time, for all b, or null: whether the state is replaced before that step, if the step is
  // valid and, in reverse, not the row's first.
  GRU_MEMBER const uint8_t* resets(int64_t g, int64_t t) const {
    const int64_t from = p.reverse[g] ? t + 1 : t;
    return p.reset_mask == nullptr || from == p.T ? nullptr : p.reset_mask + from * p.B;
  }
  // Whether no row of the group, whatever its length, has a step before or after time t.
  GRU_MEMBER bool begins(int64_t g, int64_t t) const {
    return p.reverse[g] ? t + 1 == p.T : t == 0;
  }
  GRU_MEMBER bool ends(int64_t g, int64_t t) const { return p.reverse[g] ? t == 0 : t + 1 == p.T; }
  GRU_MEMBER const Real* reset_row(int64_t g, int64_t b) const {
    return p.reset_state ? p.reset_state + (g * p.B + b) * p.H : nullptr;
  }
  // The state that a valid step starts from; null means zero.
  GRU_MEMBER const Real* previous(const Real* output, int64_t g, int64_t t, int64_t b) const {
    if (reset(g, t, b)) return reset_row(g, b);
    const bool first = p.reverse[g] ? t + 1 == length(b) : t == 0;
    if (first) return p.h0 + p.layout.state(g, b);
    const int64_t before = p.reverse[g] ? t + 1 : t - 1;
    return output + ((start(before) + b) * p.G + g) * p.H;
  }
  // Of a tile, scaled as the recurrent product reads it.
  GRU_MEMBER Vec<Real> scaled_previous(const Real* output, int64_t g, int64_t t, int64_t b,
                                       int64_t tile) const {
    constexpr int W = kLanes<Real>;
    const int n = lanes_of<Real>(tile, p.H);
    const Vec<Real> h = load_or_zero(previous(output, g, t, b), tile * W, n);
    return p.h_scale ? h * load_n(p.h_scale + (b * p.G + g) * p.H + tile * W, n) : h;
  }
  GRU_MEMBER const Real* input_row(int64_t g, int64_t t, int64_t b) const {
    const int64_t before = p.packed ? p.alive_before[t] * p.x_stride_b : t * p.x_stride_t;
    return p.x + before + b * p.x_stride_b + g * p.x_stride_g;
  }
};

}  // namespace
}  // namespace GRU_FAST_ISA
}  // namespace gru_fast
