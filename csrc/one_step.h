// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <Python.h>

namespace gru_fast {

// Adds `enable_one_step` and `one_step` to the module; nonzero with a Python exception on failure.
int add_one_step(PyObject* module);

}  // namespace gru_fast
