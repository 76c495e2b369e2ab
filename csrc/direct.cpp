// SPDX-License-Identifier: Apache-2.0
// Layers in float32 and bfloat16 called from Python without torch's dispatcher, which costs more
// than a few small steps. Tensors are read through the C exchange API that DLPack 1.3 defines and
// torch.Tensor offers: a stable ABI, as the ops' is. Plain C functions, not pybind11's, whose
// conversion of the arguments would cost as much as the rest of a small step.
#include "direct.h"

#include <ATen/dlpack.h>

#include <cstdint>
#include <exception>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "cell_names.h"
#include "cpu/huge_pages.h"
#include "cpu/isa.h"
#include "prepack.h"
#include "run.h"

namespace gru_fast {
namespace {

DLPackDLTensorFromPyObjectNoSync read_tensor = nullptr;
PyTypeObject* tensor_type = nullptr;
PyTypeObject* parameter_type = nullptr;
PyObject* is_neg = nullptr;  // torch.Tensor.is_neg

constexpr int kMaxLayers = 8;
constexpr int kMaxWeights = 4;

template <class Real>
constexpr DLDataType kNumber = {kDLFloat, 32, 1};
template <>
constexpr DLDataType kNumber<BFloat16> = {kDLBfloat, 16, 1};

// A contiguous tensor of such numbers with elements, on the CPU. Borrowed from the tensor, so what
// is read of it must be used before Python code can run.
template <class Real>
struct Dense {
  Real* data = nullptr;
  int ndim = 0;
  const int64_t* shape = nullptr;

  int64_t width() const { return shape[ndim - 1]; }
  int64_t rows() const {
    int64_t count = 1;
    for (int dim = 0; dim + 1 < ndim; ++dim) count *= shape[dim];
    return count;
  }
  bool is(int64_t first, int64_t second) const {
    return ndim == 2 && shape[0] == first && shape[1] == second;
  }
};

// False if the object is anything else.
template <class Real>
bool read(PyObject* object, Dense<Real>& dense) {
  if (Py_TYPE(object) != parameter_type && Py_TYPE(object) != tensor_type) return false;
  DLTensor t;
  // Fails for what has no memory of its own: sparse, nested, meta, wrapped by a transform.
  if (read_tensor(object, &t) != 0) {
    PyErr_Clear();
    return false;
  }
  constexpr DLDataType number = kNumber<Real>;
  if (t.device.device_type != kDLCPU || t.dtype.code != number.code ||
      t.dtype.bits != number.bits || t.dtype.lanes != number.lanes || t.ndim < 1 ||
      t.data == nullptr || t.strides == nullptr) {
    return false;
  }
  int64_t count = 1;
  for (int dim = t.ndim - 1; dim >= 0; --dim) {
    if (t.shape[dim] < 1 || (t.shape[dim] > 1 && t.strides[dim] != count)) return false;
    count *= t.shape[dim];
  }
  // A view that negates what it reads differs in nothing above.
  PyObject* negates = PyObject_CallOneArg(is_neg, object);
  Py_XDECREF(negates);
  if (negates != Py_False) {
    PyErr_Clear();
    return false;
  }
  dense = {reinterpret_cast<Real*>(static_cast<char*>(t.data) + t.byte_offset), t.ndim, t.shape};
  return true;
}

bool read_cell(PyObject* given, Cell& cell) {
  if (!PyUnicode_Check(given)) return false;
  for (const CellName& known : kCellNames) {
    if (PyUnicode_CompareWithASCIIString(given, known.name.data()) == 0) {
      cell = known.cell;
      return true;
    }
  }
  return false;
}

// weight_ih, weight_hh and, of four, bias_ih and bias_hh; a cell may lack one of them.
template <class Real>
bool read_weights(PyObject* const* weights, Py_ssize_t count, bool optional, Problem<Real>& p) {
  const int64_t rows = gate_count(p.cell) * p.H;
  Dense<Real> w_ih, w_hh;
  if (!read(weights[0], w_ih) || !w_ih.is(rows, p.I)) return false;
  if (!read(weights[1], w_hh) || !w_hh.is(rows, p.H)) return false;
  p.weight_ih = w_ih.data;
  p.weight_hh = w_hh.data;
  const Real** biases[] = {&p.bias_ih, &p.bias_hh};
  for (Py_ssize_t i = 2; i < count; ++i) {
    if (optional && weights[i] == Py_None) continue;
    Dense<Real> bias;
    if (!read(weights[i], bias) || bias.ndim != 1 || bias.width() != rows) return false;
    *biases[i - 2] = bias.data;
  }
  return true;
}

struct Arguments {
  PyObject *output, *h_n, *input, *hx;
  PyObject* const* weights;
  Py_ssize_t weight_count;
  long layers;
  bool batch_first;
  PyObject* cell;
};

// A layer and what it borrows from the list of packed weights.
template <class Real>
struct Layer {
  Forward<Real> forward{};
  std::shared_ptr<const Real> packed_ih, packed_hh;

