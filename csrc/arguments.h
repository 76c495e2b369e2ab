// SPDX-License-Identifier: Apache-2.0
// From torch tensors to the plain structs of cpu/problem.h: checks, contiguity, low precision.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cell_names.h"
#include "cpu/arena.h"
#include "cpu/huge_pages.h"
#include "cpu/problem.h"
#include "row_order.h"

namespace gru_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

template <class Real>
constexpr ScalarType kScalarType = std::is_same_v<Real, double>     ? ScalarType::Double
                                   : std::is_same_v<Real, BFloat16> ? ScalarType::BFloat16
                                                                    : ScalarType::Float;
// Not const_data_ptr<Real>(): torch knows its own bfloat16 only.
template <class Real>
const Real* data_of(const Tensor& tensor) {
  return static_cast<const Real*>(tensor.const_data_ptr());
}
template <class Real>
Real* mutable_data_of(const Tensor& tensor) {
  return static_cast<Real*>(tensor.mutable_data_ptr());
}

// The cell that an op was called with. The ops take the handle, which is theirs to delete: torch's
// conversion to std::string (2.13) makes one on the heap for each call and never frees it.
inline Cell take_cell(StringHandle handle) {
  struct Owner {
    StringHandle handle;
    ~Owner() { torch_delete_string(handle); }
  } const owner{handle};
  size_t length = 0;
  const char* text = nullptr;
  STD_TORCH_CHECK(!torch_string_length(handle, &length) && !torch_string_c_str(handle, &text),
                  "cell: expected text");
  const std::string name(text, length);
  Cell cell{};
  STD_TORCH_CHECK(find_cell(name, cell), "cell: expected ", kExpectedCells, ", got '", name.c_str(),
                  "'");
  return cell;
}

template <class Sizes>
std::string shape_text(const Sizes& sizes) {
  std::ostringstream text;
  text << '(';
  const char* separator = "";
  for (int64_t size : sizes) {
    text << separator << size;
    separator = ", ";
  }
  text << ')';
  return text.str();
}

// Calls body(Real{}) with the type that tensors of this dtype are computed in.
template <class Body>
auto with_compute_type(const char* name, const Tensor& tensor, Body body) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return body(double{});
    case ScalarType::Float:
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return body(float{});
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, float64, bfloat16 or float16, got ",
                      torch::headeronly::toString(tensor.scalar_type()));
  }
}

// Hands out contiguous pointers of type Real to tensors of the call's dtype, and keeps what it had
// to convert alive. Allocates results, and gives them back in the call's dtype.
template <class Real>
class Marshal {
 public:
  explicit Marshal(const Tensor& like) : like_(like), given_(like.scalar_type()) {
    kept_.reserve(16);
  }

  const Real* read(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
    check(name, tensor, shape);
    return data_of<Real>(keep(as_real(name, tensor)));
  }
  const Real* read(const char* name, const MaybeTensor& tensor,
                   std::initializer_list<int64_t> shape) {
    return tensor.has_value() ? read(name, *tensor, shape) : nullptr;
  }

  // Reads with the strides that the tensor has, if its last dimension is dense.
  const Tensor& rows(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
    check(name, tensor, shape);
    const int64_t last = tensor.dim() - 1;
    const bool dense = tensor.size(last) == 1 || tensor.stride(last) == 1;
    return keep(dense && given_ == kScalarType<Real> ? held(name, tensor) : as_real(name, tensor));
  }

