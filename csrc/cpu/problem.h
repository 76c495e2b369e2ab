// SPDX-License-Identifier: Apache-2.0
// What a kernel is asked to do: sizes and pointers, free of torch and of the standard library.
// Equations, semantics and their numbers: gru_fast/reference.py.
#pragma once
#include <cstdint>

#include "bfloat16.h"
#include "groups.h"
#include "narrow.h"

namespace gru_fast {

enum class Cell : int { kResetAfter, kResetBefore, kNoReset };

// The type that tensors of another are computed in.
template <class Real>
struct ComputeType {
  using type = Real;
};
template <>
struct ComputeType<BFloat16> {
  using type = float;
};
template <class Real>
using Compute = typename ComputeType<Real>::type;

static constexpr int gate_count(Cell cell) { return cell == Cell::kNoReset ? 2 : 3; }
static constexpr int slot_count(Cell cell) {
  return cell == Cell::kResetAfter ? 4 : cell == Cell::kResetBefore ? 3 : 2;
}
// How many gates the first recurrent product of a step has. reset_before has a second one, for the
// candidate, which needs r of every unit first.
static constexpr int first_gates(Cell cell) { return cell == Cell::kResetAfter ? 3 : 2; }
static constexpr bool has_second_product(Cell cell) { return cell == Cell::kResetBefore; }

// G independent recurrences over (T, B), none of T, B, G, H zero. All tensors are contiguous but x,
// whose rows are, and weights, biases, first and last states and the gradients of these, which lie
// as `layout` says. What has (T, B) in front may be packed, as in a PackedSequence: without
// padding, the rows of a time behind those of the time before.
template <class Real>
struct Problem {
  int64_t T, B, G, I, H;
  GroupLayout layout;
  Cell cell;
  const uint8_t* reverse;  // (G)
  const Real* x;           // rows of I, or of the N*H projected gates when weight_ih is null
  int64_t x_stride_t, x_stride_b, x_stride_g;
  bool x_shared;                 // one (T, B, I) for all groups
  const Real* h0;                // (G, B, H)
  StoredWeight<Real> weight_ih;  // (N*H, I) each, or null
  StoredWeight<Real> weight_hh;  // (N*H, H)
  Groups<const Real> bias_ih;    // (N*H) or null
  Groups<const Real> bias_hh;    // (N*H) or null
  const int64_t* lengths;        // (B) or null; the next two come with it
  const int64_t* order;          // (B): rows by falling length
  const int64_t* alive_before;   // (T + 1): (t, b) pairs before time t that are not padding
  bool packed;                   // with these, rows in their order; x_stride_t has no meaning then
  const uint8_t* reset_mask;     // (T, B) or null
  const Real* reset_state;       // (G, B, H) or null: reset to zero
  const Real* h_scale;           // (B, G*H) or null
};

template <class Real>
struct Forward {
  Problem<Real> in;
  Real* output;     // (T, B, G*H)
  Real* h_n;        // (G, B, H)
  Real* workspace;  // (T, B, G, S*H), or null: not saved
  // What KernelTable::pack_weight made of the weights, or null: packed by the call.
  Groups<const Real> packed_ih;
  Groups<const Real> packed_hh;
};

// A weight of shape (N*heads*H, K) to be packed for many calls.
struct PackedWeight {
  Cell cell;
  int64_t H, K;
  bool recurrent;  // weight_hh
  int64_t heads;   // groups that have rows of it
};

// A null gradient pointer means: not asked for; no weight is narrow. Those that several steps add
// to in the result itself are not rounded on the way.
template <class Real>
struct Backward {
  Problem<Real> in;
  const Real* output;          // (T, B, G*H)
  const Real* workspace;       // (T, B, G, S*H), or null: rebuild the gates
  const Real* grad_output;     // (T, B, G*H) or null
  const Real* grad_h_n;        // (G, B, H) or null
  const Real* grad_workspace;  // (T, B, G, S*H) or null
  Real* grad_x;  // contiguous (T, B, [G,] I), or grad_gates_x; null where groups share x:
  Compute<Real>* grad_shared_x;     // (T, B, I), zeroed
  Real* grad_h0;                    // (G, B, H)
  Groups<Real> grad_weight_ih;      // (N*H, I) each
  Groups<Real> grad_weight_hh;      // (N*H, H)
  Groups<Real> grad_bias_ih;        // (N*H)
  Groups<Real> grad_bias_hh;        // (N*H)
  Compute<Real>* grad_reset_state;  // (G, B, H), zeroed
  Compute<Real>* grad_h_scale;      // (B, G*H), zeroed
};

class Team;

// The kernels of one instruction set. `forward` and `backward` are called by every member of the
// team; `threads` is the largest number of members there can be, and `scratch` has the bytes that
// `*_scratch_bytes` asked for that number, aligned to 64.
template <class Real>
struct KernelTable {
  int64_t (*forward_scratch_bytes)(const Forward<Real>&, int threads);
  void (*forward)(const Forward<Real>&, Team&, int threads, int member, void* scratch);
  int64_t (*backward_scratch_bytes)(const Backward<Real>&, int threads);
  void (*backward)(const Backward<Real>&, Team&, int threads, int member, void* scratch);
  int64_t (*packed_weight_size)(const PackedWeight&);  // elements, aligned to 64 bytes
  void (*pack_weight)(const PackedWeight&, const Real* weight, Real* to);
};

struct Kernels {
  KernelTable<float> f32;
  KernelTable<double> f64;
  Conversions conversions;
};

}  // namespace gru_fast
