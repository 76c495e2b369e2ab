// SPDX-License-Identifier: Apache-2.0
// What the samplers are asked to do: sizes and pointers, free of torch, of Python and of the
// standard library. The rules of the draw stand in gru_fast/reference_sampling.py.
#pragma once
#include <cstdint>

#include "problem.h"

namespace gru_fast {

enum class Weights : int { kFloat32, kBFloat16, kInt8 };

// Of H and I: the int8 products of so long a row add up to no more than 32 bits hold.
constexpr int64_t kMostUnits = int64_t{1} << 16;

// A stack of GRU layers between a token table, or frames of features, and a head, or nothing.
struct StackShape {
  Cell cell;
  Weights weights;
  int64_t layers, H;
  int64_t I;        // features of a frame, where the input is one
  int64_t tokens;   // that a table projects; 0: the input is a frame
  int64_t outputs;  // logits of the head; 0: the output is the top layer's state
};

// Row-major float32, only read while packing.
struct LayerWeights {
  const float* weight_ih;  // (N*H, I), or (N*H, H) above the first layer; unused with a table
  const float* weight_hh;  // (N*H, H)
  const float* bias_ih;    // (N*H) or null; a table's layer has it in the table
  const float* bias_hh;    // (N*H) or null
};
struct StackWeights {
  const LayerWeights* layers;
  const float* table;        // (tokens + 1, N*H) rows W_ih x + b_ih; the last one is that of x = 0
  const float* head_weight;  // (outputs, H), or null without outputs
  const float* head_bias;    // (outputs) or null
};

struct DrawRules {
  bool greedy;
  float temperature;
  int64_t top_k;  // 0: all
  double top_p;   // >= 1: all
  float min_p;    // 0: all
};

// B sequences. `inputs` are rows of the token table, where row `tokens` stands for the zero vector;
// every sequence has at least one, and from the last one on it feeds itself.
struct Generation {
  int64_t B;
  const int32_t* inputs;
  const int64_t* input_begin;  // (B + 1) into inputs
  const int64_t* position;     // (B) absolute index of the first token drawn
  const int64_t* stream;       // (B) which random stream is drawn from
  const int64_t* limit;        // (B) tokens to draw at most
  const int64_t* eos;          // (eos_count) tokens that end a sequence
  int64_t eos_count;
  uint64_t seed;
  DrawRules rules;
  const float* h0;   // (layers, B, H), or null: zero
  int64_t capacity;  // columns of tokens and log_probs
  int64_t* tokens;   // (B, capacity)
  float* log_probs;  // (B, capacity): of the unfiltered softmax at temperature 1; or null
  int64_t* lengths;  // (B) tokens drawn
  float* h_n;        // (layers, B, H) after the last input that was fed; or null
  // Called now and then by every member; true stops the call.
  bool (*poll)(void* context);
  void* context;
};

// What the members of a call share; zeroed by the caller.
struct GenerationState {
  int64_t next_sequence;
  int32_t stop;
  int32_t agreed_stop[2];
  int64_t bad_sequence;  // 1 + a sequence whose logits held NaN, +inf or nothing above -inf
};

class Team;

// The samplers of one instruction set. A snapshot is `snapshot_bytes` of memory filled by `pack`;
// any number of threads may read it. All memory is aligned to 64.
struct SamplerKernels {
  const char* name;
  int64_t (*snapshot_bytes)(const StackShape&);
  void (*pack)(const StackShape&, const StackWeights&, void* snapshot);

  // Called by every member of a team of at most `threads`; needs outputs and tokens.
  int64_t (*generate_scratch_bytes)(const StackShape&, const Generation&, int threads);
  void (*generate)(const void* snapshot, const Generation&, GenerationState&, Team&, int threads,
                   int member, void* scratch);

  // A stream is `stream_bytes` of zeroed memory that write_state has been called for. push() feeds
  // n inputs, of `tokens` or of `frames` (n, I), and writes n rows of `outputs` or else of H
  // values.
  int64_t (*stream_bytes)(const StackShape&);
  void (*push)(const void* snapshot, void* stream, int64_t n, const int32_t* tokens,
               const float* frames, float* output);
  void (*read_state)(const void* snapshot, const void* stream, float* state);   // (layers, H)
  void (*write_state)(const void* snapshot, void* stream, const float* state);  // (layers, H)

  // One draw: the token, or -1 where the logits allow none. `logits` hold -inf from V on up to the
  // next multiple of 16; log_prob may be null.
  int64_t (*draw_scratch_bytes)(int64_t V);
  int64_t (*draw)(const DrawRules&, const float* logits, int64_t V, uint64_t seed,
                  uint64_t position, uint64_t stream, float* log_prob, void* scratch);
};

// Those of the current instruction set; unless `plain`, those with dot products where the processor
// has them: on AVX-512 both kinds (VNNI and BF16), on Linux for ARM those of bytes.
const SamplerKernels& sampler_kernels(bool plain = false);

}  // namespace gru_fast
