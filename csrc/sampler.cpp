// SPDX-License-Identifier: Apache-2.0
// The samplers as Python objects that own packed weights. They take NumPy arrays; what a caller can
// get wrong with the public classes is checked in gru_fast/sampler.py, what could write or read out
// of bounds is checked here too.
#include "sampler.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/arena.h"
#include "cpu/sampler_problem.h"
#include "cpu/stats.h"
#include "cpu/team.h"
#include "pool.h"

namespace py = pybind11;

namespace gru_fast {
namespace {

using Floats = py::array_t<float, py::array::c_style>;
using MaybeFloats = std::optional<Floats>;
template <class Integer>
using Integers = py::array_t<Integer, py::array::c_style>;

// What is left to do is worth the start of a parallel region, or a meeting at every step.
constexpr double kRegionProducts = 2e6;
constexpr int64_t kSplitBytes = 48 << 10;
constexpr auto kPollEvery = std::chrono::milliseconds(20);

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Block = std::unique_ptr<void, Free>;

Block zeroed(int64_t bytes) {
  const size_t size = (static_cast<size_t>(bytes) + 64) / 64 * 64;
  Block block(std::aligned_alloc(64, size));
  if (!block) throw std::bad_alloc();
  std::memset(block.get(), 0, size);
  return block;
}

[[noreturn]] void complain(const std::string& name, const std::string& expected,
                           const std::string& got) {
  throw std::invalid_argument(name + ": expected " + expected + ", got " + got);
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + ")";
}

void check_shape(const std::string& name, const py::array& array, std::vector<int64_t> shape) {
  const std::vector<int64_t> given(array.shape(), array.shape() + array.ndim());
  if (given != shape) complain(name, "shape " + shape_text(shape), shape_text(given));
}

const float* read(const std::string& name, const MaybeFloats& array, std::vector<int64_t> shape) {
  if (!array) return nullptr;
  check_shape(name, *array, std::move(shape));
  return array->data();
}

Cell parse_cell(const std::string& cell) {
  if (cell == "reset_after") return Cell::kResetAfter;
  if (cell == "reset_before") return Cell::kResetBefore;
  if (cell != "no_reset") {
    complain("cell", "'reset_after', 'reset_before' or 'no_reset'", "'" + cell + "'");
  }
  return Cell::kNoReset;
}

Weights parse_weights(const std::string& weights) {
  if (weights == "float32") return Weights::kFloat32;
  if (weights == "bfloat16") return Weights::kBFloat16;
  if (weights != "int8")
    complain("weights", "'float32', 'bfloat16' or 'int8'", "'" + weights + "'");
  return Weights::kInt8;
}

using LayerTuple = std::tuple<MaybeFloats, Floats, MaybeFloats, MaybeFloats>;

// Packed weights; never changed after the constructor, so any number of threads may use them.
class PackedStack {
 public:
  PackedStack(const std::string& cell, const std::string& weights, const MaybeFloats& table,
              const std::vector<LayerTuple>& layers, const MaybeFloats& head_weight,
              const MaybeFloats& head_bias, bool plain)
      : kernels_(sampler_kernels(plain)) {
    shape_.cell = parse_cell(cell);
    shape_.weights = parse_weights(weights);
    shape_.layers = static_cast<int64_t>(layers.size());
    if (layers.empty()) complain("layers", "at least one", "none");
    const int64_t gates = gate_count(shape_.cell);
    const Floats& first_hh = std::get<1>(layers[0]);
    shape_.H = first_hh.ndim() == 2 ? first_hh.shape(1) : 0;
    const int64_t H = shape_.H, most = int64_t{1} << 16;
    if (H < 1 || H > most) {
      complain("hidden size", "1 to " + std::to_string(most), std::to_string(H));
    }
    if (table) {
      shape_.tokens = table->ndim() == 2 ? table->shape(0) - 1 : 0;
      if (shape_.tokens < 1)
        complain("table", "two rows or more", std::to_string(shape_.tokens + 1));
    } else {
      const MaybeFloats& weight_ih = std::get<0>(layers[0]);
      if (!weight_ih) complain("weight_ih_l0", "an array where there is no table", "None");
      shape_.I = weight_ih->ndim() == 2 ? weight_ih->shape(1) : 0;
      if (shape_.I < 1 || shape_.I > most) {
        complain("input size", "1 to " + std::to_string(most), std::to_string(shape_.I));
      }
    }
    if (head_weight) {
      shape_.outputs = head_weight->ndim() == 2 ? head_weight->shape(0) : 0;
      if (shape_.outputs < 1) complain("head_weight", "one row or more", "none");
    }
    StackWeights from{};
    std::vector<LayerWeights> plain_layers;
    for (int64_t l = 0; l < shape_.layers; ++l) {
      const auto& [weight_ih, weight_hh, bias_ih, bias_hh] = layers[l];
      const std::string suffix = "_l" + std::to_string(l);
      LayerWeights to{};
      const bool by_table = l == 0 && table;
      if (!by_table) {
        to.weight_ih = read("weight_ih" + suffix, weight_ih, {gates * H, l > 0 ? H : shape_.I});
        if (to.weight_ih == nullptr) complain("weight_ih" + suffix, "an array", "None");
        to.bias_ih = read("bias_ih" + suffix, bias_ih, {gates * H});
      }
      to.weight_hh = read("weight_hh" + suffix, weight_hh, {gates * H, H});
      to.bias_hh = read("bias_hh" + suffix, bias_hh, {gates * H});
      plain_layers.push_back(to);
    }
    from.layers = plain_layers.data();
    from.table = read("table", table, {shape_.tokens + 1, gates * H});
    from.head_weight = read("head_weight", head_weight, {shape_.outputs, H});
    from.head_bias = read("head_bias", head_bias, {shape_.outputs});
    bytes_ = kernels_.snapshot_bytes(shape_);
    memory_ = zeroed(bytes_);
    const py::gil_scoped_release unlocked;
    kernels_.pack(shape_, from, memory_.get());
  }

