# SPDX-License-Identifier: Apache-2.0
"""The DLPack protocol itself, spoken by a producer of these tests' own, on the CPU."""

from __future__ import annotations

import ctypes
import gc

import numpy as np
import pytest

import flashcore
from flashcore import _core

INT64 = ctypes.POINTER(ctypes.c_int64)


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", INT64),
        ("strides", INT64),
        ("byte_offset", ctypes.c_uint64),
    ]


DELETER = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)


class Managed(ctypes.Structure):
    _fields_ = [("array", DLTensor), ("context", ctypes.c_void_p), ("deleter", DELETER)]


class ManagedVersioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", DELETER),
        ("flags", ctypes.c_uint64),
        ("array", DLTensor),
    ]


new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.restype = ctypes.py_object
new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
name_of = ctypes.pythonapi.PyCapsule_GetName
name_of.restype = ctypes.c_char_p
name_of.argtypes = [ctypes.py_object]
pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
pointer_of.restype = ctypes.c_void_p
pointer_of.argtypes = [ctypes.py_object, ctypes.c_char_p]


class Producer:
    """Exports a float32 NumPy array by a capsule whose every field can be chosen; counts what is done with it."""

    def __init__(self, array, versioned=True, major=1, flags=0, offset=0, strides=True, data=True):
        self.array, self.versioned, self.major, self.flags = array, versioned, major, flags
        self.offset, self.strides, self.data = offset, strides, data
        self.deleted = 0
        self.capsules, self.arguments, self.kept = [], [], []

    def __dlpack_device__(self):
        return 1, 0

    def __dlpack__(self, **arguments):
        self.arguments.append(arguments)
        managed = ManagedVersioned() if self.versioned else Managed()
        if self.versioned:
            managed.major, managed.minor, managed.flags = self.major, 0, self.flags
        managed.deleter = DELETER(self.delete)
        array, dims = managed.array, self.array.ndim
        shape = (ctypes.c_int64 * dims)(*self.array.shape)
        strides = (ctypes.c_int64 * dims)(*(s // 4 for s in self.array.strides))
        array.data = self.array.ctypes.data - self.offset if self.data else None
        array.device_type, array.ndim, array.code, array.bits, array.lanes = 1, dims, 2, 32, 1
        array.shape = ctypes.cast(shape, INT64)
        array.strides = ctypes.cast(strides, INT64) if self.strides else None
        array.byte_offset = self.offset
        self.kept.append((managed, shape, strides))
        name = b"dltensor_versioned" if self.versioned else b"dltensor"
        self.capsules.append(new_capsule(ctypes.addressof(managed), name, None))
        return self.capsules[-1]

    def delete(self, address):
        assert address == ctypes.addressof(self.kept[-1][0])
        self.deleted += 1


class OldProducer(Producer):
    """Before DLPack 1.0, __dlpack__ took no max_version."""

    def __dlpack__(self, stream=None):
        return super().__dlpack__(stream=stream)


def arrays(shape=(1, 5, 2, 8)):
    return [np.random.default_rng(seed).standard_normal(shape, dtype=np.float32) for seed in range(3)]


@pytest.mark.parametrize("versioned", [False, True])
def test_a_capsule_is_taken_once_and_deleted_once(versioned):
    query, key, value = arrays()
    producer = Producer(key, versioned)
    assert np.array_equal(flashcore.attention(query, producer, value), flashcore.attention(query, key, value))
    assert producer.arguments == [{"max_version": (1, 3)}]  # and no stream, as the CPU has none
    assert producer.deleted == 1
    assert name_of(producer.capsules[0]) == (b"used_dltensor_versioned" if versioned else b"used_dltensor")


@pytest.mark.parametrize("versioned", [False, True])
def test_a_capsule_is_deleted_once_after_an_error(versioned):
    query, key, value = arrays()
    producer = Producer(key[0], versioned)  # three dimensions
    for calls in (1, 2):
        with pytest.raises(ValueError, match="^key"):
            flashcore.attention(query, producer, value)
        assert producer.deleted == calls


def test_an_old_producer():
    query, key, value = arrays()
    expected = flashcore.attention(query, key, value)
    producer = OldProducer(key, versioned=False)
    for calls in (1, 2):
        assert np.array_equal(flashcore.attention(query, producer, value), expected)
        assert producer.deleted == calls


def test_a_newer_major_version_is_refused_and_left_to_its_capsule():
    query, key, value = arrays()
    producer = Producer(key, major=2)
    with pytest.raises(TypeError, match="^key: .*DLPack 2; FlashCore reads version 1"):
        flashcore.attention(query, producer, value)
    assert producer.deleted == 0 and name_of(producer.capsules[0]) == b"dltensor_versioned"


def test_the_read_only_flag():
    query, key, value = arrays()
    out = np.full_like(query, 7)
    assert _core.read_array(Producer(out, flags=1))["read_only"]
    assert not _core.read_array(Producer(out, flags=2))["read_only"]  # that one says: a copy
    with pytest.raises(ValueError, match="^out"):
        flashcore.attention(query, key, value, out=Producer(out, flags=1))
    assert (out == 7).all()
    writable = Producer(out)
    assert flashcore.attention(query, key, value, out=writable) is writable
    assert np.array_equal(out, flashcore.attention(query, key, value))


def test_byte_offset_and_absent_strides():
    array = arrays()[0]
    seen = _core.read_array(Producer(array, offset=64, strides=False))
    assert seen["address"] == array.ctypes.data and seen["strides"] == (80, 16, 8, 1)
    assert _core.read_array(Producer(array[:, ::-2]))["strides"] == (80, -32, 8, 1)


def test_more_dimensions_than_are_kept():
    query, key, value = arrays()
    many = np.zeros((1,) * 12, np.float32)
    assert _core.read_array(Producer(many))["ndim"] == 12
    with pytest.raises(ValueError, match="^key"):
        flashcore.attention(query, Producer(many), value)


def test_absent_memory():
    query, key, value = arrays()
    with pytest.raises(TypeError, match="^key: .*no memory"):
        flashcore.attention(query, Producer(key, data=False), value)
    assert _core.read_array(Producer(np.zeros((0, 3), np.float32), data=False))["shape"] == (0, 3)


@pytest.mark.parametrize("error", [BufferError, RuntimeError, TypeError, ValueError])
def test_a_producer_that_refuses(error):
    class Refusing(Producer):
        def __dlpack__(self, **arguments):
            raise error("not now\nnor later")

    query, key, value = arrays()
    with pytest.raises(TypeError, match="^value: got Refusing, which cannot be read through DLPack: not now$"):
        flashcore.attention(query, key, Refusing(value))


def test_other_exceptions_pass_through():
    class Interrupted(Producer):
        def __dlpack__(self, **arguments):
            raise KeyboardInterrupt

    query, key, value = arrays()
    with pytest.raises(KeyboardInterrupt):
        flashcore.attention(query, key, Interrupted(value))


def test_what_is_no_capsule():
    class Wrong(Producer):
        def __dlpack__(self, **arguments):
            return 3

    query, key, value = arrays()
    with pytest.raises(TypeError, match="^value: __dlpack__ of Wrong returned no DLPack capsule"):
        flashcore.attention(query, key, Wrong(value))


def test_an_unknown_library_gets_a_buffer():
    query, key, value = arrays()
    out, lse = flashcore.attention(Producer(query), key, value, return_lse=True)
    expected, expected_lse = flashcore.attention(query, key, value, return_lse=True)
    assert isinstance(out, flashcore.Buffer) and isinstance(lse, flashcore.Buffer)
    assert (out.shape, out.dtype, out.__dlpack_device__()) == ((1, 5, 2, 8), "float32", (1, 0))
    assert "(1, 5, 2, 8)" in repr(out) and _core.read_array(out)["address"] % 64 == 0
    array = np.from_dlpack(out)
    del out
    gc.collect()
    assert np.array_equal(array, expected) and np.array_equal(np.from_dlpack(lse), expected_lse)


def test_an_unknown_library_with_a_namespace_makes_its_own_array():
    class Namespaced(Producer):
        def __array_namespace__(self):
            return np

    query, key, value = arrays()
    result = flashcore.attention(Namespaced(query), key, value)
    assert isinstance(result, np.ndarray) and np.array_equal(result, flashcore.attention(query, key, value))


def test_a_buffer_speaks_both_versions():
    query, key, value = arrays()
    buffer = flashcore.attention(Producer(query), key, value)
    old, new = buffer.__dlpack__(), buffer.__dlpack__(max_version=(1, 0), dl_device=(1, 0), copy=False)
    assert (name_of(old), name_of(new)) == (b"dltensor", b"dltensor_versioned")
    managed = ManagedVersioned.from_address(pointer_of(new, b"dltensor_versioned"))
    assert (managed.major, managed.flags, managed.array.ndim) == (1, 0, 4)
    assert managed.array.shape[:4] == [1, 5, 2, 8] and managed.array.strides[:4] == [80, 16, 8, 1]
    del old, new  # not taken: the capsules delete what they hold
    for arguments in ({"copy": True}, {"dl_device": (2, 0)}):
        with pytest.raises(BufferError):
            buffer.__dlpack__(**arguments)
    assert np.array_equal(np.from_dlpack(buffer), flashcore.attention(query, key, value))