  // Results are in Number, Real or what it is computed in, until give_back().
  template <class Number>
  Tensor make(std::initializer_list<int64_t> shape, bool zeroed = false) const {
    const Shape sizes(shape);
    if (zeroed) return torch::stable::new_zeros(like_, sizes, kScalarType<Number>);
    Tensor result = empty(sizes, dtype_code<Number>());
    poison_if_set(result.mutable_data_ptr(), static_cast<size_t>(result.numel()) * sizeof(Number));
    return result;
  }
  Tensor give_back(const Tensor& result) const {
    if (result.scalar_type() == given_) return result;
    int32_t code = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like_.get(), &code));
    return copy(result, code);
  }

  const int64_t* read_lengths(const MaybeTensor& lengths, int64_t T, int64_t B) {
    if (!lengths.has_value()) return nullptr;
    const ScalarType type = lengths->scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Long || type == ScalarType::Int,
                    "lengths: expected int64 or int32, got ", torch::headeronly::toString(type));
    check_shape("lengths", *lengths, {B});
    // A copy: what is checked here must not change during the call.
    const Tensor& own = keep(copy(held("lengths", *lengths), aoti_torch_dtype_int64()));
    const int64_t* const values = own.template const_data_ptr<int64_t>();
    for (int64_t b = 0; b < B; ++b) {
      STD_TORCH_CHECK(values[b] >= 0 && values[b] <= T,
                      "lengths: expected values from 0 to T = ", T, ", got ", values[b],
                      " at index ", b);
    }
    return values;
  }
  void rank_rows(Problem<Real>& p) {
    if (p.lengths == nullptr) return;
    order_ = order_by_length(p.lengths, p.B, p.T);
    p.order = order_.ranks.data();
    p.alive_before = order_.alive_before.data();
  }
  const uint8_t* read_mask(const MaybeTensor& mask, int64_t T, int64_t B) {
    if (!mask.has_value()) return nullptr;
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "reset_mask: expected bool");
    check_shape("reset_mask", *mask, {T, B});
    const Tensor& dense = keep(torch::stable::contiguous(held("reset_mask", *mask)));
    return static_cast<const uint8_t*>(dense.const_data_ptr());
  }

 private:
  using Shape = torch::headeronly::IntHeaderOnlyArrayRef;
  static constexpr size_t kMaxDims = 4;
  template <class Number>
  static int32_t dtype_code() {
    return std::is_same_v<Number, double>     ? aoti_torch_dtype_float64()
           : std::is_same_v<Number, BFloat16> ? aoti_torch_dtype_bfloat16()
                                              : aoti_torch_dtype_float32();
  }
  void check_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
    STD_TORCH_CHECK(tensor.is_cpu(), name, ": expected a CPU tensor like the input");
    const auto sizes = tensor.sizes();
    bool same = sizes.size() == shape.size();
    size_t dim = 0;
    for (int64_t size : shape) same = same && sizes[dim++] == size;
    STD_TORCH_CHECK(same, name, ": expected shape ", shape_text(shape).c_str(), ", got ",
                    shape_text(sizes).c_str());
  }
  void check(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
    check_shape(name, tensor, shape);
    STD_TORCH_CHECK(tensor.scalar_type() == given_, name, ": expected the dtype of the input, ",
                    torch::headeronly::toString(given_), ", got ",
                    torch::headeronly::toString(tensor.scalar_type()));
  }
  // torch::stable's new_empty(), to() and contiguous() look their operators up by name, three times
  // a call: as much as a small step.
  Tensor empty(Shape sizes, int32_t dtype) const {
    int64_t strides[kMaxDims];
    int64_t stride = 1;
    for (size_t dim = sizes.size(); dim-- > 0; stride *= sizes[dim] > 1 ? sizes[dim] : 1) {
      strides[dim] = stride;
    }
    AtenTensorHandle made = nullptr;
    const auto failed =
        aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides, dtype,
                                 aoti_torch_device_type_cpu(), 0, &made);
    STD_TORCH_CHECK(!failed, "cannot allocate a result of shape ", shape_text(sizes).c_str());
    Tensor result(made);
    prefer_huge_pages(result.mutable_data_ptr(),
                      static_cast<size_t>(result.numel()) * result.element_size());
    return result;
  }
  Tensor copy(const Tensor& tensor, int32_t dtype) const {
    Tensor result = empty(tensor.sizes(), dtype);
    TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(result.get(), tensor.get(), 0));
    return result;
  }
  // Another tensor over its memory, which `tensor.data = other`, in a signal handler or on another
  // thread, does not free then.
  static Tensor held(const char* name, const Tensor& tensor) {
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    AtenTensorHandle made = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(tensor.get(), tensor.dim(), sizes.data(),
                                                          strides.data(), 0, &made));
    Tensor result(made);
    STD_TORCH_CHECK(result.numel() == 0 || result.const_data_ptr() != nullptr, name,
                    ": expected a tensor with memory, got one whose storage has been freed");
    return result;
  }
  Tensor as_real(const char* name, const Tensor& tensor) const {
    const bool is_real = given_ == kScalarType<Real> && tensor.is_contiguous();
    Tensor own = held(name, tensor);
    return is_real ? own : copy(own, dtype_code<Real>());
  }
  const Tensor& keep(Tensor tensor) {
    kept_.push_back(std::move(tensor));
    return kept_.back();
  }

  const Tensor like_;
  const ScalarType given_;
  std::vector<Tensor> kept_;
  RowOrder order_;
};

// The gradients that an op returns, allocated one after the other; those that nobody wants have no
// elements. The second is that of h0.
template <class Real>
class Gradients {
 public:
  // `empty`: no kernel writes them.
  Gradients(const Marshal<Real>& marshal, const std::vector<bool>& wanted, bool empty)
      : marshal_(marshal), wanted_(wanted), empty_(empty) {
    results_.reserve(wanted.size());
  }

