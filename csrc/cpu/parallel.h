// SPDX-License-Identifier: Apache-2.0
// How many threads a call is worth.
#pragma once
#include <cstdint>

#include "problem.h"

namespace gru_fast {

// `passes`: products per step relative to the forward pass. At most `available`, at least 1.
template <class Real>
int threads_worth(const Problem<Real>& p, int passes, int available) {
  if (available <= 1) return 1;
  // Orders of magnitude of one core: what a step takes is bound by arithmetic or by reading
  // weights.
  constexpr double kFlopsPerNs = sizeof(Real) == 2 ? 200 : 100, kBytesPerNs = 80;
  constexpr double kRegionNs = 18'000, kBarrierNs = 1'500;
  const double H = static_cast<double>(p.H), B = static_cast<double>(p.B);
  const double products = gate_count(p.cell) * H * static_cast<double>(p.G);
  auto step_ns = [&](double inner) {
    const double arithmetic = 2 * products * inner * B / kFlopsPerNs;
    const double reading = sizeof(Real) * products * inner / kBytesPerNs;
    return arithmetic > reading ? arithmetic : reading;
  };
  if (step_ns(H + static_cast<double>(p.I)) * static_cast<double>(p.T) * passes < kRegionNs)
    return 1;
  if (p.G * p.B >= available || step_ns(H) >= kBarrierNs) return available;
  return static_cast<int>(p.G * p.B);
}

}  // namespace gru_fast
