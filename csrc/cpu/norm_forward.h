// SPDX-License-Identifier: Apache-2.0
// The forward scan of the layer-normalised GRU. The norm needs all 3H products of a row before the
// first gate, so a step has two phases: products into a buffer, then statistics and gates. Members
// that split the units of a row meet between the phases, and each adds up the statistics of the
// whole row itself, in one order: no bit depends on the split.
#pragma once
#include "gate_math.h"
#include "gate_panels.h"
#include "norm_problem.h"
#include "schedule.h"
#include "team.h"

namespace gru_fast {
namespace GRU_FAST_ISA {
namespace {

// Rows of a round: members ask before each whether to go on.
constexpr int64_t kRoundRows = 64;

GRU_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
GRU_INLINE double square_root(double x) { return __builtin_sqrt(x); }

// The rows of a member: whole blocks, as no rows are ranked here.
GRU_INLINE Range rows_of(const Share& share, int64_t B) {
  return {share.ranks.first, share.ranks.first + share.ranks.below(B)};
}
template <class Real>
GRU_INLINE bool is_held(const Problem<Real>& p, int64_t t, int64_t b) {
  return p.lengths != nullptr && t >= p.lengths[b];
}

template <class Real>
GRU_INLINE Real sum_of_lanes(Vec<Real> a, Vec<Real> b, Vec<Real> c) {
  const Vec<Real> v = a + b + c;
  double total = 0;
  for (int i = 0; i < kLanes<Real>; ++i) total += v[i];
  return static_cast<Real>(total);
}

template <class Real>
struct NormStats {
  Real mean, rstd;
};

// Equation (18) of one row u: three gates of `tiles` tiles, zero in the lanes beyond H.
template <class Real>
NormStats<Real> norm_stats(const Real* u, int64_t tiles, int64_t H, Real eps) {
  constexpr int W = kLanes<Real>;
  using V = Vec<Real>;
  const int64_t stride = tiles * W;
  V sum[3] = {};
  for (int64_t tile = 0; tile < tiles; ++tile) {
    for (int gate = 0; gate < 3; ++gate) sum[gate] += load(u + gate * stride + tile * W);
  }
  const Real count = static_cast<Real>(3 * H);
  const Real mean = sum_of_lanes<Real>(sum[0], sum[1], sum[2]) / count;
  V square[3] = {};
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int n = lanes_of<Real>(tile, H);
    for (int gate = 0; gate < 3; ++gate) {
      V d = load(u + gate * stride + tile * W) - mean;
      if (__builtin_expect(n < W, 0)) {
        for (int lane = n; lane < W; ++lane) d[lane] = 0;
      }
      square[gate] += d * d;
    }
  }
  const Real variance = sum_of_lanes<Real>(square[0], square[1], square[2]) / count;
  return {mean, Real(1) / square_root(variance + eps)};
}

template <class Real>
class NormForwardScan {
 public:
  static constexpr int W = kLanes<Real>;
  using V = Vec<Real>;

  NormForwardScan(const NormForward<Real>& f, int threads, int member, void* scratch)
      : f_(f),
        p_(f.in),
        rows_{f.in},
        tiles_(tiles_of<Real>(p_.H)),
        ld_(round_up(p_.H, kUnitPad) + kUnitPad) {
    const int64_t states = p_.G * p_.B * ld_;
    Layout layout(scratch);
    state_ = layout.take<Real>(2 * states);
    operand_ = p_.h_scale ? layout.take<Real>(2 * states) : state_;
    products_ = layout.take<Real>(p_.G * p_.B * 3 * tiles_ * W);
    const bool on_the_fly = p_.T == 1;
    const int64_t per_member = kMostVectorsAbreast * W * p_.H;
    Real* mine = layout.take<Real>(on_the_fly ? threads * per_member : 0) + member * per_member;
    panels_ = {p_.H, p_.H, p_.H, tiles_, 3, p_.weight_hh, mine, {}, nullptr};
    if (!on_the_fly) panels_.take(p_.G, layout);
    scratch_bytes_ = layout.used();
  }

  int64_t scratch_bytes() const { return scratch_bytes_; }

  void run(Team& team, int member) {
    share_ = share_of(member, team.size(), p_.G, p_.B, tiles_, p_.H, !panels_.packed, false);
    batch_ = rows_of(share_, p_.B);
    panels_.pack(part_of(p_.G * tiles_, member, team.size()));
    start();
    team.barrier(member);
    const int64_t steps_of_round = p_.B < kRoundRows ? kRoundRows / p_.B : 1;
    for (int64_t step = 0; step < p_.T; ++step) {
      const bool begins = step > 0 && step % steps_of_round == 0;
      if (begins && !team.goes_on(step / steps_of_round, share_.waits)) return;
      for (int64_t g = share_.groups.begin; g < share_.groups.end; ++g) multiply(g, step);
      if (share_.waits) team.barrier(member);
      for (int64_t g = share_.groups.begin; g < share_.groups.end; ++g) {
        for (int64_t b = batch_.begin; b < batch_.end; ++b) gates(g, step, b);
      }
      if (share_.waits) team.barrier(member);
    }
  }

 private:
  GRU_MEMBER int64_t at(int64_t step, int64_t g, int64_t b, int64_t tile) const {
    return (step % 2 * p_.G * p_.B + g * p_.B + b) * ld_ + tile * W;
  }
  GRU_MEMBER Real* products(int64_t g, int64_t b) const {
    return products_ + (g * p_.B + b) * 3 * tiles_ * W;
  }

