// SPDX-License-Identifier: Apache-2.0
// gru_fast._C: what is not a tensor op. Tensors cross through torch.ops (ops.cpp), but for the
// calls that direct.cpp takes; everything else crosses here. Importing the module registers the
// ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/arena.h"
#include "cpu/isa.h"
#include "cpu/stats.h"
#include "direct.h"
#include "sampler.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of gru_fast: instruction set, counters and build facts.";
  m.def("cpu_isa", &gru_fast::current_isa, "Name of the instruction set that the kernels use.");
  m.def("cpu_isas", &gru_fast::usable_isas, "Instruction sets that this CPU can run, worst first.");
  m.def("set_cpu_isa", &gru_fast::set_isa, py::arg("name"),
        "Use another instruction set from now on. ValueError if this CPU cannot run it.");
  m.def(
      "multiplies_bfloat16", [] { return gru_fast::kernel_table<gru_fast::BFloat16>() != nullptr; },
      "Whether layers multiply bfloat16 as it is; else they compute in float32.");
  m.def(
      "launches", [] { return gru_fast::launches.load(); },
      "Number of calls that the kernels have served.");
  m.def("set_scratch_poison", &gru_fast::set_scratch_poison, py::arg("on"),
        "Fill scratch memory with NaN before each use, to show reads of unwritten memory.");
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["compiler"] = __VERSION__;
        info["cpp"] = static_cast<long>(__cplusplus);
        info["isas"] = gru_fast::built_isas();
        return info;
      },
      "Compiler, C++ standard and instruction sets this module was built with.");
  gru_fast::bind_sampler(m);
  gru_fast::bind_stream(m);
  if (gru_fast::add_direct(m.ptr()) != 0) throw py::error_already_set();
}
