// SPDX-License-Identifier: Apache-2.0
// How many threads a call is worth: no more than it has work for, on a machine with many cores too.
#include "cpu/parallel.h"

#include <cstdio>
#include <initializer_list>

using namespace gru_fast;

namespace {

bool failed = false;

int threads(int64_t H, int64_t B, int64_t T, int available, int passes = 1) {
  Problem<float> p{};
  p.T = T;
  p.B = B;
  p.G = 1;
  p.I = p.H = H;
  p.cell = Cell::kResetAfter;
  return threads_worth(p, passes, available);
}

void expect(const char* what, int found, int least, int most) {
  if (found >= least && found <= most) return;
  std::fprintf(stderr, "%s: expected %d to %d threads, got %d\n", what, least, most, found);
  failed = true;
}

}  // namespace

int main() {
  for (int available : {1, 2, 16, 64}) {
    expect("H = 8, one step", threads(8, 1, 1, available), 1, 1);
    expect("small units, one long sequence", threads(32, 1, 10000, available), 1, 1);
    expect("small units, a batch", threads(32, 64, 1000, available), available, available);
    expect("large", threads(1024, 256, 100, available), available, available);
    expect("large, one sequence", threads(2048, 1, 100, available), available, available);
  }
  expect("one step of some rows", threads(64, 64, 1, 64), 2, 4);
  expect("the same in training", threads(64, 64, 1, 64, 3), 3, 12);
  expect("no more than tiles of units", threads(256, 1, 1000, 64), 2, 16);
  expect("a share of a step each", threads(128, 1, 1000, 64), 2, 8);
  expect("rows before units", threads(32, 3, 10000, 64), 3, 3);
  expect("units of three rows", threads(512, 3, 1000, 128), 32, 96);
  if (failed) return 1;
  std::puts("ok");
  return 0;
}
