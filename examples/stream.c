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

static void stop(int code, const char* why) {
  fprintf(stderr, "%s\n", why);
  exit(code);
}

static int64_t read_size(const char* text) {
  char* end;
  const long size = strtol(text, &end, 10);
  if (end == text || *end != '\0' || size < 1 || size > 65536) stop(2, "a size is 1 to 65536");
  return size;
}

static float* read_floats(FILE* file, int64_t count) {
  float* values = malloc((size_t)count * sizeof *values);
  if (values == NULL) stop(1, "out of memory");
  if (fread(values, sizeof *values, (size_t)count, file) != (size_t)count) {
    stop(1, "the weights file is too short");
  }
  return values;
}

int main(int argc, char** argv) {
  if (argc != 5) stop(2, "usage: stream WEIGHTS INPUT HIDDEN LAYERS");
  FILE* file = fopen(argv[1], "rb");
  if (file == NULL) stop(2, "the weights file cannot be read");
  const int64_t input = read_size(argv[2]), hidden = read_size(argv[3]);
  const int64_t layers = read_size(argv[4]), rows = 3 * hidden;
  gru_layer* layer = calloc((size_t)layers, sizeof *layer);
  if (layer == NULL) stop(1, "out of memory");
  for (int64_t l = 0; l < layers; ++l) {
    layer[l].weight_ih = read_floats(file, rows * (l ? hidden : input));
    layer[l].weight_hh = read_floats(file, rows * hidden);
    layer[l].bias_ih = read_floats(file, rows);
    layer[l].bias_hh = read_floats(file, rows);
  }
  if (fgetc(file) != EOF) stop(1, "the weights file is too long");
  gru_stream* stream =
      gru_stream_create(GRU_RESET_AFTER, GRU_FLOAT32, input, hidden, layers, layer);
  if (stream == NULL) stop(1, "refused");
  const size_t width = (size_t)input, height = (size_t)hidden;
  float *frame = malloc(width * sizeof *frame), *state = malloc(height * sizeof *state);
  if (frame == NULL || state == NULL) stop(1, "out of memory");
  size_t got;
  while ((got = fread(frame, sizeof *frame, width, stdin)) == width) {
    gru_stream_push(stream, 1, frame, state);
    if (fwrite(state, sizeof *state, height, stdout) != height) break;
  }
  if (got > 0 && got < width) stop(1, "the last frame is cut off");
  gru_stream_destroy(stream);
  return fflush(stdout) != 0 || ferror(stdout);
}
