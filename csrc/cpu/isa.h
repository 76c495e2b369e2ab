// SPDX-License-Identifier: Apache-2.0
// Which instruction set the kernels run on: the best one that this CPU has, or the one asked for.
#pragma once
#include <string>
#include <vector>

#include "problem.h"

namespace gru_fast {

enum class IsaLevel : int { kBaseline, kAvx2, kAvx512 };

std::vector<std::string> built_isas();   // of this binary, worst to best
std::vector<std::string> usable_isas();  // of these, what this CPU can run
std::string current_isa();
IsaLevel current_isa_level();
// Throws std::invalid_argument naming what is usable.
void set_isa(const std::string& name);
// The kernels for numbers of this type. A call asks once: the instruction set may change meanwhile.
// Null for bfloat16 where the CPU does not multiply it, or another set was asked for.
template <class Real>
const KernelTable<Real>* kernel_table();
template <>
const KernelTable<float>* kernel_table();
template <>
const KernelTable<double>* kernel_table();
template <>
const KernelTable<BFloat16>* kernel_table();
const Conversions& conversions();

}  // namespace gru_fast
