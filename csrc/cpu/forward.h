// SPDX-License-Identifier: Apache-2.0
// The forward scan: input product of a chunk of steps, then step by step the recurrent product with
// the gates in its epilogue. Each member computes what its own rows and units need, so the members
// meet only where hidden units are split: once a step, twice for reset_before.
#pragma once
#include <type_traits>

#include "dot_pairs.h"
#include "forward_rows.h"
#include "gate_panels.h"
#include "schedule.h"
#include "team.h"

namespace gru_fast {
namespace GRU_FAST_ISA {
namespace {

// Inputs that are projected together, at least a step of the batch: enough to read weight_ih
// seldom, few enough that gates_x stays in the cache until its steps come.
constexpr int64_t kProjectRows = 64;
constexpr int64_t kProjectRowsOfOne = 128;  // of a single sequence

// Packing weights beyond the second level of the cache takes as long as so many steps that read
// them as they lie: of rows that are multiplied in place, and of more rows.
constexpr int64_t kFarWeights = kVecBytes < 64 ? 5 << 19 : 4 << 20;  // as measured
constexpr int64_t kStepsInPlace = 4, kStepsByTile = 2;

// Rows whose gates are worked out side by side. With narrow registers a chain of operations takes
// longer than its arithmetic, and a processor looks ahead over no more than two; with wide ones it
// takes as long, and rows side by side gain nothing.
template <class Real>
constexpr int kTogether = kVecBytes <= 32 && sizeof(Real) == 4 ? 4 : 1;

template <class Real>
class ForwardScan {
 public:
  static constexpr int W = kLanes<Real>;
  using V = Vec<Real>;
  using Number = Compute<Real>;

  ForwardScan(const Forward<Real>& f, int threads, int member, void* scratch)
      : f_(f),
        p_(f.in),
        plain_(p_.lengths == nullptr && p_.reset_mask == nullptr && p_.h_scale == nullptr),
        m_(f, steps_at_once(p_.T, p_.B), threads) {
    const bool once = p_.T == 1;
    const bool few = once || has_few_steps(threads);
    const bool input_once = once || projects_once(threads);
    gathers_ = p_.order != nullptr || (input_once && !once && p_.B > 1);
    Layout layout(scratch);
    m_.take(layout);
    gathered_ = layout.take<Real>(gathers_ && p_.weight_ih ? threads * kProjectRows * p_.I : 0) +
                member * kProjectRows * p_.I;
    const int64_t most = p_.I > p_.H ? p_.I : p_.H;
    const int64_t panel = kMostVectorsAbreast * W * packed_k<Real>(most);
    Real* mine = layout.take<Real>(few || input_once ? threads * panel : 0) + member * panel;
    const int64_t wide = GatePanels<Real>::widened_size(most);
    Real* widened =
        layout.take<Real>(p_.weight_hh.is_narrow() ? threads * wide : 0) + member * wide;
    auto panels = [&](int gate, int count, StoredWeight<Real> weight, int64_t K, bool on_the_fly,
                      Groups<const Real> given) {
      const int64_t gate_rows = p_.layout.gate_rows;
      GatePanels<Real> made{
          gate_rows, p_.H,  K,       m_.tiles, count, weight.from(gate * gate_rows * K),
          mine,      given, nullptr, widened};
      if (!on_the_fly && !given) made.take(p_.G, layout);
      return made;
    };
    const int first = first_gates(p_.cell);
    first_ = panels(0, first, p_.weight_hh, p_.H, few, f.packed_hh);
    if (has_second_product(p_.cell)) {
      second_ = panels(first, 1, p_.weight_hh, p_.H, few, f.packed_hh.from(first_.size()));
    }
    if (p_.weight_ih) input_ = panels(0, m_.gates, p_.weight_ih, p_.I, input_once, f.packed_ih);
    scratch_bytes_ = layout.used();
  }

  int64_t scratch_bytes() const { return scratch_bytes_; }

  void run(Team& team, int member) {
    share_ = share(member, team.size(), !first_.packed);
    m_.settle(share_);
    const Range panels = part_of(p_.G * m_.tiles, member, team.size());
    first_.pack(panels);
    second_.pack(panels);
    input_.pack(panels);
    start();
    team.barrier(member);
    for (int64_t begin = 0; begin < p_.T; begin += m_.chunk) {
      if (begin > 0 && !team.goes_on(begin / m_.chunk, share_.waits)) return;
      const int64_t end = begin + m_.chunk < p_.T ? begin + m_.chunk : p_.T;
      for (int64_t g = share_.groups.begin; g < share_.groups.end; ++g) project(g, begin, end);
      for (int64_t step = begin; step < end; ++step) {
        for (int64_t g = share_.groups.begin; g < share_.groups.end; ++g) {
          if (plain_) {
            take_step<true>(g, step, step - begin);
          } else {
            take_step<false>(g, step, step - begin);
          }
        }
        if (share_.waits) team.barrier(member);
        if (!has_second_product(p_.cell)) continue;
        for (int64_t g = share_.groups.begin; g < share_.groups.end; ++g) {
          if (plain_) {
            step_candidate<true>(g, step, step - begin);
          } else {
            step_candidate<false>(g, step, step - begin);
          }
        }
        if (share_.waits) team.barrier(member);
      }
    }
  }

