// SPDX-License-Identifier: Apache-2.0
#include "prepack.h"

#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>
#include <unordered_map>
#include <utility>

#include "cpu/isa.h"
#include "exchange.h"

namespace gru_fast {
namespace {

constexpr const char* kCapsule = "gru_fast.prepacked";

constexpr long kStale = -1;  // no tensor's version

// A weight on the list. Calls that run hold the panels they began with.
struct Entry {
  Reference weight;
  Reference memory;  // another tensor over what it lies in, which nobody else gets meanwhile
  PackedWeight shape;
  int users = 0;
  std::shared_ptr<void> panels;
  const void* table = nullptr;  // of the kernels that the panels are for
  long version = kStale;        // of the weight when it was packed
};

// By the weight, not by where it lies: what other tensors change there its version does not count.
using List = std::unordered_map<const PyObject*, Entry>;

// Never destroyed: capsules may die after it would have been.
List& list() {
  static List* const entries = new List;
  return *entries;
}

// How often PyTorch has changed the weight in place, or -1 with a Python exception.
long version_of(PyObject* weight) {
  PyObject* version = PyObject_GetAttrString(weight, "_version");
  const long number = version == nullptr ? -1 : PyLong_AsLong(version);
  Py_XDECREF(version);
  return number;
}

template <class Real, class Stored>
void pack(const KernelTable<Real>& table, const Stored* data, Entry& entry) {
  // The old memory unless a call reads it: for new memory the system takes longer than packing.
  if (entry.table != &table || entry.panels.use_count() != 1) {
    const size_t bytes = static_cast<size_t>(table.packed_weight_size(entry.shape)) * sizeof(Real);
    void* memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (memory == nullptr) throw std::bad_alloc();
    entry.panels.reset(memory, [](void* block) { std::free(block); });
    entry.table = &table;
  }
  Real* const panels = static_cast<Real*>(entry.panels.get());
  if constexpr (std::is_same_v<Real, Stored>) {
    table.pack_weight(entry.shape, data, panels);
  } else {
    const int64_t count = gate_count(entry.shape.cell) * entry.shape.heads * entry.shape.H;
    const std::unique_ptr<Real[]> wide(new Real[static_cast<size_t>(count * entry.shape.K)]);
    conversions().widen(kNarrow<Stored>, &data->bits, wide.get(), count * entry.shape.K);
    table.pack_weight(entry.shape, wide.get(), panels);
  }
}

void drop(PyObject* capsule) {
  const auto found =
      list().find(static_cast<const PyObject*>(PyCapsule_GetPointer(capsule, kCapsule)));
  if (found == list().end() || --found->second.users > 0) return;
  // Off the list first: what dies with a tensor may run Python code.
  const auto removed = list().extract(found);
}

bool operator==(const PackedWeight& a, const PackedWeight& b) {
  return a.cell == b.cell && a.H == b.H && a.K == b.K && a.recurrent == b.recurrent &&
         a.heads == b.heads;
}

}  // namespace

PyObject* prepack(PyObject* weight, const PackedWeight& shape) {
  if (version_of(weight) < 0) return nullptr;  // an inference tensor counts no changes
  Reference memory(PyObject_CallMethod(weight, "detach", nullptr));
  if (memory == nullptr) return nullptr;
  PyObject* capsule = PyCapsule_New(weight, kCapsule, nullptr);
  if (capsule == nullptr) return nullptr;
  try {
    const auto found =
        list()
            .try_emplace(weight, Entry{Reference(Py_NewRef(weight)), std::move(memory), shape})
            .first;
    ++found->second.users;
  } catch (const std::bad_alloc&) {
    Py_DECREF(capsule);
    return PyErr_NoMemory();
  }
  PyCapsule_SetDestructor(capsule, drop);
  return capsule;
}

void forget_panels() {
  for (auto& [key, entry] : list()) entry.version = kStale;
}

template <class Real, class Stored>
std::shared_ptr<const Real> find_prepacked(const KernelTable<Real>& table, PyObject* weight,
                                           const Stored* data, const PackedWeight& shape) {
  if (list().empty()) return nullptr;
  const auto found = list().find(weight);
  if (found == list().end() || !(found->second.shape == shape)) return nullptr;
  Entry& entry = found->second;
  Dense<Stored> held;
  if (!read(entry.memory.get(), held) || held.data != data) {
    entry.version = kStale;  // it may come back, and other tensors change what it left
    return nullptr;
  }
  const long version = version_of(weight);
  if (version < 0) {
    PyErr_Clear();
    return nullptr;
  }
  if (entry.version != version || entry.table != &table) {
    entry.version = kStale;  // packing may fail halfway
    pack(table, data, entry);
    entry.version = version;
  }
  return std::static_pointer_cast<const Real>(entry.panels);
}
GRU_FAST_FIND_PREPACKED(float, float);
GRU_FAST_FIND_PREPACKED(float, Float16);
GRU_FAST_FIND_PREPACKED(float, BFloat16);
GRU_FAST_FIND_PREPACKED(BFloat16, BFloat16);
GRU_FAST_FIND_PREPACKED(double, double);

}  // namespace gru_fast
