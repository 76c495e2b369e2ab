// SPDX-License-Identifier: Apache-2.0
// The samplers of one instruction set, for the sampler_*.cpp files.
#pragma once
#include "generate.h"

namespace gru_fast {
namespace GRU_FAST_ISA {
namespace {

// Calls body(integral constant) with the kind of weights.
template <class Body>
auto with_weights(Weights weights, Body body) {
  switch (weights) {
    case Weights::kBFloat16:
      return body(std::integral_constant<Weights, Weights::kBFloat16>{});
    case Weights::kInt8:
      return body(std::integral_constant<Weights, Weights::kInt8>{});
    default:
      return body(std::integral_constant<Weights, Weights::kFloat32>{});
  }
}

const Snapshot& snapshot_of(const void* memory) { return *static_cast<const Snapshot*>(memory); }

int64_t snapshot_bytes(const StackShape& shape) { return Snapshot(shape, nullptr).bytes; }

void pack(const StackShape& shape, const StackWeights& weights, void* memory) {
  const Snapshot s(shape, memory);
  std::memcpy(memory, &s, sizeof s);
  with_weights(shape.weights, [&](auto kind) { pack_stack<kind()>(s, weights); });
}

bool splits(const Generation& g, int threads) { return g.B < threads; }

int64_t generate_scratch_bytes(const StackShape& shape, const Generation& g, int threads) {
  const Snapshot s(shape, nullptr);
  GenerationState state{};
  return with_weights(shape.weights, [&](auto kind) {
    const Generator<kind()> member(s, g, state, splits(g, threads), Layout(nullptr),
                                   Layout(nullptr));
    return member.shared_bytes() + threads * member.bytes();
  });
}

void generate(const void* snapshot, const Generation& g, GenerationState& state, Team& team,
              int threads, int member, void* scratch) {
  const Snapshot& s = snapshot_of(snapshot);
  char* const base = static_cast<char*>(scratch);
  with_weights(s.shape.weights, [&](auto kind) {
    const bool split = splits(g, threads);
    const Generator<kind()> sizes(s, g, state, split, Layout(nullptr), Layout(nullptr));
    Generator<kind()>(s, g, state, split, Layout(base),
                      Layout(base + sizes.shared_bytes() + member * sizes.bytes()))
        .run(team, member);
  });
}

// The memory of a stream: which state is the current one, then the stack, then one row of logits.
template <Weights P>
struct StreamLayout {
  StreamLayout(const Snapshot& s, void* memory)
      : layout(memory),
        parity(layout.take<int64_t>(1)),
        stack(s, 1, layout, layout),
        logits(layout.take<float>(s.padded_outputs())) {
    if (memory != nullptr) stack.set_parity(static_cast<int>(*parity));
  }
  Layout layout;
  int64_t* parity;
  Stack<P> stack;
  float* logits;
};

int64_t stream_bytes(const StackShape& shape) {
  const Snapshot s(shape, nullptr);
  return with_weights(shape.weights,
                      [&](auto kind) { return StreamLayout<kind()>(s, nullptr).layout.used(); });
}

void push(const void* snapshot, void* stream, int64_t n, const int32_t* tokens, const float* frames,
          float* output) {
  const Snapshot& s = snapshot_of(snapshot);
  const int64_t H = s.shape.H, width = s.shape.outputs > 0 ? s.shape.outputs : H;
  with_weights(s.shape.weights, [&](auto kind) {
    StreamLayout<kind()> at(s, stream);
    const Crew alone{nullptr, 0, {0, s.tiles}};
    const int64_t most = at.stack.most_steps(1);
    for (int64_t begin = 0; begin < n; begin += most) {
      const int64_t T = n - begin < most ? n - begin : most;
      if (tokens != nullptr) {
        for (int64_t t = 0; t < T; ++t) at.stack.feed(t, 1, 0, tokens[begin + t]);
      } else {
        at.stack.feed_frames(frames + begin * s.shape.I, T, alone);
      }
      float* to = output + begin * width;
      at.stack.advance(T, 1, alone, s.shape.outputs > 0 ? nullptr : to);
      for (int64_t t = 0; s.shape.outputs > 0 && t < T; ++t) {
        at.stack.logits(T > 1 ? at.stack.top_of_steps(t) : at.stack.top(0), 1, at.logits,
                        {0, s.head.tiles});
        std::memcpy(to + t * width, at.logits, static_cast<size_t>(width) * sizeof(float));
      }
    }
    *at.parity = at.stack.parity();
  });
}

void read_state(const void* snapshot, const void* stream, float* state) {
  const Snapshot& s = snapshot_of(snapshot);
  with_weights(s.shape.weights, [&](auto kind) {
    const StreamLayout<kind()> at(s, const_cast<void*>(stream));
    for (int64_t l = 0; l < s.shape.layers; ++l) {
      std::memcpy(state + l * s.shape.H, at.stack.state(l, 0),
                  static_cast<size_t>(s.shape.H) * sizeof(float));
    }
  });
}

void write_state(const void* snapshot, void* stream, const float* state) {
  const Snapshot& s = snapshot_of(snapshot);
  with_weights(s.shape.weights, [&](auto kind) {
    const StreamLayout<kind()> at(s, stream);
    for (int64_t l = 0; l < s.shape.layers; ++l) {
      std::memcpy(at.stack.state(l, 0), state + l * s.shape.H,
                  static_cast<size_t>(s.shape.H) * sizeof(float));
      at.stack.state_written(l, 0, {0, s.tiles});
    }
  });
}

int64_t draw_scratch_bytes(int64_t V) {
  Layout layout(nullptr);
  Draw(V, layout);
  return layout.used();
}

int64_t draw_one(const DrawRules& rules, const float* logits, int64_t V, uint64_t seed,
                 uint64_t position, uint64_t stream, float* log_prob, void* scratch) {
  Layout layout(scratch);
  return Draw(V, layout)(rules, logits, seed, position, stream, log_prob);
}

}  // namespace

const SamplerKernels& sampler_table();

const SamplerKernels& sampler_table() {
  static constexpr SamplerKernels kernels = {
      GRU_FAST_ISA_NAME, snapshot_bytes,     pack,    generate_scratch_bytes,
      generate,          stream_bytes,       push,    read_state,
      write_state,       draw_scratch_bytes, draw_one};
  return kernels;
}

}  // namespace GRU_FAST_ISA
}  // namespace gru_fast
