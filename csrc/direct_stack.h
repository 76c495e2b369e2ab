// SPDX-License-Identifier: Apache-2.0
// A call past the dispatcher: what Python brings, the results that are made for it, and the layers,
// each of which reads what the one before it writes.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>
#include <tuple>

#include "cpu/huge_pages.h"
#include "cpu/parallel.h"
#include "direct_numbers.h"
#include "prepack.h"
#include "run.h"

namespace gru_fast {

constexpr int kMaxLayers = 8;
constexpr long kCell = 0;  // in place of a number of layers

struct LayerCall {
  PyObject *input, *hx;
  PyObject* const* weights;
  Py_ssize_t weight_count;
  long layers;
  bool bias, batch_first;
  GroupCount groups;
  RowOptions* options;
  Cell cell;
  bool saves;  // what backward needs

  bool is_cell() const { return layers == kCell; }
  long layer_count() const { return is_cell() ? 1 : layers; }
  int64_t state_count() const { return layer_count() * groups.directions; }
};

// What a call returns, allocated: a cell's h_n is its output.
struct Results {
  Reference output, h_n, workspace;
  bool turned = false;  // output is (T, B, D * H) and wanted as (B, T, D * H)
};

// The sizes of a call, read from input and hx; false if these are not plain.
template <class Number>
struct Sizes {
  Rows<Number> input;
  Rows<Number> hx;  // without data where the call has none
  int64_t T, B, H;
  int64_t rows;         // T * B, or fewer if they are packed
  bool packed, by_row;  // input is (rows, I), (B, T, I)

  // Of a cell's input (B, I) or (I), a layer's (T, B, I), (B, T, I), packed (rows, I) or, of one
  // sequence, (T, I).
  int64_t stride_t() const { return T == 1 ? 0 : input.strides[by_row ? 1 : 0]; }
  int64_t stride_b() const {
    return B == 1 && !packed ? 0 : input.strides[by_row || input.ndim == 2 ? 0 : 1];
  }
  bool read_from(const LayerCall& a) {
    if (!read(a.input, input)) return false;
    if (a.is_cell() ? input.ndim > 2 : input.ndim != 2 && input.ndim != 3) return false;
    by_row = a.batch_first && input.ndim == 3;
    packed = a.options->is_packed();
    rows = input.rows();
    if (packed) {
      if (input.ndim != 2 || a.options->count() != rows) return false;
      T = a.options->steps();
      B = a.options->batch();
    } else {
      T = a.is_cell() ? 1 : input.shape[by_row ? 1 : 0];
      B = rows / T;
      if (!a.options->fit(input.ndim, T, B)) return false;
    }
    if (a.hx == Py_None) {
      Dense<Number> weight_hh;
      // Backward reads the initial state as a tensor.
      if (a.saves || a.weight_count < 2 || !read(a.weights[1], weight_hh)) return false;
      H = weight_hh.width() * a.groups.heads;
      return true;
    }
    if (!read(a.hx, hx) || hx.ndim != (packed ? 3 : input.ndim)) return false;
    if (a.saves && !hx.is_dense()) return false;  // backward reads it where it lies
    H = hx.width();
    if (H % a.groups.heads != 0) return false;
    return hx.rows() == a.state_count() * B && (a.is_cell() || hx.shape[0] == a.state_count());
  }
  // Of all layers on one core, roughly, if they are computed in Real.
  template <class Real>
  double expected_ns(const LayerCall& a) const {
    Problem<Real> p{};
    p.T = T;
    p.B = B;
    p.G = a.groups.groups();
    p.H = H / a.groups.heads;
    p.cell = a.cell;
    double sum = 0;
    for (long k = 0; k < a.layer_count(); ++k) {
      p.I = k == 0 ? input.width() : a.groups.directions * H;
      sum += gru_fast::expected_ns(p, 1);
    }
    return sum;
  }
};

// False with a Python exception.
template <class Number>
bool allocate(const LayerCall& a, const Sizes<Number>& size, Results& results) {
  const auto [T, B, H] = std::tuple(size.T, size.B, size.H);
  const int64_t D = a.groups.directions, states = a.state_count();
  const bool packed = size.packed, by_row = size.by_row;
  const bool batched = packed || size.input.ndim == (a.is_cell() ? 2 : 3);
  if (a.hx != Py_None && size.hx.is_dense()) {
    results.h_n = empty_like(a.hx);
  } else if (a.is_cell()) {
    results.h_n = batched ? new_empty(a.input, {B, H}) : new_empty(a.input, {H});
  } else {
    results.h_n = batched ? new_empty(a.input, {states, B, H}) : new_empty(a.input, {states, H});
  }
  if (results.h_n == nullptr) return false;
  PyObject* const like = results.h_n.get();
  if (a.saves) {
    const int64_t G = a.groups.groups(), width = slot_count(a.cell) * (D * H / G);
    results.workspace =
        packed ? new_empty(like, {size.rows, G, width}) : new_empty(like, {T, B, G, width});
    if (results.workspace == nullptr) return false;
  }
  if (a.is_cell()) return true;
  results.turned = by_row && T > 1;
  if (packed) {
    results.output = new_empty(like, {size.rows, D * H});
  } else if (T == 1 && states == 1 && !by_row) {
    results.output = empty_like(like);
  } else if (!batched) {
    results.output = new_empty(like, {T, D * H});
  } else if (by_row && !results.turned) {
    results.output = new_empty(like, {B, T, D * H});
  } else {
    results.output = new_empty(like, {T, B, D * H});
  }
  return results.output != nullptr;
}

// A layer and what it borrows from the list of packed weights.
template <class Real>
struct Layer {
  Forward<Real> forward{};
  std::shared_ptr<const Real> packed_ih[kMaxDirections], packed_hh[kMaxDirections];