 private:
  template <bool PLAIN>
  using Rows = StepRows<Real, PLAIN>;

  static constexpr int64_t steps_at_once(int64_t T, int64_t B) {
    const int64_t rows = B == 1 ? kProjectRowsOfOne : kProjectRows;
    return B * T <= rows ? T : B >= rows ? 1 : rows / B;
  }

  // Whether the steps are so few that packing weight_hh takes longer than reading it as it lies.
  bool has_few_steps(int threads) const {
    const int64_t bytes = m_.gates * p_.H * p_.H * static_cast<int64_t>(sizeof(Real));
    const int64_t most = p_.B <= kMaxRowsInPlace ? kStepsInPlace : kStepsByTile;
    return bytes > kFarWeights && p_.T <= most && keeps_rows_together(threads);
  }

  // Whether all inputs are projected at once, so that each panel of weight_ih is used once.
  bool projects_once(int threads) const {
    if (p_.B == 1 && p_.order == nullptr) return m_.chunk == p_.T;
    return p_.B * p_.T <= kProjectRows && keeps_rows_together(threads);
  }

  // Members that each have some of the rows would all pack the same weights on the fly.
  bool keeps_rows_together(int threads) const {
    return threads == 1 || share(0, threads, false).ranks.below(p_.B) == p_.B;
  }

  Share share(int member, int members, bool once) const {
    return share_of(member, members, p_.G, p_.B, m_.tiles, p_.H, once, p_.order != nullptr);
  }

  // How many of this member's rows have a valid step at t.
  GRU_MEMBER int64_t alive(int64_t t) const { return share_.ranks.below(m_.rows.alive(t)); }

  void start() {
    for (int64_t g = share_.groups.begin; g < share_.groups.end; ++g) {
      for (int64_t i = 0; i < m_.own; ++i) {
        const int64_t b = m_.rows.row(share_.ranks[i]), length = m_.rows.length(b);
        for (int64_t tile = share_.tiles.begin; tile < share_.tiles.end; ++tile) {
          const int n = lanes_of<Real>(tile, p_.H);
          const int64_t offset = p_.layout.state(g, b) + tile * W;
          const V h = load_n(p_.h0 + offset, n);
          if (length == 0) {
            store_n(f_.h_n + offset, h, n);
          } else {
            m_.enter(m_.rows.first_step(g, b), g, i, b, tile, h);
          }
        }
        for (int64_t t = length; t < p_.T && !p_.packed; ++t) clear(g, t, b);
      }
    }
  }

  // The results of a step of padding, in the units of this member.
  void clear(int64_t g, int64_t t, int64_t b) {
    const int64_t first = share_.tiles.begin * W, end = share_.tiles.end * W;
    const int64_t units = (end < p_.H ? end : p_.H) - first;
    if (units <= 0) return;
    const int64_t at = m_.place(t, b, g);
    fill_zero(f_.output + at * p_.H + first, units);
    if (f_.workspace == nullptr) return;
    for (int slot = 0; slot < m_.slots; ++slot) {
      fill_zero(f_.workspace + (at * m_.slots + slot) * p_.H + first, units);
    }
  }

  // gates_x of a chunk: W_ih x, or what the caller projected, and the biases.
  void project(int64_t g, int64_t begin, int64_t end) {
    if (!p_.weight_ih) {
      copy_gates(g, begin, end);
    } else if (gathers_ && !lie_evenly(g)) {
      project_gathered(g, begin, end);
    } else {
      project_batch(g, begin, end);
    }
  }

  // Whether the inputs of all rows and steps lie as far from each other, in the order of steps.
  GRU_MEMBER bool lie_evenly(int64_t g) const {
    return p_.order == nullptr && m_.own == p_.B && !p_.reverse[g] &&
           p_.x_stride_t == p_.B * p_.x_stride_b;
  }

