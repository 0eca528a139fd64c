// SPDX-License-Identifier: Apache-2.0
// Reads the arrays of a call, makes its results, and keeps both in order with everybody's streams.
#include "arrays.h"

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>

#include "flashcore/error.h"

namespace flashcore {

namespace {

// Inputs whose framework has no stream to order their release by, and the event after which they may go. Guarded by the
// GIL.
struct Pending {
  std::shared_ptr<cuda::Event> done;
  std::vector<dlpack::Managed> inputs;
};

std::vector<Pending>& pending() {
  static auto& list = *new std::vector<Pending>;  // never destroyed: release_pending() empties it
  return list;
}

// The deleters may run Python and so come back here: entries leave the list before they are destroyed.
void release_completed() {
  std::vector<Pending>& list = pending();
  auto const first =
      std::stable_partition(list.begin(), list.end(), [](const Pending& p) { return !p.done->completed(); });
  std::vector<Pending> const completed(std::make_move_iterator(first), std::make_move_iterator(list.end()));
  list.erase(first, list.end());
}

std::string first_line(const char* text) {
  std::string line(text);
  return line.substr(0, line.find('\n'));
}

std::string name_of_type(nb::handle array) { return nb::cast<nb::str>(array.type().attr("__name__")).c_str(); }

// The Python error at hand as a TypeError that names the argument, unless it is none that says "not this array".
[[noreturn]] void refuse(const char* name, nb::handle array) {
  nb::python_error error;
  for (PyObject* kind :
       {PyExc_BufferError, PyExc_TypeError, PyExc_ValueError, PyExc_RuntimeError, PyExc_AttributeError}) {
    if (error.matches(kind)) {
      throw TypeError(std::string(name) + ": got " + name_of_type(array) +
                      ", which cannot be read through DLPack: " + first_line(nb::str(error.value()).c_str()));
    }
  }
  throw std::move(error);
}

void refuse_version(const char* name, nb::handle array, DLPackVersion version) {
  throw TypeError(std::string(name) + ": got " + name_of_type(array) + ", exported as DLPack " +
                  std::to_string(version.major) + "; FlashCore reads version " + std::to_string(DLPACK_MAJOR_VERSION));
}

bool empty(const Tensor& tensor) {
  const int64_t* const end = tensor.shape + std::min(tensor.ndim, Tensor::max_ndim);
  return std::find(tensor.shape, end, 0) != end;
}

bool streamless(const ArrayType& type) { return !type.api && !type.stream; }

// The current stream of a framework on a CUDA device.
void* current_stream(const ArrayType& type, int device) {
  if (type.api) {
    void* stream = nullptr;
    if (type.api->current_work_stream(kDLCUDA, device, &stream) != 0) nb::raise_python_error();
    return stream;
  }
  if (type.stream) return reinterpret_cast<void*>(nb::cast<intptr_t>(type.stream(device)));
  return type.own_stream ? cuda::own_stream(device) : cuda::legacy_stream();
}

Device dlpack_device(const char* name, nb::handle array) {
  static nb::handle const method = interned("__dlpack_device__");
  PyObject* const self = array.ptr();
  nb::object const device = nb::steal(PyObject_VectorcallMethod(method.ptr(), &self, 1, nullptr));
  if (!device.is_valid()) refuse(name, array);
  int const type = nb::cast<int>(nb::int_(device[0]));  // often an enum
  return dlpack::device_of({static_cast<DLDeviceType>(type), nb::cast<int>(device[1])});
}

// array.__dlpack__(stream=…, max_version=…), each only where wanted.
nb::object dlpack_method(nb::handle array, nb::handle stream, bool versioned) {
  static nb::handle const method = interned("__dlpack__");
  static nb::handle const max_version = nb::make_tuple(DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION).release();
  static nb::handle const names[2][2] = {
      {nb::handle(), nb::make_tuple("max_version").release()},
      {nb::make_tuple("stream").release(), nb::make_tuple("stream", "max_version").release()}};
  PyObject* args[3] = {array.ptr()};
  size_t count = 1;
  if (stream) args[count++] = stream.ptr();
  if (versioned) args[count++] = max_version.ptr();
  return nb::steal(PyObject_VectorcallMethod(method.ptr(), args, 1, names[stream.is_valid()][versioned].ptr()));
}

// The array of a capsule, which is marked as taken.
dlpack::Managed take_capsule(const char* name, nb::handle array, nb::handle capsule) {
  if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned")) {
    auto* managed = static_cast<DLManagedTensorVersioned*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
    if (managed->version.major != DLPACK_MAJOR_VERSION) refuse_version(name, array, managed->version);
    if (PyCapsule_SetName(capsule.ptr(), "used_dltensor_versioned") != 0) nb::raise_python_error();
    return dlpack::Managed(managed);
  }
  if (PyCapsule_IsValid(capsule.ptr(), "dltensor")) {
    auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
    if (PyCapsule_SetName(capsule.ptr(), "used_dltensor") != 0) nb::raise_python_error();
    return dlpack::Managed(managed);
  }
  throw TypeError(std::string(name) + ": __dlpack__ of " + name_of_type(array) + " returned no DLPack capsule");
}

// An array that DLPack does not carry, as its adapter describes it.
Tensor described(const char* name, nb::handle array, const ArrayType& type) {
  nb::object facts;
  try {
    facts = type.describe(array);
  } catch (nb::python_error& error) {
    error.restore();
    refuse(name, array);
  }
  std::string const dtype = nb::cast<nb::str>(facts[4]).c_str();
  Tensor tensor;
  for (DType known : {bfloat16, float16, float32, int32}) {
    if (to_string(known) == dtype) tensor.dtype = known;
  }
  if (tensor.dtype.kind == DTypeKind::none) {
    throw TypeError(std::string(name) + ": dtype is " + dtype + ", which cannot be read through DLPack");
  }
  tensor.data = reinterpret_cast<void*>(nb::cast<uintptr_t>(facts[0]));
  tensor.read_only = nb::cast<bool>(facts[1]);
  tensor.ndim = static_cast<int>(nb::len(nb::object(facts[2])));
  for (int i = 0; i < std::min(tensor.ndim, Tensor::max_ndim); ++i) {
    tensor.shape[i] = nb::cast<int64_t>(facts[2][i]);
    auto const bytes = nb::cast<int64_t>(facts[3][i]);
    if (bytes % tensor.dtype.bytes() != 0) {
      throw TypeError(std::string(name) + ": the stride of dimension " + std::to_string(i) + " is " +
                      std::to_string(bytes) + " bytes; expected a multiple of the element size, " +
                      std::to_string(tensor.dtype.bytes()));
    }
    tensor.stride[i] = bytes / tensor.dtype.bytes();
  }
  return tensor;
}

// Refuses a tensor that requires grad, while grad is enabled.
void check_gradient(const char* name, nb::handle array) {
  static nb::handle const requires_grad = interned("requires_grad");
  nb::object const required = nb::steal(PyObject_GetAttr(array.ptr(), requires_grad.ptr()));
  if (!required.is_valid()) refuse(name, array);
  if (required.ptr() == Py_False) return;
  throw ValueError(std::string(name) + ": it requires grad; FlashCore has no backward pass yet: call it under " +
                   "torch.no_grad() or pass " + name + ".detach()");
}

// Whether a tensor may be a lazily negated view, which the C exchange API would take without the negation. Such is the
// imaginary part of a conjugated tensor: every second number of it, and so is every view of it but what as_strided
// makes. (To ask each tensor took 0.10 us on the host of an H100, of a call's 8.8.)
bool may_be_negated(const Tensor& tensor) {
  if (tensor.dtype.kind == DTypeKind::bfloat) return false;  // there is no complex bfloat16
  for (int i = 0; i < std::min(tensor.ndim, Tensor::max_ndim); ++i) {
    if (tensor.shape[i] > 1 && tensor.stride[i] % 2 != 0) return false;
  }
  return true;
}

// Refuses a lazy negation: x.conj().imag is such a view.
void check_negation(const char* name, nb::handle array) {
  static nb::handle const is_neg = interned("is_neg");
  PyObject* const self = array.ptr();
  nb::object const negated = nb::steal(PyObject_VectorcallMethod(is_neg.ptr(), &self, 1, nullptr));
  if (!negated.is_valid()) refuse(name, array);
  if (negated.ptr() == Py_False) return;
  throw TypeError(std::string(name) + ": got a tensor with its negative bit set; pass " + name + ".resolve_neg()");
}

}  // namespace

