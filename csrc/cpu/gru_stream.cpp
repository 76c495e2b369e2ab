// SPDX-License-Identifier: Apache-2.0
#include "gru_stream.h"

#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "sampler_problem.h"

using namespace gru_fast;

struct gru_stream {
  const SamplerKernels& kernels;
  void* snapshot;
  void* memory;
};

namespace {

void* zeroed(int64_t bytes) {
  const size_t size = (static_cast<size_t>(bytes) + 64) / 64 * 64;
  void* block = std::aligned_alloc(64, size);
  if (block != nullptr) std::memset(block, 0, size);
  return block;
}

}  // namespace

gru_stream* gru_stream_create(int cell, int weights, int64_t input, int64_t hidden, int64_t layers,
                              const gru_layer* layer) try {
  constexpr int64_t most = int64_t{1} << 16;
  const bool known = cell >= GRU_RESET_AFTER && cell <= GRU_NO_RESET && weights >= GRU_FLOAT32 &&
                     weights <= GRU_INT8;
  if (!known || input < 1 || input > most || hidden < 1 || hidden > most || layers < 1 ||
      layer == nullptr) {
    return nullptr;
  }
  StackShape shape{};
  shape.cell = static_cast<Cell>(cell);
  shape.weights = static_cast<Weights>(weights);
  shape.layers = layers;
  shape.H = hidden;
  shape.I = input;
  std::vector<LayerWeights> from;
  for (int64_t l = 0; l < layers; ++l) {
    if (layer[l].weight_ih == nullptr || layer[l].weight_hh == nullptr) return nullptr;
    from.push_back({layer[l].weight_ih, layer[l].weight_hh, layer[l].bias_ih, layer[l].bias_hh});
  }
  const SamplerKernels& kernels = sampler_kernels();
  std::unique_ptr<gru_stream, decltype(&gru_stream_destroy)> stream(
      new gru_stream{kernels, zeroed(kernels.snapshot_bytes(shape)),
                     zeroed(kernels.stream_bytes(shape))},
      gru_stream_destroy);
  if (stream->snapshot == nullptr || stream->memory == nullptr) return nullptr;
  kernels.pack(shape, {from.data(), nullptr, nullptr, nullptr}, stream->snapshot);
  const std::vector<float> zeros(static_cast<size_t>(layers * hidden));
  gru_stream_set_state(stream.get(), zeros.data());
  return stream.release();
} catch (...) {
  return nullptr;
}

void gru_stream_push(gru_stream* stream, int64_t n, const float* frames, float* states) {
  stream->kernels.push(stream->snapshot, stream->memory, n, nullptr, frames, states);
}

void gru_stream_get_state(const gru_stream* stream, float* state) {
  stream->kernels.read_state(stream->snapshot, stream->memory, state);
}

void gru_stream_set_state(gru_stream* stream, const float* state) {
  stream->kernels.write_state(stream->snapshot, stream->memory, state);
}

void gru_stream_destroy(gru_stream* stream) {
  if (stream == nullptr) return;
  std::free(stream->snapshot);
  std::free(stream->memory);
  delete stream;
}
