// SPDX-License-Identifier: Apache-2.0
// flashcore.Buffer: a result in FlashCore's own memory, exported through the Python DLPack protocol.
#include "buffer.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <string>

#include "dlpack.h"
#include "flashcore/error.h"

namespace flashcore {

namespace nb = nanobind;
using namespace nb::literals;

namespace {

constexpr std::align_val_t alignment{64};

struct Buffer {
  std::shared_ptr<Storage> storage;
};

// What an exported array keeps alive. The strides and shape that it points to are the storage's own.
template <typename ManagedTensor>
struct Export {
  ManagedTensor managed;
  std::shared_ptr<Storage> storage;
};

template <typename ManagedTensor>
ManagedTensor* export_storage(const std::shared_ptr<Storage>& storage) {
  auto* exported = new Export<ManagedTensor>{{}, storage};
  const Tensor& tensor = storage->tensor();
  DLTensor& array = exported->managed.dl_tensor;
  array.data = tensor.data;
  array.device = dlpack::to_dlpack(tensor.device);
  array.ndim = tensor.ndim;
  array.dtype = dlpack::to_dlpack(tensor.dtype);
  array.shape = const_cast<int64_t*>(tensor.shape);  // DLPack has no const; nobody writes there
  array.strides = const_cast<int64_t*>(tensor.stride);
  array.byte_offset = 0;
  exported->managed.manager_ctx = exported;
  exported->managed.deleter = [](ManagedTensor* self) {
    delete static_cast<Export<ManagedTensor>*>(self->manager_ctx);
  };
  return &exported->managed;
}

// A capsule whose array is deleted with it unless a consumer has taken the array and renamed the capsule.
template <typename ManagedTensor>
nb::object make_capsule(ManagedTensor* managed, const char* name) {
  PyObject* capsule = PyCapsule_New(managed, name, [](PyObject* self) {
    const char* const current = PyCapsule_GetName(self);
    if (!current || std::strncmp(current, "dltensor", 8) != 0) return;
    auto* unused = static_cast<ManagedTensor*>(PyCapsule_GetPointer(self, current));
    unused->deleter(unused);
  });
  if (!capsule) {
    managed->deleter(managed);
    nb::raise_python_error();
  }
  return nb::steal(capsule);
}

// The stream that a consumer names in DLPack's encoding.
void* consumer_stream(nb::handle stream) {
  if (stream.is_none()) return cuda::legacy_stream();
  int64_t const handle = nb::cast<int64_t>(stream);
  if (handle == 0) {
    throw ValueError("stream: 0 is ambiguous on CUDA; expected 1 (legacy default), 2 (per-thread default) or a handle");
  }
  return reinterpret_cast<void*>(static_cast<intptr_t>(handle));
}

nb::object export_buffer(const Buffer& self, nb::handle stream, nb::handle max_version, nb::handle dl_device,
                         nb::handle copy) {
  const Tensor& tensor = self.storage->tensor();
  DLDevice const device = dlpack::to_dlpack(tensor.device);
  if (!dl_device.is_none() && !dl_device.equal(nb::make_tuple(int(device.device_type), device.device_id))) {
    throw nb::buffer_error("flashcore.Buffer cannot be exported to another device");
  }
  if (copy.ptr() == Py_True) throw nb::buffer_error("flashcore.Buffer cannot be exported as a copy");
  bool const in_order = !stream.is_none() && nb::cast<int64_t>(stream) == -1;  // the consumer orders its work by itself
  if (tensor.device.type == DeviceType::cuda && !in_order) {
    if (const cuda::Event* const ready = self.storage->ready()) ready->hold(consumer_stream(stream));
  }
  if (!max_version.is_none() && nb::cast<int>(max_version[0]) >= DLPACK_MAJOR_VERSION) {
    auto* managed = export_storage<DLManagedTensorVersioned>(self.storage);
    managed->version = {DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION};
    managed->flags = 0;
    return make_capsule(managed, "dltensor_versioned");
  }
  return make_capsule(export_storage<DLManagedTensor>(self.storage), "dltensor");
}

nb::tuple shape_of(const Buffer& self) {
  const Tensor& tensor = self.storage->tensor();
  nb::list extents;
  for (int i = 0; i < tensor.ndim; ++i) extents.append(tensor.shape[i]);
  return nb::tuple(extents);
}

}  // namespace

Storage::Storage(const Tensor& compact, void* stream) : tensor_(compact), stream_(stream) {
  auto const bytes = static_cast<size_t>(std::max<int64_t>(dlpack::elements(compact), 1) * compact.dtype.bytes());
  tensor_.data = compact.device.type == DeviceType::cuda ? cuda::allocate(compact.device.index, bytes, stream)
                                                         : ::operator new(bytes, alignment);
}

Storage::~Storage() {
  if (tensor_.device.type == DeviceType::cuda) {
    cuda::release(tensor_.device.index, tensor_.data, stream_);
  } else {
    ::operator delete(tensor_.data, alignment);
  }
}

nb::object make_buffer(std::shared_ptr<Storage> storage) { return nb::cast(Buffer{std::move(storage)}); }

void bind_buffer(nb::module_& m) {
  nb::class_<Buffer>(m, "Buffer",
                     R"(A result in FlashCore's own memory, for array types whose library is unknown to FlashCore.

Pass it to the `from_dlpack` of any library. It is row-major; on CUDA its consumers' streams wait for the result.)")
      .def("__dlpack__", &export_buffer, nb::kw_only(), "stream"_a = nb::none(), "max_version"_a = nb::none(),
           "dl_device"_a = nb::none(), "copy"_a = nb::none(),
           nb::sig("def __dlpack__(self, *, stream: int | None = None, max_version: tuple[int, int] | None = None, "
                   "dl_device: tuple[int, int] | None = None, copy: bool | None = None) -> typing.Any"),
           R"(The memory as a DLPack capsule: "dltensor_versioned" for a max_version from (1, 0) on, else "dltensor".

stream: on CUDA the stream whose later work waits for the result: None or 1 for the legacy default stream, 2 for the
    per-thread one, a cudaStream_t as an integer, or -1 not to wait. Ignored on the CPU.
Raises BufferError for another dl_device or copy=True, ValueError for stream=0.)")
      .def(
          "__dlpack_device__",
          [](const Buffer& self) {
            DLDevice const device = dlpack::to_dlpack(self.storage->tensor().device);
            return nb::make_tuple(int(device.device_type), device.device_id);
          },
          nb::sig("def __dlpack_device__(self) -> tuple[int, int]"),
          "DLPack's device type (1: CPU, 2: CUDA) and the device's index.")
      .def_prop_ro("shape", &shape_of, nb::sig("def shape(self) -> tuple[int, ...]"), "The extents, outermost first.")
      .def_prop_ro(
          "dtype", [](const Buffer& self) { return nb::str(to_string(self.storage->tensor().dtype).c_str()); },
          nb::sig("def dtype(self) -> str"), "The element type's name, as \"float16\".")
      .def("__repr__", [](const Buffer& self) {
        const Tensor& tensor = self.storage->tensor();
        std::string const shape = nb::repr(shape_of(self)).c_str();
        return nb::str(("flashcore.Buffer(shape=" + shape + ", dtype='" + to_string(tensor.dtype) + "', device='" +
                        to_string(tensor.device) + "')")
                           .c_str());
      });
}

}  // namespace flashcore
