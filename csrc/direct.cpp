// SPDX-License-Identifier: Apache-2.0
// Layers in float32, bfloat16 and float64 called from Python without torch's dispatcher, which
// costs more than a few small steps. Plain C functions, not pybind11's, whose conversion of the
// arguments would cost as much as the rest of a small step.
#include "direct.h"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <tuple>

#include "cpu/huge_pages.h"
#include "direct_call.h"
#include "prepack.h"
#include "run.h"

namespace gru_fast {
namespace {

constexpr int kMaxLayers = 8;
constexpr long kCell = 0;  // in place of a number of layers

struct Arguments {
  PyObject *input, *hx;
  PyObject* const* weights;
  Py_ssize_t weight_count;
  long layers;
  bool bias, batch_first;
  GroupCount groups;
  RowOptions* options;
  Cell cell;
  bool saves;  // what backward needs

  bool is_cell() const { return layers == kCell; }
  long layer_count() const { return is_cell() ? 1 : layers; }
  int64_t state_count() const { return layer_count() * groups.directions; }
};

// What a call returns, allocated: a cell's h_n is its output.
struct Results {
  Reference output, h_n, workspace;
  bool turned = false;  // output is (T, B, D * H) and wanted as (B, T, D * H)
};

// A layer and what it borrows from the list of packed weights.
template <class Real>
struct Layer {
  Forward<Real> forward{};
  std::shared_ptr<const Real> packed_ih[kMaxDirections], packed_hh[kMaxDirections];

  void find_packed(const KernelTable<Real>& table, PyObject* const* weights,
                   Py_ssize_t per_direction, const GroupCount& count) {
    const Problem<Real>& p = forward.in;
    const PackedWeight ih{p.cell, p.H, p.I, false, count.heads};
    const PackedWeight hh{p.cell, p.H, p.H, true, count.heads};
    for (int64_t d = 0; d < count.directions; ++d, weights += per_direction) {
      packed_ih[d] = find_prepacked(table, weights[0], p.weight_ih[d], ih);
      packed_hh[d] = find_prepacked(table, weights[1], p.weight_hh[d], hh);
    }
    forward.packed_ih = all_of(packed_ih, count, table, ih);
    forward.packed_hh = all_of(packed_hh, count, table, hh);
  }

 private:
  // Nothing if a direction has none.
  static Groups<const Real> all_of(const std::shared_ptr<const Real> (&packed)[kMaxDirections],
                                   const GroupCount& count, const KernelTable<Real>& table,
                                   const PackedWeight& shape) {
    const Real* found[kMaxDirections] = {};
    for (int64_t d = 0; d < count.directions; ++d) {
      if (packed[d] == nullptr) return {};
      found[d] = packed[d].get();
    }
    return count.spread(found, table.packed_weight_size(shape) / count.heads);
  }
};

template <class Real>
struct Stack {
  Layer<Real> layers[kMaxLayers];
  std::unique_ptr<Real[]> between;  // outputs of inner layers, where T > 1
  std::unique_ptr<Real[]> start;    // the initial state, where the call's has gaps or is none
};

// The rows of a state, one behind the other.
template <class Real>
void copy_rows(const Rows<Real>& state, Real* to) {
  const int64_t H = state.width(), B = state.ndim > 1 ? state.shape[state.ndim - 2] : 1;
  for (int64_t row = 0; row < state.rows(); ++row) {
    const Real* from = state.data;
    if (state.ndim > 1) from += row % B * state.strides[state.ndim - 2];
    if (state.ndim > 2) from += row / B * state.strides[0];
    std::copy_n(from, H, to + row * H);
  }
}

// The sizes of a call, read from input and hx; false if these are not plain.
template <class Real>
struct Sizes {
  Rows<Real> input;
  Rows<Real> hx;  // without data where the call has none
  int64_t T, B, H;
  int64_t rows;         // T * B, or fewer if they are packed
  bool packed, by_row;  // input is (rows, I), (B, T, I)

