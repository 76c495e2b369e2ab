// SPDX-License-Identifier: Apache-2.0
// The gradients of a layer in one direction, or of a cell, without torch's dispatcher.
#include <cstdint>

#include "cpu/huge_pages.h"
#include "direct.h"
#include "direct_call.h"
#include "run.h"

namespace gru_fast {
namespace {

constexpr int kInputs = 2 + kMaxWeights;  // input, hx and the weights

struct Arguments {
  PyObject *grad_output, *grad_h_n;
  PyObject* inputs[kInputs];
  PyObject *output, *workspace;
  bool is_cell;
  Cell cell;
  bool wanted[kInputs];
};

// A gradient of a result; false if it is there and not plain.
template <class Real>
bool read_gradient(PyObject* object, int64_t rows, int64_t H, bool again, const Real*& data) {
  if (object == Py_None) return true;
  Dense<Real> grad;
  if (!read(object, grad, again) || grad.rows() != rows || grad.width() != H) return false;
  data = grad.data;
  return true;
}

template <class Real>
struct Call {
  Backward<Real> f{};
  Reference grads[kInputs];

  // False if input and hx are not plain, or not of one size.
  bool read_sizes(const Arguments& a, bool again) {
    Rows<Real> input;
    Dense<Real> hx;
    const int ndim = a.is_cell ? 2 : 3;
    if (!read(a.inputs[0], input, again) || !read(a.inputs[1], hx, again)) return false;
    if (input.ndim != ndim || hx.ndim != ndim) return false;
    Problem<Real>& p = f.in;
    p.T = a.is_cell ? 1 : input.shape[0];
    p.B = input.shape[ndim - 2];
    p.G = 1;
    p.I = input.width();
    p.H = hx.width();
    p.cell = a.cell;
    p.reverse = kForwardOnly;
    p.x = input.data;
    p.x_stride_t = a.is_cell ? 0 : input.strides[0];
    p.x_stride_b = input.strides[ndim - 2];
    p.x_shared = true;
    p.h0 = hx.data;
    return hx.rows() == p.B;
  }

  // False if a gradient of a result is not plain, or does not fit.
  bool read_gradients(const Arguments& a, bool again) {
    const Problem<Real>& p = f.in;
    return read_gradient(a.grad_output, p.T * p.B, p.H, again, f.grad_output) &&
           read_gradient(a.grad_h_n, p.B, p.H, again, f.grad_h_n);
  }

  // False with a Python exception.
  bool allocate(const Arguments& a) {
    const Problem<Real>& p = f.in;
    for (int i = 0; i < kInputs; ++i) {
      if (!a.wanted[i]) continue;
      PyObject* const like = a.inputs[i];
      grads[i] = i > 0       ? empty_like(like)
                 : a.is_cell ? new_empty(like, {p.B, p.I})
                             : new_empty(like, {p.T, p.B, p.I});
      if (grads[i] == nullptr) return false;
    }
    return true;
  }

  // Everything once more, now that no Python code comes between; false if anything is not plain or
  // does not fit.
  bool read_all(const Arguments& a) {
    if (!read_sizes(a, true)) return false;
    Problem<Real>& p = f.in;
    if (!read_weights(a.inputs + 2, kMaxWeights, true, p)) return false;
    Dense<Real> output, workspace;
    if (!read(a.output, output) || output.rows() != p.T * p.B || output.width() != p.H)
      return false;
    if (!read(a.workspace, workspace) || workspace.rows() != p.T * p.B ||
        workspace.width() != slot_count(p.cell) * p.H) {
      return false;
    }
    f.output = output.data;
    f.workspace = workspace.data;
    if (!read_gradients(a, true)) return false;
    const int64_t rows = gate_count(p.cell) * p.H;
    const int64_t sizes[kInputs] = {p.T * p.B * p.I, p.B * p.H, rows * p.I, rows * p.H, rows, rows};
    Real** const to[kInputs] = {&f.grad_x,         &f.grad_h0,      &f.grad_weight_ih,
                                &f.grad_weight_hh, &f.grad_bias_ih, &f.grad_bias_hh};
    for (int i = 0; i < kInputs; ++i) {
      if (grads[i] == nullptr) continue;
      Dense<Real> grad;
      if (!read(grads[i].get(), grad, true) || grad.rows() * grad.width() != sizes[i]) return false;
      prefer_huge_pages(grad.data, static_cast<size_t>(sizes[i]) * sizeof(Real));
      *to[i] = grad.data;
    }
    return true;
  }
};

// What run_direct_backward() returns; null without a Python exception if it is of another type.
template <class Real>
PyObject* run(const Arguments& a, const KernelTable<Real>* table) {
  Call<Real> call;
  if (table == nullptr || !call.read_sizes(a, false)) return nullptr;
  // Those of sum() and of batch_first have strides of their own: nothing is allocated for them.
  if (!call.read_gradients(a, false)) return nullptr;
  if (!call.allocate(a)) return nullptr;
  if (!call.read_all(a)) Py_RETURN_NONE;
  Failure failure;
  bool done;
  Py_BEGIN_ALLOW_THREADS;
  done = failure.guard([&] {
    run_backward_kernel(*table, call.f);
    return true;
  });
  Py_END_ALLOW_THREADS;
  failure.raise();
  PyObject* result = done ? PyTuple_New(kInputs) : nullptr;
  if (result == nullptr) return nullptr;
  for (int i = 0; i < kInputs; ++i) {
    PyObject* grad = call.grads[i].release();
    PyTuple_SET_ITEM(result, i, grad != nullptr ? grad : Py_NewRef(Py_None));
  }
  return result;
}

}  // namespace

PyObject* run_direct_backward(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  if (nargs != 10) {
    PyErr_Format(PyExc_TypeError, "run_direct_backward: expected 10 arguments, got %zd", nargs);
    return nullptr;
  }
  Items<kMaxWeights> weights;
  Items<kInputs> wanted;
  Arguments a{args[0], args[1], {args[2], args[3]}, args[5], args[6], false, {}, {}};
  a.is_cell = PyObject_IsTrue(args[7]) == 1;
  if (!read_cell(args[8], a.cell) || !weights.hold(args[4]) || !wanted.hold(args[9]) ||
      weights.size() != kMaxWeights || wanted.size() != kInputs) {
    if (PyErr_Occurred()) return nullptr;
    Py_RETURN_NONE;
  }
  for (int i = 0; i < kMaxWeights; ++i) a.inputs[2 + i] = weights.get()[i];
  for (int i = 0; i < kInputs; ++i) {
    a.wanted[i] = a.inputs[i] != Py_None && PyObject_IsTrue(wanted.get()[i]) == 1;
  }
  if (PyErr_Occurred()) return nullptr;
  return by_number([&](const auto* table) { return run(a, table); });
}

}  // namespace gru_fast
