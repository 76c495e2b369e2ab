// SPDX-License-Identifier: Apache-2.0
// Products of few rows with packed weights of 32, 16 or 8 bits. Weights and the rows they meet
// lie in 32-bit words of 1, 2 or 4 neighbouring k, so one loop serves all three. float32 is
// product() of tile.h, and keeps its order of summation; bfloat16 adds k in order too, in one
// chain; int8 adds integers, exactly. So neither rows, tiles abreast nor threads change a bit.
#pragma once
#include "dot_word.h"
#include "gate_math.h"
#include "panels.h"
#include "schedule.h"
#include "tile.h"

namespace gru_fast {
namespace GRU_FAST_ISA {
namespace {

// Rows or tiles whose epilogues run side by side: what one waits for hides in the others.
constexpr int kItems = kVecBytes == 64 ? 4 : 2;

// sum[i][n] += half HALF of the words at `a` and at `panels`, as dot_tiles() has them.
template <Weights P, int HALF, int NV, int ROWS, int N>
GRU_INLINE void add_half(const uint32_t* a, int64_t row_stride, const uint32_t* panels,
                         int64_t panel_stride, Sum<P> (&sum)[ROWS][N]) {
  constexpr int W = kLanes<float>;
  // Each half reads the words anew, and the mask each time: compilers would keep them.
  asm("" : "+r"(a), "+r"(panels));
  auto half_of = [](Words word) GRU_MEMBER_LAMBDA {
    const Words* mask = &kHighHalves;
    asm("" : "+r"(mask));
    return Dot<P>::template half<HALF>(word, *mask);
  };
  Sum<P> weight[N];
#pragma GCC unroll 12
  for (int n = 0; n < N; ++n) {
    weight[n] = half_of(load_words(panels + (n / NV) * panel_stride + (n % NV) * W));
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
    // Compilers shift the number first, and then bring it from one kind of register to the other.
    Words word = a[i * row_stride] - Words{};
    asm("" : "+x"(word));
    const Sum<P> row = half_of(word);
#pragma GCC unroll 12
    for (int n = 0; n < N; ++n) sum[i][n] += weight[n] * row;
  }
}

// out[(i * NT + tile) * NV + v], as product() of tile.h.
template <Weights P, int ROWS, int NT, int NV>
void dot_tiles(const uint32_t* a, int64_t row_stride, const uint32_t* panels, int64_t words,
               Sum<P>* out) {
  if constexpr (P == Weights::kFloat32) {
    product<float, ROWS, NT, NV>({reinterpret_cast<const float*>(a), row_stride}, 0,
                                 reinterpret_cast<const float*>(panels), words, out);
  } else {
    constexpr int W = kLanes<float>;
    constexpr int N = NT * NV;
    const int64_t panel_stride = words * NV * W;
    Sum<P> sum[ROWS][N] = {};
    for (int64_t k = 0; k < words; ++k) {
      const uint32_t* at = panels + k * (NV * W);
      if constexpr (P == Weights::kBFloat16 && kHalfByHalf && ROWS > kMostRowsOfSix) {
        add_half<P, 0, NV>(a + k, row_stride, at, panel_stride, sum);
        add_half<P, 1, NV>(a + k, row_stride, at, panel_stride, sum);
        continue;
      }
      Words weight[N];
#pragma GCC unroll 12
      for (int n = 0; n < N; ++n) {
        weight[n] = load_words(at + (n / NV) * panel_stride + (n % NV) * W);
      }
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i) {
        const auto row = Dot<P>::ready(a[i * row_stride + k]);
#if defined(__aarch64__)
        if (i > 0) load_after(a, sum[i - 1]);
#endif
#pragma GCC unroll 12
        for (int n = 0; n < N; ++n) Dot<P>::add(sum[i][n], weight[n], row);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 12
      for (int n = 0; n < N; ++n) out[i * N + n] = sum[i][n];
    }
  }
}

template <Weights P>
using DotTiles = void (*)(const uint32_t*, int64_t, const uint32_t*, int64_t, Sum<P>*);

template <Weights P, int ROWS, int NV, int NT>
DotTiles<P> pick_tiles(int tiles) {
  if constexpr (NT > 1) {
    if (tiles < NT) return pick_tiles<P, ROWS, NV, NT - 1>(tiles);
  }
  return dot_tiles<P, ROWS, NT, NV>;
}

// Few rows need several tiles abreast to hide the latency of the sums; a single row of int8 no more
// than that, so that panels are small beside the first cache (see multiply).
template <Weights P>
constexpr int most_abreast(int rows, int vectors) {
  const int sums = rows > kMostRowsOfSix ? 3 : rows > 1 || P == Weights::kInt8 ? 6 : 12;
  return sums / vectors < 8 ? sums / vectors : 8;
}

template <Weights P, int NV>
DotTiles<P> pick_dot(int rows, int tiles) {
  return for_rows(rows, [=]<int ROWS>(std::integral_constant<int, ROWS>) {
    return pick_tiles<P, ROWS, NV, most_abreast<P>(ROWS, NV)>(tiles);
  });
}

// The packed weights of `tiles` unit tiles, `count` gates side by side: [tile][k word][gate][lane].
struct Panels {
  uint32_t* words;
  float* scale;     // int8: [tile][gate][lane], what one unit of the integer sum is worth
  int32_t* offset;  // int8 with biased bytes: [tile][gate][lane], to be taken off the sum
  int64_t K;        // in words
  int64_t tiles;
  int count;
};

constexpr int pack_of(Weights weights) {
  return weights == Weights::kInt8 ? 4 : weights == Weights::kBFloat16 ? 2 : 1;
}

GRU_INLINE Panels take_panels(Weights weights, int64_t units, int64_t K, int count,
                              Layout& layout) {
  const int64_t tiles = tiles_of<float>(units), lanes = tiles * count * kLanes<float>;
  const int64_t words = (K + pack_of(weights) - 1) / pack_of(weights);
  const bool scaled = weights == Weights::kInt8;
  Panels panels{nullptr, nullptr, nullptr, words, tiles, count};
  panels.words = layout.take<uint32_t>(lanes * words);
  panels.scale = layout.take<float>(scaled ? lanes : 0);
  panels.offset = layout.take<int32_t>(scaled && kBiasedBytes ? lanes : 0);
  return panels;
}

// float32 to bfloat16, to the nearest, ties to even.
GRU_INLINE uint32_t bfloat16_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) return 0x7fc0;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

constexpr float kInt8Most = 127.0f;

GRU_INLINE int32_t nearest(float value) {
  const float magic = ExpConstants<float>::magic;
  const float shifted = value + magic;
  int32_t bits, zero;
  std::memcpy(&bits, &shifted, sizeof bits);
  std::memcpy(&zero, &magic, sizeof zero);
  return bits - zero;
}

// One row of weights, stride `step` words from k word to k word. Returns the int8 scale and offset.
template <Weights P>
void pack_row(const float* row, int64_t K, int64_t words, uint32_t* to, int64_t step, float* scale,
              int32_t* offset) {
  constexpr int pack = Dot<P>::kPack;
  float per_value = 0;
  if (P == Weights::kInt8) {
    float most = 0, zero = 0;  // NaN where a weight is NaN or infinite, which no byte can show
    for (int64_t k = 0; k < K; ++k) {
      const float size = row[k] < 0 ? -row[k] : row[k];
      most = size > most ? size : most;
      zero += 0 * row[k];
    }
    // The rows that it meets are 127 times what they stand for.
    *scale = most / kInt8Most / kInt8Most + zero;
    per_value = most > 0 ? kInt8Most / most : 0;
  }
  int32_t total = 0;
  for (int64_t word = 0; word < words; ++word) {
    uint32_t bits = 0;
    for (int i = 0; i < pack && word * pack + i < K; ++i) {
      const float value = row[word * pack + i];
      if (P == Weights::kBFloat16) {
        bits |= bfloat16_bits(value) << (16 * i);
      } else {
        const int32_t byte = static_cast<int8_t>(nearest(value * per_value));
        total += byte;
        bits |= (static_cast<uint32_t>(byte) & 0xff) << (8 * i);
      }
    }
    to[word * step] = bits;
  }
  if (P == Weights::kInt8 && kBiasedBytes) *offset = 128 * total;
}

// Rows gates[i] * units + unit of a row-major weight with K columns; zero from `units` on.
template <Weights P>
void pack_panels(const float* weight, int64_t units, int64_t K, const int* gates,
                 const Panels& panels) {
  constexpr int W = kLanes<float>;
  const int64_t step = panels.count * W;
  for (int64_t tile = 0; tile < panels.tiles; ++tile) {
    const int left = lanes_of<float>(tile, units);
    const int n = left > 0 ? left : 0;
    for (int i = 0; i < panels.count; ++i) {
      const float* rows = weight + (gates[i] * units + tile * W) * K;
      uint32_t* to = panels.words + tile * panels.K * step + i * W;
      if constexpr (P == Weights::kFloat32) {
        pack_transposed(rows, K, n, K, reinterpret_cast<float*>(to), step);
      } else {
        for (int lane = 0; lane < W; ++lane) {
          const int64_t at = tile * step + i * W + lane;
          pack_row<P>(rows + lane * K, lane < n ? K : 0, panels.K, to + lane, step,
                      panels.scale + at, panels.offset + at);
        }
      }
    }
  }
}

// The word that stands for zeros.
template <Weights P>
constexpr uint32_t zero_word() {
  return P == Weights::kInt8 && kBiasedBytes ? 0x80808080u : 0;
}

// The low 8 bits of each lane, and the low 16. Compilers extract lane by lane what __builtin_
// convertvector asks for.
GRU_INLINE void store_low_bytes(void* to, Words value) {
#if defined(__AVX512F__)
  _mm_storeu_si128(static_cast<__m128i*>(to),
                   _mm512_maskz_cvtepi32_epi8(0xffff, reinterpret_cast<__m512i>(value)));
#elif defined(__SSE2__)
  typedef uint32_t Four __attribute__((vector_size(16)));
  for (int i = 0; i < kVecBytes / 16; ++i) {
    Four four;
    std::memcpy(&four, reinterpret_cast<const char*>(&value) + 16 * i, sizeof four);
    const __m128i low = reinterpret_cast<__m128i>(four & 0xff);
    const __m128i pairs = _mm_packs_epi32(low, low);
    const int bytes = _mm_cvtsi128_si32(_mm_packus_epi16(pairs, pairs));
    std::memcpy(static_cast<char*>(to) + 4 * i, &bytes, sizeof bytes);
  }
#elif defined(__aarch64__)
  const uint16x4_t pairs = vmovn_u32(reinterpret_cast<uint32x4_t>(value));
  const uint8x8_t bytes = vmovn_u16(vcombine_u16(pairs, pairs));
  std::memcpy(to, &bytes, 4);
#else
  typedef uint8_t Bytes __attribute__((vector_size(kVecBytes / 4)));
  const Bytes bytes = __builtin_convertvector(value, Bytes);
  std::memcpy(to, &bytes, sizeof bytes);
#endif
}
GRU_INLINE void store_low_halves(void* to, Words value) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(static_cast<__m256i*>(to),
                      _mm512_maskz_cvtepi32_epi16(0xffff, reinterpret_cast<__m512i>(value)));
#elif defined(__AVX2__)
  const __m256i pairs = _mm256_packus_epi32(reinterpret_cast<__m256i>(value & 0xffff),
                                            reinterpret_cast<__m256i>(value & 0xffff));
  _mm_storeu_si128(static_cast<__m128i*>(to),
                   _mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08)));
