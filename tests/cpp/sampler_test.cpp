// SPDX-License-Identifier: Apache-2.0
// Generation and streams over many shapes, for sanitizers: every block of memory is as large as the
// kernels asked for, and filled with NaN. One thread and two must agree, also when both read the
// same weights at the same time. Exits non-zero on a fault.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <random>
#include <thread>
#include <vector>

#include "cpu/gru_stream.h"
#include "cpu/sampler_problem.h"
#include "cpu/team.h"

using namespace gru_fast;

// How many calls of new are served before one fails; negative: all of them.
static long served = -1;

void* operator new(size_t size) {
  if (served == 0) throw std::bad_alloc();
  if (served > 0) --served;
  void* block = std::malloc(size > 0 ? size : 1);
  if (block == nullptr) throw std::bad_alloc();
  return block;
}
void operator delete(void* block) noexcept { std::free(block); }
void operator delete(void* block, size_t) noexcept { std::free(block); }

namespace {

std::mt19937 generator(1);

std::vector<float> normal(int64_t count) {
  std::normal_distribution<float> draw(0, 0.4f);
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = draw(generator);
  return values;
}

struct Block {
  explicit Block(int64_t bytes) : bytes(static_cast<size_t>((bytes + 63) / 64 * 64)) {
    data = std::aligned_alloc(64, this->bytes);
    std::memset(data, 0xff, this->bytes);
  }
  ~Block() { std::free(data); }
  Block(const Block&) = delete;
  size_t bytes;
  void* data;
};

struct Result {
  std::vector<int64_t> tokens, lengths;
  std::vector<float> log_probs, h_n;
  bool operator==(const Result&) const = default;
};

constexpr int64_t kMostTokens = 12;
constexpr int64_t kRowsAtOnce = 64;  // of a member

struct Prompts {
  std::vector<int32_t> inputs;
  std::vector<int64_t> begin{0}, position, stream, limit;

