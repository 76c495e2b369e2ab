// SPDX-License-Identifier: Apache-2.0
// The tables of one instruction set, for the kernels_*.cpp files: of float32 and float64, or, with
// GRU_FAST_BFLOAT16, of bfloat16.
#pragma once
#include "backward.h"
#include "forward.h"
#ifndef GRU_FAST_BFLOAT16
#include "conversions.h"
#endif

namespace gru_fast {
namespace GRU_FAST_ISA {

template <class Real>
static constexpr KernelTable<Real> kTable = {forward_scratch_bytes<Real>,  forward<Real>,
                                             backward_scratch_bytes<Real>, backward<Real>,
                                             packed_weight_size<Real>,     pack_weight<Real>};

#ifdef GRU_FAST_BFLOAT16
const KernelTable<BFloat16>& bfloat16_table();
const KernelTable<BFloat16>& bfloat16_table() { return kTable<BFloat16>; }
#else
const Kernels& table();
const Kernels& table() {
  static constexpr Kernels kernels = {kTable<float>, kTable<double>, kConversions};
  return kernels;
}
#endif

}  // namespace GRU_FAST_ISA
}  // namespace gru_fast
