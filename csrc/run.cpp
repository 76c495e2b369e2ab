// SPDX-License-Identifier: Apache-2.0
#include "run.h"

#include "run_team.h"

namespace gru_fast {

template <class Real>
void run_forward_kernel(const KernelTable<Real>& table, const Forward<Real>& f) {
  run_on_team(f, 1, table.forward_scratch_bytes, table.forward);
}
template <class Real>
void run_backward_kernel(const KernelTable<Real>& table, const Backward<Real>& f) {
  run_on_team(f, kBackwardPasses, table.backward_scratch_bytes, table.backward);
}

template void run_forward_kernel(const KernelTable<float>&, const Forward<float>&);
template void run_forward_kernel(const KernelTable<double>&, const Forward<double>&);
template void run_forward_kernel(const KernelTable<BFloat16>&, const Forward<BFloat16>&);
template void run_backward_kernel(const KernelTable<float>&, const Backward<float>&);
template void run_backward_kernel(const KernelTable<double>&, const Backward<double>&);
template void run_backward_kernel(const KernelTable<BFloat16>&, const Backward<BFloat16>&);

}  // namespace gru_fast
