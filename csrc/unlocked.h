// SPDX-License-Identifier: Apache-2.0
// Work without the interpreter's lock.
#pragma once
#include <Python.h>

#include <exception>

namespace gru_fast {

// Runs work() without the interpreter's lock; what it throws is thrown with the lock held. Takes
// the lock back in a statement: where Python is at its end, that unwinds the thread, which no
// destructor (as that of pybind11's gil_scoped_release) can let pass.
template <class Work>
void without_lock(Work&& work) {
  std::exception_ptr thrown;
  PyThreadState* const state = PyEval_SaveThread();
  try {
    work();
  } catch (...) {
    thrown = std::current_exception();
  }
  PyEval_RestoreThread(state);
  if (thrown) std::rethrow_exception(thrown);
}

}  // namespace gru_fast
