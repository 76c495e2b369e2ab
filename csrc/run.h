// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "cpu/problem.h"

namespace gru_fast {

// Runs a kernel on as many of torch's threads as the call is worth.
template <class Real>
void run_forward_kernel(const KernelTable<Real>& table, const Forward<Real>& f);
extern template void run_forward_kernel(const KernelTable<float>&, const Forward<float>&);
extern template void run_forward_kernel(const KernelTable<BFloat16>&, const Forward<BFloat16>&);
template <class Real>
void run_backward_kernel(const KernelTable<Real>& table, const Backward<Real>& f);
extern template void run_backward_kernel(const KernelTable<float>&, const Backward<float>&);
extern template void run_backward_kernel(const KernelTable<BFloat16>&, const Backward<BFloat16>&);

}  // namespace gru_fast
