// SPDX-License-Identifier: Apache-2.0
#include "isa.h"
#include "sampler_problem.h"
#ifdef GRU_FAST_NEON_DOT
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace gru_fast {

namespace baseline {
const SamplerKernels& sampler_table();
}
#ifdef GRU_FAST_X86
namespace avx2 {
const SamplerKernels& sampler_table();
}
namespace avx512 {
const SamplerKernels& sampler_table();
}
namespace avx512_dot {
const SamplerKernels& sampler_table();
}
#endif
#ifdef GRU_FAST_NEON_DOT
namespace neon_dot {
const SamplerKernels& sampler_table();
}
#endif

const SamplerKernels& sampler_kernels([[maybe_unused]] bool plain) {
#ifdef GRU_FAST_X86
  const IsaLevel level = current_isa_level();
  if (level == IsaLevel::kAvx512) {
    const bool dot = __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
    return dot && !plain ? avx512_dot::sampler_table() : avx512::sampler_table();
  }
  if (level == IsaLevel::kAvx2) return avx2::sampler_table();
#endif
#ifdef GRU_FAST_NEON_DOT
  if ((getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0 && !plain) return neon_dot::sampler_table();
#endif
  return baseline::sampler_table();
}

}  // namespace gru_fast
