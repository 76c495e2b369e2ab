// SPDX-License-Identifier: Apache-2.0
// Packed weights as a Python object, and the checks of the arrays that Python hands over: what a
// caller can get wrong with the public classes is checked in gru_fast/sampler.py, what could write
// or read out of bounds is checked here.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cell_names.h"
#include "cpu/block.h"
#include "cpu/sampler_problem.h"
#include "unlocked.h"

namespace gru_fast {

using Floats = pybind11::array_t<float, pybind11::array::c_style>;
using MaybeFloats = std::optional<Floats>;
template <class Integer>
using Integers = pybind11::array_t<Integer, pybind11::array::c_style>;

[[noreturn]] inline void complain(const std::string& name, const std::string& expected,
                                  const std::string& got) {
  throw std::invalid_argument(name + ": expected " + expected + ", got " + got);
}

inline std::string as_text(const std::vector<int64_t>& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + ")";
}

inline void check_shape(const std::string& name, const pybind11::array& array,
                        std::vector<int64_t> shape) {
  const std::vector<int64_t> given(array.shape(), array.shape() + array.ndim());
  if (given != shape) complain(name, "shape " + as_text(shape), as_text(given));
}

inline const float* read(const std::string& name, const MaybeFloats& array,
                         std::vector<int64_t> shape) {
  if (!array) return nullptr;
  check_shape(name, *array, std::move(shape));
  return array->data();
}

inline Weights parse_weights(const std::string& weights) {
  if (weights == "float32") return Weights::kFloat32;
  if (weights == "bfloat16") return Weights::kBFloat16;
  if (weights != "int8")
    complain("weights", "'float32', 'bfloat16' or 'int8'", "'" + weights + "'");
  return Weights::kInt8;
}

using LayerTuple = std::tuple<MaybeFloats, Floats, MaybeFloats, MaybeFloats>;

// The sizes that the first layer, the table and the head give.
inline StackShape shape_of(const std::string& cell, const std::string& weights,
                           const MaybeFloats& table, const std::vector<LayerTuple>& layers,
                           const MaybeFloats& head_weight) {
  StackShape shape{};
  if (!find_cell(cell, shape.cell)) complain("cell", kExpectedCells, "'" + cell + "'");
  shape.weights = parse_weights(weights);
  shape.layers = static_cast<int64_t>(layers.size());
  if (layers.empty()) complain("layers", "at least one", "none");
  const Floats& first_hh = std::get<1>(layers[0]);
  shape.H = first_hh.ndim() == 2 ? first_hh.shape(1) : 0;
  if (shape.H < 1 || shape.H > kMostUnits) {
    complain("hidden size", "1 to " + std::to_string(kMostUnits), std::to_string(shape.H));
  }
  if (table) {
    constexpr int64_t most_tokens = std::numeric_limits<int32_t>::max();  // as they are fed
    shape.tokens = table->ndim() == 2 ? table->shape(0) - 1 : 0;
    if (shape.tokens < 1 || shape.tokens > most_tokens) {
      complain("table", "2 to " + std::to_string(most_tokens + 1) + " rows",
               std::to_string(shape.tokens + 1));
    }
  } else {
    const MaybeFloats& weight_ih = std::get<0>(layers[0]);
    if (!weight_ih) complain("weight_ih_l0", "an array where there is no table", "None");
    shape.I = weight_ih->ndim() == 2 ? weight_ih->shape(1) : 0;
    if (shape.I < 1 || shape.I > kMostUnits) {
      complain("input size", "1 to " + std::to_string(kMostUnits), std::to_string(shape.I));
    }
  }
  if (head_weight) {
    shape.outputs = head_weight->ndim() == 2 ? head_weight->shape(0) : 0;
    if (shape.outputs < 1) complain("head_weight", "one row or more", "none");
  }
  return shape;
}

// The weights of layer l; those of the input only where no table has them.
inline LayerWeights read_layer(const StackShape& shape, int64_t l, const LayerTuple& layer) {
  const auto& [weight_ih, weight_hh, bias_ih, bias_hh] = layer;
  const int64_t H = shape.H, rows = gate_count(shape.cell) * H;
  const std::string suffix = "_l" + std::to_string(l);
  LayerWeights to{};
  if (l > 0 || shape.tokens == 0) {
    to.weight_ih = read("weight_ih" + suffix, weight_ih, {rows, l > 0 ? H : shape.I});
    if (to.weight_ih == nullptr) complain("weight_ih" + suffix, "an array", "None");
    to.bias_ih = read("bias_ih" + suffix, bias_ih, {rows});
  }
  to.weight_hh = read("weight_hh" + suffix, weight_hh, {rows, H});
  to.bias_hh = read("bias_hh" + suffix, bias_hh, {rows});
  return to;
}

// Packed weights; never changed after the constructor, so any number of threads may use them.
class PackedStack {
 public:
  PackedStack(const std::string& cell, const std::string& weights, const MaybeFloats& table,
              const std::vector<LayerTuple>& layers, const MaybeFloats& head_weight,
              const MaybeFloats& head_bias, bool plain)
      : shape_(shape_of(cell, weights, table, layers, head_weight)),
        kernels_(sampler_kernels(plain)),
        bytes_(kernels_.snapshot_bytes(shape_)) {
    std::vector<LayerWeights> from_layers;
    for (int64_t l = 0; l < shape_.layers; ++l) {
      from_layers.push_back(read_layer(shape_, l, layers[l]));
    }
    const StackWeights from = {
        from_layers.data(),
        read("table", table, {shape_.tokens + 1, gate_count(shape_.cell) * shape_.H}),
        read("head_weight", head_weight, {shape_.outputs, shape_.H}),
        read("head_bias", head_bias, {shape_.outputs})};
    memory_ = zeroed(bytes_);
    without_lock([&] { kernels_.pack(shape_, from, memory_.get()); });
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
  const StackShape shape_;
  const SamplerKernels& kernels_;
  const int64_t bytes_;
  Block memory_;
};

}  // namespace gru_fast
