// SPDX-License-Identifier: Apache-2.0
// The gradients of a layer or a cell without torch's dispatcher.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>

#include "cpu/huge_pages.h"
#include "cpu/parallel.h"
#include "direct.h"
#include "direct_call.h"
#include "run.h"

namespace gru_fast {
namespace {

constexpr int kMaxInputs = 2 + kMaxDirections * kMaxWeights;  // input, hx and the weights

struct Arguments {
  PyObject *grad_output, *grad_h_n;
  PyObject* inputs[kMaxInputs];
  PyObject *output, *workspace;
  bool is_cell;
  Cell cell;
  GroupCount groups;
  RowOptions* options;
  bool wanted[kMaxInputs];

  bool is_packed() const { return options->is_packed(); }
  int input_count() const { return static_cast<int>(2 + groups.directions * kMaxWeights); }
};

// A gradient of a result; false if it is there and not plain.
template <class Real>
bool read_gradient(PyObject* object, int64_t rows, int64_t H, const Real*& data) {
  if (object == Py_None) return true;
  Dense<Real> grad;
  if (!read(object, grad) || grad.rows() != rows || grad.width() != H) return false;
  data = grad.data;
  return true;
}

template <class Real>
struct Call {
  using Number = Compute<Real>;
  static constexpr bool kRounds = !std::is_same_v<Real, Number>;

  Backward<Real> f{};
  int64_t rows = 0;  // T * B, or fewer if they are packed
  Reference grads[kMaxInputs];
  Real* grad_x = nullptr;

  // False if input and hx are not plain, or not of one size.
  bool read_sizes(const Arguments& a) {
    Rows<Real> input;
    Dense<Real> hx;
    const int ndim = a.is_cell || a.is_packed() ? 2 : 3;
    if (!read(a.inputs[0], input) || !read(a.inputs[1], hx)) return false;
    if (input.ndim != ndim || hx.ndim != (a.is_cell ? 2 : 3)) return false;
    Problem<Real>& p = f.in;
    rows = input.rows();
    if (a.is_packed()) {
      if (a.options->count() != rows) return false;
      p.T = a.options->steps();
      p.B = a.options->batch();
    } else {
      p.T = a.is_cell ? 1 : input.shape[0];
      p.B = input.shape[ndim - 2];
      if (!a.options->fit(ndim, p.T, p.B)) return false;
    }
    if (hx.width() % a.groups.heads != 0) return false;
    p.G = a.groups.groups();
    p.I = input.width();
    p.H = hx.width() / a.groups.heads;
    p.layout = a.groups.layout(p.B, p.H);
    p.cell = a.cell;
    p.reverse = reverse_flags(a.groups.directions);
    p.x = input.data;
    p.x_stride_t = a.is_cell ? 0 : input.strides[0];
    p.x_stride_b = input.strides[ndim - 2];
    p.x_shared = true;
    p.h0 = hx.data;
    const int64_t D = a.groups.directions;
    return hx.rows() == D * p.B && (a.is_cell || hx.shape[0] == D);
  }

  // False if a gradient of a result is not plain, or does not fit.
  bool read_gradients(const Arguments& a) {
    const Problem<Real>& p = f.in;
    return read_gradient(a.grad_output, rows, p.G * p.H, f.grad_output) &&
           read_gradient(a.grad_h_n, a.groups.directions * p.B, a.groups.heads * p.H, f.grad_h_n);
  }

  // False with a Python exception.
  bool allocate(const Arguments& a) {
    const Problem<Real>& p = f.in;
    for (int i = 0; i < a.input_count(); ++i) {
      if (!a.wanted[i]) continue;
      PyObject* const like = a.inputs[i];
      grads[i] = i > 0                        ? empty_like(like)
                 : a.is_cell || a.is_packed() ? new_empty(like, {rows, p.I})
                                              : new_empty(like, {p.T, p.B, p.I});
      if (grads[i] == nullptr) return false;
    }
    return true;
  }

  // Everything, with no Python code in between; false if anything is not plain or does not fit.
  bool read_all(const Arguments& a) {
    if (!read_sizes(a)) return false;
    Problem<Real>& p = f.in;
    FoundWeights<Real> weights;
    if (!weights.read_from(a.inputs + 2, kMaxWeights, true, a.groups, p)) return false;
    weights.describe(a.groups, p);
    Dense<Real> output, workspace;
    if (!read(a.output, output) || output.rows() != rows || output.width() != p.G * p.H)
      return false;
    if (!read(a.workspace, workspace) || workspace.rows() != rows * p.G ||
        workspace.width() != slot_count(p.cell) * p.H) {
      return false;
    }
    f.output = output.data;
    f.workspace = workspace.data;
    if (!read_gradients(a)) return false;
    if (!read_grad(0, rows * p.I, grad_x)) return false;
    if (!read_grad(1, p.G * p.B * p.H, f.grad_h0)) return false;
    const int64_t rows_of_all = gate_count(p.cell) * a.groups.heads * p.H;
    const int64_t columns[kMaxWeights] = {p.I, p.H, 1, 1};
    Groups<Real>* const to[kMaxWeights] = {&f.grad_weight_ih, &f.grad_weight_hh, &f.grad_bias_ih,
                                           &f.grad_bias_hh};
    for (int i = 0; i < kMaxWeights; ++i) {
      Real* found[kMaxDirections] = {};
      for (int64_t d = 0; d < a.groups.directions; ++d) {
        const auto at = static_cast<int>(2 + d * kMaxWeights + i);
        if (!read_grad(at, rows_of_all * columns[i], found[d])) return false;
      }
      *to[i] = a.groups.spread(found, p.H * columns[i]);
    }
    return true;
  }

