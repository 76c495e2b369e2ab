// SPDX-License-Identifier: Apache-2.0
// Forward and backward passes of layers, scans and layer-normalised scans for sanitizers: every
// block of memory is as large as the kernels asked for, and filled with NaN. One thread and
// several, and weights packed before, by the call and widened by it, must agree in every bit. A
// call that is told to end does so on all its threads. Exits non-zero on a fault.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "cpu/norm_problem.h"
#include "cpu/problem.h"
#include "cpu/team.h"

namespace gru_fast::baseline {
const Kernels& table();
const NormKernels& norm_table();
}  // namespace gru_fast::baseline

using namespace gru_fast;

namespace {

std::mt19937 generator(1);

using Values = std::vector<float>;

Values normal(int64_t count) {
  std::normal_distribution<float> draw(0, 0.4f);
  Values values(static_cast<size_t>(count));
  for (float& value : values) value = draw(generator);
  return values;
}

using Halves = std::vector<uint16_t>;

Halves halves_of(const Values& values) {
  Halves halves(values.size());
  std::ranges::transform(values, halves.begin(), [](float value) { return float16_bits(value); });
  return halves;
}

// As float16 has them.
Values rounded(Values values) {
  for (float& value : values) value = float16_value(float16_bits(value));
  return values;
}

std::vector<uint8_t> flags(int64_t count) {
  std::vector<uint8_t> values(static_cast<size_t>(count));
  for (uint8_t& value : values) value = generator() % 4 == 0;
  return values;
}

struct Case {
  Cell cell;
  int64_t T, B, G, I, H;
  bool projects;  // x, else gates_x
  bool shared;    // one x for all groups
  bool lengths, resets, scales, recompute;
  bool packed = false;
  bool heads = false;  // groups have rows of one weight

  GroupLayout layout() const {
    return heads ? GroupLayout::of_heads(G, H) : GroupLayout::of_groups(B, H);
  }
  // Where each group has its part of a weight, a bias or a gradient of these.
  template <class Number>
  Groups<Number> spread(Number* all, int64_t columns) const {
    return {all, (heads ? H : gate_count(cell) * H) * columns};
  }
};

// The tensors that a call reads.
struct Inputs {
  explicit Inputs(const Case& c)
      : N(gate_count(c.cell)),
        width(c.projects ? c.I : N * c.H),
        x(normal(c.T * c.B * (c.shared ? 1 : c.G) * width)),
        h0(normal(c.G * c.B * c.H)),
        weight_ih(rounded(normal(c.G * N * c.H * c.I))),
        weight_hh(rounded(normal(c.G * N * c.H * c.H))),
        bias_ih(normal(c.G * N * c.H)),
        bias_hh(normal(c.G * N * c.H)),
        gamma(normal(c.G * N * c.H)),
        reset_state(normal(c.G * c.B * c.H)),
        h_scale(normal(c.B * c.G * c.H)),
        grad_output(normal(c.T * c.B * c.G * c.H)),
        grad_h_n(normal(c.G * c.B * c.H)),
        reverse(static_cast<size_t>(c.G)),
        reset_mask(flags(c.T * c.B)) {
    reverse.back() = c.G > 1;
    for (int64_t b = 0; b < c.B; ++b) {
      const int64_t least = c.packed ? 1 : 0;
      const auto above = static_cast<int64_t>(generator() % (c.T + 1 - least));
      lengths.push_back(b == 0 ? c.T : least + above);
    }
    if (c.packed) std::ranges::sort(lengths, std::greater<>());
    order.resize(lengths.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
    alive_before.push_back(0);
    for (int64_t t = 0; t < c.T; ++t) {
      const auto alive = std::ranges::count_if(lengths, [&](int64_t n) { return n > t; });
      alive_before.push_back(alive_before.back() + alive);
    }
    rows = c.packed ? alive_before.back() : c.T * c.B;
    x.resize(static_cast<size_t>(rows * (c.shared ? 1 : c.G) * width));
    x.shrink_to_fit();
    grad_output.resize(static_cast<size_t>(rows * c.G * c.H));
    grad_output.shrink_to_fit();
  }

  Problem<float> problem(const Case& c, bool ranked) const {
    Problem<float> p{};
    p.T = c.T;
    p.B = c.B;
    p.G = c.G;
    p.I = c.projects ? c.I : 0;
    p.H = c.H;
    p.layout = c.layout();
    p.cell = c.cell;
    p.reverse = reverse.data();
    p.x = x.data();
    p.x_stride_g = c.shared ? 0 : width;
    p.x_stride_b = width * (c.shared ? 1 : c.G);
    p.x_stride_t = p.x_stride_b * c.B;
    p.x_shared = c.shared;
    p.h0 = h0.data();
    p.weight_hh = c.spread(weight_hh.data(), c.H);
    p.bias_hh = c.spread(bias_hh.data(), 1);
    if (c.projects) {
      p.weight_ih = c.spread(weight_ih.data(), c.I);
      p.bias_ih = c.spread(bias_ih.data(), 1);
    }
    p.packed = c.packed;
    if (c.lengths) {
      p.lengths = lengths.data();
      p.order = ranked ? order.data() : nullptr;
      p.alive_before = ranked ? alive_before.data() : nullptr;
    }
    if (c.resets) {
      p.reset_mask = reset_mask.data();
      p.reset_state = reset_state.data();
    }
    if (c.scales) p.h_scale = h_scale.data();
    return p;
  }

  int64_t N, width, rows;  // rows: of (T, B)
  Values x, h0, weight_ih, weight_hh, bias_ih, bias_hh, gamma, reset_state, h_scale, grad_output,
      grad_h_n;
  std::vector<uint8_t> reverse, reset_mask;
  std::vector<int64_t> lengths, order, alive_before;
};

// The tensors that a call writes.
class Results {
 public:
  float* make(int64_t count, bool zeroed = false) {
    all_.emplace_back(static_cast<size_t>(count));
    if (!zeroed) std::memset(all_.back().data(), 0xff, all_.back().size() * sizeof(float));
    return all_.back().data();
  }
  // NaN is not equal to NaN: what was not written shows as a fault.
  bool operator==(const Results&) const = default;