  // As many rows in one product as lie evenly: all of the chunk, else those of a sequence or of a
  // step, whichever are more.
  void project_batch(int64_t g, int64_t begin, int64_t end) {
    const int64_t count = m_.own;
    const int64_t steps = end - begin, stride_b = p_.x_stride_b;
    const int64_t stride_t = p_.reverse[g] ? -p_.x_stride_t : p_.x_stride_t;
    const Real* const x = m_.rows.input_row(g, m_.rows.time(g, begin), share_.ranks.first);
    auto rows = [&](const Real* from, int64_t stride, int64_t size, int64_t to, int64_t step) {
      project_rows(g, from, stride, size, [&](int64_t row) { return to + row * step; });
    };
    if (lie_evenly(g)) {
      rows(x, stride_b, steps * count, 0, 1);
    } else if (steps > count) {
      for (int64_t i = 0; i < count; ++i) rows(x + i * stride_b, stride_t, steps, i, count);
    } else {
      for (int64_t i = 0; i < steps; ++i) {
        rows(x + i * stride_t, stride_b, count, i * count, 1);
      }
    }
  }

  // b_ih, and the b_hh that may be added before the gate.
  GRU_MEMBER V input_bias(int64_t g, int gate, int64_t tile) const {
    const int n = lanes_of<Real>(tile, p_.H);
    const int64_t at = gate * p_.layout.gate_rows + tile * W;
    const bool separate = p_.cell == Cell::kResetAfter && gate == 2;
    return load_or_zero(p_.bias_ih[g], at, n) +
           load_or_zero(separate ? nullptr : p_.bias_hh[g], at, n);
  }

  void copy_gates(int64_t g, int64_t begin, int64_t end) {
    for (int64_t step = begin; step < end; ++step) {
      const int64_t t = m_.rows.time(g, step), rows = alive(t);
      for (int64_t i = 0; i < rows; ++i) {
        const Real* row = m_.rows.input_row(g, t, m_.rows.row(share_.ranks[i]));
        for (int64_t tile = share_.tiles.begin; tile < share_.tiles.end; ++tile) {
          const int n = lanes_of<Real>(tile, p_.H);
          Number* to = m_.gates_x(g, (step - begin) * m_.own + i, tile);
          for (int gate = 0; gate < m_.gates; ++gate) {
            store(to + gate * W,
                  load_n(row + gate * p_.H + tile * W, n) + input_bias(g, gate, tile));
          }
        }
      }
    }
  }

  // Rows of x that lie evenly; to_row(i) is the row of the chunk that row i belongs to.
  template <class ToRow>
  void project_rows(int64_t g, const Real* first, int64_t stride, int64_t count, ToRow to_row) {
    input_.multiply({first, stride}, count, g, share_.tiles, false,
                    [&](const Sums<Real>& sums) GRU_MEMBER_LAMBDA {
                      V bias[3];
                      for (int gate = 0; gate < m_.gates; ++gate) {
                        bias[gate] = input_bias(g, gate, sums.tile);
                      }
                      for (int i = 0; i < sums.rows; ++i) {
                        Number* to = m_.gates_x(g, to_row(sums.row + i), sums.tile);
                        for (int gate = 0; gate < m_.gates; ++gate) {
                          store(to + gate * W, sums.of(i)[gate] + bias[gate]);
                        }
                      }
                    });
  }

  // Rows that do not lie evenly, brought together first.
  void project_gathered(int64_t g, int64_t begin, int64_t end) {
    int64_t to_row[kProjectRows];
    int64_t count = 0;
    auto flush = [&]() {
      project_rows(g, gathered_, p_.I, count, [&](int64_t row) { return to_row[row]; });
      count = 0;
    };
    for (int64_t step = begin; step < end; ++step) {
      const int64_t t = m_.rows.time(g, step), rows = alive(t);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t b = m_.rows.row(share_.ranks[i]);
        std::memcpy(gathered_ + count * p_.I, m_.rows.input_row(g, t, b),
                    static_cast<size_t>(p_.I) * sizeof(Real));
        to_row[count++] = (step - begin) * m_.own + i;
        if (count == kProjectRows) flush();
      }
    }
    flush();
  }

  // Multiplies the states of this member's rows that are alive at a step; every other step
  // backwards, as what was read last is still in the cache.
  template <class Epilogue>
  GRU_MEMBER void multiply(const GatePanels<Real>& panels, const Real* operand, int64_t g,
                           int64_t step, Epilogue epilogue) {
    panels.multiply({operand, m_.ld}, alive(m_.rows.time(g, step)), g, share_.tiles, step % 2 != 0,
                    [&](const Sums<Real>& sums)
                        GRU_MEMBER_LAMBDA { rows_together<kTogether<Real>>(sums, epilogue); });
  }