  const StackShape& shape() const { return shape_; }
  const SamplerKernels& kernels() const { return kernels_; }
  const void* memory() const { return memory_.get(); }
  int64_t bytes() const { return bytes_; }

  // Products of one step of one sequence.
  double products() const {
    const double H = static_cast<double>(shape_.H);
    return H * H * gate_count(shape_.cell) * static_cast<double>(2 * shape_.layers - 1) +
           H * static_cast<double>(shape_.outputs);
  }

 private:
  StackShape shape_{};
  const SamplerKernels& kernels_;
  int64_t bytes_ = 0;
  Block memory_;
};

DrawRules rules_of(bool do_sample, double temperature, std::optional<int64_t> top_k,
                   std::optional<double> top_p, std::optional<double> min_p) {
  return {!do_sample, static_cast<float>(temperature), top_k.value_or(0), top_p.value_or(1.0),
          static_cast<float>(min_p.value_or(0.0))};
}

// Looks for signals on the thread that Python called, now and then.
struct Signals {
  const std::thread::id caller = std::this_thread::get_id();
  std::chrono::steady_clock::time_point last = std::chrono::steady_clock::now();
  bool raised = false;

  bool is_mine() const { return std::this_thread::get_id() == caller; }

  static bool poll(void* context) {
    auto& self = *static_cast<Signals*>(context);
    if (!self.is_mine() || self.raised) return self.raised;
    const auto now = std::chrono::steady_clock::now();
    if (now - self.last < kPollEvery) return false;
    self.last = now;
    const py::gil_scoped_acquire locked;
    self.raised = PyErr_CheckSignals() != 0;
    return self.raised;
  }
};

int threads_worth(const PackedStack& stack, const Generation& g, int available) {
  if (available <= 1) return 1;
  const int bytes_each = stack.shape().weights == Weights::kFloat32    ? 4
                         : stack.shape().weights == Weights::kBFloat16 ? 2
                                                                       : 1;
  double steps = 0;
  for (int64_t b = 0; b < g.B; ++b) {
    steps += static_cast<double>(g.input_begin[b + 1] - g.input_begin[b] + g.limit[b]);
  }
  if (steps * stack.products() < kRegionProducts) return 1;
  if (g.B >= available) return available;
  const bool split = stack.products() * bytes_each >= kSplitBytes;
  return split ? available : static_cast<int>(g.B);
}

using Generated = std::tuple<py::array, py::array, py::object, py::array>;

// Sequence b is fed inputs[begin[b]:begin[b + 1]], where the row after the last token of the table
// is the zero vector, then what it draws.
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
  Generation g{};
  g.B = static_cast<int64_t>(limit.size());
  const int64_t B = g.B;
  check_shape("position", position, {B});
  check_shape("stream", stream, {B});
  check_shape("input_begin", input_begin, {B + 1});
  g.inputs = inputs.data();
  g.input_begin = input_begin.data();
  g.position = position.data();
  g.stream = stream.data();
  g.limit = limit.data();
  for (int64_t b = 0; b < B; ++b) {
    if (g.limit[b] < 1) complain("limit", ">= 1", std::to_string(g.limit[b]));
    if (g.input_begin[b] < 0 || g.input_begin[b] >= g.input_begin[b + 1]) {
      complain("input_begin", "ascending values from 0", std::to_string(g.input_begin[b]));
    }
    g.capacity = std::max(g.capacity, g.limit[b]);
  }
  if (B > 0 && g.input_begin[B] > inputs.size()) {
    complain("input_begin", "at most " + std::to_string(inputs.size()),
             std::to_string(g.input_begin[B]));
  }
  for (int64_t i = 0; i < inputs.size(); ++i) {
    if (g.inputs[i] < 0 || g.inputs[i] > shape.tokens) {
      complain("inputs", "0 to " + std::to_string(shape.tokens), std::to_string(g.inputs[i]));
    }
  }
  g.eos = eos.data();
  g.eos_count = static_cast<int64_t>(eos.size());
  g.seed = seed;
  g.rules = rules_of(do_sample, temperature, top_k, top_p, min_p);
  if (do_sample && !(g.rules.temperature > 0 && g.rules.temperature < HUGE_VALF)) {
    complain("temperature", "a float32 > 0", std::to_string(temperature));
  }
  g.h0 = read("h0", h0, {shape.layers, B, shape.H});

