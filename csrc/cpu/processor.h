// SPDX-License-Identifier: Apache-2.0
// What the instruction set does not tell of a processor.
#pragma once
#ifdef __AVX512F__
#include <cpuid.h>
#endif

namespace gru_fast {
namespace GRU_FAST_ISA {
namespace {

// Whether two registers of 64 bytes are shuffled in a cycle: by AMD's processors from family 26
// (Zen 5) on. A Zen 4 and Intel's shuffle one, others have no such registers.
inline bool shuffles_two_wide_registers() {
#ifdef __AVX512F__
  static const bool yes = [] {
    constexpr unsigned kZen5 = 26;
    unsigned signature = 0, rest = 0;
    if (!__builtin_cpu_is("amd") || !__get_cpuid(1, &signature, &rest, &rest, &rest)) return false;
    return (signature >> 8 & 15) + (signature >> 20 & 255) >= kZen5;
  }();
  return yes;
#else
  return false;
#endif
}

}  // namespace
}  // namespace GRU_FAST_ISA
}  // namespace gru_fast