  template <bool PLAIN>
  GRU_MEMBER void take_step(int64_t g, int64_t step, int64_t in_chunk) {
    if (p_.cell == Cell::kResetAfter) {
      if (first_.packed && alive(m_.rows.time(g, step)) == 1) {
        step_one_row<PLAIN>(g, step, in_chunk);
      } else {
        step_reset_after<PLAIN>(g, step, in_chunk);
      }
    } else if (p_.cell == Cell::kNoReset) {
      step_no_reset<PLAIN>(g, step, in_chunk);
    } else {
      step_reset_update<PLAIN>(g, step, in_chunk);
    }
  }

  // Gate after gate: the rows of a batch hide each other's chains, and r beside z, as close() has
  // them, takes 4% longer.
  template <bool PLAIN>
  __attribute__((noinline)) void step_reset_after(int64_t g, int64_t step, int64_t in_chunk) {
    const Rows<PLAIN> rows(m_, share_.ranks, g, step, in_chunk);
    const Real* const bias = p_.bias_hh.from(2 * p_.layout.gate_rows)[g];
    multiply(first_, m_.operand + m_.at(step, g, 0, 0), g, step,
             [&]<int N>(const Sums<Real>& at) GRU_MEMBER_LAMBDA {
               const int64_t tile = at.tile;
               V r[N], z[N], q[N], n[N];
               GRU_EACH(j) r[j] = at.of(j)[0] + load(rows.gates_x(at.row + j, tile));
               sigmoid<Real, N>(r, Nothing{});
               GRU_EACH(j) z[j] = at.of(j)[1] + load(rows.gates_x(at.row + j, tile) + W);
               sigmoid<Real, N>(z, Nothing{});
               const V b = load_or_zero(bias, tile * W, lanes_of<Real>(tile, p_.H));
               GRU_EACH(j) q[j] = at.of(j)[2] + b;
               GRU_EACH(j) n[j] = load(rows.gates_x(at.row + j, tile) + 2 * W) + r[j] * q[j];
               tanh<Real, N>(n, Nothing{});
               GRU_EACH(j) rows.leave(at.row + j, tile, q[j], r[j], z[j], n[j]);
             });
  }

  // As step_reset_after(), of a single row with packed weights. Every other step goes through the
  // tiles from the last to the first: what was read last is still in the cache.
  template <bool PLAIN>
  __attribute__((noinline)) void step_one_row(int64_t g, int64_t step, int64_t in_chunk) {
    const Rows<PLAIN> rows(m_, share_.ranks, g, step, in_chunk);
    const Real* const row = m_.operand + m_.at(step, g, 0, 0);
    const bool backwards = step % 2 != 0;
    Range tiles = share_.tiles;
    if constexpr (kPairs && !std::is_same_v<Real, double>) {
      if (p_.H <= kSumBlock && tiles.size() != 3) {  // three are best multiplied at once
        const Panels panels = first_.panels(g);
        Pairs<weights_of<Real>(), 3>(panels, tiles, backwards)
            .multiply(reinterpret_cast<const uint32_t*>(row),
                      [&](Items at, const V(&sums)[3][2], auto between)
                          GRU_MEMBER_LAMBDA { close<2>(rows, g, at.tile, sums, between); });
        tiles.begin = tiles.end - tiles.size() % 2;
      }
    }
    constexpr int64_t kAbreast = 4;
    for (int64_t left = tiles.size(), now; left > 0; left -= now) {
      now = left < kAbreast ? left : kAbreast;
      const int64_t tile = backwards ? tiles.begin + left - now : tiles.end - left;
      V sums[kAbreast * 3];
      pick_product<Real>(1, static_cast<int>(now), 3)({row, 0}, 0, first_.get(g, tile, 1), p_.H,
                                                      sums);
      close_all<kTogether<Real>>(rows, g, tile, sums, now);
    }
  }

  // close() of `count` neighbouring tiles, N at a time as long as there are so many.
  template <int N, bool PLAIN>
  GRU_MEMBER void close_all(const Rows<PLAIN>& rows, int64_t g, int64_t tile, const V* sums,
                            int64_t count) {
    for (; count >= N; count -= N) {
      V some[3][N];
      GRU_EACH(j) {
        for (int gate = 0; gate < 3; ++gate) some[gate][j] = sums[3 * j + gate];
      }
      close<N>(rows, g, tile, some);
      tile += N;
      sums += 3 * N;
    }
    if constexpr (N > 1) close_all<N / 2>(rows, g, tile, sums, count);
  }

