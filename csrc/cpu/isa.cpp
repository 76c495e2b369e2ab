// SPDX-License-Identifier: Apache-2.0
#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "norm_problem.h"
#ifdef GRU_FAST_X86
#include <cpuid.h>
#endif

namespace gru_fast {

namespace baseline {
const Kernels& table();
const NormKernels& norm_table();
}  // namespace baseline
#ifdef GRU_FAST_X86
namespace avx2 {
const Kernels& table();
const NormKernels& norm_table();
}  // namespace avx2
namespace avx512 {
const Kernels& table();
const NormKernels& norm_table();
}  // namespace avx512
namespace avx512_bf16 {
const KernelTable<BFloat16>& bfloat16_table();
}
#endif

namespace {

struct Isa {
  IsaLevel level;
  const char* name;
  bool (*usable)();
  const Kernels& (*table)();
  const NormKernels& (*norm_table)();
};

bool always() { return true; }
#ifdef GRU_FAST_X86
// GCC's cpu_supports also asks the operating system whether it saves the wide registers.
// It knows of F16C only in some compilers, and any processor with AVX2 has it.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

constexpr Isa kIsas[] = {
    {IsaLevel::kBaseline, "baseline", always, baseline::table, baseline::norm_table},
#ifdef GRU_FAST_X86
    {IsaLevel::kAvx2, "avx2", has_avx2, avx2::table, avx2::norm_table},
    {IsaLevel::kAvx512, "avx512", has_avx512, avx512::table, avx512::norm_table},
#endif
};

const Isa* find_usable(const std::string& name, const std::string& expected) {
  for (const Isa& isa : kIsas) {
    if (name == isa.name && isa.usable()) return &isa;
  }
  std::string usable;
  for (const std::string& other : usable_isas()) usable += (usable.empty() ? "" : ", ") + other;
  throw std::invalid_argument(expected + " that this CPU can run (" + usable + "), got '" + name +
                              "'");
}

const Isa* choose() {
  if (const char* name = std::getenv("GRU_FAST_CPU_ISA"); name != nullptr && *name != '\0') {
    return find_usable(name, "GRU_FAST_CPU_ISA: expected an instruction set");
  }
  const Isa* best = &kIsas[0];
  for (const Isa& isa : kIsas) {
    if (isa.usable()) best = &isa;
  }
  return best;
}

std::atomic<const Isa*> current{nullptr};

const Isa& get() {
  const Isa* isa = current.load(std::memory_order_acquire);
  if (isa == nullptr) {
    isa = choose();
    current.store(isa, std::memory_order_release);
  }
  return *isa;
}

}  // namespace

std::vector<std::string> built_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : kIsas) names.emplace_back(isa.name);
  return names;
}

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : kIsas) {
    if (isa.usable()) names.emplace_back(isa.name);
  }
  return names;
}

std::string current_isa() { return get().name; }
IsaLevel current_isa_level() { return get().level; }
void set_isa(const std::string& name) {
  current.store(find_usable(name, "instruction set: expected one"), std::memory_order_release);
}

template <>
const KernelTable<float>* kernel_table() {
  return &get().table().f32;
}
template <>
const KernelTable<double>* kernel_table() {
  return &get().table().f64;
}
template <>
const KernelTable<BFloat16>* kernel_table() {
#ifdef GRU_FAST_X86
  if (current_isa_level() == IsaLevel::kAvx512 && __builtin_cpu_supports("avx512bf16")) {
    return &avx512_bf16::bfloat16_table();
  }
#endif
  return nullptr;
}
const Conversions& conversions() { return get().table().conversions; }
const NormKernels& norm_kernels() { return get().norm_table(); }

}  // namespace gru_fast
