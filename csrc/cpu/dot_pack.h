// SPDX-License-Identifier: Apache-2.0
// What dot.h multiplies: weights packed into words of 32 bits, and the rows that meet them, rounded
// as the weights are.
#pragma once
#include "dot_word.h"
#include "gate_math.h"
#include "panels.h"

namespace gru_fast {
namespace GRU_FAST_ISA {
namespace {

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
        bits |= uint32_t{bfloat16_bits(value)} << (16 * i);
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

}  // namespace
}  // namespace GRU_FAST_ISA
}  // namespace gru_fast
