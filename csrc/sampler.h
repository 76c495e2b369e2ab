// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <pybind11/pybind11.h>

namespace gru_fast {

// Adds PackedStack, Stream and draw to the module.
void bind_sampler(pybind11::module_& module);

}  // namespace gru_fast
