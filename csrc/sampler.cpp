// SPDX-License-Identifier: Apache-2.0
// The generation loop and the draw for Python, from NumPy arrays; packed_stack.h says what is
// checked where.
#include "sampler.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/arena.h"
#include "cpu/parallel.h"
#include "cpu/sampler_problem.h"
#include "cpu/stats.h"
#include "cpu/team.h"
#include "packed_stack.h"
#include "pool.h"
#include "run_team.h"
#include "signals.h"

namespace py = pybind11;

namespace gru_fast {
namespace {

// Products that a thread has to have to do for its start to be worth it, some 10 us, and weights of
// a step that are worth another thread and its meetings: more than a first cache holds.
constexpr double kShareProducts = 1e6;
constexpr double kSplitBytes = 48 << 10;

// Within these bounds the likeliest token is always left to be drawn.
DrawRules checked_rules(bool do_sample, double temperature, std::optional<int64_t> top_k,
                        std::optional<double> top_p, std::optional<double> min_p) {
  const DrawRules rules = {!do_sample, static_cast<float>(temperature), top_k.value_or(0),
                           top_p.value_or(1.0), static_cast<float>(min_p.value_or(0.0))};
  if (do_sample && !(rules.temperature > 0 && rules.temperature < HUGE_VALF)) {
    complain("temperature", "a float32 > 0", std::to_string(temperature));
  }
  if (top_k && *top_k < 1) complain("top_k", ">= 1 or None", std::to_string(*top_k));
  if (!(rules.top_p > 0 && rules.top_p <= 1)) {
    complain("top_p", "0 < top_p <= 1 or None", std::to_string(rules.top_p));
  }
  if (!(rules.min_p >= 0 && rules.min_p <= 1)) {
    complain("min_p", "0 <= min_p <= 1 or None", std::to_string(*min_p));
  }
  return rules;
}

int threads_worth(const PackedStack& stack, const Generation& g, int available) {
  if (available <= 1) return 1;
  const int bytes_each = stack.shape().weights == Weights::kFloat32    ? 4
                         : stack.shape().weights == Weights::kBFloat16 ? 2
                                                                       : 1;
  double steps = 0;
  for (int64_t b = 0; b < g.B; ++b) {
    steps += static_cast<double>(g.input_begin[b + 1] - g.input_begin[b] + g.limit[b]);
  }
  const int threads = at_most(available, steps * stack.products() / kShareProducts);
  if (threads <= 1) return 1;
  if (g.B >= threads) return threads;
  const double each = 1 + std::floor(stack.products() * bytes_each / kSplitBytes);
  return at_most(threads, static_cast<double>(g.B) * each);
}

// What a call feeds and where it stops: sequence b is fed inputs[begin[b]:begin[b + 1]], where the
// row after the last token of the table is the zero vector, then what it draws.
Generation checked_sequences(const StackShape& shape, const Integers<int32_t>& inputs,
                             const Integers<int64_t>& input_begin,
                             const Integers<int64_t>& position, const Integers<int64_t>& stream,
                             const Integers<int64_t>& limit) {
  Generation g{};
  g.B = static_cast<int64_t>(limit.size());
  check_shape("position", position, {g.B});
  check_shape("stream", stream, {g.B});
  check_shape("input_begin", input_begin, {g.B + 1});
  g.inputs = inputs.data();
  g.input_begin = input_begin.data();
  g.position = position.data();
  g.stream = stream.data();
  g.limit = limit.data();
  for (int64_t b = 0; b < g.B; ++b) {
    if (g.limit[b] < 1) complain("limit", ">= 1", std::to_string(g.limit[b]));
    if (g.input_begin[b] < 0 || g.input_begin[b] >= g.input_begin[b + 1]) {
      complain("input_begin", "ascending values from 0", std::to_string(g.input_begin[b]));
    }
    g.capacity = std::max(g.capacity, g.limit[b]);
  }
  if (g.B > 0 && g.input_begin[g.B] > inputs.size()) {
    complain("input_begin", "at most " + std::to_string(inputs.size()),
             std::to_string(g.input_begin[g.B]));
  }
  for (int64_t i = 0; i < inputs.size(); ++i) {
    if (g.inputs[i] < 0 || g.inputs[i] > shape.tokens) {
      complain("inputs", "0 to " + std::to_string(shape.tokens), std::to_string(g.inputs[i]));
    }
  }
  return g;
}

// Runs a call on at most `threads` threads. Needs no lock of the interpreter.
void run(const PackedStack& stack, const Generation& g, GenerationState& state, Signals& signals,
         int threads) {
  threads = threads_worth(stack, g, threads);
  const Scratch scratch(
      static_cast<size_t>(stack.kernels().generate_scratch_bytes(stack.shape(), g, threads)));
  Team team(threads);
  run_members(
      team, threads, signals,
      [&](int member) {
        stack.kernels().generate(stack.memory(), g, state, team, threads, member, scratch.data());
      },
      [&] { __atomic_store_n(&state.stop, 1, __ATOMIC_RELAXED); });
  launches.fetch_add(1, std::memory_order_relaxed);
}

using Generated = std::tuple<py::array, py::array, py::object, py::array>;

Generated generate(const PackedStack& stack, const Integers<int32_t>& inputs,
                   const Integers<int64_t>& input_begin, const Integers<int64_t>& position,
                   const Integers<int64_t>& stream, const Integers<int64_t>& limit,
                   const std::vector<int64_t>& eos, uint64_t seed, bool do_sample,
                   double temperature, std::optional<int64_t> top_k, std::optional<double> top_p,
                   std::optional<double> min_p, const MaybeFloats& h0, bool log_probs,
                   int threads) {
  const StackShape& shape = stack.shape();
  if (shape.outputs < 1 || shape.tokens < 1) {
    complain("generate", "a stack with a table and a head", "one without");
  }
  if (shape.outputs > shape.tokens) {
    complain("head",
             "at most as many rows as the table has tokens (" + std::to_string(shape.tokens) + ")",
             std::to_string(shape.outputs));
  }
  Generation g = checked_sequences(shape, inputs, input_begin, position, stream, limit);
  g.eos = eos.data();
  g.eos_count = static_cast<int64_t>(eos.size());
  g.seed = seed;
  g.rules = checked_rules(do_sample, temperature, top_k, top_p, min_p);
  g.h0 = read("h0", h0, {shape.layers, g.B, shape.H});

  Integers<int64_t> tokens({g.B, g.capacity}), lengths(g.B);
  Floats h_n({shape.layers, g.B, shape.H});
  MaybeFloats chances;
  if (log_probs) chances = Floats({g.B, g.capacity});
  g.tokens = tokens.mutable_data();
  g.lengths = lengths.mutable_data();
  g.log_probs = chances ? chances->mutable_data() : nullptr;
  g.h_n = h_n.mutable_data();

  Signals signals;
  g.poll = Signals::poll;
  g.context = &signals;
  GenerationState state{};
  const int pool = pool_threads();
  if (g.B > 0) {
    without_lock(
        [&] { run(stack, g, state, signals, threads > 0 ? std::min(threads, pool) : pool); });
  }
  signals.rethrow();
  if (state.bad_sequence > 0) {
    const bool divided = do_sample && temperature != 1;
    complain(divided ? "logits / temperature " + std::string(py::str(py::float_(temperature)))
                     : "logits",
             "no NaN or +inf and at least one finite value",
             "others in sequence " + std::to_string(stream.data()[state.bad_sequence - 1]));
  }
  py::object chances_or_none = py::none();
  if (chances) chances_or_none = *chances;
  return {tokens, lengths, chances_or_none, h_n};
}

// Rows of logits (n, V) to tokens (n) and their log-probabilities (n); -1 where a row allows none.
std::tuple<py::array, py::array> draw(const Floats& logits, uint64_t seed,
                                      const Integers<int64_t>& position,
                                      const Integers<int64_t>& stream, bool do_sample,
                                      double temperature, std::optional<int64_t> top_k,
                                      std::optional<double> top_p, std::optional<double> min_p) {
  const int64_t n = logits.ndim() == 2 ? logits.shape(0) : 0;
  const int64_t V = logits.ndim() == 2 ? logits.shape(1) : 0;
  if (V < 1) complain("logits", "shape (n, V >= 1)", "none");
  check_shape("position", position, {n});
  check_shape("stream", stream, {n});
  const SamplerKernels& kernels = sampler_kernels();
  const DrawRules rules = checked_rules(do_sample, temperature, top_k, top_p, min_p);
  const Block scratch = zeroed(kernels.draw_scratch_bytes(V));
  std::vector<float> row(static_cast<size_t>((V + 15) / 16 * 16),
                         -std::numeric_limits<float>::infinity());
  Integers<int64_t> tokens(n);
  Floats log_probs(n);
  const float* const from = logits.data();
  const int64_t *const positions = position.data(), *const streams = stream.data();
  int64_t* const to = tokens.mutable_data();
  float* const chances = log_probs.mutable_data();
  without_lock([&] {
    for (int64_t i = 0; i < n; ++i) {
      std::copy_n(from + i * V, V, row.data());
      to[i] = kernels.draw(rules, row.data(), V, seed, static_cast<uint64_t>(positions[i]),
                           static_cast<uint64_t>(streams[i]), chances + i, scratch.get());
    }
  });
  return {tokens, log_probs};
}

}  // namespace

void bind_sampler(py::module_& m) {
  py::class_<PackedStack, std::shared_ptr<PackedStack>>(
      m, "PackedStack", "Packed weights of GRU layers between a token table and a head.")
      .def(py::init<const std::string&, const std::string&, const MaybeFloats&,
                    const std::vector<LayerTuple>&, const MaybeFloats&, const MaybeFloats&, bool>(),
           py::arg("cell"), py::arg("weights"), py::arg("table"), py::arg("layers"),
           py::arg("head_weight"), py::arg("head_bias"), py::kw_only(), py::arg("plain") = false)
      .def_property_readonly("kernel", [](const PackedStack& s) { return s.kernels().name; })
      .def_property_readonly("nbytes", &PackedStack::bytes)
      .def("generate", &generate, py::kw_only(), py::arg("inputs"), py::arg("input_begin"),
           py::arg("position"), py::arg("stream"), py::arg("limit"), py::arg("eos"),
           py::arg("seed"), py::arg("do_sample"), py::arg("temperature"), py::arg("top_k"),
           py::arg("top_p"), py::arg("min_p"), py::arg("h0"), py::arg("log_probs"),
           py::arg("threads"));
  m.def("draw", &draw, "Tokens and log-probabilities drawn from rows of logits.", py::arg("logits"),
        py::arg("seed"), py::arg("position"), py::arg("stream"), py::kw_only(),
        py::arg("do_sample") = true, py::arg("temperature") = 1.0, py::arg("top_k") = py::none(),
        py::arg("top_p") = py::none(), py::arg("min_p") = py::none());
}

}  // namespace gru_fast
