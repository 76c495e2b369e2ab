// SPDX-License-Identifier: Apache-2.0
#include "prepack.h"

#include <cstdlib>
#include <new>
#include <unordered_map>

#include "cpu/isa.h"

namespace gru_fast {
namespace {

constexpr const char* kCapsule = "gru_fast.prepacked";

// A weight on the list. Calls that run hold the panels they began with.
struct Entry {
  PyObject* weight;
  PackedWeight shape;
  int users = 0;
  Panels32 panels;
  const Kernels* kernels = nullptr;  // that the panels are for
  long version = 0;                  // of the weight when it was packed
};

using List = std::unordered_map<const float*, Entry>;

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

Panels32 pack(const KernelTable<float>& table, const float* data, const PackedWeight& shape) {
  const size_t bytes = static_cast<size_t>(table.packed_weight_size(shape)) * sizeof(float);
  auto* memory = static_cast<float*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
  if (memory == nullptr) throw std::bad_alloc();
  const std::shared_ptr<float> panels(memory, [](float* block) { std::free(block); });
  table.pack_weight(shape, data, memory);
  return panels;
}

void drop(PyObject* capsule) {
  const auto found = list().find(static_cast<float*>(PyCapsule_GetPointer(capsule, kCapsule)));
  if (found == list().end() || --found->second.users > 0) return;
  PyObject* weight = found->second.weight;
  list().erase(found);
  Py_DECREF(weight);
}

bool operator==(const PackedWeight& a, const PackedWeight& b) {
  return a.cell == b.cell && a.H == b.H && a.K == b.K && a.recurrent == b.recurrent;
}

}  // namespace

PyObject* prepack(PyObject* weight, const float* data, const PackedWeight& shape) {
  if (version_of(weight) < 0) return nullptr;  // an inference tensor counts no changes
  PyObject* capsule = PyCapsule_New(const_cast<float*>(data), kCapsule, nullptr);
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

Panels32 find_prepacked(const float* data, const PackedWeight& shape) {
  if (list().empty()) return nullptr;
  const auto found = list().find(data);
  if (found == list().end() || !(found->second.shape == shape)) return nullptr;
  Entry& entry = found->second;
  const long version = version_of(entry.weight);
  if (version < 0) {
    PyErr_Clear();
    return nullptr;
  }
  const Kernels& current = kernels();
  if (entry.panels == nullptr || entry.version != version || entry.kernels != &current) {
    entry.panels = pack(current.f32, data, shape);
    entry.kernels = &current;
    entry.version = version;
  }
  return entry.panels;
}

}  // namespace gru_fast
