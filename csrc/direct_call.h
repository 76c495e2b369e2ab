// SPDX-License-Identifier: Apache-2.0
// What calls past the dispatcher have in common: weights and names as Python brings them, and what
// a kernel throws as Python wants it.
#pragma once
#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>

#include "cell_names.h"
#include "cpu/isa.h"
#include "exchange.h"
#include "ragged_rows.h"
#include "resets.h"
#include "signals.h"
#include "unlocked.h"

namespace gru_fast {

constexpr int kMaxWeights = 4;  // of a direction
constexpr int kMaxDirections = 2;
constexpr int kMaxHeads = 64;

// Whether each of so many groups of a layer goes backwards in time.
inline const uint8_t* reverse_flags(int64_t directions) {
  static constexpr uint8_t kBoth[kMaxDirections] = {0, 1}, kForwards[kMaxHeads] = {};
  return directions > 1 ? kBoth : kForwards;
}

inline bool read_cell(PyObject* given, Cell& cell) {
  if (!PyUnicode_Check(given)) return false;
  for (const CellName& known : kCellNames) {
    if (PyUnicode_CompareWithASCIIString(given, known.name.data()) == 0) {
      cell = known.cell;
      return true;
    }
  }
  return false;
}

// Which recurrences a layer has: those of its directions, or heads in the one that there is.
struct GroupCount {
  int64_t directions, heads;

  int64_t groups() const { return directions * heads; }
  GroupLayout layout(int64_t B, int64_t H) const {
    return heads > 1 ? GroupLayout::of_heads(heads, H) : GroupLayout::of_groups(B, H);
  }
  // Of what each direction has, in each head `step` numbers from that of the one before.
  template <class Number>
  Groups<Number> spread(Number* const (&found)[kMaxDirections], int64_t step) const {
    if (heads > 1) return {found[0], step};
    if (directions > 1) return Groups<Number>::of_two(found[0], found[1]);
    return Groups<Number>::of_one(found[0]);
  }
};

// Where the weights of a layer lie: weight_ih, weight_hh, bias_ih and bias_hh, each in every
// direction, or null.
template <class Number>
struct FoundWeights {
  const Number* at[kMaxWeights][kMaxDirections] = {};

  // Of each weight and bias, of all heads.
  template <class Real>
  static int64_t rows(const Problem<Real>& p, const GroupCount& count) {
    return gate_count(p.cell) * count.heads * p.H;
  }
  // From weight_ih, weight_hh and, of four, bias_ih and bias_hh of each direction. The last two may
  // be None in all directions if they are optional.
  template <class Real>
  bool read_from(PyObject* const* weights, Py_ssize_t per_direction, bool optional,
                 const GroupCount& count, const Problem<Real>& p) {
    const int64_t columns[] = {p.I, p.H};
    for (Py_ssize_t i = 0; i < per_direction; ++i) {
      for (int64_t d = 0; d < count.directions; ++d) {
        PyObject* const weight = weights[d * per_direction + i];
        if (optional && i > 1 && weight == Py_None) continue;
        Dense<Number> dense;
        if (!read(weight, dense)) return false;
        if (!(i > 1 ? dense.is(rows(p, count)) : dense.is(rows(p, count), columns[i]))) {
          return false;
        }
        at[i][d] = dense.data;
      }
      if (count.directions > 1 && (at[i][0] == nullptr) != (at[i][1] == nullptr)) return false;
    }
    return true;
  }
  void describe(const GroupCount& count, Problem<Number>& p) const {
    p.weight_ih = count.spread(at[0], p.H * p.I);
    p.weight_hh = count.spread(at[1], p.H * p.H);
    p.bias_ih = count.spread(at[2], p.H);
    p.bias_hh = count.spread(at[3], p.H);
  }
};

// num_heads of a layer of so many directions; false if it is none that kernels have.
inline bool read_heads(PyObject* given, GroupCount& count) {
  count.heads = PyLong_AsLong(given);
  if (count.heads == -1) PyErr_Clear();  // who checks arguments has a better message
  return count.heads == 1 || (count.heads > 1 && count.heads <= kMaxHeads && count.directions == 1);
}

// What has been thrown, kept until the interpreter's lock is held.
class Failure {
 public:
  // body()'s result, or false if it threw.
  template <class Body>
  bool guard(Body&& body) {
    try {
      return body();
    } catch (const std::bad_alloc& error) {
      kind_ = PyExc_MemoryError;
      text_ = error.what();
    } catch (const std::invalid_argument& error) {
      kind_ = PyExc_ValueError;
      text_ = error.what();
    } catch (const std::exception& error) {
      if (is_pythons(error)) {
        raised_ = std::current_exception();
        return false;
      }
      kind_ = PyExc_RuntimeError;
      text_ = error.what();
    }
    return false;
  }
  // Makes it a Python exception.
  void raise() {
    if (raised_) return restore(raised_);
    if (kind_ != nullptr) PyErr_SetString(kind_, text_.c_str());
  }

