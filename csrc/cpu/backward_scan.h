// SPDX-License-Identifier: Apache-2.0
// The scan back through a chunk: the product that carries D of a step into the gradient of the
// state before it, whose epilogue already computes D of the step before.
#pragma once
#include "carry.h"
#include "chunk.h"
#include "column_panels.h"
#include "gate_gradients.h"
#include "team.h"
#include "tile.h"

namespace gru_fast {
namespace GRU_FAST_ISA {
namespace {

template <class Real>
class BackwardScan {
 public:
  static constexpr int W = kLanes<Real>;
  using V = Vec<Real>;
  using Number = Compute<Real>;
  using Gradients = GateGradients<Real>;

  BackwardScan(const Backward<Real>& f, const Chunk<Real>& chunk, Layout& layout, int threads,
               int member)
      : f_(f), p_(f.in), c_(chunk), carry_(f, c_.units, layout, threads) {
    // Where all of it stays in the cache it is no use, nor where a step is too much to hold.
    constexpr int64_t kKept = 1 << 20, kStep = 1 << 18;
    const int64_t step_bytes = p_.B * p_.G * c_.slots * p_.H * static_cast<int64_t>(sizeof(Real));
    prefetches_ = f.workspace != nullptr && step_bytes * p_.T > kKept && step_bytes <= kStep;
    auto panels = [&](int first_slot, int slots, int64_t first_product) {
      ColumnPanels<Real> made{
          p_.weight_hh.own, p_.layout.gate_rows, p_.H, c_.units, p_.H, {}, slots, nullptr, nullptr};
      for (int i = 0; i < slots; ++i) made.order[i] = c_.gate_of(first_slot + i);
      made.take(p_.G, p_.T - first_product <= 1, layout, threads, member);
      return made;
    };
    panels_ = panels(0, first_gates(p_.cell), carry_.first_product());
    if (has_second_product(p_.cell)) candidate_panels_ = panels(2, 1, 0);
  }

  // Packs W_hh and starts the carry from grad_h_n.
  void begin(int members, int member) {
    share_ = share_of(member, members, p_.G, p_.B, c_.tiles, panels_.K(), panels_.packed == nullptr,
                      p_.order != nullptr);
    panels_.pack(p_.G, members, member);
    if (has_second_product(p_.cell)) candidate_panels_.pack(p_.G, members, member);
    carry_.begin(share_);
  }

  void run(Team& team, int member) {
    for (int64_t g = share_.groups.begin; g < share_.groups.end; ++g) {
      begin_rows(g, c_.end - 1, 0);
    }
    for (int64_t step = c_.end - 1; step >= c_.begin; --step) {
      if (share_.waits) team.barrier(member);
      if (has_second_product(p_.cell)) {
        for (int64_t g = share_.groups.begin; g < share_.groups.end; ++g)
          through_candidate(g, step);
        if (share_.waits) team.barrier(member);
      }
      if (step < carry_.first_product()) break;
      for (int64_t g = share_.groups.begin; g < share_.groups.end; ++g) through_state(g, step);
    }
  }

  void finish() const { carry_.finish(share_); }

 private:
  // D of a step for the rows from a rank on, which no later step was alive for.
  void begin_rows(int64_t g, int64_t step, int64_t from) {
    const Gradients gradients(c_, carry_, share_.ranks, prefetches_, g, step);
    const int64_t end = share_.ranks.below(c_.rows.alive_at(g, step));
    for (int64_t row = share_.ranks.below(from); row < end; ++row) {
      for (int64_t tile = share_.tiles.begin; tile < share_.tiles.end; ++tile) {
        gradients.add(row, tile, load(gradients.carried(row, tile)));
      }
    }
  }

  // reset_before: D of n reaches r and the state through the gated state r * s: equations (10) and
  // (11), and the e * r of (12).
  void through_candidate(int64_t g, int64_t step) {
    const int64_t t = c_.rows.time(g, step), first_row = c_.first_row(g, step);
    multiply(c_.d(g, step, 0, 2, 0), candidate_panels_, g, step,
             [&](int64_t row, int64_t tile, const V* sums) GRU_MEMBER_LAMBDA {
               const int64_t rank = share_.ranks[row];
               const int64_t b = c_.rows.row(rank), index = c_.rows.start(t) + b;
               const int lanes = lanes_of<Real>(tile, p_.H);
               const V r = load_n(c_.gate_row(g, first_row + rank, index) + tile * W, lanes);
               V dr = sums[0] * c_.scaled_previous(g, t, b, tile);
               if (f_.grad_workspace != nullptr) {
                 const int64_t at = (index * p_.G + g) * c_.slots * p_.H + tile * W;
                 dr += load_n(f_.grad_workspace + at, lanes);
               }
               store(c_.d(g, first_row + rank) + tile * W, dr * r * (Number(1) - r));
               carry_.add(g, t, row, b, tile, sums[0] * r);
             });
  }

  // The product of equation (12), then D of the step before.
  void through_state(int64_t g, int64_t step) {
    const int64_t t = c_.rows.time(g, step), alive = c_.rows.alive(t);
    const bool more = step > c_.begin;
    const int64_t still = more ? c_.rows.alive_at(g, step - 1) : 0;
    const int64_t own_still = share_.ranks.below(still);
    const Gradients before(c_, carry_, share_.ranks, prefetches_, g, more ? step - 1 : step);
    const bool plain = p_.reset_mask == nullptr && p_.h_scale == nullptr;
    multiply(c_.d(g, step, 0, 0, 0), panels_, g, step,
             [&](int64_t row, int64_t tile, const V* sums) GRU_MEMBER_LAMBDA {
               Number* const carried = before.carried(row, tile);
               V so_far = load(carried) + sums[0];
               if (!plain) {
                 const int64_t b = c_.rows.row(share_.ranks[row]);
                 carry_.add(g, t, row, b, tile, sums[0]);
                 if (c_.rows.reset(g, t, b)) carry_.leave_to_reset_state(g, row, b, tile);
                 so_far = load(carried);
               }
               if (row < own_still) {
                 before.add(row, tile, so_far);
               } else {
                 store(carried, so_far);
               }
             });
    if (still > alive) begin_rows(g, step - 1, alive);
  }

  // Multiplies D of this member's rows that are alive at a step, every other step backwards.
  template <class Epilogue>
  GRU_MEMBER void multiply(const Real* operand, const ColumnPanels<Real>& panels, int64_t g,
                           int64_t step, Epilogue epilogue) {
    const Ranks ranks = share_.ranks;
    panels.multiply({operand + ranks.first * c_.ld, ranks.stride * c_.ld},
                    ranks.below(c_.rows.alive_at(g, step)), g, share_.tiles, step % 2 != 0,
                    row_by_row<Real>(epilogue));
  }

  const Backward<Real>& f_;
  const Problem<Real>& p_;
  const Chunk<Real>& c_;
  Carry<Real> carry_;
  ColumnPanels<Real> panels_{}, candidate_panels_{};
  bool prefetches_;
  Share share_{};
};

}  // namespace
}  // namespace GRU_FAST_ISA
}  // namespace gru_fast
