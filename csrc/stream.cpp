// SPDX-License-Identifier: Apache-2.0
// A sequence that is fed from outside, as a Python object.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cpu/sampler_problem.h"
#include "cpu/stats.h"
#include "packed_stack.h"
#include "sampler.h"
#include "signals.h"
#include "unlocked.h"

namespace py = pybind11;

namespace gru_fast {
namespace {

[[noreturn]] void complain_of_type(const std::string& name, const std::string& expected,
                                   const py::handle& given) {
  const bool array = py::isinstance<py::array>(given);
  const py::object type =
      array ? given.attr("dtype") : py::type::of(given).attr("__name__").cast<py::object>();
  throw py::type_error(name + ": expected " + expected + ", got " + (array ? "an array of " : "") +
                       std::string(py::str(type)));
}

// The state of one sequence that is fed from outside.
class Stream {
 public:
  explicit Stream(std::shared_ptr<const PackedStack> stack)
      : stack_(std::move(stack)),
        memory_(zeroed(stack_->kernels().stream_bytes(stack_->shape()))),
        width_(stack_->shape().outputs > 0 ? stack_->shape().outputs : stack_->shape().H),
        output_(width_) {
    std::fill_n(output_.mutable_data(), width_, 0.0f);
    reset();
  }

  // The same array every time.
  Floats step(const py::object& input) {
    const Use use(busy_);
    const StackShape& shape = stack_->shape();
    if (shape.tokens > 0) {
      const int32_t token = checked_token(as_integer(input));
      push_unlocked(1, &token, nullptr, output_.mutable_data());
    } else {
      const Floats frame = Floats::ensure(input);
      if (!frame) complain_of_type("frame", "float32", input);
      // Only a complaint may allocate.
      if (frame.ndim() != 1 || frame.shape(0) != shape.I) check_shape("frame", frame, {shape.I});
      check_finite("frame", frame);
      push_unlocked(1, nullptr, frame.data(), output_.mutable_data());
    }
    return output_;
  }

  Floats push(const py::object& inputs) {
    const Use use(busy_);
    const StackShape& shape = stack_->shape();
    Integers<int32_t> tokens;
    Floats frames;
    int64_t n;
    if (shape.tokens > 0) {
      const auto given = py::array::ensure(inputs);
      if (!given) complain_of_type("tokens", "integers", inputs);
      // NumPy would cut off the fractions of numbers in a list, and read digits out of texts.
      const bool whole = given.size() == 0 || std::string_view("iub").find(given.dtype().kind()) !=
                                                  std::string_view::npos;
      if (!whole) complain_of_type("tokens", "integers", given);
      n = given.size();
      check_shape("tokens", given, {n});
      tokens = given.dtype().kind() == 'u' ? checked_tokens<uint64_t>(given)
                                           : checked_tokens<int64_t>(given);
    } else {
      frames = Floats::ensure(inputs);
      if (!frames) complain_of_type("frames", "float32", inputs);
      n = frames.ndim() > 0 ? frames.shape(0) : 0;
      check_shape("frames", frames, {n, shape.I});
      check_finite("frames", frames);
    }
    Floats output({n, width_});
    push_interruptibly(n, shape.tokens > 0 ? tokens.data() : nullptr,
                       shape.tokens > 0 ? nullptr : frames.data(), output.mutable_data());
    return output;
  }

  const Floats& output() const { return output_; }

  void reset() {
    const Use use(busy_);
    write_state(std::vector<float>(static_cast<size_t>(state_size())));
  }
  py::bytes state() {
    const Use use(busy_);
    const std::vector<float> values = read_state();
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
    write_state(values);
  }

 private:
  // As many inputs as the kernels take at once.
  static constexpr int64_t kBetweenLooks = 64;

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

  // The 8 bits of a product have none for NaN and infinity: such a frame would pass for zeros.
  void check_finite(const char* name, const Floats& values) const {
    if (stack_->shape().weights != Weights::kInt8) return;
    constexpr uint32_t exponent = 0x7f800000;
    const float* value = values.data();
    uint32_t any = 0;
    for (int64_t i = 0; i < values.size(); ++i) {
      any |= (std::bit_cast<uint32_t>(value[i]) & exponent) == exponent;
    }
    if (any) complain(name, "finite values for int8 weights", "NaN or infinity");
  }

