// SPDX-License-Identifier: Apache-2.0
// How many threads a call is worth.
#pragma once
#include <cstdint>

#include "problem.h"

namespace gru_fast {

// No more threads than a limit, which may have a fraction.
inline int at_most(int threads, double limit) {
  return limit < threads ? static_cast<int>(limit) : threads;
}

// `passes`: products per step relative to the forward pass. At most `available`, at least 1.
template <class Real>
int threads_worth(const Problem<Real>& p, int passes, int available) {
  // Orders of magnitude of one core: what a step takes is bound by arithmetic or by reading
  // weights.
  constexpr double kFlopsPerNs = sizeof(Real) == 2 ? 200 : 100, kBytesPerNs = 80;
  // What a thread has to have to do in all, and in a step after which it waits for the others.
  constexpr double kShareNs = 9'000, kShareOfStepNs = 500;
  constexpr int64_t kUnits = 16;
  const double H = static_cast<double>(p.H), B = static_cast<double>(p.B);
  const double products = gate_count(p.cell) * H * static_cast<double>(p.G);
  auto step_ns = [&](double inner) {
    const double arithmetic = 2 * products * inner * B / kFlopsPerNs;
    const double reading = sizeof(Real) * products * inner / kBytesPerNs;
    return arithmetic > reading ? arithmetic : reading;
  };
  const double all_ns = step_ns(H + static_cast<double>(p.I)) * static_cast<double>(p.T) * passes;
  const int threads = at_most(available, all_ns / kShareNs);
  if (threads <= 1) return 1;
  const int64_t rows = p.G * p.B;
  if (rows >= threads) return threads;
  // Hidden units are split, which the first meetings do not pay for.
  if (step_ns(H) < 3 * kShareOfStepNs) return static_cast<int>(rows);
  const double tiles = static_cast<double>(rows * ((p.H + kUnits - 1) / kUnits));
  return at_most(at_most(threads, tiles), step_ns(H) / kShareOfStepNs);
}

}  // namespace gru_fast
