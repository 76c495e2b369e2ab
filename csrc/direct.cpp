// SPDX-License-Identifier: Apache-2.0
// Layers called from Python without torch's dispatcher, which costs more than a few small steps.
// Plain C functions, not pybind11's, whose conversion of the arguments would cost as much as the
// rest of a small step.
#include "direct.h"

#include <cstdint>

#include "direct_stack.h"

namespace gru_fast {
namespace {

// Calls the kernels; false if a tensor is not plain or does not fit, or with a Python exception.
template <class Numbers>
bool run_stack(const LayerCall& a, const Results& results, const Numbers& numbers, bool brief) {
  Memory memory;
  if (!brief && !(memory.hold(&a.input, 1) && memory.hold(&a.hx, 1) &&
                  memory.hold(a.weights, a.weight_count))) {
    return false;
  }
  Stack stack(numbers);
  Failure failure;
  if (failure.guard([&] { return stack.read_from(a, results); })) {
    if (run_unlocked(failure, brief, [&] { stack.run(); })) return true;
  }
  failure.raise();
  return false;
}

// Numbers that are widened are so on one thread: more of them are left to the operators, which take
// all threads for it.
constexpr int64_t kMostWidened = 1 << 18;

// What run_direct() returns; null without a Python exception if a tensor is of another type.
template <class Numbers>
PyObject* run(const LayerCall& a, const Numbers& numbers) {
  Sizes<typename Numbers::Stored> size;
  if (numbers.table == nullptr || !size.read_from(a)) return nullptr;
  if (Numbers::kWidens &&
      (a.saves || size.rows * (size.input.width() + a.groups.directions * size.H) > kMostWidened)) {
    return nullptr;
  }
  Results results;
  if (!allocate(a, size, results)) return nullptr;
  const bool brief = is_brief(size.template expected_ns<typename Numbers::Computed>(a));
  if (!run_stack(a, results, numbers, brief)) {
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

// Returns body(call). The arguments are input, hx or None, list or tuple of weights, layers, bias,
// bidirectional, batch_first, batch sizes of a PackedSequence or None, lengths or None, reset_mask
// or None, num_heads, cell, saves.
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
  if (!read_cell(args[11], cell) || !weights.hold(args[2]) || !is_plain(args[0]) ||
      !are_plain_or_none(&args[1], 1) || !are_plain_or_none(weights.get(), weights.size())) {
    Py_RETURN_NONE;
  }
  RowOptions options;
  GroupCount groups{bidirectional && layers != kCell ? kMaxDirections : 1, 1};
  if (!options.read(args[7], args[8], args[9], batch_first) || !read_heads(args[10], groups) ||
      (layers == kCell && (options.any() || groups.heads > 1))) {
    if (PyErr_Occurred()) return nullptr;
    Py_RETURN_NONE;
  }
  const LayerCall given{args[0],     args[1], weights.get(), weights.size(), layers, bias,
                        batch_first, groups,  &options,      cell,           saves};
  return body(given);
}

// As functional.gru(): (output, h_n). With None for layers as
// functional.gru_cell(): the new state. If it saves, of one layer only, the workspace comes last.
// None if the call is not a plain one.
PyObject* run_direct(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  return with_arguments(args, nargs, [](const LayerCall& a) {
    Reference done(by_number([&]<class Real>(const KernelTable<Real>* table) {
      return run(a, AsTheyAre<Real>{table});
    }));
    if (done.get() != Py_None) return done.release();
    return by_narrow_number([&](const auto& numbers) { return run(a, numbers); });
  });
}

// True if run_direct() would take a call that saves, else None.
PyObject* takes_direct(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  return with_arguments(args, nargs, [](const LayerCall& a) {
    return by_number([&]<class Real>(const KernelTable<Real>* table) -> PyObject* {
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
      FoundWeights<Real> weights;
      const bool fit = weights.read_from(a.weights, kMaxWeights, true, a.groups, p);
      return fit ? Py_NewRef(Py_True) : nullptr;
    });
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
  if (!read_cell(args[1], shape.cell) || !is_plain(args[0])) Py_RETURN_NONE;
  if (!read_weight<float>(args[0], shape) && !read_weight<BFloat16>(args[0], shape) &&
      !read_weight<double>(args[0], shape) && !read_weight<Float16>(args[0], shape)) {
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
