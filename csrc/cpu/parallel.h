// SPDX-License-Identifier: Apache-2.0
// How long a call will take, roughly, and how many threads it is worth.
#pragma once
#include <cstdint>

#include "problem.h"

namespace gru_fast {

// No more threads than a limit, which may have a fraction.
inline int at_most(int threads, double limit) {
  return limit < threads ? static_cast<int>(limit) : threads;
}

// What a thread has to have to do in all.
constexpr double kShareNs = 9'000;

// Of one core, the product with weights of `inner` columns in a step: orders of magnitude of
// arithmetic or of reading the weights.
template <class Real>
double step_ns(const Problem<Real>& p, int64_t inner) {
  constexpr double kFlopsPerNs = sizeof(Real) == 2 ? 200 : 100, kBytesPerNs = 80;
  const double weights =
      static_cast<double>(p.G * p.H * inner) * static_cast<double>(gate_count(p.cell));
  const double arithmetic = 2 * weights * static_cast<double>(p.B) / kFlopsPerNs;
  const double reading = sizeof(Real) * weights / kBytesPerNs;
  return arithmetic > reading ? arithmetic : reading;
}

// Products per step of the gradients, relative to the forward pass.
constexpr int kBackwardPasses = 3;

// Of one core, all of a layer. `passes`: products per step relative to the forward pass.
template <class Real>
double expected_ns(const Problem<Real>& p, int passes) {
  return step_ns(p, p.H + p.I) * static_cast<double>(p.T) * passes;
}

// Whether so much work is for one thread only.
inline bool is_brief(double ns) { return ns < 2 * kShareNs; }

// At most `available`, at least 1.
template <class Real>
int threads_worth(const Problem<Real>& p, int passes, int available) {
  constexpr double kShareOfStepNs = 500;  // of a step, after which a thread waits for the others
  constexpr int64_t kUnits = 16;
  const double all_ns = expected_ns(p, passes);
  if (is_brief(all_ns)) return 1;
  const int threads = at_most(available, all_ns / kShareNs);
  if (threads <= 1) return 1;
  const int64_t rows = p.G * p.B;
  if (rows >= threads) return threads;
  // Hidden units are split, which the first meetings do not pay for.
  const double of_step = step_ns(p, p.H);
  if (of_step < 3 * kShareOfStepNs) return static_cast<int>(rows);
  const double tiles = static_cast<double>(rows * ((p.H + kUnits - 1) / kUnits));
  return at_most(at_most(threads, tiles), of_step / kShareOfStepNs);
}

}  // namespace gru_fast