  Integers<int64_t> tokens({B, g.capacity}), lengths(B);
  Floats h_n({shape.layers, B, shape.H});
  MaybeFloats chances;
  if (log_probs) chances = Floats({B, g.capacity});
  g.tokens = tokens.mutable_data();
  g.lengths = lengths.mutable_data();
  g.log_probs = chances ? chances->mutable_data() : nullptr;
  g.h_n = h_n.mutable_data();

  Signals signals;
  g.poll = Signals::poll;
  g.context = &signals;
  GenerationState state{};
  if (B > 0) {
    const py::gil_scoped_release unlocked;
    threads = threads_worth(stack, g, threads > 0 ? threads : pool_threads());
    const Scratch scratch(
        static_cast<size_t>(stack.kernels().generate_scratch_bytes(shape, g, threads)));
    Team team(threads);
    std::atomic<int> finished{0};
    run_parts(threads, [&](int64_t begin, int64_t end) {
      const int member = team.join(static_cast<int>(end - begin));
      if (member < 0) {
        // Only the thread that Python called can look for signals, also where it came too late.
        while (signals.is_mine() && finished.load() < team.size_for_latecomer()) {
          if (Signals::poll(&signals)) __atomic_store_n(&state.stop, 1, __ATOMIC_RELAXED);
          std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
        return;
      }
      stack.kernels().generate(stack.memory(), g, state, team, threads, member, scratch.data());
      finished.fetch_add(1);
    });
    launches.fetch_add(1, std::memory_order_relaxed);
  }
  if (signals.raised) throw py::error_already_set();
  if (state.bad_sequence > 0) {
    complain("logits", "no NaN or +inf and at least one finite value",
             "others in sequence " + std::to_string(state.bad_sequence - 1));
  }
  py::object chances_or_none = py::none();
  if (chances) chances_or_none = *chances;
  return {tokens, lengths, chances_or_none, h_n};
}

// The state of one sequence that is fed from outside.
class Stream {
 public:
  explicit Stream(std::shared_ptr<const PackedStack> stack)
      : stack_(std::move(stack)),
        memory_(zeroed(stack_->kernels().stream_bytes(stack_->shape()))),
        width_(stack_->shape().outputs > 0 ? stack_->shape().outputs : stack_->shape().H),
        output_(width_) {
    reset();
  }

  // The same array every time.
  Floats step(const py::object& input) {
    const Use use(busy_);
    const StackShape& shape = stack_->shape();
    if (shape.tokens > 0) {
      const int32_t token = checked_token(py::cast<int64_t>(input));
      push_unlocked(1, &token, nullptr, output_.mutable_data());
    } else {
      const Floats frame = Floats::ensure(input);
      if (!frame) throw py::error_already_set();
      // Only a complaint may allocate.
      if (frame.ndim() != 1 || frame.shape(0) != shape.I) check_shape("frame", frame, {shape.I});
      push_unlocked(1, nullptr, frame.data(), output_.mutable_data());
    }
    return output_;
  }

  Floats push(const py::object& inputs, MaybeFloats output) {
    const Use use(busy_);
    const StackShape& shape = stack_->shape();
    Integers<int32_t> tokens;
    Floats frames;
    int64_t n;
    if (shape.tokens > 0) {
      const auto wide = Integers<int64_t>::ensure(inputs);
      if (!wide) throw py::error_already_set();
      n = wide.size();
      check_shape("tokens", wide, {n});
      tokens = Integers<int32_t>(n);
      for (int64_t i = 0; i < n; ++i) tokens.mutable_data()[i] = checked_token(wide.data()[i]);
    } else {
      frames = Floats::ensure(inputs);
      if (!frames) throw py::error_already_set();
      n = frames.ndim() > 0 ? frames.shape(0) : 0;
      check_shape("frames", frames, {n, shape.I});
    }
    if (output) {
      check_shape("out", *output, {n, width_});
    } else {
      output = Floats({n, width_});
    }
    push_unlocked(n, shape.tokens > 0 ? tokens.data() : nullptr,
                  shape.tokens > 0 ? nullptr : frames.data(), output->mutable_data());
    return *output;
  }

