// SPDX-License-Identifier: Apache-2.0
// Scratch memory that outlives a call: fresh pages cost 10 to 40% of a small training step.
#pragma once
#include <cstddef>

namespace gru_fast {

// A block of at least `bytes`, aligned to 64, taken from the last one given back where it fits.
class Scratch {
 public:
  explicit Scratch(size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
  size_t bytes_;
};

// Fill every block and every result with NaN before it is used: what reads memory it has not
// written, or does not write what it should, then shows.
void set_scratch_poison(bool on);
void poison_if_set(void* data, size_t bytes);

}  // namespace gru_fast