#else
  typedef uint16_t Halves __attribute__((vector_size(kVecBytes / 2)));
  const Halves halves = __builtin_convertvector(value, Halves);
  std::memcpy(to, &halves, sizeof halves);
#endif
}

// A register of a row, as the left operand of a product: |value * multiple| <= 127 for int8.
template <Weights P>
GRU_INLINE void store_row(uint32_t* row, int64_t tile, Vec<float> value, float multiple) {
  constexpr int W = kLanes<float>;
  if constexpr (P == Weights::kFloat32) {
    store(reinterpret_cast<float*>(row) + tile * W, value);
  } else if constexpr (P == Weights::kBFloat16) {
#if defined(__AVX512BF16__)
    const __m256bh halves = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(value));
    std::memcpy(row + tile * (W / 2), &halves, sizeof halves);
#else
    const Words bits = reinterpret_cast<Words>(value);
    const Words rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const Words quiet_nan = Words{} + 0x7fc0;
    store_low_halves(row + tile * (W / 2), value == value ? rounded : quiet_nan);
#endif
  } else {
    // The low bits of the sum hold the rounded integer, as in scaled_exp().
    const Words bits = reinterpret_cast<Words>(value * multiple + ExpConstants<float>::magic);
    store_low_bytes(row + tile * (W / 4), kBiasedBytes ? bits ^ 0x80 : bits);
  }
}