  Prompts(int64_t B, int64_t V) {
    for (int64_t b = 0; b < B; ++b) {
      const int64_t length = b == 0 ? 70 : generator() % 9;
      inputs.push_back(static_cast<int32_t>(V));
      for (int64_t i = 0; i < length; ++i) inputs.push_back(static_cast<int32_t>(generator() % V));
      begin.push_back(static_cast<int64_t>(inputs.size()));
      position.push_back(length);
      stream.push_back(b);
      // Many all end together: in each row a sequence follows another.
      limit.push_back(B > kRowsAtOnce ? kMostTokens : 1 + generator() % kMostTokens);
    }
  }
};

// By so many threads of those that were asked for, which decide what is split.
Result run(const StackShape& shape, const void* snapshot, const Prompts& prompts,
           const DrawRules& rules, int threads, int asked) {
  const SamplerKernels& kernels = sampler_kernels();
  const auto B = static_cast<int64_t>(prompts.limit.size());
  const int64_t eos = B > kRowsAtOnce ? -1 : 0;
  Result result{std::vector<int64_t>(B * kMostTokens, -1), std::vector<int64_t>(B, -1),
                std::vector<float>(B * kMostTokens),
                std::vector<float>(shape.layers * B * shape.H)};
  Generation g{};
  g.B = B;
  g.inputs = prompts.inputs.data();
  g.input_begin = prompts.begin.data();
  g.position = prompts.position.data();
  g.stream = prompts.stream.data();
  g.limit = prompts.limit.data();
  g.eos = &eos;
  g.eos_count = 1;
  g.seed = 3;
  g.rules = rules;
  g.capacity = kMostTokens;
  g.tokens = result.tokens.data();
  g.lengths = result.lengths.data();
  g.log_probs = result.log_probs.data();
  g.h_n = result.h_n.data();
  g.poll = [](void*) { return false; };
  GenerationState state{};
  const Block scratch(kernels.generate_scratch_bytes(shape, g, asked));
  Team team(threads);
  auto part = [&](int number) {
    const int member = team.join(number, 1);
    if (member >= 0) kernels.generate(snapshot, g, state, team, asked, member, scratch.data);
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(part, i);
  part(0);
  for (std::thread& other : others) other.join();
  return result;
}

bool generates(Cell cell, Weights weights, int64_t B, int64_t H, int64_t V) {
  StackShape shape{cell, weights, 2, H, 0, V, V};
  const int64_t rows = gate_count(cell) * H;
  const auto table = normal((V + 1) * rows), hh = normal(2 * rows * H), ih = normal(rows * H);
  const auto bias = normal(3 * rows), head = normal(V * H), head_bias = normal(V);
  const LayerWeights layers[] = {
      {nullptr, hh.data(), nullptr, bias.data()},
      {ih.data(), hh.data() + rows * H, bias.data() + rows, bias.data() + 2 * rows}};
  const Block snapshot(sampler_kernels().snapshot_bytes(shape));
  sampler_kernels().pack(shape, {layers, table.data(), head.data(), head_bias.data()},
                         snapshot.data);
  const Prompts prompts(B, V);
  const DrawRules rules{false, 0.8f, B % 2 ? 4 : 0, B == 5 ? 0.7 : 1.0, 0};
  Result one;
  std::thread other([&] { one = run(shape, snapshot.data, prompts, rules, 1, 1); });
  const Result two = run(shape, snapshot.data, prompts, rules, 2, 2);
  other.join();
  const int more = static_cast<int>(B) + 1;  // than there are rows, which are split then
  return one == two && (B == 1 || one == run(shape, snapshot.data, prompts, rules, 2, more));
}

// The states over some frames; frames and weights are the same for all kinds of weights.
std::vector<float> streams(Cell cell, Weights weights, int64_t H, int64_t I) {
  generator.seed(2);
  const SamplerKernels& kernels = sampler_kernels();
  const StackShape shape{cell, weights, 1, H, I, 0, 0};
  const int64_t rows = gate_count(cell) * H, n = 70;
  const auto ih = normal(rows * I), hh = normal(rows * H), frames = normal(n * I);
  const LayerWeights layer{ih.data(), hh.data(), nullptr, nullptr};
  const Block snapshot(kernels.snapshot_bytes(shape)), stream(kernels.stream_bytes(shape));
  kernels.pack(shape, {&layer, nullptr, nullptr, nullptr}, snapshot.data);
  std::memset(stream.data, 0, stream.bytes);
  std::vector<float> state(static_cast<size_t>(H)), output(static_cast<size_t>(n * H));
  kernels.write_state(snapshot.data, stream.data, state.data());
  kernels.push(snapshot.data, stream.data, n, nullptr, frames.data(), output.data());
  kernels.read_state(snapshot.data, stream.data, state.data());
  return output;
}

float distance(const std::vector<float>& a, const std::vector<float>& b) {
  float most = 0;
  for (size_t i = 0; i < a.size(); ++i) most = std::fmax(most, std::fabs(a[i] - b[i]));
  return most;
}

// The interface for C: what it refuses, and that it leaks nothing when memory is out.
bool is_sound(int weights) {
  constexpr int64_t H = 19, I = 5;
  auto ih = normal(3 * H * I), hh = normal(3 * H * H);
  gru_layer layer{ih.data(), hh.data(), nullptr, nullptr};
  auto create = [&](int64_t hidden, const gru_layer* from) {
    return gru_stream_create(GRU_RESET_AFTER, weights, I, hidden, 1, from);
  };
  const gru_layer no_hh{ih.data(), nullptr, nullptr, nullptr};
  const gru_layer no_ih{nullptr, hh.data(), nullptr, nullptr};
  if (create(0, &layer) || create(H, nullptr) || create(H, &no_hh) || create(H, &no_ih)) {
    return false;
  }
  for (int kind : {-1, 3}) {
    if (gru_stream_create(kind, weights, I, H, 1, &layer)) return false;
    if (gru_stream_create(GRU_RESET_AFTER, kind, I, H, 1, &layer)) return false;
  }
  gru_stream* stream = nullptr;
  for (long most = 0; stream == nullptr; ++most) {
    served = most;
    stream = create(H, &layer);
    served = -1;
  }
  const auto frame = normal(I);
  std::vector<float> state(H);
  gru_stream_push(stream, 1, frame.data(), state.data());
  gru_stream_destroy(stream);
  for (float value : state) {
    if (!(std::fabs(value) < 1)) return false;
  }
  // Weights that are not numbers show in their unit.
  for (int i = 0; i < I; ++i) ih[2 * H * I + 3 * I + i] = std::nanf("");
  stream = create(H, &layer);
  gru_stream_push(stream, 1, frame.data(), state.data());
  gru_stream_destroy(stream);
  return std::isnan(state[3]) && !std::isnan(state[4]);
}

}  // namespace

int main() {
  for (int weights : {GRU_FLOAT32, GRU_BFLOAT16, GRU_INT8}) {
    if (!is_sound(weights)) return std::fprintf(stderr, "fault: the interface for C\n"), 1;
  }
  for (Cell cell : {Cell::kResetAfter, Cell::kResetBefore, Cell::kNoReset}) {
    for (Weights weights : {Weights::kFloat32, Weights::kBFloat16, Weights::kInt8}) {
      for (int64_t B : {1, 2, 5, 200}) {
        for (int64_t V : {7, 65}) {
          // One row is split by hidden units, and a large head with it.
          const bool same =
              generates(cell, weights, B, B == 1 || B == 200 ? 45 : 19, B * V == 65 ? 1500 : V);
          if (!same) return std::fprintf(stderr, "fault: threads show\n"), 1;
        }
      }
    }
    const auto exact = streams(cell, Weights::kFloat32, 19, 5);
    for (Weights weights : {Weights::kBFloat16, Weights::kInt8}) {
      const float error = distance(streams(cell, weights, 19, 5), exact);
      if (!(error < 0.05f)) return std::fprintf(stderr, "fault: rounded weights show\n"), 1;
    }
  }
  std::puts("ok");
}