  void run(const Arguments& a, const KernelTable<Real>& table) {
    a.options->describe(f.in);
    const int64_t count = rows * f.in.I;
    std::unique_ptr<Number[]> sums;  // of all groups, before they are rounded
    if (f.in.G == 1 || grad_x == nullptr) {
      f.grad_x = grad_x;
    } else if constexpr (kRounds) {
      sums.reset(new Number[static_cast<size_t>(count)]());
      f.grad_shared_x = sums.get();
    } else {
      std::fill_n(grad_x, count, Real{});
      f.grad_shared_x = grad_x;
    }
    run_backward_kernel(table, f);
    if constexpr (kRounds) {
      if (sums != nullptr) {
        conversions().narrow(kNarrow<Real>, sums.get(), &grad_x->bits, count);
      }
    }
  }

 private:
  // Where a gradient of `size` numbers is written, if it is wanted; false if it does not fit.
  bool read_grad(int i, int64_t size, Real*& data) {
    if (grads[i] == nullptr) return true;
    Dense<Real> grad;
    if (!read(grads[i].get(), grad) || grad.rows() * grad.width() != size) return false;
    prefer_huge_pages(grad.data, static_cast<size_t>(size) * sizeof(Real));
    data = grad.data;
    return true;
  }
};

// What run_direct_backward() returns; null without a Python exception if it is of another type.
template <class Real>
PyObject* run(const Arguments& a, const KernelTable<Real>* table) {
  Call<Real> call;
  if (table == nullptr || !call.read_sizes(a)) return nullptr;
  // Those of sum() and of batch_first have strides of their own: nothing is allocated for them.
  if (!call.read_gradients(a)) return nullptr;
  if (!call.allocate(a)) return nullptr;
  const bool brief = is_brief(expected_ns(call.f.in, kBackwardPasses));
  Memory memory;
  if (!brief && !(memory.hold(&a.grad_output, 1) && memory.hold(&a.grad_h_n, 1) &&
                  memory.hold(a.inputs, a.input_count()) && memory.hold(&a.output, 1) &&
                  memory.hold(&a.workspace, 1))) {
    return nullptr;
  }
  if (!call.read_all(a)) Py_RETURN_NONE;
  Failure failure;
  const bool done = run_unlocked(failure, brief, [&] { call.run(a, *table); });
  failure.raise();
  PyObject* result = done ? PyTuple_New(a.input_count()) : nullptr;
  if (result == nullptr) return nullptr;
  for (int i = 0; i < a.input_count(); ++i) {
    PyObject* grad = call.grads[i].release();
    PyTuple_SET_ITEM(result, i, grad != nullptr ? grad : Py_NewRef(Py_None));
  }
  return result;
}

}  // namespace

PyObject* run_direct_backward(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  if (nargs != 14) {
    PyErr_Format(PyExc_TypeError, "run_direct_backward: expected 14 arguments, got %zd", nargs);
    return nullptr;
  }
  Items<kMaxDirections * kMaxWeights> weights;
  Items<kMaxInputs> wanted;
  RowOptions options;
  Arguments a{args[0], args[1], {args[2], args[3]}, args[5], args[6], false,
              {},      {1, 1},  &options,           {}};
  a.is_cell = PyObject_IsTrue(args[11]) == 1;
  bool known = read_cell(args[12], a.cell) && weights.hold(args[4]) && wanted.hold(args[13]);
  if (!a.is_cell && weights.size() > kMaxWeights) a.groups.directions = kMaxDirections;
  known = options.read(args[7], args[8], args[9], false) && known && read_heads(args[10], a.groups);
  if (a.is_cell && (options.any() || a.groups.heads > 1)) known = false;
  if (!known || weights.size() != a.groups.directions * kMaxWeights ||
      wanted.size() != a.input_count()) {
    if (PyErr_Occurred()) return nullptr;
    Py_RETURN_NONE;
  }
  std::copy_n(weights.get(), weights.size(), a.inputs + 2);
  if (!are_plain_or_none(&a.grad_output, 1) || !are_plain_or_none(&a.grad_h_n, 1) ||
      !are_plain_or_none(a.inputs, a.input_count()) || !is_plain(a.output) ||
      !is_plain(a.workspace)) {
    Py_RETURN_NONE;
  }
  for (int i = 0; i < a.input_count(); ++i) {
    a.wanted[i] = a.inputs[i] != Py_None && PyObject_IsTrue(wanted.get()[i]) == 1;
  }
  if (PyErr_Occurred()) return nullptr;
  if (a.groups.directions > 1) {  // kernels write a weight's gradient for both or for none
    for (int i = 2; i < 2 + kMaxWeights; ++i) {
      const bool either = a.wanted[i] || a.wanted[i + kMaxWeights];
      a.wanted[i] = either && a.inputs[i] != Py_None;
      a.wanted[i + kMaxWeights] = either && a.inputs[i + kMaxWeights] != Py_None;
    }
  }
  return by_number([&](const auto* table) { return run(a, table); });
}

}  // namespace gru_fast