  // Makes h the state that `step` starts from.
  GRU_MEMBER void enter(int64_t step, int64_t g, int64_t b, int64_t tile, V h) {
    const int n = lanes_of<Real>(tile, p_.H);
    const int64_t t = rows_.time(g, step);
    if (rows_.reset(g, t, b)) h = load_or_zero(rows_.reset_row(g, b), tile * W, n);
    store(state_ + at(step, g, b, tile), h);
    if (p_.h_scale != nullptr) {
      const V scale = load_n(p_.h_scale + (b * p_.G + g) * p_.H + tile * W, n);
      store(operand_ + at(step, g, b, tile), h * scale);
    }
  }

  void start() {
    for (int64_t g = share_.groups.begin; g < share_.groups.end; ++g) {
      for (int64_t b = batch_.begin; b < batch_.end; ++b) {
        for (int64_t tile = share_.tiles.begin; tile < share_.tiles.end; ++tile) {
          const Real* h0 = p_.h0 + (g * p_.B + b) * p_.H + tile * W;
          enter(0, g, b, tile, load_n(h0, lanes_of<Real>(tile, p_.H)));
        }
      }
    }
  }

  // Equation (17) for the rows and tiles of this member.
  void multiply(int64_t g, int64_t step) const {
    const Real* operand = operand_ + at(step, g, batch_.begin, 0);
    panels_.multiply(
        {operand, ld_}, batch_.size(), g, share_.tiles, step % 2 != 0,
        row_by_row<Real>([&](int64_t row, int64_t tile, const V* sums) GRU_MEMBER_LAMBDA {
          Real* to = products(g, batch_.begin + row) + tile * W;
          for (int gate = 0; gate < 3; ++gate) {
            store(to + gate * tiles_ * W, sums[gate]);
          }
        }));
  }

  // Equations (18) to (21) and (6) for one row and the tiles of this member.
  void gates(int64_t g, int64_t step, int64_t b) {
    const int64_t t = rows_.time(g, step), row = (t * p_.B + b) * p_.G + g;
    const Real* u = products(g, b);
    const NormStats<Real> stats = norm_stats<Real>(u, tiles_, p_.H, f_.eps);
    const bool held = is_held(p_, t, b);
    if (f_.rstd != nullptr && share_.tiles.begin == 0 && share_.tiles.size() > 0) {
      f_.rstd[row] = held ? Real(0) : stats.rstd;
    }
    const Real* a = rows_.input_row(g, t, b);
    const Real* gamma = f_.gamma + g * 3 * p_.H;
    const Real* const bias = p_.bias_hh[g];
    for (int64_t tile = share_.tiles.begin; tile < share_.tiles.end; ++tile) {
      const int n = lanes_of<Real>(tile, p_.H);
      const int64_t unit = tile * W;
      V v[3], k[3];
      for (int gate = 0; gate < 3; ++gate) {
        v[gate] = (load(u + gate * tiles_ * W + unit) - stats.mean) * stats.rstd;
        k[gate] = v[gate] * load_n(gamma + gate * p_.H + unit, n) +
                  load_or_zero(bias, gate * p_.H + unit, n);
      }
      const V r = sigmoid<Real>(load_n(a + unit, n) + k[0]);
      const V z = sigmoid<Real>(load_n(a + p_.H + unit, n) + k[1]);
      const V c = tanh<Real>(load_n(a + 2 * p_.H + unit, n) + r * k[2]);
      if (f_.workspace != nullptr) {
        Real* to = f_.workspace + row * kNormSlots * p_.H + unit;
        const V slots[kNormSlots] = {v[0], v[1], v[2], r, z, c};
        for (int slot = 0; slot < kNormSlots; ++slot) {
          store_n(to + slot * p_.H, held ? V{} : slots[slot], n);
        }
      }
      finish(step, row, g, b, tile, held, z, c);
    }
  }

  GRU_MEMBER void finish(int64_t step, int64_t row, int64_t g, int64_t b, int64_t tile, bool held,
                         V z, V c) {
    const int n = lanes_of<Real>(tile, p_.H);
    const V previous = load(state_ + at(step, g, b, tile));
    const V h = held ? previous : c + z * (previous - c);
    store_n(f_.output + row * p_.H + tile * W, held ? V{} : h, n);
    if (step + 1 == p_.T) {
      store_n(f_.h_n + (g * p_.B + b) * p_.H + tile * W, h, n);
    } else {
      enter(step + 1, g, b, tile, h);
    }
  }

  const NormForward<Real>& f_;
  const Problem<Real>& p_;
  const Schedule<Real> rows_;
  const int64_t tiles_, ld_;
  Real *state_, *operand_, *products_;
  GatePanels<Real> panels_{};
  int64_t scratch_bytes_;
  Share share_{};
  Range batch_{};
};

template <class Real>
int64_t norm_forward_scratch_bytes(const NormForward<Real>& f, int threads) {
  return NormForwardScan<Real>(f, threads, 0, nullptr).scratch_bytes();
}

template <class Real>
void norm_forward(const NormForward<Real>& f, Team& team, int threads, int member, void* scratch) {
  NormForwardScan<Real>(f, threads, member, scratch).run(team, member);
}

}  // namespace
}  // namespace GRU_FAST_ISA
}  // namespace gru_fast
