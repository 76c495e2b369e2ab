// SPDX-License-Identifier: Apache-2.0
#include "isa.h"
#include "norm_problem.h"

namespace gru_fast {

namespace baseline {
const NormKernels& norm_table();
}
#ifdef GRU_FAST_X86
namespace avx2 {
const NormKernels& norm_table();
}
namespace avx512 {
const NormKernels& norm_table();
}
#endif

const NormKernels& norm_kernels() {
#ifdef GRU_FAST_X86
  const IsaLevel level = current_isa_level();
  if (level == IsaLevel::kAvx512) return avx512::norm_table();
  if (level == IsaLevel::kAvx2) return avx2::norm_table();
#endif
  return baseline::norm_table();
}

}  // namespace gru_fast