 private:
  std::exception_ptr raised_;
  PyObject* kind_ = nullptr;
  std::string text_;
};

// Runs work() for a call whose tensors have been read; false if it threw. A brief one keeps the
// interpreter's lock, so that nobody can give the tensors other memory. It works on one thread, for
// the others of a team may wait for a call that wants the lock. Any other call holds their Memory.
template <class Work>
bool run_unlocked(Failure& failure, bool brief, Work&& work) {
  return failure.guard([&] {
    if (brief) {
      const SignalsWait wait;
      work();
    } else {
      without_lock(work);
    }
    return true;
  });
}

// What a call may say of its rows and steps beside their number.
class RowOptions {
 public:
  // False if they are not plain, or with a Python exception. Batch sizes are those of a
  // PackedSequence and come alone; the mask is (B, T) if it is turned.
  bool read(PyObject* batch_sizes, PyObject* lengths, PyObject* reset_mask, bool turned) {
    is_ragged_ = batch_sizes != Py_None || lengths != Py_None;
    has_resets_ = reset_mask != Py_None;
    if (batch_sizes != Py_None && (lengths != Py_None || has_resets_)) return false;
    if (!any()) return true;
    Failure failure;
    const bool done = failure.guard([&] {
      if (batch_sizes != Py_None) return ragged_.read_batch_sizes(batch_sizes);
      return (!is_ragged_ || ragged_.read_lengths(lengths)) &&
             (!has_resets_ || resets_.read(reset_mask, turned));
    });
    failure.raise();
    return done;
  }

  bool any() const { return is_ragged_ || has_resets_; }
  bool is_ragged() const { return is_ragged_; }  // or all rows have T steps
  bool is_packed() const { return is_ragged_ && ragged_.packed(); }
  // Of packed rows: their number, that of the first step and that of steps.
  int64_t count() const { return ragged_.count(); }
  int64_t batch() const { return ragged_.batch(); }
  int64_t steps() const { return ragged_.steps(); }
  // Whether they are those of an input that is not packed.
  bool fit(int input_ndim, int64_t T, int64_t B) const {
    return (!is_ragged_ || ragged_.fit(T, B)) && (!has_resets_ || resets_.fit(input_ndim, T, B));
  }
  // To be called once a tensor has been seen to have so many rows. May throw std::bad_alloc.
  template <class Real>
  void describe(Problem<Real>& p) {
    if (is_ragged_) ragged_.describe(p);
    if (has_resets_) p.reset_mask = resets_.data();
  }

 private:
  bool is_ragged_ = false, has_resets_ = false;
  RaggedRows ragged_;
  Resets resets_;
};

// body(kernels) with each of what find() returns a tuple of, until one returns an object or raises;
// else None.
template <class Find, class Body>
PyObject* with_each(Find find, Body& body) {
  decltype(find()) all;
  Failure failure;
  const bool found = failure.guard([&] {  // an instruction set may be asked for that there is not
    all = find();
    return true;
  });
  failure.raise();
  if (!found) return nullptr;
  PyObject* result = nullptr;
  auto is_done = [&](const auto& kernels) {
    result = body(kernels);
    return result != nullptr || PyErr_Occurred() != nullptr;
  };
  std::apply([&](const auto&... kernels) { return (is_done(kernels) || ...); }, all);
  if (result != nullptr || PyErr_Occurred()) return result;
  Py_RETURN_NONE;
}

// With the kernels for each type of numbers, null where there are none.
template <class Body>
PyObject* by_number(Body&& body) {
  return with_each(
      [] {
        return std::tuple(kernel_table<float>(), kernel_table<BFloat16>(), kernel_table<double>());
      },
      body);
}

// References to the items of a list or tuple, which may change while the lock is released.
template <int kMost>
class Items {
 public:
  Items() = default;
  Items(const Items&) = delete;
  Items& operator=(const Items&) = delete;
  ~Items() {
    for (Py_ssize_t i = 0; i < count_; ++i) Py_DECREF(items_[i]);
  }
  // False if it is no list or tuple, or too long.
  bool hold(PyObject* sequence) {
    if (!PyList_CheckExact(sequence) && !PyTuple_CheckExact(sequence)) return false;
    if (PySequence_Fast_GET_SIZE(sequence) > kMost) return false;
    while (count_ < PySequence_Fast_GET_SIZE(sequence)) {
      items_[count_] = Py_NewRef(PySequence_Fast_GET_ITEM(sequence, count_));
      ++count_;
    }
    return true;
  }
  PyObject* const* get() const { return items_; }
  Py_ssize_t size() const { return count_; }

 private:
  PyObject* items_[kMost];
  Py_ssize_t count_ = 0;
};

}  // namespace gru_fast
