// SPDX-License-Identifier: Apache-2.0
// Packed weights as a Python object, and the checks of the arrays that Python hands over: what a
// caller can get wrong with the public classes is checked in gru_fast/sampler.py, what could write
// or read out of bounds is checked here.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cell_names.h"
#include "cpu/sampler_problem.h"

namespace gru_fast {

using Floats = pybind11::array_t<float, pybind11::array::c_style>;
using MaybeFloats = std::optional<Floats>;
template <class Integer>
using Integers = pybind11::array_t<Integer, pybind11::array::c_style>;

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Block = std::unique_ptr<void, Free>;

inline Block zeroed(int64_t bytes) {
  const size_t size = (static_cast<size_t>(bytes) + 64) / 64 * 64;
  Block block(std::aligned_alloc(64, size));
  if (!block) throw std::bad_alloc();
  std::memset(block.get(), 0, size);
  return block;
}

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

// Packed weights; never changed after the constructor, so any number of threads may use them.
class PackedStack {
 public:
  PackedStack(const std::string& cell, const std::string& weights, const MaybeFloats& table,
              const std::vector<LayerTuple>& layers, const MaybeFloats& head_weight,
              const MaybeFloats& head_bias, bool plain)
      : kernels_(sampler_kernels(plain)) {
    if (!find_cell(cell, shape_.cell)) complain("cell", kExpectedCells, "'" + cell + "'");
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
    const pybind11::gil_scoped_release unlocked;
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

}  // namespace gru_fast