  const Floats& output() const { return output_; }

  void reset() {
    const Use use(busy_);
    const std::vector<float> zeros(static_cast<size_t>(state_size()));
    stack_->kernels().write_state(stack_->memory(), memory_.get(), zeros.data());
  }
  py::bytes state() {
    const Use use(busy_);
    std::vector<float> values(static_cast<size_t>(state_size()));
    stack_->kernels().read_state(stack_->memory(), memory_.get(), values.data());
    return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float)};
  }
  void set_state(const py::bytes& bytes) {
    const Use use(busy_);
    const std::string_view text = bytes;
    std::vector<float> values(static_cast<size_t>(state_size()));
    if (text.size() != values.size() * sizeof(float)) {
      complain("state", std::to_string(values.size() * sizeof(float)) + " bytes",
               std::to_string(text.size()));
    }
    std::memcpy(values.data(), text.data(), text.size());
    if (stack_->shape().weights == Weights::kInt8) {
      for (float value : values) {
        if (!(value >= -1 && value <= 1)) {
          complain("state", "values from -1 to 1 for int8 weights", std::to_string(value));
        }
      }
    }
    stack_->kernels().write_state(stack_->memory(), memory_.get(), values.data());
  }

 private:
  // Refuses a second thread instead of waiting for the first.
  class Use {
   public:
    explicit Use(std::atomic<bool>& busy) : busy_(busy) {
      if (busy_.exchange(true, std::memory_order_acquire)) {
        throw std::runtime_error("Stream: expected one thread at a time, got a second one");
      }
    }
    ~Use() { busy_.store(false, std::memory_order_release); }

   private:
    std::atomic<bool>& busy_;
  };

  int64_t state_size() const { return stack_->shape().layers * stack_->shape().H; }
  int32_t checked_token(int64_t token) const {
    if (token < 0 || token > stack_->shape().tokens) {
      complain("token", "0 to " + std::to_string(stack_->shape().tokens), std::to_string(token));
    }
    return static_cast<int32_t>(token);
  }
  void push_unlocked(int64_t n, const int32_t* tokens, const float* frames, float* output) {
    const py::gil_scoped_release unlocked;
    stack_->kernels().push(stack_->memory(), memory_.get(), n, tokens, frames, output);
    launches.fetch_add(1, std::memory_order_relaxed);
  }

  const std::shared_ptr<const PackedStack> stack_;
  const Block memory_;
  const int64_t width_;
  Floats output_;
  std::atomic<bool> busy_{false};
};

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
  const DrawRules rules = rules_of(do_sample, temperature, top_k, top_p, min_p);
  const Block scratch = zeroed(kernels.draw_scratch_bytes(V));
  std::vector<float> row(static_cast<size_t>((V + 15) / 16 * 16),
                         -std::numeric_limits<float>::infinity());
  Integers<int64_t> tokens(n);
  Floats log_probs(n);
  for (int64_t i = 0; i < n; ++i) {
    std::copy_n(logits.data() + i * V, V, row.data());
    tokens.mutable_data()[i] = kernels.draw(
        rules, row.data(), V, seed, static_cast<uint64_t>(position.data()[i]),
        static_cast<uint64_t>(stream.data()[i]), log_probs.mutable_data() + i, scratch.get());
  }
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
  py::class_<Stream>(m, "Stream", "The state of one sequence that is fed from outside.")
      .def(py::init([](std::shared_ptr<PackedStack> stack) {
             return std::make_unique<Stream>(std::move(stack));
           }),
           py::arg("stack"))
      .def_property_readonly("output", &Stream::output)
      .def("step", &Stream::step, py::arg("input"))
      .def("push", &Stream::push, py::arg("inputs"), py::arg("out") = py::none())
      .def("reset", &Stream::reset)
      .def_property("state", &Stream::state, &Stream::set_state);
  m.def("draw", &draw, "Tokens and log-probabilities drawn from rows of logits.", py::arg("logits"),
        py::arg("seed"), py::arg("position"), py::arg("stream"), py::kw_only(),
        py::arg("do_sample") = true, py::arg("temperature") = 1.0, py::arg("top_k") = py::none(),
        py::arg("top_p") = py::none(), py::arg("min_p") = py::none());
}

}  // namespace gru_fast