  int64_t state_size() const { return stack_->shape().layers * stack_->shape().H; }
  int64_t as_integer(const py::object& token) const {
    // Not py::cast, which goes on to __int__: that cuts off fractions.
    const auto index = py::reinterpret_steal<py::object>(PyNumber_Index(token.ptr()));
    const int64_t value = index ? PyLong_AsLongLong(index.ptr()) : -1;
    if (value == -1 && PyErr_Occurred() != nullptr) {
      if (PyErr_ExceptionMatches(PyExc_OverflowError) != 0) {
        PyErr_Clear();
        complain("token", "0 to " + std::to_string(stack_->shape().tokens), py::str(index));
      }
      if (PyErr_ExceptionMatches(PyExc_TypeError) == 0) throw py::error_already_set();
      PyErr_Clear();
      complain_of_type("token", "an integer", token);
    }
    return value;
  }
  template <class Integer>
  int32_t checked_token(Integer token) const {
    const int64_t most = stack_->shape().tokens;
    if (std::cmp_less(token, 0) || std::cmp_greater(token, most)) {
      complain("token", "0 to " + std::to_string(most), std::to_string(token));
    }
    return static_cast<int32_t>(token);
  }
  // Of any array that fits Integer.
  template <class Integer>
  Integers<int32_t> checked_tokens(const py::array& given) const {
    Integers<int32_t> tokens(given.size());
    if (given.size() == 0) return tokens;  // of floats, if it was an empty list
    const auto wide = Integers<Integer>::ensure(given);
    if (!wide) complain_of_type("tokens", "integers", given);
    for (int64_t i = 0; i < given.size(); ++i) {
      tokens.mutable_data()[i] = checked_token(wide.data()[i]);
    }
    return tokens;
  }
  void push_unlocked(int64_t n, const int32_t* tokens, const float* frames, float* output) {
    without_lock([&] {
      stack_->kernels().push(stack_->memory(), memory_.get(), n, tokens, frames, output);
    });
    launches.fetch_add(1, std::memory_order_relaxed);
  }
  // The same of any number; where a signal's handler raises, the state is what it was before.
  void push_interruptibly(int64_t n, const int32_t* tokens, const float* frames, float* output) {
    if (n <= kBetweenLooks) return push_unlocked(n, tokens, frames, output);
    const std::vector<float> before = read_state();
    Signals signals;
    bool ended = false;
    without_lock([&] {
      for (int64_t begin = 0; begin < n && !ended; begin += kBetweenLooks) {
        stack_->kernels().push(stack_->memory(), memory_.get(), std::min(n - begin, kBetweenLooks),
                               tokens == nullptr ? nullptr : tokens + begin,
                               frames == nullptr ? nullptr : frames + begin * stack_->shape().I,
                               output + begin * width_);
        ended = Signals::poll(&signals);
      }
    });
    launches.fetch_add(1, std::memory_order_relaxed);
    if (ended) write_state(before);
    signals.rethrow();
  }

  std::vector<float> read_state() const {
    std::vector<float> values(static_cast<size_t>(state_size()));
    stack_->kernels().read_state(stack_->memory(), memory_.get(), values.data());
    return values;
  }
  void write_state(const std::vector<float>& values) {
    stack_->kernels().write_state(stack_->memory(), memory_.get(), values.data());
  }

  const std::shared_ptr<const PackedStack> stack_;
  const Block memory_;
  const int64_t width_;
  Floats output_;
  std::atomic<bool> busy_{false};
};

}  // namespace

void bind_stream(py::module_& m) {
  py::class_<Stream>(m, "Stream", "The state of one sequence that is fed from outside.")
      .def(py::init([](std::shared_ptr<PackedStack> stack) {
             return std::make_unique<Stream>(std::move(stack));
           }),
           py::arg("stack"))
      .def_property_readonly("output", &Stream::output)
      .def("step", &Stream::step, py::arg("input"))
      .def("push", &Stream::push, py::arg("inputs"))
      .def("reset", &Stream::reset)
      .def_property("state", &Stream::state, &Stream::set_state);
}

}  // namespace gru_fast
