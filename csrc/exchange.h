// SPDX-License-Identifier: Apache-2.0
// torch's tensors read without its dispatcher, through the C exchange API that DLPack 1.3 defines
// and torch.Tensor offers: a stable ABI, as the ops' is. All functions need the interpreter's lock.
#pragma once
#include <Python.h>

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <vector>

#include "cpu/problem.h"

namespace gru_fast {

struct Release {
  void operator()(PyObject* object) const { Py_DECREF(object); }
};
using Reference = std::unique_ptr<PyObject, Release>;

// A contiguous tensor with elements, on the CPU. Borrowed from the tensor: Python code, and other
// threads that get the interpreter's lock, can give the tensor other memory, and free this. So what
// is read is used before any of that can run, unless Memory holds it.
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
  bool is(int64_t size) const { return ndim == 1 && shape[0] == size; }
  bool is(int64_t first, int64_t second) const {
    return ndim == 2 && shape[0] == first && shape[1] == second;
  }
};

// One whose rows are contiguous, and lie as they like.
template <class Real>
struct Rows : Dense<Real> {
  const int64_t* strides = nullptr;

  bool is_dense() const {
    int64_t count = 1;
    for (int dim = this->ndim - 1; dim >= 0; --dim) {
      if (this->shape[dim] > 1 && strides[dim] != count) return false;
      count *= this->shape[dim];
    }
    return true;
  }
};

// Whether it is a tensor, of no derived class, that can be read: to be asked once of each that
// Python brings, for read() cannot see all of it. May run Python code, and other threads.
bool is_plain(PyObject* object);
inline bool are_plain_or_none(PyObject* const* objects, Py_ssize_t count) {
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (objects[i] != Py_None && !is_plain(objects[i])) return false;
  }
  return true;
}

// False if the object is anything else, or not enabled. Runs no Python code.
template <class Real>
bool read(PyObject* object, Dense<Real>& dense);
template <class Real>
bool read(PyObject* object, Rows<Real>& rows);
// The same of any strides.
bool read_strided(PyObject* object, Rows<bool>& tensor);
extern template bool read(PyObject*, Dense<float>&);
extern template bool read(PyObject*, Dense<BFloat16>&);
extern template bool read(PyObject*, Dense<Float16>&);
extern template bool read(PyObject*, Dense<double>&);
extern template bool read(PyObject*, Dense<int64_t>&);
extern template bool read(PyObject*, Rows<float>&);
extern template bool read(PyObject*, Rows<BFloat16>&);
extern template bool read(PyObject*, Rows<Float16>&);
extern template bool read(PyObject*, Rows<double>&);

// The memory of tensors that a call reads without the interpreter's lock: `tensor.data = other`
// does not free it meanwhile.
class Memory {
 public:
  // Of plain tensors, or None; false with a Python exception.
  bool hold(PyObject* const* tensors, Py_ssize_t count);

 private:
  std::vector<Reference> storages_;
};

// New tensors, as the methods of that name make them; null with a Python exception.
Reference empty_like(PyObject* tensor);
Reference new_empty(PyObject* tensor, std::initializer_list<int64_t> shape);
Reference transposed(PyObject* tensor);  // the first two dimensions

// Learns torch's types, torch.Tensor and torch.nn.Parameter. 1 if this torch has the exchange API,
// 0 if it has not, -1 with a Python exception.
int enable_exchange(PyObject* tensor, PyObject* parameter);

}  // namespace gru_fast