  // Of a cell's input (B, I) or (I), a layer's (T, B, I), (B, T, I), packed (rows, I) or, of one
  // sequence, (T, I).
  int64_t stride_t() const { return T == 1 ? 0 : input.strides[by_row ? 1 : 0]; }
  int64_t stride_b() const {
    return B == 1 && !packed ? 0 : input.strides[by_row || input.ndim == 2 ? 0 : 1];
  }
  bool read_from(const Arguments& a, bool again = false) {
    if (!read(a.input, input, again)) return false;
    if (a.is_cell() ? input.ndim > 2 : input.ndim != 2 && input.ndim != 3) return false;
    by_row = a.batch_first && input.ndim == 3;
    packed = a.options->is_packed();
    rows = input.rows();
    if (packed) {
      if (input.ndim != 2 || a.options->count() != rows) return false;
      T = a.options->steps();
      B = a.options->batch();
    } else {
      T = a.is_cell() ? 1 : input.shape[by_row ? 1 : 0];
      B = rows / T;
      if (!a.options->fit(input.ndim, T, B)) return false;
    }
    if (a.hx == Py_None) {
      Dense<Real> weight_hh;
      // Backward reads the initial state as a tensor.
      if (a.saves || a.weight_count < 2 || !read(a.weights[1], weight_hh, again)) return false;
      H = weight_hh.width() * a.groups.heads;
      return true;
    }
    if (!read(a.hx, hx, again) || hx.ndim != (packed ? 3 : input.ndim)) return false;
    if (a.saves && !hx.is_dense()) return false;  // backward reads it where it lies
    H = hx.width();
    if (H % a.groups.heads != 0) return false;
    return hx.rows() == a.state_count() * B && (a.is_cell() || hx.shape[0] == a.state_count());
  }
};

// False with a Python exception.
template <class Real>
bool allocate(const Arguments& a, const Sizes<Real>& size, Results& results) {
  const auto [T, B, H] = std::tuple(size.T, size.B, size.H);
  const int64_t D = a.groups.directions, states = a.state_count();
  const bool packed = size.packed, by_row = size.by_row;
  const bool batched = packed || size.input.ndim == (a.is_cell() ? 2 : 3);
  if (a.hx != Py_None && size.hx.is_dense()) {
    results.h_n = empty_like(a.hx);
  } else if (a.is_cell()) {
    results.h_n = batched ? new_empty(a.input, {B, H}) : new_empty(a.input, {H});
  } else {
    results.h_n = batched ? new_empty(a.input, {states, B, H}) : new_empty(a.input, {states, H});
  }
  if (results.h_n == nullptr) return false;
  PyObject* const like = results.h_n.get();
  if (a.saves) {
    const int64_t G = a.groups.groups(), width = slot_count(a.cell) * (D * H / G);
    results.workspace =
        packed ? new_empty(like, {size.rows, G, width}) : new_empty(like, {T, B, G, width});
    if (results.workspace == nullptr) return false;
  }
  if (a.is_cell()) return true;
  results.turned = by_row && T > 1;
  if (packed) {
    results.output = new_empty(like, {size.rows, D * H});
  } else if (T == 1 && states == 1 && !by_row) {
    results.output = empty_like(like);
  } else if (!batched) {
    results.output = new_empty(like, {T, D * H});
  } else if (by_row && !results.turned) {
    results.output = new_empty(like, {B, T, D * H});
  } else {
    results.output = new_empty(like, {T, B, D * H});
  }
  return results.output != nullptr;
}

// The layers, each of which reads what the one before it writes; false if anything is not plain or
// does not fit.
template <class Real>
bool read_stack(const Arguments& a, const Results& results, const KernelTable<Real>& table,
                Stack<Real>& stack) {
  Sizes<Real> size;
  Dense<Real> output, h_n;
  if (!size.read_from(a, true) || !read(results.h_n.get(), h_n, true)) return false;
  const auto [T, B, H] = std::tuple(size.T, size.B, size.H);
  const long layers = a.layer_count();
  const int64_t D = a.groups.directions, layer_state = D * B * H;
  if (h_n.rows() != layers * D * B || h_n.width() != H) return false;
  if (a.is_cell()) {
    output = h_n;
  } else if (!read(results.output.get(), output, true) || output.rows() != size.rows ||
             output.width() != D * H) {
    return false;
  }
  const Py_ssize_t per_direction = a.bias ? kMaxWeights : 2, per_layer = per_direction * D;
  if (a.weight_count != layers * per_layer) return false;
  // The output of a layer; but that of a row without steps is zero, and its state stays.
  const bool is_state = T == 1 && D == 1 && !a.options->is_ragged();
  const int64_t layer_output = size.rows * D * H;
  if (!is_state && layers > 1) {
    stack.between.reset(new Real[static_cast<size_t>((layers > 2 ? 2 : 1) * layer_output)]);
  }

  const Real* h0 = size.hx.data;
  if (h0 == nullptr || !size.hx.is_dense()) {
    stack.start.reset(new Real[static_cast<size_t>(layers * layer_state)]());
    if (h0 != nullptr) copy_rows(size.hx, stack.start.get());
    h0 = stack.start.get();
  }

  const Real* x = size.input.data;
  int64_t width = size.input.width(), stride_t = size.stride_t(), stride_b = size.stride_b();
  for (long k = 0; k < layers; ++k) {
    Forward<Real>& f = stack.layers[k].forward;
    f.in.T = T;
    f.in.B = B;
    f.in.G = a.groups.groups();
    f.in.I = width;
    f.in.H = H / a.groups.heads;
    f.in.layout = a.groups.layout(B, f.in.H);
    f.in.cell = a.cell;
    f.in.reverse = reverse_flags(D);
    f.in.x = x;
    f.in.x_stride_t = stride_t;
    f.in.x_stride_b = stride_b;
    f.in.x_shared = true;
    a.options->describe(f.in);
    f.in.h0 = h0 + k * layer_state;
    const bool optional = a.is_cell() || a.saves;
    if (!read_weights(a.weights + k * per_layer, per_direction, optional, a.groups, f.in)) {
      return false;
    }
    f.h_n = h_n.data + k * layer_state;
    f.output = k + 1 == layers ? output.data
               : is_state      ? f.h_n
                               : stack.between.get() + k % 2 * layer_output;
    x = f.output;
    width = stride_b = D * H;
    stride_t = layer_state;
  }
  const size_t output_bytes = static_cast<size_t>(layer_output) * sizeof(Real);
  prefer_huge_pages(output.data, output_bytes);
  if (a.saves) {
    Dense<Real> workspace;
    if (!read(results.workspace.get(), workspace, true)) return false;
    prefer_huge_pages(workspace.data, output_bytes * slot_count(a.cell));
    stack.layers[0].forward.workspace = workspace.data;
  } else {  // a training step changes its weights
    for (long k = 0; k < layers; ++k) {
      stack.layers[k].find_packed(table, a.weights + k * per_layer, per_direction, a.groups);
    }
  }
  return true;
}

// Calls the kernels; false if a tensor is not plain or does not fit, or with a Python exception.
template <class Real>
bool run_stack(const Arguments& a, const Results& results, const KernelTable<Real>& table) {
  Stack<Real> stack;
  Failure failure;
  bool done = failure.guard([&] { return read_stack(a, results, table, stack); });
  if (done) {
    Py_BEGIN_ALLOW_THREADS;
    done = failure.guard([&] {
      for (long k = 0; k < a.layer_count(); ++k) run_forward_kernel(table, stack.layers[k].forward);
      return true;
    });
    Py_END_ALLOW_THREADS;
  }
  failure.raise();
  return done;
}

// What run_direct() returns; null without a Python exception if a tensor is of another type.
template <class Real>
PyObject* run(const Arguments& a, const KernelTable<Real>* table) {
  Sizes<Real> size;
  if (table == nullptr || !size.read_from(a)) return nullptr;
  Results results;
  if (!allocate(a, size, results)) return nullptr;
  if (!run_stack(a, results, *table)) {
    if (PyErr_Occurred()) return nullptr;
    Py_RETURN_NONE;
  }
  if (a.is_cell() && !a.saves) return results.h_n.release();
  if (a.is_cell()) return PyTuple_Pack(2, results.h_n.get(), results.workspace.get());
  if (results.turned) results.output = transposed(results.output.get());
  if (results.output == nullptr) return nullptr;
  if (!a.saves) return PyTuple_Pack(2, results.output.get(), results.h_n.get());
  return PyTuple_Pack(3, results.output.get(), results.h_n.get(), results.workspace.get());
}

// Calls body(arguments, table) with the kernels for each type of numbers, as by_number() does. They
// are input, hx or None, list or tuple of weights, layers, bias, bidirectional, batch_first, batch
// sizes of a PackedSequence or None, lengths or None, reset_mask or None, num_heads, cell, saves.
template <class Body>
PyObject* with_arguments(PyObject* const* args, Py_ssize_t nargs, Body body) {
  if (nargs != 13) {
    PyErr_Format(PyExc_TypeError, "run_direct: expected 13 arguments, got %zd", nargs);
    return nullptr;
  }
  const long layers = args[3] == Py_None ? kCell : PyLong_AsLong(args[3]);
  const bool bias = PyObject_IsTrue(args[4]) == 1, bidirectional = PyObject_IsTrue(args[5]) == 1;
  const bool batch_first = PyObject_IsTrue(args[6]) == 1, saves = PyObject_IsTrue(args[12]) == 1;
  if (PyErr_Occurred()) return nullptr;
  if ((layers < 1 && args[3] != Py_None) || layers > (saves ? 1 : kMaxLayers)) Py_RETURN_NONE;
  Cell cell;
  Items<kMaxLayers * kMaxDirections * kMaxWeights> weights;
  if (!read_cell(args[11], cell) || !weights.hold(args[2])) Py_RETURN_NONE;
  RowOptions options;
  GroupCount groups{bidirectional && layers != kCell ? kMaxDirections : 1, 1};
  if (!options.read(args[7], args[8], args[9], batch_first) || !read_heads(args[10], groups) ||
      (layers == kCell && (options.any() || groups.heads > 1))) {
    if (PyErr_Occurred()) return nullptr;
    Py_RETURN_NONE;
  }
  const Arguments given{args[0],     args[1], weights.get(), weights.size(), layers, bias,
                        batch_first, groups,  &options,      cell,           saves};
  return by_number([&](const auto* table) { return body(given, table); });
}

// As functional.gru(): (output, h_n). With None for layers as
// functional.gru_cell(): the new state. If it saves, of one layer only, the workspace comes last.
// None if the call is not a plain one.
PyObject* run_direct(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  return with_arguments(args, nargs,
                        [](const auto& a, const auto* table) { return run(a, table); });
}

// True if run_direct() would take a call that saves, else None.
PyObject* takes_direct(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  return with_arguments(
      args, nargs, []<class Real>(const Arguments& a, const KernelTable<Real>* table) -> PyObject* {
        Sizes<Real> size;
        if (table == nullptr || !a.saves || a.weight_count != a.groups.directions * kMaxWeights) {
          return nullptr;
        }
        if (!size.read_from(a)) return nullptr;
        Problem<Real> p{};
        p.G = a.groups.groups();
        p.I = size.input.width();
        p.H = size.H / a.groups.heads;
        p.cell = a.cell;
        return read_weights(a.weights, kMaxWeights, true, a.groups, p) ? Py_NewRef(Py_True)
                                                                       : nullptr;
      });
}

// Puts the sizes of a weight into `shape`; false if it is not a plain matrix of whole gates.
template <class Real>
bool read_weight(PyObject* object, PackedWeight& shape) {
  Dense<Real> weight;
  if (!read(object, weight) || weight.ndim != 2) return false;
  const int64_t of_unit = gate_count(shape.cell) * shape.heads;
  if (weight.shape[0] % of_unit != 0) return false;
  shape.H = weight.shape[0] / of_unit;
  shape.K = weight.width();
  return !shape.recurrent || shape.K == shape.H;
}

// Arguments: weight, cell, whether it is a weight_hh, num_heads. A capsule, during whose life
// run_direct() has the weight packed; None if it is not a plain matrix of whole gates.
PyObject* prepack_weight(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  if (nargs != 4) {
    PyErr_Format(PyExc_TypeError, "prepack: expected 4 arguments, got %zd", nargs);
    return nullptr;
  }
  PackedWeight shape{};
  shape.recurrent = PyObject_IsTrue(args[2]) == 1;
  shape.heads = PyLong_AsLong(args[3]);
  if (PyErr_Occurred()) return nullptr;
  if (shape.heads < 1 || shape.heads > kMaxHeads) Py_RETURN_NONE;
  if (!read_cell(args[1], shape.cell)) Py_RETURN_NONE;
  if (!read_weight<float>(args[0], shape) && !read_weight<BFloat16>(args[0], shape) &&
      !read_weight<double>(args[0], shape)) {
    Py_RETURN_NONE;
  }
  return prepack(args[0], shape);
}

// Has all such weights packed again when they are next used.
PyObject* forget_packed(PyObject*, PyObject*) {
  forget_panels();
  Py_RETURN_NONE;
}

// Arguments: torch.Tensor, torch.nn.Parameter. Whether this torch has the exchange API.
PyObject* enable_direct(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  if (nargs != 2 || !PyType_Check(args[0]) || !PyType_Check(args[1])) {
    PyErr_SetString(PyExc_TypeError, "enable_direct: expected the types Tensor and Parameter");
    return nullptr;
  }
  const int enabled = enable_exchange(args[0], args[1]);
  return enabled < 0 ? nullptr : PyBool_FromLong(enabled);
}

PyCFunction as_method(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function));
}

}  // namespace

int add_direct(PyObject* module) {
  static PyMethodDef methods[] = {
      {"enable_direct", as_method(&enable_direct), METH_FASTCALL,
       "Learn torch's types; whether this torch can be read without its dispatcher."},
      {"run_direct", as_method(&run_direct), METH_FASTCALL,
       "Layers past the dispatcher: (output, h_n), or a cell's state; None if it is not plain."},
      {"takes_direct", as_method(&takes_direct), METH_FASTCALL,
       "Whether run_direct takes a call that saves for backward: True or None."},
      {"run_direct_backward", as_method(&run_direct_backward), METH_FASTCALL,
       "The gradients of a layer or cell that run_direct saved for; None if it is not plain."},
      {"prepack", as_method(&prepack_weight), METH_FASTCALL,
       "A capsule during whose life run_direct has a weight packed; None if it is not plain."},
      {"forget_packed", &forget_packed, METH_NOARGS,
       "Have all weights that prepack took packed again when they are next used."},
      {nullptr, nullptr, 0, nullptr},
  };
  return PyModule_AddFunctions(module, methods);
}

}  // namespace gru_fast