  void find_packed(const KernelTable<Real>& table) {
    const Problem<Real>& p = forward.in;
    packed_ih = find_prepacked(table, p.weight_ih, {p.cell, p.H, p.I, false});
    packed_hh = find_prepacked(table, p.weight_hh, {p.cell, p.H, p.H, true});
    forward.packed_ih = packed_ih.get();
    forward.packed_hh = packed_hh.get();
  }
};

template <class Real>
struct Stack {
  Layer<Real> layers[kMaxLayers];
  std::unique_ptr<Real[]> between;  // outputs of inner layers, where T > 1
};

// The layers, each of which reads what the one before it writes; false if anything is not plain or
// does not fit.
template <class Real>
bool read_stack(const Arguments& a, const KernelTable<Real>& table, Stack<Real>& stack) {
  static constexpr uint8_t forward_only[1] = {0};
  Cell cell;
  Dense<Real> output, h_n, input, hx;
  if (!read_cell(a.cell, cell) || !read(a.output, output) || !read(a.input, input) ||
      !read(a.hx, hx) || hx.ndim != input.ndim) {
    return false;
  }
  const bool stacked = a.h_n != Py_None;
  const bool batch_first = a.batch_first && input.ndim == 3;
  const int64_t T = stacked ? input.shape[batch_first ? 1 : 0] : 1;
  const int64_t B = input.rows() / T, H = hx.width();
  if (stacked) {
    if (input.ndim != 2 && input.ndim != 3) return false;
    if (!read(a.h_n, h_n) || h_n.rows() != a.layers * B || h_n.width() != H) return false;
    if (hx.shape[0] != a.layers) return false;
  } else if (input.ndim > 2 || a.layers != 1) {
    return false;
  }
  if (hx.rows() != a.layers * B || output.rows() != T * B || output.width() != H) return false;
  const Py_ssize_t per_layer = a.weight_count / a.layers;
  if (a.weight_count % a.layers != 0 || (per_layer != 2 && per_layer != kMaxWeights)) return false;
  if (T > 1 && a.layers > 1) {
    stack.between.reset(new Real[static_cast<size_t>((a.layers > 2 ? 2 : 1) * T * B * H)]);
  }

  const Real* x = input.data;
  int64_t width = input.width(), stride_t = batch_first ? width : B * width;
  int64_t stride_b = batch_first ? T * width : width;
  for (long k = 0; k < a.layers; ++k) {
    Forward<Real>& f = stack.layers[k].forward;
    f.in.T = T;
    f.in.B = B;
    f.in.G = 1;
    f.in.I = width;
    f.in.H = H;
    f.in.cell = cell;
    f.in.reverse = forward_only;
    f.in.x = x;
    f.in.x_stride_t = stride_t;
    f.in.x_stride_b = stride_b;
    f.in.x_shared = true;
    f.in.h0 = hx.data + k * B * H;
    if (!read_weights(a.weights + k * per_layer, per_layer, !stacked, f.in)) return false;
    f.h_n = stacked ? h_n.data + k * B * H : output.data;
    f.output = k + 1 == a.layers ? output.data
               : T == 1          ? f.h_n
                                 : stack.between.get() + k % 2 * T * B * H;
    x = f.output;
    width = stride_b = H;
    stride_t = B * H;
  }
  for (long k = 0; k < a.layers; ++k) stack.layers[k].find_packed(table);
  prefer_huge_pages(output.data, static_cast<size_t>(T * B * H) * sizeof(Real));
  return true;
}

// True, False or null, as run_direct().
template <class Real>
PyObject* run_stack(const Arguments& a, const KernelTable<Real>& table) {
  Stack<Real> stack;
  PyObject* kind = nullptr;
  std::string text;
  auto guarded = [&](auto&& body) {
    try {
      return body();
    } catch (const std::bad_alloc&) {
      kind = PyExc_MemoryError;
    } catch (const std::invalid_argument& error) {
      kind = PyExc_ValueError;
      text = error.what();
    } catch (const std::exception& error) {
      kind = PyExc_RuntimeError;
      text = error.what();
    }
    return false;
  };
  bool done = guarded([&] { return read_stack(a, table, stack); });
  if (done) {
    Py_BEGIN_ALLOW_THREADS;
    done = guarded([&] {
      for (long k = 0; k < a.layers; ++k) run_forward_kernel(table, stack.layers[k].forward);
      return true;
    });
    Py_END_ALLOW_THREADS;
  }
  if (kind == nullptr) return PyBool_FromLong(done);
  PyErr_SetString(kind, text.c_str());
  return nullptr;
}

// Arguments: output, h_n or None, input, hx, list of weights, layers, batch_first, cell. Without
// h_n it is a cell: output and hx are (B, H) or (H,). With it, h_n and hx are (layers, B, H), or
// (layers, H) where input is (T, I); output is (T, B, H) in either layout of input. True if the
// call was done; False, with nothing written, if it is not a plain one.
PyObject* run_direct(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  if (nargs != 8) {
    PyErr_Format(PyExc_TypeError, "run_direct: expected 8 arguments, got %zd", nargs);
    return nullptr;
  }
  if (read_tensor == nullptr || !PyList_CheckExact(args[4])) Py_RETURN_FALSE;
  const long layers = PyLong_AsLong(args[5]);
  if (layers == -1 && PyErr_Occurred()) return nullptr;
  const int batch_first = PyObject_IsTrue(args[6]);
  if (batch_first < 0) return nullptr;
  const Py_ssize_t count = PyList_GET_SIZE(args[4]);
  if (layers < 1 || layers > kMaxLayers || count > kMaxLayers * kMaxWeights) Py_RETURN_FALSE;
  // The caller holds the other tensors; the list may change while the lock is released, which
  // is_neg does too.
  PyObject* weights[kMaxLayers * kMaxWeights];
  for (Py_ssize_t i = 0; i < count; ++i) weights[i] = Py_NewRef(PyList_GET_ITEM(args[4], i));
  const Arguments given{args[0], args[1], args[2],          args[3], weights,
                        count,   layers,  batch_first != 0, args[7]};
  PyObject* result = run_stack(given, *kernel_table<float>());
  const KernelTable<BFloat16>* table = kernel_table<BFloat16>();
  if (result == Py_False && table != nullptr) {
    Py_DECREF(result);
    result = run_stack(given, *table);
  }
  for (Py_ssize_t i = 0; i < count; ++i) Py_DECREF(weights[i]);
  return result;
}

// Where a weight lies, or null; its sizes go into `shape`.
template <class Real>
const void* read_weight(PyObject* object, PackedWeight& shape) {
  Dense<Real> weight;
  if (!read(object, weight) || weight.ndim != 2) return nullptr;
  if (weight.shape[0] % gate_count(shape.cell) != 0) return nullptr;
  shape.H = weight.shape[0] / gate_count(shape.cell);
  shape.K = weight.width();
  return shape.recurrent && shape.K != shape.H ? nullptr : weight.data;
}

// Arguments: weight, cell, whether it is a weight_hh. A capsule, during whose life run_direct() has
// the weight packed; None if it is not a plain matrix of whole gates.
PyObject* prepack_weight(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  if (nargs != 3) {
    PyErr_Format(PyExc_TypeError, "prepack: expected 3 arguments, got %zd", nargs);
    return nullptr;
  }
  PackedWeight shape{};
  shape.recurrent = PyObject_IsTrue(args[2]) == 1;
  if (PyErr_Occurred()) return nullptr;
  if (read_tensor == nullptr || !read_cell(args[1], shape.cell)) Py_RETURN_NONE;
  const void* data = read_weight<float>(args[0], shape);
  if (data == nullptr) data = read_weight<BFloat16>(args[0], shape);
  if (data == nullptr) Py_RETURN_NONE;
  return prepack(args[0], data, shape);
}

// Arguments: torch.Tensor, torch.nn.Parameter. Whether this torch has the exchange API.
PyObject* enable_direct(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  if (nargs != 2 || !PyType_Check(args[0]) || !PyType_Check(args[1])) {
    PyErr_SetString(PyExc_TypeError, "enable_direct: expected the types Tensor and Parameter");
    return nullptr;
  }
  if (read_tensor != nullptr) Py_RETURN_TRUE;
  PyObject* capsule = PyObject_GetAttrString(args[0], "__dlpack_c_exchange_api__");
  const auto* api = capsule == nullptr ? nullptr
                                       : static_cast<const DLPackExchangeAPI*>(
                                             PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  Py_XDECREF(capsule);
  PyErr_Clear();
  if (api == nullptr || api->header.version.major != DLPACK_MAJOR_VERSION ||
      api->dltensor_from_py_object_no_sync == nullptr) {
    Py_RETURN_FALSE;
  }
  is_neg = PyObject_GetAttrString(args[0], "is_neg");
  if (is_neg == nullptr) return nullptr;
  // Never given back: the types live as long as torch.
  tensor_type = reinterpret_cast<PyTypeObject*>(Py_NewRef(args[0]));
  parameter_type = reinterpret_cast<PyTypeObject*>(Py_NewRef(args[1]));
  read_tensor = api->dltensor_from_py_object_no_sync;
  Py_RETURN_TRUE;
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
       "Layers into output and h_n; False, with nothing written, if it is not plain."},
      {"prepack", as_method(&prepack_weight), METH_FASTCALL,
       "A capsule during whose life run_direct has a weight packed; None if it is not plain."},
      {nullptr, nullptr, 0, nullptr},
  };
  return PyModule_AddFunctions(module, methods);
}

}  // namespace gru_fast
