// SPDX-License-Identifier: Apache-2.0
// The scan back through a chunk: the product that carries D of a step into the gradient of the
// state before it, whose epilogue already computes D of the step before.
#pragma once
#include "chunk.h"
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

  BackwardScan(const Backward<Real>& f, const Chunk<Real>& chunk, Layout& layout)
      : f_(f), p_(f.in), c_(chunk) {
    // Slots that enter the first product of a step, and where they start in D.
    slot_begin_ = 0;
    slot_count_ = p_.cell == Cell::kResetAfter ? 3 : 2;
    carry_ = layout.template take<Real>(p_.G * p_.B * c_.units);
    panels_ = layout.template take<Real>(p_.G * c_.tiles * slot_count_ * c_.units * W);
    candidate_panels_ = p_.cell == Cell::kResetBefore
                            ? layout.template take<Real>(p_.G * c_.tiles * c_.units * W)
                            : nullptr;
  }

  // Packs W_hh by columns, in the order of the slots of D, and starts the carry from grad_h_n.
  void begin(int members, int member) {
    share_ = share_of(member, members, p_.G, p_.B, c_.tiles, slot_count_ * c_.units);
    const Range part = part_of(p_.G * c_.tiles, member, members);
    for (int64_t i = part.begin; i < part.end; ++i) {
      const int64_t g = i / c_.tiles, tile = i % c_.tiles;
      for (int slot = 0; slot < slot_count_; ++slot) {
        pack(g, c_.gate_of(slot), tile, panels_ + (i * slot_count_ + slot) * c_.units * W);
      }
      if (candidate_panels_) pack(g, 2, tile, candidate_panels_ + i * c_.units * W);
    }
    each_own_tile([&](int64_t g, int64_t b, int64_t tile) {
      const int64_t offset = (g * p_.B + b) * p_.H + tile * W;
      store(carry(g, b, tile), load_or_zero(f_.grad_h_n, offset, lanes_of<Real>(tile, p_.H)));
    });
  }

  void run(Team& team, int member) {
    each_own_tile(
        [&](int64_t g, int64_t b, int64_t tile) { gate_gradients(g, c_.end - 1, b, tile); });
    for (int64_t step = c_.end - 1; step >= c_.begin; --step) {
      if (share_.waits) team.barrier(member);
      if (p_.cell == Cell::kResetBefore) {
        for (int64_t g = share_.groups.begin; g < share_.groups.end; ++g)
          through_candidate(g, step);
        if (share_.waits) team.barrier(member);
      }
      for (int64_t g = share_.groups.begin; g < share_.groups.end; ++g) through_state(g, step);
    }
  }

  void finish() {
    each_own_tile([&](int64_t g, int64_t b, int64_t tile) {
      const int64_t offset = (g * p_.B + b) * p_.H + tile * W;
      if (f_.grad_h0) {
        store_n(f_.grad_h0 + offset, load(carry(g, b, tile)), lanes_of<Real>(tile, p_.H));
      }
    });
  }

 private:
  template <class Body>
  GRU_MEMBER void each_own_tile(Body body) const {
    for (int64_t g = share_.groups.begin; g < share_.groups.end; ++g) {
      for (int64_t b = share_.batch.begin; b < share_.batch.end; ++b) {
        for (int64_t tile = share_.tiles.begin; tile < share_.tiles.end; ++tile) body(g, b, tile);
      }
    }
  }

  void pack(int64_t g, int gate, int64_t tile, Real* to) const {
    const Real* block = p_.weight_hh + (g * c_.gates + gate) * p_.H * p_.H;
    pack_columns(block, p_.H, p_.H, tile, to);
    fill_zero(to + p_.H * W, (c_.units - p_.H) * W);
  }

  GRU_MEMBER Real* carry(int64_t g, int64_t b, int64_t tile) const {
    return carry_ + (g * p_.B + b) * c_.units + tile * W;
  }

  // D of a step from the gradient of its state: equations (9) to (14). What the state passes on
  // directly stays in the carry.
  GRU_MEMBER void gate_gradients(int64_t g, int64_t step, int64_t b, int64_t tile) {
    const int64_t t = c_.rows.time(g, step);
    if (c_.rows.held(t, b)) {
      for (int slot = 0; slot < c_.slots; ++slot) store(c_.d(g, step, b, slot, tile), V{});
      return;
    }
    const int lanes = lanes_of<Real>(tile, p_.H);
    const Real* saved = c_.gate_row(g, step, t, b) + tile * W;
    const int64_t out = ((t * p_.B + b) * p_.G + g) * p_.H + tile * W;
    const Real* extra =
        f_.grad_workspace
            ? f_.grad_workspace + ((t * p_.B + b) * p_.G + g) * c_.slots * p_.H + tile * W
            : nullptr;
    auto slot = [&](int i) GRU_MEMBER_LAMBDA { return load_n(saved + i * p_.H, lanes); };
    auto grad_slot = [&](int i) GRU_MEMBER_LAMBDA { return load_or_zero(extra, i * p_.H, lanes); };
    const int z_slot = c_.slots - 2, n_slot = c_.slots - 1;
    const V z = slot(z_slot), n = slot(n_slot);
    const V previous = load_or_zero(c_.previous(g, t, b), tile * W, lanes);
    const V dh = load(carry(g, b, tile)) + load_or_zero(f_.grad_output, out, lanes);
    const V dn = dh * (Real(1) - z) + grad_slot(n_slot);
    const V dz = dh * (previous - n) + grad_slot(z_slot);
    const V da_n = dn * (Real(1) - n * n);
    store(c_.d(g, step, b, n_slot, tile), da_n);
    store(c_.d(g, step, b, z_slot, tile), dz * z * (Real(1) - z));
    store(carry(g, b, tile), dh * z);
    if (p_.cell == Cell::kResetAfter) {
      const V q = slot(0), r = slot(1);
      const V dr = da_n * q + grad_slot(1);
      store(c_.d(g, step, b, 0, tile), da_n * r + grad_slot(0));
      store(c_.d(g, step, b, 1, tile), dr * r * (Real(1) - r));
    }
  }

  // reset_before: D of n reaches r and the state through the gated state r * hs.
  void through_candidate(int64_t g, int64_t step) {
    const int64_t t = c_.rows.time(g, step);
    const int64_t first = share_.batch.begin;
    multiply(c_.d(g, step, first, 2, 0), c_.units, candidate_panels_, g,
             [&](int64_t row, int64_t tile, const V* sums) GRU_MEMBER_LAMBDA {
               const int64_t b = first + row;
               if (c_.rows.held(t, b)) return;
               const int lanes = lanes_of<Real>(tile, p_.H);
               const V r = load_n(c_.gate_row(g, step, t, b) + tile * W, lanes);
               V dr = sums[0] * c_.scaled_previous(g, t, b, tile);
               if (f_.grad_workspace != nullptr) {
                 const int64_t at = ((t * p_.B + b) * p_.G + g) * c_.slots * p_.H + tile * W;
                 dr += load_n(f_.grad_workspace + at, lanes);
               }
               store(c_.d(g, step, b, 0, tile), dr * r * (Real(1) - r));
               add_to_state(g, t, b, tile, sums[0] * r);
             });
  }

  void through_state(int64_t g, int64_t step) {
    const int64_t t = c_.rows.time(g, step);
    const int64_t first = share_.batch.begin;
    multiply(c_.d(g, step, first, slot_begin_, 0), slot_count_ * c_.units, panels_, g,
             [&](int64_t row, int64_t tile, const V* sums) GRU_MEMBER_LAMBDA {
               const int64_t b = first + row;
               if (!c_.rows.held(t, b)) add_to_state(g, t, b, tile, sums[0]);
               if (c_.rows.reset(g, t, b)) leave_to_reset_state(g, b, tile);
               if (step > c_.begin) gate_gradients(g, step - 1, b, tile);
             });
  }

  // `grad` is the gradient of the scaled state: equation (15).
  GRU_MEMBER void add_to_state(int64_t g, int64_t t, int64_t b, int64_t tile, V grad) {
    if (p_.h_scale != nullptr) {
      const int lanes = lanes_of<Real>(tile, p_.H);
      const int64_t at = (b * p_.G + g) * p_.H + tile * W;
      if (f_.grad_h_scale != nullptr) {
        const V previous = load_or_zero(c_.previous(g, t, b), tile * W, lanes);
        store_n(f_.grad_h_scale + at, load_n(f_.grad_h_scale + at, lanes) + grad * previous, lanes);
      }
      grad *= load_n(p_.h_scale + at, lanes);
    }
    store(carry(g, b, tile), load(carry(g, b, tile)) + grad);
  }

  GRU_MEMBER void leave_to_reset_state(int64_t g, int64_t b, int64_t tile) {
    if (f_.grad_reset_state != nullptr) {
      const int lanes = lanes_of<Real>(tile, p_.H);
      Real* to = f_.grad_reset_state + (g * p_.B + b) * p_.H + tile * W;
      store_n(to, load_n(to, lanes) + load(carry(g, b, tile)), lanes);
    }
    store(carry(g, b, tile), V{});
  }

  template <class Epilogue>
  GRU_MEMBER void multiply(const Real* operand, int64_t K, const Real* panels, int64_t g,
                           Epilogue epilogue) {
    sweep<Real>(
        {operand, c_.ld}, share_.batch.size(), K, 1, share_.tiles.begin, share_.tiles.end,
        [&](int64_t tile, int) { return panels + (g * c_.tiles + tile) * K * W; }, epilogue);
  }

  const Backward<Real>& f_;
  const Problem<Real>& p_;
  const Chunk<Real>& c_;
  int slot_begin_, slot_count_;
  Real *carry_, *panels_, *candidate_panels_;
  Share share_{};
};

}  // namespace
}  // namespace GRU_FAST_ISA
}  // namespace gru_fast
