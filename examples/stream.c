/* SPDX-License-Identifier: Apache-2.0
 * A GRU in a C program: weights from a file, frames from standard input, states to standard output.
 *
 *   for f in gru_stream sampler_isa sampler_baseline team; do
 *     c++ -std=c++20 -O3 -Wno-psabi -c csrc/cpu/$f.cpp; done
 *   cc -O2 -Icsrc/cpu -c examples/stream.c && c++ -pthread *.o -o stream
 *   ./stream weights.bin 64 128 1 < frames.f32 > states.f32
 *
 * weights.bin: float32, layer by layer weight_ih, weight_hh, bias_ih, bias_hh of a torch.nn.GRU. */
#include <stdio.h>
#include <stdlib.h>

#include "gru_stream.h"

static float* read_floats(FILE* file, size_t count) {
  float* values = malloc(count * sizeof *values);
  if (values == NULL || fread(values, sizeof *values, count, file) != count) {
    fprintf(stderr, "the weights file is too short\n");
    exit(1);
  }
  return values;
}

int main(int argc, char** argv) {
  FILE* file = argc == 5 ? fopen(argv[1], "rb") : NULL;
  if (file == NULL) return fprintf(stderr, "usage: stream WEIGHTS INPUT HIDDEN LAYERS\n"), 2;
  const size_t input = strtoul(argv[2], NULL, 10), hidden = strtoul(argv[3], NULL, 10);
  const size_t layers = strtoul(argv[4], NULL, 10), rows = 3 * hidden;
  gru_layer* layer = calloc(layers + 1, sizeof *layer);
  if (layer == NULL) return fprintf(stderr, "refused\n"), 1;
  for (size_t l = 0; l < layers; ++l) {
    layer[l].weight_ih = read_floats(file, rows * (l ? hidden : input));
    layer[l].weight_hh = read_floats(file, rows * hidden);
    layer[l].bias_ih = read_floats(file, rows);
    layer[l].bias_hh = read_floats(file, rows);
  }
  gru_stream* stream = gru_stream_create(GRU_RESET_AFTER, GRU_FLOAT32, (int64_t)input,
                                         (int64_t)hidden, (int64_t)layers, layer);
  float *frame = malloc((input + 1) * sizeof *frame), *state = malloc((hidden + 1) * sizeof *state);
  if (stream == NULL || frame == NULL || state == NULL) return fprintf(stderr, "refused\n"), 1;
  while (fread(frame, sizeof *frame, input, stdin) == input) {
    gru_stream_push(stream, 1, frame, state);
    if (fwrite(state, sizeof *state, hidden, stdout) != hidden) break;
  }
  gru_stream_destroy(stream);
  return fflush(stdout) != 0 || ferror(stdout);
}