  template <class Number>
  void find_packed(const KernelTable<Real>& table, PyObject* const* weights,
                   Py_ssize_t per_direction, const FoundWeights<Number>& found,
                   const GroupCount& count) {
    const Problem<Real>& p = forward.in;
    const PackedWeight ih{p.cell, p.H, p.I, false, count.heads};
    const PackedWeight hh{p.cell, p.H, p.H, true, count.heads};
    for (int64_t d = 0; d < count.directions; ++d, weights += per_direction) {
      packed_ih[d] = find_prepacked(table, weights[0], found.at[0][d], ih);
      packed_hh[d] = find_prepacked(table, weights[1], found.at[1][d], hh);
    }
    forward.packed_ih = all_of(packed_ih, count, table, ih);
    forward.packed_hh = all_of(packed_hh, count, table, hh);
  }

 private:
  // Nothing if a direction has none.
  static Groups<const Real> all_of(const std::shared_ptr<const Real> (&packed)[kMaxDirections],
                                   const GroupCount& count, const KernelTable<Real>& table,
                                   const PackedWeight& shape) {
    const Real* found[kMaxDirections] = {};
    for (int64_t d = 0; d < count.directions; ++d) {
      if (packed[d] == nullptr) return {};
      found[d] = packed[d].get();
    }
    return count.spread(found, table.packed_weight_size(shape) / count.heads);
  }
};

// The layers of a call. What is widened has memory of its own here, and is rounded between layers:
// the operators hand on tensors.
template <class Numbers>
class Stack {
  using Stored = typename Numbers::Stored;
  using Real = typename Numbers::Computed;

 public:
  explicit Stack(const Numbers& numbers) : numbers_(numbers) {}

  // False if anything is not plain or does not fit. Runs no Python code. May throw std::bad_alloc.
  bool read_from(const LayerCall& a, const Results& results) {
    Sizes<Stored> size;
    Dense<Stored> output, h_n;
    if (!size.read_from(a) || !read(results.h_n.get(), h_n)) return false;
    const auto [T, B, H] = std::tuple(size.T, size.B, size.H);
    count_ = a.layer_count();
    const int64_t D = a.groups.directions, layer_state = D * B * H;
    state_size_ = count_ * layer_state;
    if (h_n.rows() != count_ * D * B || h_n.width() != H) return false;
    if (!a.is_cell() && (!read(results.output.get(), output) || output.rows() != size.rows ||
                         output.width() != D * H)) {
      return false;
    }
    const Py_ssize_t per_direction = a.bias ? kMaxWeights : 2, per_layer = per_direction * D;
    if (a.weight_count != count_ * per_layer) return false;
    // The output of a layer; but that of a row without steps is zero, and its state stays.
    const bool is_state = T == 1 && D == 1 && !a.options->is_ragged();
    output_size_ = size.rows * D * H;
    given_output_ = output.data;
    given_h_n_ = h_n.data;
    read_edges(a, size);
    if (!is_state && count_ > 1) make(between_, (count_ > 2 ? 2 : 1) * output_size_);

    const Real* x = x_;
    int64_t width = size.input.width(), stride_t = stride_t_, stride_b = stride_b_;
    for (long k = 0; k < count_; ++k) {
      Forward<Real>& f = layers_[k].forward;
      f.in.T = T;
      f.in.B = B;
      f.in.G = a.groups.groups();
      f.in.I = width;
      f.in.H = H / a.groups.heads;
      f.in.layout = a.groups.layout(B, f.in.H);
      f.in.cell = a.cell;
      f.in.reverse = reverse_flags(D);
      f.in.x = x;
      f.in.x_stride_t = stride_t;
      f.in.x_stride_b = stride_b;
      f.in.x_shared = true;
      a.options->describe(f.in);
      f.in.h0 = h0_ + k * layer_state;
      FoundWeights<Stored> found;
      PyObject* const* const weights = a.weights + k * per_layer;
      const bool optional = a.is_cell() || a.saves;
      if (!found.read_from(weights, per_direction, optional, a.groups, f.in)) return false;
      give_weights(found, a.groups, f.in);
      f.h_n = h_n_ + k * layer_state;
      f.output = k + 1 == count_ ? output_
                 : is_state      ? f.h_n
                                 : between_.get() + k % 2 * output_size_;
      x = f.output;
      width = stride_b = D * H;
      stride_t = layer_state;
      if (a.saves) continue;  // a training step changes its weights
      layers_[k].find_packed(*numbers_.table, weights, per_direction, found, a.groups);
    }
    const size_t output_bytes = static_cast<size_t>(output_size_) * sizeof(Real);
    prefer_huge_pages(output_, output_bytes);
    if constexpr (!Numbers::kWidens) {  // else the operators save
      if (a.saves) {
        Dense<Stored> workspace;
        if (!read(results.workspace.get(), workspace)) return false;
        prefer_huge_pages(workspace.data, output_bytes * slot_count(a.cell));
        layers_[0].forward.workspace = workspace.data;
      }
    }
    return true;
  }

