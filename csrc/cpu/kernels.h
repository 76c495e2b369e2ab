// SPDX-License-Identifier: Apache-2.0
// The table of one instruction set, for the kernels_*.cpp files.
#pragma once
#include "backward.h"
#include "forward.h"

namespace gru_fast {
namespace GRU_FAST_ISA {

const Kernels& table();

const Kernels& table() {
  static constexpr Kernels kernels = {
      {forward_scratch_bytes<float>, forward<float>, backward_scratch_bytes<float>,
       backward<float>},
      {forward_scratch_bytes<double>, forward<double>, backward_scratch_bytes<double>,
       backward<double>},
  };
  return kernels;
}

}  // namespace GRU_FAST_ISA
}  // namespace gru_fast
