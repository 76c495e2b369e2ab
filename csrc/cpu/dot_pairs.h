// SPDX-License-Identifier: Apache-2.0
// The product of one row with panels, two tiles at a time, where the epilogue of a pair and the
// product of the next run side by side: the one waits for its chain of operations, the other for
// the second level of the cache. The sums and their order are those of dot.h.
#pragma once
#include "dot.h"
#include "share.h"

namespace gru_fast {
namespace GRU_FAST_ISA {
namespace {

// Sums, the values of an epilogue and its constants stand in registers at the same time.
constexpr bool kPairs = kVecBytes == 64;
// An epilogue of three gates lets the product go on about so many times.
constexpr int64_t kTurns = 14;

// Whether each output is one chain of additions.
template <Weights P>
constexpr bool one_chain(const Panels& panels) {
  return P != Weights::kFloat32 || panels.K <= kSumBlock;
}

// The product with one pair of tiles: its sums so far, and what comes next.
template <Weights P, int COUNT>
struct PairProduct {
  static constexpr int W = kLanes<float>;
  static constexpr int N = 2 * COUNT;

  GRU_MEMBER void begin(const uint32_t* words, int64_t panel, const uint32_t* row) {
    at[0] = words;
    at[1] = words + panel;
    a = row;
#pragma GCC unroll 6
    for (int n = 0; n < N; ++n) sums[n] = Sum<P>{};
  }
  GRU_MEMBER void go_on(const uint32_t* stop) {
    for (; a < stop; ++a) {
      // Otherwise a register for each of the sums holds how far it lies from the first.
      asm("" : "+r"(at[1]));
#pragma GCC unroll 6
      for (int n = 0; n < N; ++n) {
        const Words weight = load_words(at[n / COUNT] + n % COUNT * W);
        if constexpr (P == Weights::kFloat32) {
          sums[n] += reinterpret_cast<Vec<float>>(weight) * *reinterpret_cast<const float*>(a);
        } else {
          Dot<P>::add(sums[n], weight, Dot<P>::ready(*a));
        }
      }
      at[0] += COUNT * W;
      at[1] += COUNT * W;
    }
  }

  Sum<P> sums[N];
  const uint32_t *at[2], *a;
};

// What a step multiplies one row by, and in which order: the tiles of a range but an odd last one.
template <Weights P, int COUNT>
struct Pairs {
  using Product = PairProduct<P, COUNT>;

  GRU_MEMBER Pairs(const Panels& panels, Range range, bool backwards)
      : panels(panels),
        count((range.end - range.begin) / 2),
        begin(range.begin),
        backwards(backwards),
        panel(panels.K * COUNT * Product::W),
        turn((panels.K + kTurns - 1) / kTurns) {}

  GRU_MEMBER int64_t tile(int64_t pair) const {
    return begin + 2 * (backwards ? count - 1 - pair : pair);
  }
  GRU_MEMBER const uint32_t* words(int64_t pair) const { return panels.words + tile(pair) * panel; }

  // As multiply() with one row; epilogue(items, values, between) calls between() where it can
  // wait.
  template <class Epilogue>
  GRU_MEMBER void multiply(const uint32_t* a, Epilogue epilogue) const {
    const uint32_t* const end = a + panels.K;
    if (count == 0) return;
    Product product;
    product.begin(words(0), panel, a);
    product.go_on(end);
    for (int64_t pair = 0; pair < count; ++pair) {
      const bool last = pair + 1 == count;
      // Behind the last pair there is nothing to multiply.
      const uint32_t* next = words(last ? pair : pair + 1);
      const uint32_t* row = last ? end : a;
      // Compilers join a product and a sum only where no branch lies between them.
      Vec<float> values[COUNT][2];
      const Items items = {0, tile(pair), 0, 1};
      value_items<P, 2, COUNT>(panels, product.sums, COUNT, items, values);
      product.begin(next, panel, row);
      epilogue(items, values, [&]() GRU_MEMBER_LAMBDA {
        const uint32_t* stop = product.a + turn;
        product.go_on(stop < end ? stop : end);
      });
      product.go_on(end);
    }
  }

  const Panels& panels;
  const int64_t count, begin;
  const bool backwards;
  const int64_t panel, turn;
};

}  // namespace
}  // namespace GRU_FAST_ISA
}  // namespace gru_fast
