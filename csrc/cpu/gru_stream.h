/* SPDX-License-Identifier: Apache-2.0
 * A stack of GRU layers that is stepped, for programs without Python and without torch.
 * Build: csrc/cpu/{gru_stream,sampler_isa,sampler_baseline,team}.cpp, C++20; with
 * -DGRU_FAST_X86=1, or -DGRU_FAST_NEON_DOT=1 on Linux for ARM, gru_stream.cpp and what setup.py
 * takes of csrc/cpu/ there, with its flags. */
#ifndef GRU_FAST_GRU_STREAM_H
#define GRU_FAST_GRU_STREAM_H
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { GRU_RESET_AFTER, GRU_RESET_BEFORE, GRU_NO_RESET };
enum { GRU_FLOAT32, GRU_BFLOAT16, GRU_INT8 };

/* Row-major, as torch.nn.GRU has them: N*H rows of the gates r, z, n (z, n without reset), with
 * `input` columns in the first weight_ih and H in all others. A bias may be null. */
typedef struct {
  const float *weight_ih, *weight_hh, *bias_ih, *bias_hh;
} gru_layer;

typedef struct gru_stream gru_stream;

/* Copies the weights; the state is zero. Null where a size or a kind is wrong, a weight is missing,
 * memory is out, or GRU_FAST_CPU_ISA names no instruction set of this processor. */
gru_stream* gru_stream_create(int cell, int weights, int64_t input, int64_t hidden, int64_t layers,
                              const gru_layer* layer);
/* Feeds n frames of `input` values; writes n rows of `hidden` values, the last layer's states.
 * Allocates nothing. One thread at a time. With GRU_INT8 frames must be finite. */
void gru_stream_push(gru_stream* stream, int64_t n, const float* frames, float* states);
/* (layers, hidden) values. With GRU_INT8 they must lie between -1 and 1. */
void gru_stream_get_state(const gru_stream* stream, float* state);
void gru_stream_set_state(gru_stream* stream, const float* state);
void gru_stream_destroy(gru_stream* stream);

#ifdef __cplusplus
}
#endif
#endif
