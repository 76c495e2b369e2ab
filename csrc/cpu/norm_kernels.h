// SPDX-License-Identifier: Apache-2.0
// The kernels of the layer-normalised GRU for one instruction set, for the norm_*.cpp files.
#pragma once
#include "norm_backward.h"

namespace gru_fast {
namespace GRU_FAST_ISA {

template <class Real>
constexpr NormTable<Real> kNormTable = {norm_forward_scratch_bytes<Real>, norm_forward<Real>,
                                        norm_backward_scratch_bytes<Real>, norm_backward<Real>};

const NormKernels& norm_table();

const NormKernels& norm_table() {
  static constexpr NormKernels kernels = {kNormTable<float>, kNormTable<double>};
  return kernels;
}

}  // namespace GRU_FAST_ISA
}  // namespace gru_fast
