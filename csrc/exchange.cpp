// SPDX-License-Identifier: Apache-2.0
#include "exchange.h"

#include <ATen/dlpack.h>

#include <utility>

namespace gru_fast {
namespace {

DLPackDLTensorFromPyObjectNoSync read_tensor = nullptr;
PyTypeObject* tensor_type = nullptr;
PyTypeObject* parameter_type = nullptr;

// Methods of torch.Tensor, but for the last.
struct Functions {
  PyObject *is_neg, *untyped_storage, *new_empty, *transpose, *empty_like;
} functions;

template <class Real>
constexpr DLDataType kNumber = {kDLFloat, 32, 1};
template <>
constexpr DLDataType kNumber<BFloat16> = {kDLBfloat, 16, 1};
template <>
constexpr DLDataType kNumber<Float16> = {kDLFloat, 16, 1};
template <>
constexpr DLDataType kNumber<double> = {kDLFloat, 64, 1};
template <>
constexpr DLDataType kNumber<int64_t> = {kDLInt, 64, 1};
template <>
constexpr DLDataType kNumber<bool> = {kDLBool, 8, 1};

bool is_tensor(PyObject* object) {
  return read_tensor != nullptr &&
         (Py_TYPE(object) == parameter_type || Py_TYPE(object) == tensor_type);
}

// A tensor of such numbers with elements, on the CPU.
template <class Real>
bool read_any(PyObject* object, Rows<Real>& rows) {
  if (!is_tensor(object)) return false;
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
  for (int dim = 0; dim < t.ndim; ++dim) {
    if (t.shape[dim] < 1) return false;
  }
  rows.data = reinterpret_cast<Real*>(static_cast<char*>(t.data) + t.byte_offset);
  rows.ndim = t.ndim;
  rows.shape = t.shape;
  rows.strides = t.strides;
  return true;
}

}  // namespace

bool is_plain(PyObject* object) {
  if (!is_tensor(object)) return false;
  // A view that negates what it reads differs in nothing that read() sees.
  PyObject* negates = PyObject_CallOneArg(functions.is_neg, object);
  Py_XDECREF(negates);
  if (negates == Py_False) return true;
  PyErr_Clear();
  return false;
}

template <class Real>
bool read(PyObject* object, Dense<Real>& dense) {
  Rows<Real> found;
  if (!read_any(object, found) || !found.is_dense()) return false;
  dense = found;
  return true;
}
template <class Real>
bool read(PyObject* object, Rows<Real>& rows) {
  return read_any(object, rows) && (rows.width() == 1 || rows.strides[rows.ndim - 1] == 1);
}
bool read_strided(PyObject* object, Rows<bool>& tensor) { return read_any(object, tensor); }
template bool read(PyObject*, Dense<float>&);
template bool read(PyObject*, Dense<BFloat16>&);
template bool read(PyObject*, Dense<Float16>&);
template bool read(PyObject*, Dense<double>&);
template bool read(PyObject*, Dense<int64_t>&);
template bool read(PyObject*, Rows<float>&);
template bool read(PyObject*, Rows<BFloat16>&);
template bool read(PyObject*, Rows<Float16>&);
template bool read(PyObject*, Rows<double>&);

bool Memory::hold(PyObject* const* tensors, Py_ssize_t count) {
  storages_.reserve(storages_.size() + static_cast<size_t>(count));
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (tensors[i] == Py_None) continue;
    Reference storage(PyObject_CallOneArg(functions.untyped_storage, tensors[i]));
    if (storage == nullptr) return false;
    storages_.push_back(std::move(storage));
  }
  return true;
}

Reference empty_like(PyObject* tensor) {
  return Reference(PyObject_CallOneArg(functions.empty_like, tensor));
}
Reference new_empty(PyObject* tensor, std::initializer_list<int64_t> shape) {
  Reference sizes(PyTuple_New(static_cast<Py_ssize_t>(shape.size())));
  if (sizes == nullptr) return nullptr;
  Py_ssize_t dim = 0;
  for (int64_t size : shape) {
    PyObject* number = PyLong_FromLongLong(size);
    if (number == nullptr) return nullptr;
    PyTuple_SET_ITEM(sizes.get(), dim++, number);
  }
  PyObject* arguments[] = {tensor, sizes.get()};
  return Reference(PyObject_Vectorcall(functions.new_empty, arguments, 2, nullptr));
}
Reference transposed(PyObject* tensor) {
  static PyObject* const dims[] = {PyLong_FromLong(0), PyLong_FromLong(1)};
  PyObject* arguments[] = {tensor, dims[0], dims[1]};
  return Reference(PyObject_Vectorcall(functions.transpose, arguments, 3, nullptr));
}

int enable_exchange(PyObject* tensor, PyObject* parameter) {
  if (read_tensor != nullptr) return 1;
  PyObject* capsule = PyObject_GetAttrString(tensor, "__dlpack_c_exchange_api__");
  const auto* api = capsule == nullptr ? nullptr
                                       : static_cast<const DLPackExchangeAPI*>(
                                             PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  Py_XDECREF(capsule);
  PyErr_Clear();
  if (api == nullptr || api->header.version.major != DLPACK_MAJOR_VERSION ||
      api->dltensor_from_py_object_no_sync == nullptr) {
    return 0;
  }
  const Reference torch(PyImport_ImportModule("torch"));
  if (torch == nullptr) return -1;
  // These and the types are never given back: they live as long as torch.
  functions = {
      PyObject_GetAttrString(tensor, "is_neg"), PyObject_GetAttrString(tensor, "untyped_storage"),
      PyObject_GetAttrString(tensor, "new_empty"), PyObject_GetAttrString(tensor, "transpose"),
      PyObject_GetAttrString(torch.get(), "empty_like")};
  if (PyErr_Occurred()) return -1;
  tensor_type = reinterpret_cast<PyTypeObject*>(Py_NewRef(tensor));
  parameter_type = reinterpret_cast<PyTypeObject*>(Py_NewRef(parameter));
  read_tensor = api->dltensor_from_py_object_no_sync;
  return 1;
}

}  // namespace gru_fast