Tensor Arrays::input(const char* name, nb::handle array) { return add(name, array); }

Tensor Arrays::output(const char* name, nb::handle array, const char* instead) {
  Tensor const tensor = add(name, array);
  if (!arrays_.back().type->writable) {
    throw ValueError(std::string(name) + ": got " + name_of_type(array) + ", which is immutable; " + instead);
  }
  return tensor;
}

Tensor Arrays::add(const char* name, nb::handle array) {
  if (arrays_.empty()) arrays_.reserve(10);
  Array& entry = arrays_.emplace_back();
  try {
    entry.type = array_type_of(array);
  } catch (nb::python_error& error) {
    error.restore();
    refuse(name, array);
  }
  if (!entry.type) {
    throw TypeError(std::string(name) + ": expected an array with __dlpack__, got " + name_of_type(array));
  }
  Tensor const tensor = read(name, array, entry);
  if (entry.type->grad_enabled) {
    if (!grad_enabled_) grad_enabled_ = nb::cast<bool>(entry.type->grad_enabled());
    if (*grad_enabled_) check_gradient(name, array);
    if (may_be_negated(tensor)) check_negation(name, array);
  }
  if (!tensor.data && !empty(tensor)) {
    throw TypeError(std::string(name) + ": got " + name_of_type(array) +
                    ", which holds no memory; expected a real array");
  }
  if (arrays_.size() == 1) dtype_ = tensor.dtype;
  return tensor;
}

