// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <Python.h>

namespace gru_fast {

// Arguments: grad_output and grad_h_n, each or None; input, hx; list or tuple of weight_ih,
// weight_hh, bias_ih and bias_hh or None, of each direction; output, workspace; batch sizes of a
// PackedSequence, lengths and reset_mask, each or None; num_heads; whether it is a cell; its name;
// which of input, hx and the weights want a gradient. Their gradients, or None; None if the call is
// not a plain one.
PyObject* run_direct_backward(PyObject*, PyObject* const* args, Py_ssize_t nargs);

// Adds what Python calls past the dispatcher to the module; nonzero with a Python exception on
// failure.
int add_direct(PyObject* module);

}  // namespace gru_fast
