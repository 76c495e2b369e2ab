// SPDX-License-Identifier: Apache-2.0
#include "prepack.h"

#include <cstdlib>
#include <new>
#include <unordered_map>

#include "exchange.h"

namespace gru_fast {
namespace {

constexpr const char* kCapsule = "gru_fast.prepacked";

// A weight on the list. Calls that run hold the panels they began with.
struct Entry {
  PyObject* weight;
  PackedWeight shape;
  int users = 0;
  std::shared_ptr<const void> panels;
  const void* table = nullptr;  // of the kernels that the panels are for
  long version = 0;             // of the weight when it was packed
};

using List = std::unordered_map<const void*, Entry>;

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

template <class Real>
std::shared_ptr<const void> pack(const KernelTable<Real>& table, const Real* data,
                                 const PackedWeight& shape) {
  const size_t bytes = static_cast<size_t>(table.packed_weight_size(shape)) * sizeof(Real);
  void* memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  if (memory == nullptr) throw std::bad_alloc();
  const std::shared_ptr<void> panels(memory, [](void* block) { std::free(block); });
  table.pack_weight(shape, data, static_cast<Real*>(memory));
  return panels;
}

void drop(PyObject* capsule) {
  const auto found = list().find(PyCapsule_GetPointer(capsule, kCapsule));
  if (found == list().end() || --found->second.users > 0) return;
  PyObject* weight = found->second.weight;
  list().erase(found);
  Py_DECREF(weight);
}

bool operator==(const PackedWeight& a, const PackedWeight& b) {
  return a.cell == b.cell && a.H == b.H && a.K == b.K && a.recurrent == b.recurrent;
}

}  // namespace

PyObject* prepack(PyObject* weight, const void* data, const PackedWeight& shape) {
  if (version_of(weight) < 0) return nullptr;  // an inference tensor counts no changes
  PyObject* capsule = PyCapsule_New(const_cast<void*>(data), kCapsule, nullptr);
  if (capsule == nullptr) return nullptr;
  try {
    const auto [entry, is_new] = list().try_emplace(data, Entry{weight, shape});
    if (is_new) Py_INCREF(weight);
    ++entry->second.users;
  } catch (const std::bad_alloc&) {
    Py_DECREF(capsule);
    return PyErr_NoMemory();
  }
  PyCapsule_SetDestructor(capsule, drop);
  return capsule;
}

template <class Real>
std::shared_ptr<const Real> find_prepacked(const KernelTable<Real>& table, const Real* data,
                                           const PackedWeight& shape) {
  if (list().empty()) return nullptr;
  const auto found = list().find(data);
  if (found == list().end() || !(found->second.shape == shape)) return nullptr;
  Entry& entry = found->second;
  // share_memory_() moves a storage: what lies here now may be another tensor.
  Dense<Real> held;
  if (!read(entry.weight, held, true) || held.data != data) return nullptr;
  const long version = version_of(entry.weight);
  if (version < 0) {
    PyErr_Clear();
    return nullptr;
  }
  if (entry.panels == nullptr || entry.version != version || entry.table != &table) {
    entry.panels = pack(table, data, shape);
    entry.table = &table;
    entry.version = version;
  }
  return std::static_pointer_cast<const Real>(entry.panels);
}
template std::shared_ptr<const float> find_prepacked(const KernelTable<float>&, const float*,
                                                     const PackedWeight&);
template std::shared_ptr<const BFloat16> find_prepacked(const KernelTable<BFloat16>&,
                                                        const BFloat16*, const PackedWeight&);

}  // namespace gru_fast