// Which rows and tiles the N items of an epilogue are: neighbours in one of the two.
struct Items {
  int64_t row, tile;
  int row_step, tile_step;
  GRU_MEMBER int64_t row_of(int j) const { return row + j * row_step; }
  GRU_MEMBER int64_t tile_of(int j) const { return tile + j * tile_step; }
};

// values[v][j] is sum v of item j; the items lie `stride` sums apart.
template <Weights P, int N, int COUNT>
GRU_INLINE void value_items(const Panels& panels, const Sum<P>* sums, int64_t stride, Items items,
                            Vec<float> (&values)[COUNT][N]) {
  constexpr int W = kLanes<float>;
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) {
#pragma GCC unroll 3
    for (int v = 0; v < COUNT; ++v) {
      if constexpr (P == Weights::kInt8) {
        const int64_t at = (items.tile_of(j) * COUNT + v) * W;
        Ints sum = sums[j * stride + v];
        if (kBiasedBytes) {
          sum -= reinterpret_cast<Ints>(
              load_words(reinterpret_cast<const uint32_t*>(panels.offset + at)));
        }
        values[v][j] = __builtin_convertvector(sum, Vec<float>) * load(panels.scale + at);
      } else {
        values[v][j] = sums[j * stride + v];
      }
    }
  }
}

// epilogue(items, values) of value_items().
template <Weights P, int N, int COUNT, class Epilogue>
GRU_INLINE void finish_items(const Panels& panels, const Sum<P>* sums, int64_t stride, Items items,
                             Epilogue epilogue) {
  Vec<float> values[COUNT][N];
  value_items<P, N, COUNT>(panels, sums, stride, items, values);
  epilogue(items, values);
}

// The first `count` items from `items` on, as many at a time as there are left.
template <Weights P, int N, int COUNT, class Epilogue>
GRU_INLINE void finish_all(const Panels& panels, const Sum<P>* sums, int64_t stride, int count,
                           Items items, Epilogue epilogue) {
  int j = 0;
  for (; j + N <= count; j += N) {
    finish_items<P, N, COUNT>(panels, sums + j * stride, stride, items, epilogue);
    items.row += N * items.row_step;
    items.tile += N * items.tile_step;
  }
  if constexpr (N > 1) {
    finish_all<P, N / 2, COUNT>(panels, sums + j * stride, stride, count - j, items, epilogue);
  }
}

}  // namespace
}  // namespace GRU_FAST_ISA
}  // namespace gru_fast
