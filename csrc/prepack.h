// SPDX-License-Identifier: Apache-2.0
// Weights that are packed once for many calls: a list of what has been packed. All functions need
// the interpreter's lock.
#pragma once
#include <Python.h>

#include <memory>

#include "cpu/problem.h"

namespace gru_fast {

// Adds a weight to the list until the capsule that is returned dies; it is packed when it is first
// asked for. `weight` is the tensor that calls will bring; it and its memory are kept alive. Null
// with a Python exception on failure.
PyObject* prepack(PyObject* weight, const PackedWeight& shape);

// Has all weights on the list packed again when they are next asked for.
void forget_panels();

// The panels of a weight for these kernels, packed again if it has changed since; null if it is not
// on the list, or lies elsewhere by now. A weight of 16 bits is widened. Throws std::bad_alloc.
template <class Real, class Stored>
std::shared_ptr<const Real> find_prepacked(const KernelTable<Real>& table, PyObject* weight,
                                           const Stored* data, const PackedWeight& shape);
#define GRU_FAST_FIND_PREPACKED(Real, Stored)                                              \
  template std::shared_ptr<const Real> find_prepacked(const KernelTable<Real>&, PyObject*, \
                                                      const Stored*, const PackedWeight&)
extern GRU_FAST_FIND_PREPACKED(float, float);
extern GRU_FAST_FIND_PREPACKED(float, Float16);
extern GRU_FAST_FIND_PREPACKED(float, BFloat16);
extern GRU_FAST_FIND_PREPACKED(BFloat16, BFloat16);
extern GRU_FAST_FIND_PREPACKED(double, double);

}  // namespace gru_fast