 private:
  std::vector<Values> all_;
};

template <class Call>
void on_team(const Call& call, int threads, int64_t (*scratch_bytes)(const Call&, int),
             void (*kernel)(const Call&, Team&, int, int, void*), bool (*poll)(void*) = nullptr,
             void* context = nullptr) {
  const auto bytes = static_cast<size_t>((scratch_bytes(call, threads) + 63) / 64 * 64);
  const std::unique_ptr<void, void (*)(void*)> scratch(std::aligned_alloc(64, bytes), std::free);
  std::memset(scratch.get(), 0xff, bytes);
  Team team(threads, poll, context);
  auto part = [&](int number) {
    const int member = team.join(number, 1);
    if (member >= 0) kernel(call, team, threads, member, scratch.get());
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(part, i);
  part(0);
  for (std::thread& other : others) other.join();
}

struct Free {
  void operator()(float* memory) const { std::free(memory); }
};
using Panels = std::unique_ptr<float, Free>;

Panels packed(const PackedWeight& weight, const Values& values) {
  const KernelTable<float>& kernels = baseline::table().f32;
  const size_t bytes = static_cast<size_t>(kernels.packed_weight_size(weight)) * sizeof(float);
  Panels panels(static_cast<float*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
  std::memset(panels.get(), 0xff, bytes);
  kernels.pack_weight(weight, values.data(), panels.get());
  return panels;
}

enum class Given { kAsTheyAre, kPacked, kNarrow };

Results layer(const Case& c, const Inputs& in, int threads, Given weights = Given::kAsTheyAre) {
  const KernelTable<float>& kernels = baseline::table().f32;
  const int64_t rows = in.rows * c.G, gates = in.N * c.H, states = c.G * c.B * c.H;
  Results results;
  Forward<float> f{};
  f.in = in.problem(c, true);
  f.output = results.make(rows * c.H);
  f.h_n = results.make(states);
  if (!c.recompute) f.workspace = results.make(rows * slot_count(c.cell) * c.H);
  Panels packed_ih, packed_hh;
  if (weights == Given::kPacked) {
    const int64_t heads = c.heads ? c.G : 1;
    const PackedWeight ih{c.cell, c.H, c.I, false, heads}, hh{c.cell, c.H, c.H, true, heads};
    packed_ih = packed(ih, in.weight_ih);
    packed_hh = packed(hh, in.weight_hh);
    f.packed_ih = {packed_ih.get(), kernels.packed_weight_size(ih) / heads};
    f.packed_hh = {packed_hh.get(), kernels.packed_weight_size(hh) / heads};
  }
  const Halves narrow_ih = halves_of(in.weight_ih), narrow_hh = halves_of(in.weight_hh);
  if (weights == Given::kNarrow) {
    f.in.weight_hh = {c.spread(narrow_hh.data(), c.H), Narrow::kFloat16};
    if (c.projects) f.in.weight_ih = {c.spread(narrow_ih.data(), c.I), Narrow::kFloat16};
  }
  on_team(f, threads, kernels.forward_scratch_bytes, kernels.forward);

  Backward<float> b{};
  b.in = in.problem(c, true);
  b.output = f.output;
  b.workspace = f.workspace;
  b.grad_output = in.grad_output.data();
  b.grad_h_n = in.grad_h_n.data();
  if (c.shared && c.G > 1) {
    b.grad_shared_x = results.make(in.rows * in.width, true);
  } else {
    b.grad_x = results.make(static_cast<int64_t>(in.x.size()));
  }
  b.grad_h0 = results.make(states);
  if (c.projects) {
    b.grad_weight_ih = c.spread(results.make(c.G * gates * c.I), c.I);
    b.grad_bias_ih = c.spread(results.make(c.G * gates), 1);
  }
  b.grad_weight_hh = c.spread(results.make(c.G * gates * c.H), c.H);
  b.grad_bias_hh = c.spread(results.make(c.G * gates), 1);
  if (c.resets) b.grad_reset_state = results.make(states, true);
  if (c.scales) b.grad_h_scale = results.make(states, true);
  on_team(b, threads, kernels.backward_scratch_bytes, kernels.backward);
  return results;
}

Results norm_scan(const Case& c, const Inputs& in, int threads) {
  const NormTable<float>& kernels = baseline::norm_table().f32;
  const int64_t rows = c.T * c.B * c.G, gates = 3 * c.H, states = c.G * c.B * c.H;
  Results results;
  NormForward<float> f{};
  f.in = in.problem(c, false);
  f.gamma = in.gamma.data();
  f.eps = 1e-5f;
  f.output = results.make(rows * c.H);
  f.h_n = results.make(states);
  if (!c.recompute) {
    f.workspace = results.make(rows * kNormSlots * c.H);
    f.rstd = results.make(rows);
  }
  on_team(f, threads, kernels.forward_scratch_bytes, kernels.forward);

  NormBackward<float> b{};
  b.in = f.in;
  b.gamma = f.gamma;
  b.eps = f.eps;
  b.output = f.output;
  b.workspace = f.workspace;
  b.rstd = f.rstd;
  b.grad_output = in.grad_output.data();
  b.grad_h_n = in.grad_h_n.data();
  b.grad_gates_x = results.make(rows * gates);
  b.grad_h0 = results.make(states);
  b.grad_weight = results.make(c.G * gates * c.H);
  b.grad_gamma = results.make(c.G * gates);
  b.grad_bias = results.make(c.G * gates);
  if (c.resets) b.grad_reset_state = results.make(states, true);
  if (c.scales) b.grad_h_scale = results.make(states, true);
  on_team(b, threads, kernels.backward_scratch_bytes, kernels.backward);
  return results;
}

// Ends a call after some rounds of the thread that asks first.
struct Ending {
  std::atomic<std::thread::id> owner{};
  int rounds = 0;

  static bool poll(void* context) {
    auto& self = *static_cast<Ending*>(context);
    std::thread::id nobody;
    const std::thread::id me = std::this_thread::get_id();
    if (!self.owner.compare_exchange_strong(nobody, me) && nobody != me) return false;
    return ++self.rounds >= 3;
  }
};

// Whether some of the first `step` values were written and some of the last were not. Threads that
// do not wait for each other may have come to the end.
bool begun_only(const Values& values, int64_t step) {
  auto written = [](float value) { return value == value; };
  return std::any_of(values.begin(), values.begin() + step, written) &&
         !std::all_of(values.end() - step, values.end(), written);
}

// Units are split where there is one row, rows where there are more.
bool ends_early(int64_t B, int threads) {
  const Case c{Cell::kResetAfter, 4000, B, 1, 3, 64, true, true, false, false, false, false};
  const Inputs in(c);
  const KernelTable<float>& kernels = baseline::table().f32;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const auto rows = static_cast<size_t>(c.T * B), states = static_cast<size_t>(B * c.H);
  Values output(rows * 64, nan), workspace(rows * 4 * 64, nan), h_n(states);
  Forward<float> f{};
  f.in = in.problem(c, true);
  f.output = output.data();
  f.h_n = h_n.data();
  f.workspace = workspace.data();
  Ending forward_ends;
  on_team(f, threads, kernels.forward_scratch_bytes, kernels.forward, Ending::poll, &forward_ends);
  if (!begun_only(output, B * c.H)) return false;

  Values grad_x(in.x.size(), nan);
  Backward<float> b{};
  b.in = f.in;
  b.output = f.output;
  b.workspace = f.workspace;
  b.grad_output = in.grad_output.data();
  b.grad_x = grad_x.data();
  on_team(f, threads, kernels.forward_scratch_bytes, kernels.forward);
  Ending backward_ends;
  on_team(b, threads, kernels.backward_scratch_bytes, kernels.backward, Ending::poll,
          &backward_ends);
  std::ranges::reverse(grad_x);
  if (!begun_only(grad_x, B * c.I)) return false;

  NormForward<float> n{};
  const Case norm_case{
      Cell::kResetAfter, 4000, B, 1, 3, 64, false, false, false, false, false, true};
  const Inputs gates_x(norm_case);
  n.in = gates_x.problem(norm_case, false);
  n.gamma = in.gamma.data();
  n.eps = 1e-5f;
  output.assign(output.size(), nan);
  n.output = output.data();
  n.h_n = h_n.data();
  Ending norm_ends;
  const NormTable<float>& norm = baseline::norm_table().f32;
  on_team(n, threads, norm.forward_scratch_bytes, norm.forward, Ending::poll, &norm_ends);
  return begun_only(output, B * c.H);
}

}  // namespace

int main() {
  for (int threads : {1, 2, 5}) {
    if (!ends_early(1, threads) || !ends_early(12, threads)) {
      std::fprintf(stderr, "fault: a call that was told to end did not\n");
      return 1;
    }
  }
  constexpr int64_t kSizes[][5] = {
      // T, B, G, I, H: one step; one row; rows left over; more than a chunk of the backward pass;
      // more than a block of the sum; weights beyond the second level of the cache, in rows of
      // 2.6 and of 4 KB
      {1, 3, 2, 5, 7},   {1, 2, 1, 3, 19},    {9, 1, 1, 6, 33},
      {5, 13, 2, 4, 10}, {40, 9, 1, 3, 9},    {30, 9, 3, 4, 9},
      {3, 2, 1, 270, 5}, {1, 1, 1, 660, 210}, {1, 1, 1, 1030, 131},
  };
  for (const auto& [T, B, G, I, H] : kSizes) {
    for (int kind = 0; kind < 24; ++kind) {
      const auto cell = static_cast<Cell>(kind % 3);
      const bool odd = kind & 1, upper = kind & 2;
      const Case layer_case{cell, T,   B,          G,          I,         H,
                            true, odd, kind >= 12, kind >= 18, kind >= 6, upper};
      const Case scan_case{cell,  T,     B,          G,          I,         H,
                           false, false, kind >= 12, kind >= 18, kind >= 6, upper};
      const Case packed_case{cell, T, B, G, I, H, true, odd, true, false, false, upper, true};
      const Case heads_case{cell, T,          B,     G,     I,     H,     true,
                            true, kind >= 12, false, false, upper, false, true};
      const Inputs x(layer_case), gates_x(scan_case), packed_x(packed_case), heads_x(heads_case);
      const Results alone = layer(layer_case, x, 1), scanned = layer(scan_case, gates_x, 1),
                    of_packed = layer(packed_case, packed_x, 1),
                    of_heads = layer(heads_case, heads_x, 1);
      for (int threads : {2, 5}) {
        const bool same = layer(layer_case, x, threads) == alone &&
                          layer(scan_case, gates_x, threads) == scanned &&
                          layer(packed_case, packed_x, threads) == of_packed &&
                          layer(heads_case, heads_x, threads) == of_heads;
        const bool packed_alike =
            (G > 1 || layer(layer_case, x, threads, Given::kPacked) == alone) &&
            layer(heads_case, heads_x, threads, Given::kPacked) == of_heads;
        const bool widened_alike = layer(layer_case, x, threads, Given::kNarrow) == alone &&
                                   layer(scan_case, gates_x, threads, Given::kNarrow) == scanned &&
                                   layer(heads_case, heads_x, threads, Given::kNarrow) == of_heads;
        const bool norm = cell == Cell::kResetAfter;
        if (!same || !packed_alike || !widened_alike ||
            (norm &&
             !(norm_scan(scan_case, gates_x, threads) == norm_scan(scan_case, gates_x, 1)))) {
          std::fprintf(stderr, "fault: threads show, or a result was not written\n");
          return 1;
        }
      }
    }
  }
  std::puts("ok");
}
