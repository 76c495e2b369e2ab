// SPDX-License-Identifier: Apache-2.0
#include "signals.h"

#include <pybind11/pybind11.h>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace gru_fast {
namespace {

bool may_be_main_thread() {
#if defined(__linux__)
  return syscall(SYS_gettid) == getpid();
#else
  return true;
#endif
}

}  // namespace

bool Signals::look() {
  if (raised_) return true;
  const auto now = Clock::now();
  if (now - last_ < kPollEvery) return false;
  last_ = now;
  if (!may_be_main_thread()) return false;
  const pybind11::gil_scoped_acquire locked;
  raised_ = PyErr_CheckSignals() != 0;
  return raised_;
}

void Signals::throw_raised() {
  const pybind11::gil_scoped_acquire locked;
  throw pybind11::error_already_set();
}

}  // namespace gru_fast
