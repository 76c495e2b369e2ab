// SPDX-License-Identifier: Apache-2.0
// Which instruction set the kernels run on: the best one that this CPU has, or the one asked for.
#pragma once
#include <string>
#include <vector>

#include "problem.h"

namespace gru_fast {

std::vector<std::string> usable_isas();  // worst to best
std::string current_isa();
// Throws std::invalid_argument naming what is usable.
void set_isa(const std::string& name);
const Kernels& kernels();
// Kernels that multiply bfloat16, or null: where the CPU does not, or another set was asked for.
const KernelTable<BFloat16>* bfloat16_kernels();

}  // namespace gru_fast
