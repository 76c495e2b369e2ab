// SPDX-License-Identifier: Apache-2.0
// Weights that are packed once for many calls: a list of what has been packed, found by the place
// where a weight lies. All functions need the interpreter's lock.
#pragma once
#include <Python.h>

#include <memory>

#include "cpu/problem.h"

namespace gru_fast {

// Adds a weight to the list until the capsule that is returned dies; it is packed when it is first
// asked for. `weight` shares memory and version with the tensor that calls will bring, is kept
// alive, and `data` is where it lies. Null with a Python exception on failure.
PyObject* prepack(PyObject* weight, const void* data, const PackedWeight& shape);

// The panels of a weight for these kernels, packed again if it has changed since; null if it is not
// on the list. Throws std::bad_alloc.
template <class Real>
std::shared_ptr<const Real> find_prepacked(const KernelTable<Real>& table, const Real* data,
                                           const PackedWeight& shape);
extern template std::shared_ptr<const float> find_prepacked(const KernelTable<float>&, const float*,
                                                            const PackedWeight&);
extern template std::shared_ptr<const BFloat16> find_prepacked(const KernelTable<BFloat16>&,
                                                               const BFloat16*,
                                                               const PackedWeight&);

}  // namespace gru_fast
