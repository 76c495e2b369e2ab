// SPDX-License-Identifier: Apache-2.0
// What the kernels of the layer-normalised GRU are asked to do; equations in
// gru_fast/reference_norm.py.
#pragma once
#include "problem.h"

namespace gru_fast {

constexpr int kNormSlots = 6;  // v of r, z, n; then r, z, n

// `in` is a scan: x holds the normalised input products, weight_ih is null, bias_hh is the norm's.
template <class Real>
struct NormForward {
  Problem<Real> in;
  const Real* gamma;  // (G, 3H)
  Real eps;
  Real* output;     // (T, B, G*H)
  Real* h_n;        // (G, B, H)
  Real* workspace;  // (T, B, G, 6H), or null: not saved
  Real* rstd;       // (T, B, G), or null with workspace
};

// A null gradient pointer means: not asked for.
template <class Real>
struct NormBackward {
  Problem<Real> in;
  const Real* gamma;
  Real eps;
  const Real* output;       // (T, B, G*H)
  const Real* workspace;    // (T, B, G, 6H), or null: rebuild the gates
  const Real* rstd;         // (T, B, G), or null with workspace
  const Real* grad_output;  // (T, B, G*H) or null
  const Real* grad_h_n;     // (G, B, H) or null
  Real* grad_gates_x;       // (T, B, G, 3H)
  Real* grad_h0;            // (G, B, H)
  Real* grad_weight;        // (G, 3H, H)
  Real* grad_gamma;         // (G, 3H)
  Real* grad_bias;          // (G, 3H)
  Real* grad_reset_state;   // (G, B, H), zeroed
  Real* grad_h_scale;       // (B, G*H), zeroed
};

// As KernelTable.
template <class Real>
struct NormTable {
  int64_t (*forward_scratch_bytes)(const NormForward<Real>&, int threads);
  void (*forward)(const NormForward<Real>&, Team&, int threads, int member, void* scratch);
  int64_t (*backward_scratch_bytes)(const NormBackward<Real>&, int threads);
  void (*backward)(const NormBackward<Real>&, Team&, int threads, int member, void* scratch);
};

struct NormKernels {
  NormTable<float> f32;
  NormTable<double> f64;
};

// Of the instruction set in use.
const NormKernels& norm_kernels();

}  // namespace gru_fast
