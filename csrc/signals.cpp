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

thread_local bool signals_wait = false;

}  // namespace

SignalsWait::SignalsWait() { signals_wait = true; }
SignalsWait::~SignalsWait() { signals_wait = false; }

bool Signals::look() {
  if (raised_) return true;
  const auto now = Clock::now();
  if (last_ == Clock::time_point{}) last_ = now;  // the first time: short calls never come here
  if (now - last_ < kPollEvery) return false;
  last_ = now;
  if (signals_wait || !may_be_main_thread()) return false;
  const pybind11::gil_scoped_acquire locked;
  raised_ = PyErr_CheckSignals() != 0;
  return raised_;
}

void Signals::throw_raised() {
  const pybind11::gil_scoped_acquire locked;
  throw pybind11::error_already_set();
}

bool is_pythons(const std::exception& error) {
  return dynamic_cast<const pybind11::error_already_set*>(&error) != nullptr;
}

void restore(const std::exception_ptr& error) {
  try {
    std::rethrow_exception(error);
  } catch (pybind11::error_already_set& raised) {
    raised.restore();
  }
}

}  // namespace gru_fast
