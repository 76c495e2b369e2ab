// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "cpu/problem.h"

namespace gru_fast {

// Runs a kernel for float, double or BFloat16 on as many of torch's threads as the call is worth.
template <class Real>
void run_forward_kernel(const KernelTable<Real>& table, const Forward<Real>& f);
template <class Real>
void run_backward_kernel(const KernelTable<Real>& table, const Backward<Real>& f);

}  // namespace gru_fast