  // Points to the next one, or nowhere. `summed`: kernels add to it.
  template <class Number>
  void next(Number*& pointer, std::initializer_list<int64_t> shape, bool summed = false) {
    const bool wanted = wanted_[results_.size()];
    results_.push_back(wanted ? marshal_.template make<Number>(shape, summed || empty_)
                              : marshal_.template make<Real>({0}));
    pointer = wanted ? mutable_data_of<Number>(results_.back()) : nullptr;
  }
  // Where there is no step, that of h_n is that of h0.
  void pass_on(const MaybeTensor& grad_h_n) {
    if (wanted_[1] && grad_h_n.has_value()) torch::stable::copy_(results_[1], *grad_h_n);
  }
  // A tuple of N tensors in the call's dtype.
  template <size_t N>
  auto give_back() const {
    return [this]<size_t... I>(std::index_sequence<I...>) {
      return std::make_tuple(marshal_.give_back(results_[I])...);
    }(std::make_index_sequence<N>{});
  }

 private:
  const Marshal<Real>& marshal_;
  const std::vector<bool>& wanted_;
  const bool empty_;
  std::vector<Tensor> results_;
};

// The arguments that all ops share. weight_ih and bias_ih are absent in scan, whose x is
// gates_x.
struct Arguments {
  const Tensor& x;
  const Tensor& h0;
  const Tensor* weight_ih;
  const Tensor& weight_hh;
  const MaybeTensor* bias_ih;
  const MaybeTensor& bias_hh;
  const MaybeTensor& lengths;
  const MaybeTensor& reset_mask;
  const MaybeTensor& reset_state;
  const MaybeTensor& h_scale;
  Cell cell;
  std::vector<uint8_t> reverse;
  const char* x_name;
};

template <class Real>
Problem<Real> read_problem(Marshal<Real>& m, const Arguments& a) {
  const Tensor& x = a.x;
  const bool layer = a.weight_ih != nullptr;
  STD_TORCH_CHECK(a.h0.dim() == 3, "h0: expected (G, B, H), got ", a.h0.dim(), " dimensions");
  STD_TORCH_CHECK(
      layer ? x.dim() == 3 || x.dim() == 4 : x.dim() == 4, a.x_name,
      layer ? ": expected (T, B, I) or (T, B, G, I), got " : ": expected (T, B, G, N*H), got ",
      x.dim(), " dimensions");
  Problem<Real> p{};
  p.T = x.size(0);
  p.B = x.size(1);
  p.G = a.h0.size(0);
  p.H = a.h0.size(2);
  p.layout = GroupLayout::of_groups(p.B, p.H);
  p.cell = a.cell;
  const int64_t rows = gate_count(p.cell) * p.H;
  p.I = layer ? x.size(x.dim() - 1) : 0;
  const int64_t width = layer ? p.I : rows;
  STD_TORCH_CHECK(static_cast<int64_t>(a.reverse.size()) == p.G, "reverse: expected ", p.G,
                  " values, one for each group of h0, got ", a.reverse.size());
  STD_TORCH_CHECK(!a.reset_state.has_value() || a.reset_mask.has_value(),
                  "reset_state: expected together with reset_mask, which is missing");

  p.x_shared = x.dim() == 3;
  const Tensor& dense = p.x_shared ? m.rows(a.x_name, x, {p.T, p.B, width})
                                   : m.rows(a.x_name, x, {p.T, p.B, p.G, width});
  p.x = data_of<Real>(dense);
  p.x_stride_t = dense.stride(0);
  p.x_stride_b = dense.stride(1);
  p.x_stride_g = p.x_shared ? 0 : dense.stride(2);
  p.reverse = a.reverse.data();
  p.h0 = m.read("h0", a.h0, {p.G, p.B, p.H});
  if (layer) {
    p.weight_ih = {m.read("weight_ih", *a.weight_ih, {p.G, rows, p.I}), rows * p.I};
    p.bias_ih = {m.read("bias_ih", *a.bias_ih, {p.G, rows}), rows};
  }
  static const Real nothing{};  // a tensor without elements has no address, which is scan's sign
  if (layer && p.I == 0) {
    p.x = &nothing;
    p.weight_ih = {&nothing, 0};
  }
  p.weight_hh = {m.read("weight_hh", a.weight_hh, {p.G, rows, p.H}), rows * p.H};
  p.bias_hh = {m.read("bias_hh", a.bias_hh, {p.G, rows}), rows};
  p.lengths = m.read_lengths(a.lengths, p.T, p.B);
  m.rank_rows(p);
  p.reset_mask = m.read_mask(a.reset_mask, p.T, p.B);
  p.reset_state = m.read("reset_state", a.reset_state, {p.G, p.B, p.H});
  p.h_scale = m.read("h_scale", a.h_scale, {p.B, p.G * p.H});
  return p;
}

}  // namespace gru_fast