  // What follows the products of N neighbouring tiles of the first row, from `tile` on.
  template <int N, bool PLAIN, class Between = Nothing>
  GRU_MEMBER void close(const Rows<PLAIN>& rows, int64_t g, int64_t tile, const V (&sums)[3][N],
                        Between between = {}) {
    const Real* const bias = p_.bias_hh.from(2 * p_.layout.gate_rows)[g];
    const Number* const gx = rows.gates_x(0, tile);
    V rz[2 * N], q[N], n[N];
    reset_after_gates<Real, N>(
        sums, [&](int j, int gate) GRU_MEMBER_LAMBDA { return load(gx + (3 * j + gate) * W); },
        [&](int j) GRU_MEMBER_LAMBDA {
          return load_or_zero(bias, (tile + j) * W, lanes_of<Real>(tile + j, p_.H));
        },
        rz, q, n, between);
    GRU_EACH(j) { rows.leave(0, tile + j, q[j], rz[j], rz[N + j], n[j]); }
  }

  template <bool PLAIN>
  __attribute__((noinline)) void step_no_reset(int64_t g, int64_t step, int64_t in_chunk) {
    const Rows<PLAIN> rows(m_, share_.ranks, g, step, in_chunk);
    multiply(first_, m_.operand + m_.at(step, g, 0, 0), g, step,
             [&]<int N>(const Sums<Real>& at) GRU_MEMBER_LAMBDA {
               V z[N], n[N];
               GRU_EACH(j) z[j] = at.of(j)[0] + load(rows.gates_x(at.row + j, at.tile));
               sigmoid<Real, N>(z, Nothing{});
               GRU_EACH(j) n[j] = at.of(j)[1] + load(rows.gates_x(at.row + j, at.tile) + W);
               tanh<Real, N>(n, Nothing{});
               GRU_EACH(j) {
                 rows.save(at.row + j, at.tile, 0, z[j]);
                 rows.save(at.row + j, at.tile, 1, n[j]);
                 rows.finish(at.row + j, at.tile, z[j], n[j]);
               }
             });
  }

  template <bool PLAIN>
  __attribute__((noinline)) void step_reset_update(int64_t g, int64_t step, int64_t in_chunk) {
    const Rows<PLAIN> rows(m_, share_.ranks, g, step, in_chunk);
    multiply(first_, m_.operand + m_.at(step, g, 0, 0), g, step,
             [&]<int N>(const Sums<Real>& at) GRU_MEMBER_LAMBDA {
               V r[N], z[N];
               GRU_EACH(j) r[j] = at.of(j)[0] + load(rows.gates_x(at.row + j, at.tile));
               sigmoid<Real, N>(r, Nothing{});
               GRU_EACH(j) z[j] = at.of(j)[1] + load(rows.gates_x(at.row + j, at.tile) + W);
               sigmoid<Real, N>(z, Nothing{});
               GRU_EACH(j) {
                 rows.save(at.row + j, at.tile, 0, r[j]);
                 rows.save(at.row + j, at.tile, 1, z[j]);
                 rows.gate(at.row + j, at.tile, r[j], z[j]);
               }
             });
  }

  template <bool PLAIN>
  void step_candidate(int64_t g, int64_t step, int64_t in_chunk) {
    const Rows<PLAIN> rows(m_, share_.ranks, g, step, in_chunk);
    multiply(second_, m_.gated + m_.at(g, 0, 0), g, step,
             [&]<int N>(const Sums<Real>& at) GRU_MEMBER_LAMBDA {
               V n[N];
               GRU_EACH(j) n[j] = at.of(j)[0] + load(rows.gates_x(at.row + j, at.tile) + 2 * W);
               tanh<Real, N>(n, Nothing{});
               GRU_EACH(j) {
                 rows.save(at.row + j, at.tile, 2, n[j]);
                 rows.finish(at.row + j, at.tile, rows.update(at.row + j, at.tile), n[j]);
               }
             });
  }

  const Forward<Real>& f_;
  const Problem<Real>& p_;
  const bool plain_;
  ForwardMemory<Real> m_;
  bool gathers_;
  Real* gathered_;
  GatePanels<Real> first_{}, second_{}, input_{};
  int64_t scratch_bytes_;
  Share share_{};
};

template <class Real>
int64_t forward_scratch_bytes(const Forward<Real>& f, int threads) {
  return ForwardScan<Real>(f, threads, 0, nullptr).scratch_bytes();
}

template <class Real>
void forward(const Forward<Real>& f, Team& team, int threads, int member, void* scratch) {
  ForwardScan<Real>(f, threads, member, scratch).run(team, member);
}

}  // namespace
}  // namespace GRU_FAST_ISA
}  // namespace gru_fast
