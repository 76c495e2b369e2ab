// SPDX-License-Identifier: Apache-2.0
// A KeyboardInterrupt during a long call.
#pragma once
#include <chrono>
#include <exception>
#include <thread>

namespace gru_fast {

// Looks for Python's signals now and then on the thread that made it. Calls below kPollEvery never
// ask for the interpreter's lock, nor does any other thread than Python's main one, which alone
// runs handlers.
class Signals {
 public:
  bool is_mine() const { return std::this_thread::get_id() == caller_; }

  // Of a Signals: whether to end the call, for a handler has raised. False on all other threads,
  // which may not touch what the caller's writes.
  static bool poll(void* context) {
    auto& self = *static_cast<Signals*>(context);
    return self.is_mine() && self.look();
  }

  // Throws what a handler has raised, as pybind11 has it.
  void rethrow() const {
    if (raised_) throw_raised();
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr auto kPollEvery = std::chrono::milliseconds(30);

  bool look();
  [[noreturn]] static void throw_raised();

  const std::thread::id caller_ = std::this_thread::get_id();
  Clock::time_point last_{};
  bool raised_ = false;
};

// While one lives, Signals of this thread look for none: a handler could free what is read.
class SignalsWait {
 public:
  SignalsWait();
  ~SignalsWait();
  SignalsWait(const SignalsWait&) = delete;
  SignalsWait& operator=(const SignalsWait&) = delete;
};

// Whether it is what rethrow() throws.
bool is_pythons(const std::exception& error);
// Makes such an exception Python's current one again.
void restore(const std::exception_ptr& error);

}  // namespace gru_fast
