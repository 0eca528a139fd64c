// SPDX-License-Identifier: Apache-2.0
// Finds out about array types, and remembers the ones seen last.
#include "array_type.h"

#include <array>
#include <utility>

namespace flashcore {

namespace {

// Enough for every array type that a process is likely to use at a time. Bounded, for classes may be made by the
// thousand.
constexpr int cached_types = 16;

struct Cache {
  std::array<PyObject*, cached_types> keys{};
  std::array<std::shared_ptr<ArrayType>, cached_types> types;
  int next = 0;
};

const DLPackExchangeAPI* exchange_api_of(nb::handle type) {
  nb::object const capsule = nb::getattr(type, "__dlpack_c_exchange_api__", nb::none());
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
  auto const* header =
      static_cast<const DLPackExchangeAPIHeader*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (header && header->version.major != DLPACK_MAJOR_VERSION) header = header->prev_api;
  return reinterpret_cast<const DLPackExchangeAPI*>(header);
}

nb::object member(nb::handle adapter, const char* name) {
  nb::object value = nb::getattr(adapter, name);
  return value.is_none() ? nb::object() : value;
}

std::shared_ptr<ArrayType> find_out(nb::handle array) {
  nb::object const adapter = nb::module_::import_("flashcore._frameworks").attr("adapter_of")(array);
  if (adapter.is_none()) return nullptr;
  auto type = std::make_shared<ArrayType>();
  type->type = nb::borrow(array.type());
  type->api = exchange_api_of(array.type());
  type->grad_enabled = member(adapter, "grad_enabled");
  type->on_cpu = nb::cast<bool>(adapter.attr("on_cpu"));
  type->writable = nb::cast<bool>(adapter.attr("writable"));
  type->own_stream = nb::cast<bool>(adapter.attr("own_stream"));
  type->export_array = member(adapter, "export");
  type->ready = member(adapter, "ready");
  type->describe = member(adapter, "describe");
  type->stream = member(adapter, "stream");
  type->empty = member(adapter, "empty");
  type->from_buffer = member(adapter, "from_buffer");
  return type;
}

}  // namespace

std::shared_ptr<ArrayType> array_type_of(nb::handle array) {
  static auto& cache = *new Cache;  // never destroyed: it holds Python objects
  PyObject* const key = array.type().ptr();
  for (int i = 0; i < cached_types; ++i) {
    if (cache.keys[i] == key) return cache.types[i];
  }
  std::shared_ptr<ArrayType> type = find_out(array);
  if (!type) return nullptr;
  // The old entry goes last: its destruction may run Python, and so this function.
  int const slot = cache.next;
  cache.next = (slot + 1) % cached_types;
  cache.keys[slot] = key;
  std::shared_ptr<ArrayType> const old = std::exchange(cache.types[slot], type);
  return type;
}

nb::handle interned(const char* text) {
  PyObject* const string = PyUnicode_InternFromString(text);
  if (!string) nb::raise_python_error();
  return string;
}

}  // namespace flashcore
