// SPDX-License-Identifier: Apache-2.0
// The backward pass, chunk by chunk of steps from the end of the scan: rebuild the gates where they
// were not saved, scan back through the chunk for the gate gradients D, then turn D into the
// gradients of the input, the weights and the biases while it is still in cache.
#pragma once
#include "backward_scan.h"
#include "rebuild.h"
#include "weight_grads.h"

namespace gru_fast {
namespace GRU_FAST_ISA {
namespace {

template <class Real>
class BackwardPass {
 public:
  BackwardPass(const Backward<Real>& f, int threads, int member, void* scratch)
      : f_(f),
        layout_(scratch),
        chunk_(f, layout_),
        rebuild_(f, chunk_, layout_, threads),
        scan_(f, chunk_, layout_, threads, member),
        grads_(f, chunk_, layout_, threads, member) {}

  int64_t scratch_bytes() const { return layout_.used(); }

  void run(Team& team, int member) {
    scan_.begin(team.size(), member);
    grads_.pack(team.size(), member);
    chunk_.clear(team.size(), member);
    team.barrier(member);
    int64_t round = 0;
    for (int64_t end = f_.in.T; end > 0; end = chunk_.begin) {
      if (!team.goes_on(round++)) return;
      chunk_.end_before(end);
      chunk_.locate(team.size(), member);
      if (f_.workspace == nullptr) rebuild_.run(team, member);
      scan_.run(team, member);
      team.barrier(member);
      grads_.run(team, member);
    }
    scan_.finish();
  }

 private:
  const Backward<Real>& f_;
  Layout layout_;
  Chunk<Real> chunk_;
  Rebuild<Real> rebuild_;
  BackwardScan<Real> scan_;
  WeightGrads<Real> grads_;
};

template <class Real>
int64_t backward_scratch_bytes(const Backward<Real>& f, int threads) {
  return BackwardPass<Real>(f, threads, 0, nullptr).scratch_bytes();
}

template <class Real>
void backward(const Backward<Real>& f, Team& team, int threads, int member, void* scratch) {
  BackwardPass<Real>(f, threads, member, scratch).run(team, member);
}

}  // namespace
}  // namespace GRU_FAST_ISA
}  // namespace gru_fast
