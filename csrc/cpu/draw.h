// SPDX-License-Identifier: Apache-2.0
// A token from logits by the rules of gru_fast/reference_sampling.py: Philox4x32-10, softmax with
// temperature, top_k, top_p, min_p, inversion of the cumulative distribution.
#pragma once
#include "gate_math.h"
#include "panels.h"
#include "sampler_problem.h"

namespace gru_fast {
namespace GRU_FAST_ISA {
namespace {

// Partial sums cover 16 tokens on every instruction set.
constexpr int64_t kDrawBlock = 16;

// A uniform in [0, 1), a multiple of 2**-24: the top 24 bits of the first Philox4x32-10 word.
GRU_INLINE float uniform(uint64_t seed, uint64_t position, uint64_t stream) {
  uint32_t c0 = static_cast<uint32_t>(position), c1 = static_cast<uint32_t>(position >> 32);
  uint32_t c2 = static_cast<uint32_t>(stream), c3 = static_cast<uint32_t>(stream >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c0, p1 = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return static_cast<float>(c0 >> 8) * 0x1p-24f;
}

// exp(x) for x <= 0; zero where float32 has no normal number left, as for a masked logit.
template <int N>
GRU_INLINE void exp_negative(Vec<float> (&x)[N]) {
  constexpr float limit = ExpConstants<float>::limit;
  Vec<float> scale[N], fraction[N], clamped[N];
  GRU_EACH(j) clamped[j] = larger<float>(-limit, x[j]);
  scaled_exp<float, N>(clamped, scale, fraction);
  GRU_EACH(j) x[j] = x[j] < -limit ? Vec<float>{} : scale[j] * fraction[j] + scale[j];
}

typedef float Float8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef double Double8 __attribute__((vector_size(64)));
typedef double Double4 __attribute__((vector_size(32)));
typedef double Double2 __attribute__((vector_size(16)));

template <class Half, class Whole>
GRU_INLINE Half add_halves(Whole whole) {
  Half half[2];
  std::memcpy(half, &whole, sizeof half);
  return half[0] + half[1];
}

GRU_INLINE double block_sum(const float* weights) {
  const Double8 low = __builtin_convertvector(*reinterpret_cast<const Float8*>(weights), Double8);
  const Double8 high =
      __builtin_convertvector(*reinterpret_cast<const Float8*>(weights + 8), Double8);
  const Double2 sum = add_halves<Double2>(add_halves<Double4>(low + high));
  return sum[0] + sum[1];
}

class Draw {
 public:
  static constexpr int W = kLanes<float>;

  GRU_MEMBER Draw(int64_t V, Layout& layout)
      : V_(V),
        padded_(round_up(V, kDrawBlock)),
        weights_(layout.take<float>(padded_)),
        kept_(layout.take<float>(padded_)),
        sums_(layout.take<double>(padded_ / kDrawBlock)),
        heap_(layout.take<uint64_t>(V)) {}

  // `logits` hold -inf from V on up to the next multiple of 16. Returns -1 where they hold NaN or
  // +inf, or nothing above -inf, also after the division by the temperature. *log_prob, unless
  // null, gets the logarithm of the token's share in the softmax of the logits as they are.
  int64_t operator()(const DrawRules& rules, const float* logits, uint64_t seed, uint64_t position,
                     uint64_t stream, float* log_prob) {
    const float u = uniform(seed, position, stream);
    const bool ranked = (rules.top_k > 0 && rules.top_k < V_) || rules.top_p < 1;
    const bool plain = !rules.greedy && !ranked && rules.min_p == 0;
    const float top = largest(logits);
    const float most = rules.greedy ? top : top / rules.temperature;
    if (!(top - top == 0.0f && most - most == 0.0f)) return -1;
    // A sum of plain weights shows NaN by itself.
    if (!plain && holds_nan(logits)) return -1;
    int64_t token;
    double total = 0;
    if (rules.greedy) {
      for (token = 0; logits[token] != top;) ++token;
    } else if (ranked) {
      token = sample_ranked(rules, logits, most, u);
    } else {
      const double sum = weigh(logits, rules.temperature, most, rules.min_p);
      if (!(sum - sum == 0)) return -1;
      token = invert(weights_, u, sum);
      if (rules.temperature == 1 && plain) total = sum;
    }
    if (log_prob != nullptr) {
      if (total == 0) total = weigh(logits, 1, top, 0);
      *log_prob =
          static_cast<float>(static_cast<double>(logits[token] - top) - __builtin_log(total));
    }
    return token;
  }

 private:
  // The largest; of no use where there is NaN, which callers look for.
  GRU_MEMBER float largest(const float* logits) const {
    Vec<float> most = load(logits);
    for (int64_t i = W; i < padded_; i += W) most = larger<float>(load(logits + i), most);
    return largest_lane<W / 2>(most);
  }
  template <int D>
  GRU_MEMBER static float largest_lane(Vec<float> v) {
    v = larger<float>(exchange_lanes<float, D>(v, std::make_index_sequence<W>{}), v);
    if constexpr (D > 1) return largest_lane<D / 2>(v);
    return v[0];
  }
  bool holds_nan(const float* logits) const {
    bool found = false;
    for (int64_t i = 0; i < padded_; ++i) found |= logits[i] != logits[i];
    return found;
  }

  // weights_ = exp(logits / temperature - most), or 0 below `least`; returns their sum.
  GRU_MEMBER double weigh(const float* logits, float temperature, float most, float least) {
    return temperature == 1 ? weigh_all<false>(logits, temperature, most, least)
                            : weigh_all<true>(logits, temperature, most, least);
  }
  template <bool DIVIDES>
  double weigh_all(const float* logits, float temperature, float most, float least) {
    constexpr int kMost = kDrawBlock / W > 4 ? kDrawBlock / W : 4;
    int64_t i = 0;
    for (; i + kMost * W <= padded_; i += kMost * W) {
      weigh_some<DIVIDES, kMost>(logits, temperature, most, least, i);
    }
    for (; i < padded_; i += W) weigh_some<DIVIDES, 1>(logits, temperature, most, least, i);
    double total = 0;
    for (int64_t block = 0; block < padded_ / kDrawBlock; ++block) {
      total += sums_[block] = block_sum(weights_ + block * kDrawBlock);
    }
    return total;
  }
  template <bool DIVIDES, int N>
  GRU_MEMBER void weigh_some(const float* logits, float temperature, float most, float least,
                             int64_t at) {
    Vec<float> w[N];
    GRU_EACH(j) {
      const Vec<float> v = load(logits + at + j * W);
      w[j] = (DIVIDES ? v / temperature : v) - most;
    }
    exp_negative<N>(w);
    if (least > 0) GRU_EACH(j) w[j] = w[j] >= least ? w[j] : Vec<float>{};
    GRU_EACH(j) store(weights_ + at + j * W, w[j]);
  }

  int64_t sample_ranked(const DrawRules& rules, const float* logits, float most, float u) {
    const bool top_k = rules.top_k > 0 && rules.top_k < V_;
    double total = weigh(logits, rules.temperature, most, 0);
    fill_heap(logits, rules.temperature);
    const int64_t candidates = top_k ? rules.top_k : V_;
    if (top_k) {
      total = 0;
      for (int64_t rank = 0; rank < candidates; ++rank) total += weights_[pop(V_ - rank)];
    }
    fill_zero(kept_, padded_);
    double below = 0;
    for (int64_t rank = 0; rank < candidates; ++rank) {
      // The first one whatever the product, which a processor may round to 0.
      if (rank > 0 && rules.top_p < 1 && !(below < rules.top_p * total)) break;
      // What pop() took lies at the end of the heap.
      const int64_t id = top_k ? id_of(heap_[V_ - 1 - rank]) : pop(V_ - rank);
      below += weights_[id];
      if (weights_[id] >= rules.min_p) kept_[id] = weights_[id];
    }
    total = 0;
    for (int64_t i = 0; i < padded_; i += kDrawBlock) {
      total += sums_[i / kDrawBlock] = block_sum(kept_ + i);
    }
    return invert(kept_, u, total);
  }

  // The first token whose running sum exceeds u * total; sums_ are those of its blocks. Counts
  // instead of stopping: where the sum passes is anybody's guess, also the processor's.
  GRU_MEMBER int64_t invert(const float* weights, float u, double total) const {
    const double target = static_cast<double>(u) * total;
    double before = 0, sum = 0;
    int64_t block = 0;
    for (int64_t i = 0; i < padded_ / kDrawBlock; ++i) {
      sum += sums_[i];
      const bool passed = sum > target;
      block += !passed;
      before = passed ? before : sum;
    }
    const float* of_block = weights + block * kDrawBlock;
    int within = 0;
#pragma GCC unroll 16
    for (int i = 0; i < kDrawBlock; ++i) {
      before += of_block[i];
      within += !(before > target);
    }
    if (within == kDrawBlock) {
      // The block added in another order fell short by a rounding.
      for (--within; within > 0 && !(of_block[within] > 0);) --within;
    }
    return block * kDrawBlock + within;
  }

  // A max-heap of keys that rank by (-logit, id).
  GRU_MEMBER static int64_t id_of(uint64_t key) {
    return static_cast<int64_t>(~static_cast<uint32_t>(key));
  }
  void fill_heap(const float* logits, float temperature) {
    for (int64_t i = 0; i < V_; ++i) {
      const float scaled = logits[i] / temperature + 0.0f;  // -0 ties with 0
      uint32_t bits;
      std::memcpy(&bits, &scaled, sizeof bits);
      bits = bits >> 31 ? ~bits : bits | 0x80000000u;
      heap_[i] = uint64_t{bits} << 32 | static_cast<uint32_t>(~i);
    }
    for (int64_t i = V_ / 2 - 1; i >= 0; --i) sink(i, V_);
  }
  GRU_MEMBER void sink(int64_t at, int64_t size) {
    const uint64_t key = heap_[at];
    for (int64_t child; (child = 2 * at + 1) < size; at = child) {
      if (child + 1 < size && heap_[child + 1] > heap_[child]) ++child;
      if (heap_[child] <= key) break;
      heap_[at] = heap_[child];
    }
    heap_[at] = key;
  }
  // Moves the top of a heap of `size` behind its end; returns its token.
  GRU_MEMBER int64_t pop(int64_t size) {
    const uint64_t key = heap_[0];
    heap_[0] = heap_[size - 1];
    sink(0, size - 1);
    heap_[size - 1] = key;
    return id_of(key);
  }

  const int64_t V_, padded_;
  float *weights_, *kept_;
  double* sums_;
  uint64_t* heap_;
};

}  // namespace
}  // namespace GRU_FAST_ISA
}  // namespace gru_fast
