// SPDX-License-Identifier: Apache-2.0
// Weights that are packed once for many calls: a list of what has been packed, found by the place
// where a weight lies. All functions need the interpreter's lock.
#pragma once
#include <Python.h>

#include <memory>

#include "cpu/problem.h"

namespace gru_fast {

using Panels32 = std::shared_ptr<const float>;

// Adds a weight to the list until the capsule that is returned dies; it is packed when it is first
// asked for. `weight` shares memory and version with the tensor that calls will bring, is kept
// alive, and `data` is where it lies. Null with a Python exception on failure.
PyObject* prepack(PyObject* weight, const float* data, const PackedWeight& shape);

// The panels of a weight for the kernels in use, packed again if it has changed since; null if it
// is not on the list. Throws std::bad_alloc.
Panels32 find_prepacked(const float* data, const PackedWeight& shape);

}  // namespace gru_fast
