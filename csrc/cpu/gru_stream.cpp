// SPDX-License-Identifier: Apache-2.0
#include "gru_stream.h"

#include <memory>
#include <vector>

#include "block.h"
#include "sampler_problem.h"

using namespace gru_fast;

struct gru_stream {
  const SamplerKernels& kernels;
  const Block snapshot, memory;
};

gru_stream* gru_stream_create(int cell, int weights, int64_t input, int64_t hidden, int64_t layers,
                              const gru_layer* layer) try {
  const bool known = cell >= GRU_RESET_AFTER && cell <= GRU_NO_RESET && weights >= GRU_FLOAT32 &&
                     weights <= GRU_INT8;
  if (!known || input < 1 || input > kMostUnits || hidden < 1 || hidden > kMostUnits ||
      layers < 1 || layer == nullptr) {
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
  std::unique_ptr<gru_stream> stream(new gru_stream{kernels, zeroed(kernels.snapshot_bytes(shape)),
                                                    zeroed(kernels.stream_bytes(shape))});
  kernels.pack(shape, {from.data(), nullptr, nullptr, nullptr}, stream->snapshot.get());
  const std::vector<float> zeros(static_cast<size_t>(layers * hidden));
  gru_stream_set_state(stream.get(), zeros.data());
  return stream.release();
} catch (...) {
  return nullptr;
}

void gru_stream_push(gru_stream* stream, int64_t n, const float* frames, float* states) {
  stream->kernels.push(stream->snapshot.get(), stream->memory.get(), n, nullptr, frames, states);
}

void gru_stream_get_state(const gru_stream* stream, float* state) {
  stream->kernels.read_state(stream->snapshot.get(), stream->memory.get(), state);
}

void gru_stream_set_state(gru_stream* stream, const float* state) {
  stream->kernels.write_state(stream->snapshot.get(), stream->memory.get(), state);
}

void gru_stream_destroy(gru_stream* stream) { delete stream; }