Tensor Arrays::read(const char* name, nb::handle array, Array& into) {
  ArrayType& type = *into.type;
  if (!type.api) return call_dlpack(name, array, into);
  Tensor tensor;
  if (type.api->dltensor_from_py_object_no_sync) {
    DLTensor view;
    if (type.api->dltensor_from_py_object_no_sync(array.ptr(), &view) != 0) refuse(name, array);
    tensor = dlpack::tensor_of(view, false);
  } else {
    DLManagedTensorVersioned* managed = nullptr;
    if (type.api->managed_tensor_from_py_object_no_sync(array.ptr(), &managed) != 0) refuse(name, array);
    into.managed = dlpack::Managed(managed);
    if (managed->version.major != DLPACK_MAJOR_VERSION) refuse_version(name, array, managed->version);
    tensor = into.managed.tensor();
  }
  into.device = tensor.device;
  lead(array, type, tensor.device);
  if (tensor.device.type == DeviceType::cuda && tensor.device == device_ && &type != arrays_[0].type.get()) {
    if (void* const theirs = current_stream(type, device_.index); theirs != stream_) {
      cuda::order(device_.index, theirs, stream_);
    }
  }
  return tensor;
}

Tensor Arrays::call_dlpack(const char* name, nb::handle array, Array& into) {
  ArrayType& type = *into.type;
  into.device = type.on_cpu ? Device{} : dlpack_device(name, array);
  lead(array, type, into.device);
  nb::object stream;
  if (into.device.type == DeviceType::cuda) {
    // DLPack counts the legacy default stream as 1.
    void* const handle = into.device == device_ && stream_ ? stream_ : cuda::legacy_stream();
    stream = nb::int_(reinterpret_cast<intptr_t>(handle));
  } else if (type.ready) {
    type.ready(array);
  }
  nb::object capsule;
  if (type.export_array) {
    try {
      capsule = type.export_array(array, stream.is_valid() ? stream : nb::none());
    } catch (nb::python_error& error) {
      error.restore();
    }
  } else {
    capsule = dlpack_method(array, stream, type.versioned);
    if (!capsule.is_valid() && type.versioned &&
        PyErr_ExceptionMatches(PyExc_TypeError)) {  // a producer before DLPack 1.0
      PyErr_Clear();
      capsule = dlpack_method(array, stream, false);
      type.versioned = !capsule.is_valid();
    }
    if (!capsule.is_valid() && type.describe && PyErr_ExceptionMatches(PyExc_BufferError)) {
      PyErr_Clear();
      return described(name, array, type);
    }
  }
  if (!capsule.is_valid()) refuse(name, array);
  into.managed = take_capsule(name, array, capsule);
  return into.managed.tensor();
}

