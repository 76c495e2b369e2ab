// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <pybind11/pybind11.h>

namespace gru_fast {

// Adds PackedStack and draw to the module.
void bind_sampler(pybind11::module_& module);
// Adds Stream, after the former.
void bind_stream(pybind11::module_& module);

}  // namespace gru_fast
