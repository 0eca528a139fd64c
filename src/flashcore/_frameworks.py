# SPDX-License-Identifier: Apache-2.0
"""How each array library differs where DLPack alone does not say enough.

The C++ bindings ask `adapter_of` once for each array type that they meet and keep the answer. No library is imported
here: an array of it is at hand, so it is imported already.
"""

from __future__ import annotations

import atexit
import importlib
import sys
from typing import Any

from . import _core


class Adapter:
    """An array type that is known by its DLPack methods alone; the subclasses know more. None means: not needed."""

    on_cpu = False
    """Whether no array of this type lies on a device."""
    writable = True
    """False where the library's arrays are immutable: `out=` is refused then."""
    own_stream = False
    """Whether the library has no current stream, so that work on its arrays goes to a stream of FlashCore's own."""
    grad_enabled: Any = None
    """`torch.is_grad_enabled`; for other libraries None."""
    export: Any = None
    """`export(array, stream)`: the DLPack capsule, in place of `array.__dlpack__`. `stream` is None on the CPU."""
    ready: Any = None
    """`ready(array)`: returns when an array on the CPU has been computed."""
    describe: Any = None
    """`describe(array)`: address, read-only, shape, strides in bytes and dtype name of an array that DLPack refuses;
    raises BufferError or TypeError if FlashCore cannot take it either."""
    stream: Any = None
    """`stream(device_index)`: the handle of the current CUDA stream. None: the legacy default stream."""
    empty: Any = None
    """`empty(like, shape, dtype)`: a new row-major array on the device of `like`, of the dtype named or, for None, of
    its dtype. None: results lie in FlashCore's own memory and are handed over by `from_buffer`."""

    def from_buffer(self, like, buffer):
        """The library's array over a `flashcore.Buffer`; the buffer itself where the library has no way to make one."""
        namespace = getattr(like, "__array_namespace__", None)
        from_dlpack = getattr(namespace(), "from_dlpack", None) if namespace else None
        return from_dlpack(buffer) if from_dlpack else buffer


class NumPy(Adapter):
    on_cpu = True

    def __init__(self, numpy):
        self.numpy = numpy
        self.dtypes = {"float32": numpy.dtype("float32"), "uint8": numpy.dtype("uint8")}

    def describe(self, array):
        # NumPy does not export ml_dtypes' bfloat16; before NumPy 2.1 it exports no read-only array either.
        if not array.dtype.isnative:
            raise BufferError(f"dtype {array.dtype.str} is not in this machine's byte order")
        interface = array.__array_interface__
        address, read_only = interface["data"]
        return address, read_only, array.shape, array.strides, array.dtype.name

    def empty(self, like, shape, dtype):
        return self.numpy.empty(shape, like.dtype if dtype is None else self.dtypes[dtype])


class Torch(Adapter):
    """Used in full only before PyTorch 2.10, which brought the C exchange API; of later ones `grad_enabled` is all."""

    def __init__(self, torch):
        self.torch = torch
        self.grad_enabled = torch.is_grad_enabled

    def export(self, array, stream):
        # PyTorch exports neither what requires grad, nor from another device than the current one.
        array = array.detach()
        if stream is None:
            return array.__dlpack__()
        with self.torch.cuda.device(array.device):
            return array.__dlpack__(stream=stream)

    def stream(self, device_index):
        return self.torch.cuda.current_stream(device_index).cuda_stream

    def empty(self, like, shape, dtype):
        dtype = like.dtype if dtype is None else getattr(self.torch, dtype)
        return self.torch.empty(shape, dtype=dtype, device=like.device)


class Jax(Adapter):
    writable = False
    own_stream = True

    def __init__(self, _jax):
        self.dlpack = importlib.import_module("jax.dlpack")
        # Once more, so that it runs before JAX, imported meanwhile, takes its backends down.
        atexit.unregister(_core.release_pending)
        atexit.register(_core.release_pending)

    def ready(self, array):
        array.block_until_ready()

    def from_buffer(self, like, buffer):
        return self.dlpack.from_dlpack(buffer)


class CuPy(Adapter):
    def __init__(self, cupy):
        self.cupy = cupy

    def stream(self, device_index):
        with self.cupy.cuda.Device(device_index):
            return self.cupy.cuda.get_current_stream().ptr

    def empty(self, like, shape, dtype):
        with like.device:
            return self.cupy.empty(shape, like.dtype if dtype is None else dtype)


def adapter_of(array) -> Adapter | None:
    """The adapter for arrays of this array's type, None if it is no array. TypeError says why it cannot be taken."""
    kind = type(array)
    if kind.__name__ == "FakeTensor":
        raise TypeError("it has no memory")
    if kind.__name__ == "MaskedArray":
        raise TypeError("its mask would be ignored; pass its .data")
    jax = sys.modules.get("jax")
    if jax and isinstance(array, getattr(getattr(jax, "core", None), "Tracer", ())):
        raise TypeError("it has no values while JAX traces; call FlashCore outside of jax.jit, grad and vmap")
    if not hasattr(kind, "__dlpack__") or not hasattr(kind, "__dlpack_device__"):
        return None
    for library, name, adapter in (
        ("torch", "Tensor", Torch),
        ("numpy", "ndarray", NumPy),
        ("jax", "Array", Jax),
        ("cupy", "ndarray", CuPy),
    ):
        module = sys.modules.get(library)
        if module and isinstance(array, getattr(module, name, ())):
            return adapter(module)
    return Adapter()
