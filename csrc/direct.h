// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <Python.h>

namespace gru_fast {

// Adds `enable_direct`, `run_direct` and `prepack` to the module; nonzero with a Python exception
// on failure.
int add_direct(PyObject* module);

}  // namespace gru_fast