void Arrays::lead(nb::handle array, const ArrayType& type, Device device) {
  if (leader_) return;
  leader_ = array;
  device_ = device;
  if (device.type == DeviceType::cuda) stream_ = current_stream(type, device.index);
}

Result Arrays::allocate(DType dtype, int ndim, const int64_t* shape) {
  ArrayType const& type = *arrays_[0].type;
  Result result;
  result.tensor = dlpack::compact(dtype, device_, ndim, shape);
  if (type.api) {
    DLTensor prototype{};
    prototype.device = dlpack::to_dlpack(device_);
    prototype.ndim = ndim;
    prototype.dtype = dlpack::to_dlpack(dtype);
    prototype.shape = result.tensor.shape;
    prototype.strides = result.tensor.stride;
    DLManagedTensorVersioned* managed = nullptr;
    std::string problem;
    auto const set_error = [](void* text, const char* /*kind*/, const char* message) {
      *static_cast<std::string*>(text) = first_line(message);
    };
    if (type.api->managed_tensor_allocator(&prototype, &managed, &problem, set_error) != 0 || !managed) {
      throw RuntimeError("allocating the result: " + problem);
    }
    result.managed_ = dlpack::Managed(managed);
    result.tensor.data = result.managed_.tensor().data;
  } else if (type.empty) {
    nb::object const extents = nb::steal(PyTuple_New(ndim));
    for (int i = 0; i < ndim; ++i) PyTuple_SetItem(extents.ptr(), i, PyLong_FromLongLong(shape[i]));
    result.object_ =
        type.empty(leader_, extents, dtype == dtype_ ? nb::none() : nb::object(nb::str(to_string(dtype).c_str())));
    Array array;
    array.type = arrays_[0].type;
    result.tensor = read("out", result.object_, array);
  } else {
    result.storage_ = std::make_shared<Storage>(result.tensor, stream_);
    result.tensor.data = result.storage_->tensor().data;
    storages_.push_back(result.storage_);
  }
  return result;
}

void Arrays::issued() {
  if (device_.type != DeviceType::cuda) return;
  Pending held;
  bool any_streamless = false;
  for (Array& array : arrays_) {
    if (streamless(*array.type)) {
      any_streamless = true;
      held.inputs.push_back(std::move(array.managed));
    } else if (array.type != arrays_[0].type && array.device == device_) {
      // The framework may give the memory to work on its own stream once the caller drops the array.
      if (void* const theirs = current_stream(*array.type, device_.index); theirs != stream_) {
        cuda::order(device_.index, stream_, theirs);
      }
    }
  }
  if (!any_streamless) return;
  held.done = std::make_shared<cuda::Event>(device_.index, stream_);
  for (auto const& storage : storages_) storage->filled(held.done);
  pending().push_back(std::move(held));
  release_completed();
}

nb::object Arrays::take(Result&& result) {
  if (result.managed_) {
    void* object = nullptr;
    if (arrays_[0].type->api->managed_tensor_to_py_object_no_sync(result.managed_.release(), &object) != 0) {
      nb::raise_python_error();
    }
    return nb::steal(static_cast<PyObject*>(object));
  }
  if (result.object_) return std::move(result.object_);
  return arrays_[0].type->from_buffer(leader_, make_buffer(std::move(result.storage_)));
}

void release_pending() {
  for (Pending const& entry : pending()) entry.done->synchronize();
  std::vector<Pending> const last = std::exchange(pending(), {});
}

}  // namespace flashcore