  // Needs no interpreter's lock.
  void run() {
    for (long k = 0; k < count_; ++k) {
      run_forward_kernel(*numbers_.table, layers_[k].forward);
      if constexpr (Numbers::kWidens) {
        if (k + 1 < count_) numbers_.round(layers_[k].forward.output, output_size_);
      }
    }
    if constexpr (Numbers::kWidens) {
      if (given_output_ != nullptr) numbers_.write(output_, output_size_, given_output_);
      numbers_.write(h_n_, state_size_, given_h_n_);
    }
  }

 private:
  using Room = std::unique_ptr<Real[]>;

  static Real* make(Room& room, int64_t count) {
    room.reset(new Real[static_cast<size_t>(count)]);
    return room.get();
  }

  // The rows of a tensor, one behind the other.
  Real* read_rows(const Rows<Stored>& from, Room& room) const {
    const int64_t width = from.width(), near = from.ndim > 1 ? from.shape[from.ndim - 2] : 1;
    Real* const to = make(room, from.rows() * width);
    for (int64_t row = 0; row < from.rows(); ++row) {
      const Stored* at = from.data;
      if (from.ndim > 1) at += row % near * from.strides[from.ndim - 2];
      if (from.ndim > 2) at += row / near * from.strides[0];
      numbers_.read(at, width, to + row * width);
    }
    return to;
  }

  // What the first layer reads and the last one writes.
  void read_edges(const LayerCall& a, const Sizes<Stored>& size) {
    if constexpr (Numbers::kWidens) {
      const int64_t I = size.input.width();
      x_ = read_rows(size.input, input_room_);
      stride_t_ = size.by_row ? I : size.B * I;
      stride_b_ = size.by_row ? size.T * I : I;
      h_n_ = make(h_n_room_, state_size_);
      output_ = a.is_cell() ? h_n_ : make(output_room_, output_size_);
      const int64_t gates = 2 * a.groups.directions * gate_count(a.cell) * size.H;
      biases_ = make(bias_room_, count_ * gates);
    } else {
      x_ = size.input.data;
      stride_t_ = size.stride_t();
      stride_b_ = size.stride_b();
      h_n_ = given_h_n_;
      output_ = a.is_cell() ? h_n_ : given_output_;
      if (size.hx.data != nullptr && size.hx.is_dense()) h0_ = size.hx.data;
    }
    if (h0_ != nullptr) return;
    if (size.hx.data != nullptr) {
      h0_ = read_rows(size.hx, start_room_);
    } else {
      std::fill_n(make(start_room_, state_size_), state_size_, Real{});
      h0_ = start_room_.get();
    }
  }

  void give_weights(const FoundWeights<Stored>& found, const GroupCount& count, Problem<Real>& p) {
    if constexpr (!Numbers::kWidens) {
      found.describe(count, p);
    } else {
      auto weight = [&](int i, int64_t columns) {
        const uint16_t* bits[kMaxDirections] = {};
        for (int64_t d = 0; d < count.directions; ++d) bits[d] = &found.at[i][d]->bits;
        return StoredWeight<Real>(count.spread(bits, p.H * columns), kNarrow<Stored>);
      };
      p.weight_ih = weight(0, p.I);
      p.weight_hh = weight(1, p.H);
      const int64_t rows = FoundWeights<Stored>::rows(p, count);
      auto bias = [&](int i) {
        const Real* wide[kMaxDirections] = {};
        for (int64_t d = 0; d < count.directions && found.at[i][d] != nullptr; ++d) {
          numbers_.read(found.at[i][d], rows, biases_);
          wide[d] = biases_;
          biases_ += rows;
        }
        return count.spread(wide, p.H);
      };
      p.bias_ih = bias(2);
      p.bias_hh = bias(3);
    }
  }

  const Numbers numbers_;
  long count_ = 0;
  Layer<Real> layers_[kMaxLayers];
  int64_t output_size_ = 0, state_size_ = 0;  // numbers of a layer's output, of all states
  const Real *x_ = nullptr, *h0_ = nullptr;
  int64_t stride_t_ = 0, stride_b_ = 0;  // of x
  Real *output_ = nullptr, *h_n_ = nullptr;
  Real* biases_ = nullptr;  // the next to be widened go here
  Stored *given_output_ = nullptr, *given_h_n_ = nullptr;
  Room between_;     // outputs of inner layers, where T > 1
  Room start_room_;  // the initial state, where it cannot be read where it lies
  Room input_room_, output_room_, h_n_room_, bias_room_;
};

}  // namespace gru_fast
