# SPDX-License-Identifier: Apache-2.0
"""Arrays of each library: read in place, results in the caller's own type, on the caller's stream."""

from __future__ import annotations

import importlib
import os
import sys
import threading

import numpy as np
import pytest

import flashcore
from flashcore import _core

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would leave PyTorch no memory on a GPU

SHAPE = (2, 37, 4, 32)  # bshd
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}


class Library:
    """What the tests need of an array library."""

    writable = True

    def __init__(self, device):
        self.device = device


class NumPy(Library):
    dtypes = ("float32", "float16")

    def __init__(self, device):
        super().__init__(device)
        if device != "cpu":
            pytest.skip("NumPy's arrays lie on the CPU")
        self.type = np.ndarray

    def make(self, values, dtype):
        return values.astype(dtype)

    def float64(self, array):
        return array.astype(np.float64)

    def address(self, array):
        return array.__array_interface__["data"][0]

    def device_of(self, array):
        return "cpu"


class MlDtypes(NumPy):
    dtypes = ("bfloat16",)

    def __init__(self, device):
        super().__init__(device)
        self.ml_dtypes = pytest.importorskip("ml_dtypes")

    def make(self, values, dtype):
        return values.astype(getattr(self.ml_dtypes, dtype) if dtype == "bfloat16" else dtype)


class Torch(Library):
    def __init__(self, device):
        super().__init__(device)
        self.torch = pytest.importorskip("torch")
        self.type = self.torch.Tensor
        self.dtypes = ("float16", "bfloat16") if device == "cuda" else ("float32", "float16", "bfloat16")

    def make(self, values, dtype):
        return self.torch.from_numpy(values).to(self.device, getattr(self.torch, dtype))

    def float64(self, array):
        return array.double().cpu().numpy()

    def address(self, array):
        return array.data_ptr()

    def device_of(self, array):
        return array.device.type


class PlainTorch(Torch):
    """PyTorch as it was before the C exchange API."""

    def __init__(self, device):
        super().__init__(device)
        self.Plain = type("PlainTensor", (self.torch.Tensor,), {"__dlpack_c_exchange_api__": None})

    def make(self, values, dtype):
        return super().make(values, dtype).as_subclass(self.Plain)


class Jax(Library):
    writable = False

    def __init__(self, device):
        super().__init__(device)
        self.jax = pytest.importorskip("jax")
        try:
            self.place = self.jax.devices(device)[0]
        except RuntimeError:
            pytest.skip(f"JAX has no {device} device here")
        self.type = self.jax.Array
        self.dtypes = ("float16", "bfloat16") if device == "cuda" else ("float32", "float16", "bfloat16")

    def make(self, values, dtype):
        return self.jax.device_put(values.astype(self.jax.numpy.dtype(dtype)), self.place)

    def float64(self, array):
        return np.asarray(array).astype(np.float64)

    def address(self, array):
        return array.unsafe_buffer_pointer()

    def device_of(self, array):
        return {"cpu": "cpu", "gpu": "cuda"}[next(iter(array.devices())).platform]


class CuPy(Library):
    dtypes = ("float16",)

    def __init__(self, device):
        super().__init__(device)
        if device != "cuda":
            pytest.skip("CuPy's arrays lie on a GPU")
        self.cupy = pytest.importorskip("cupy")
        self.type = self.cupy.ndarray

    def make(self, values, dtype):
        return self.cupy.asarray(values.astype(dtype))

    def float64(self, array):
        return self.cupy.asnumpy(array).astype(np.float64)

    def address(self, array):
        return array.data.ptr

    def device_of(self, array):
        return "cuda"


@pytest.fixture(params=[NumPy, MlDtypes, Torch, PlainTorch, Jax, CuPy], ids=lambda library: library.__name__)
def library(request, device):
    return request.param(device)


@pytest.fixture
def torch_on(device):
    """torch, and the device as torch calls it."""
    return pytest.importorskip("torch"), device


def numbers(seed=0, shape=SHAPE):
    generator = np.random.default_rng(seed)
    return [generator.standard_normal(shape, dtype=np.float32) for _ in range(3)]


def reference(query, key, value):
    """Attention of bshd arrays in float64, and its log-sum-exp."""
    query, key, value = (np.asarray(a, np.float64).transpose(0, 2, 1, 3) for a in (query, key, value))
    scores = query @ key.transpose(0, 1, 3, 2) / np.sqrt(query.shape[-1])
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - top)
    sums = weights.sum(-1, keepdims=True)
    return (weights / sums @ value).transpose(0, 2, 1, 3), (top + np.log(sums))[..., 0]


def close(library, result, expected, dtype):
    return np.abs(library.float64(result) - expected).max() <= TOLERANCE[dtype]


def test_result_is_the_callers_type_on_its_device(library):
    for dtype in library.dtypes:
        arrays = [library.make(a, dtype) for a in numbers()]
        expected, expected_lse = reference(*(library.float64(a) for a in arrays))
        for result in (flashcore.attention(*arrays), flashcore.attention(*arrays, return_lse=True)[0]):
            assert isinstance(result, library.type)
            assert result.dtype == arrays[0].dtype and tuple(result.shape) == SHAPE
            assert library.device_of(result) == library.device
            assert close(library, result, expected, dtype)
        lse = flashcore.attention(*arrays, return_lse=True)[1]
        assert isinstance(lse, library.type) and "float32" in str(lse.dtype)
        assert library.device_of(lse) == library.device
        assert close(library, lse, expected_lse, "float16" if dtype == "float16" else dtype)


def test_inputs_are_read_in_place(library):
    for dtype in library.dtypes:
        array = library.make(numbers()[0], dtype)
        seen = _core.read_array(array)
        assert seen["address"] == library.address(array)
        assert (seen["dtype"], seen["shape"]) == (dtype, SHAPE)
        assert seen["strides"] == (37 * 4 * 32, 4 * 32, 32, 1)
        assert seen["device"].startswith(library.device)


def test_out_is_written_in_place_and_returned(library):
    dtype = library.dtypes[0]
    arrays = [library.make(a, dtype) for a in numbers()]
    out = library.make(np.full(SHAPE, 7, np.float32), dtype)
    if not library.writable:
        with pytest.raises(ValueError, match="out: .*immutable"):
            flashcore.attention(*arrays, out=out)
        assert (library.float64(out) == 7).all()
        return
    address = library.address(out)
    assert flashcore.attention(*arrays, out=out) is out
    assert library.address(out) == address
    assert close(library, out, reference(*(library.float64(a) for a in arrays))[0], dtype)


def test_varlen_and_combine_return_the_callers_type(library):
    dtype = library.dtypes[0]
    arrays = [library.make(a, dtype) for a in numbers(shape=(1, 20, 2, 16))]
    packed = [a.reshape(20, 2, 16) for a in arrays]
    lengths = np.array([0, 5, 20], np.int32)
    lengths = library.jax.device_put(lengths, library.place) if isinstance(library, Jax) else lengths
    lengths = library.torch.from_numpy(lengths).to(library.device) if isinstance(library, Torch) else lengths
    lengths = library.cupy.asarray(lengths) if isinstance(library, CuPy) else lengths
    out, lse = flashcore.attention_varlen(*packed, lengths, lengths, return_lse=True)
    assert isinstance(out, library.type) and isinstance(lse, library.type)
    for begin, end in ((0, 5), (5, 20)):
        expected, expected_lse = reference(*(library.float64(a)[:, begin:end] for a in arrays))
        assert np.abs(library.float64(out)[begin:end] - expected[0]).max() <= TOLERANCE[dtype]
        assert np.abs(library.float64(lse)[:, begin:end] - expected_lse[0]).max() <= 2e-3

    parts = [
        flashcore.attention(arrays[0], *(a[:, s] for a in arrays[1:]), return_lse=True)
        for s in (slice(0, 7), slice(7, 20))
    ]
    out, lse = flashcore.combine([part[0] for part in parts], [part[1] for part in parts])
    assert isinstance(out, library.type) and isinstance(lse, library.type) and out.dtype == arrays[0].dtype
    expected, expected_lse = reference(*(library.float64(a) for a in arrays))
    assert np.abs(library.float64(out) - expected).max() <= 2 * TOLERANCE[dtype]
    assert np.abs(library.float64(lse) - expected_lse).max() <= 2e-3


def test_no_reference_is_kept(library):
    arrays = [library.make(a, library.dtypes[0]) for a in numbers()]
    flashcore.attention(*arrays)
    _core.release_pending()
    before = [sys.getrefcount(a) for a in arrays]
    for _ in range(10):
        flashcore.attention(*arrays, return_lse=True)
        with pytest.raises(ValueError):
            flashcore.attention(*arrays, layout="hbsd")
        with pytest.raises(ValueError):
            flashcore.attention(*arrays[:2], arrays[2][0])
    _core.release_pending()
    assert [sys.getrefcount(a) for a in arrays] == before


def test_memory_stays_level(library):
    resource = pytest.importorskip("resource")
    arrays = [library.make(a, library.dtypes[0]) for a in numbers(shape=(1, 64, 4, 64))]
    for _ in range(50):
        flashcore.attention(*arrays, return_lse=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(400):  # 32 KiB and more leak each time, should one of the results do so
        flashcore.attention(*arrays, return_lse=True)
    unit = 1 if sys.platform == "darwin" else 1024
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < 6 << 20


def test_two_threads(library):
    dtype = library.dtypes[0]
    wrong = []

    def work(seed):
        arrays = [library.make(a, dtype) for a in numbers(seed)]
        expected = reference(*(library.float64(a) for a in arrays))[0]
        for _ in range(20):
            if not close(library, flashcore.attention(*arrays), expected, dtype):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_libraries_mix(torch_on):
    torch, device = torch_on
    if device != "cpu":
        pytest.skip("NumPy's arrays lie on the CPU")
    query, key, value = numbers()
    expected = reference(query, key, value)[0]
    result = flashcore.attention(torch.from_numpy(query), key, torch.from_numpy(value))
    assert isinstance(result, torch.Tensor) and np.abs(result.numpy() - expected).max() <= 1e-5
    result = flashcore.attention(query, torch.from_numpy(key), value)
    assert isinstance(result, np.ndarray) and np.abs(result - expected).max() <= 1e-5
    out = torch.empty(SHAPE)
    assert flashcore.attention(query, key, value, out=out) is out
    assert np.abs(out.numpy() - expected).max() <= 1e-5


# NumPy


def test_numpy_read_only_arrays_are_inputs_but_no_out():
    arrays = numbers()
    for array in arrays:
        array.flags.writeable = False
    assert _core.read_array(arrays[0])["read_only"]
    assert np.abs(flashcore.attention(*arrays) - reference(*arrays)[0]).max() <= 1e-5
    out = np.full(SHAPE, 7, np.float32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="^out"):
        flashcore.attention(*arrays, out=out)
    assert (out == 7).all()


def test_numpy_bfloat16_keeps_strides_and_read_only():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    array = numbers()[0].astype(ml_dtypes.bfloat16)[::-1, ::2]
    array.flags.writeable = False
    seen = _core.read_array(array)
    assert seen["address"] == array.__array_interface__["data"][0] and seen["dtype"] == "bfloat16"
    assert seen["strides"] == tuple(s // 2 for s in array.strides) and seen["read_only"]


def test_numpy_arrays_that_cannot_be_exchanged():
    query, key, value = numbers()
    ml_dtypes = pytest.importorskip("ml_dtypes")
    odd = np.zeros(SHAPE, np.dtype([("a", "i1"), ("b", "f4")]))["b"]  # strides are no multiple of four
    for bad in (
        query.astype(">f4"),
        np.zeros(SHAPE, [("a", "f4")]),
        query.astype(ml_dtypes.float8_e4m3fn),
        query.astype(object),
        np.ma.masked_less(query, 0),
        odd,
    ):
        with pytest.raises(TypeError, match="^key: "):
            flashcore.attention(query, bad, value)
    with pytest.raises(TypeError, match="^value: .*float64"):
        flashcore.attention(query, key, value.astype(np.float64))


@pytest.mark.parametrize("bad", [[1.0], None, 3, "x", np.ndarray, object()], ids=lambda bad: type(bad).__name__)
def test_what_is_no_array(bad):
    query, key, value = numbers()
    with pytest.raises(TypeError, match=f"^query: expected an array with __dlpack__, got {type(bad).__name__}$"):
        flashcore.attention(bad, key, value)
    with pytest.raises(TypeError, match="^value: "):
        flashcore.attention(query, key, bad)
    if bad is not None:
        with pytest.raises(TypeError, match="^out: "):
            flashcore.attention(query, key, value, out=bad)


# PyTorch


def test_torch_gradients_are_refused(torch_on):
    torch, device = torch_on
    query, key, value = (torch.from_numpy(a).to(device, torch.float16) for a in numbers())
    expected = flashcore.attention(query, key, value)
    for leaf in (key.clone().requires_grad_(), torch.nn.Parameter(key.clone())):
        with pytest.raises(ValueError, match=r"^key: .*requires grad.*no_grad\(\).*key\.detach\(\)"):
            flashcore.attention(query, leaf, value)
        with torch.no_grad():
            result = flashcore.attention(query, leaf, value)
        assert not result.requires_grad and torch.equal(result, expected)
        assert torch.equal(flashcore.attention(query, leaf.detach(), value), expected)
    plain = type("PlainTensor", (torch.Tensor,), {"__dlpack_c_exchange_api__": None})
    leaf = key.clone().as_subclass(plain).requires_grad_()
    with pytest.raises(ValueError, match="^key: .*requires grad"):
        flashcore.attention(query, leaf, value)
    with torch.no_grad():
        assert torch.equal(flashcore.attention(query, leaf, value), expected)


def test_torch_tensors_without_plain_memory(torch_on):
    torch, device = torch_on
    fake_tensor = importlib.import_module("torch._subclasses.fake_tensor")
    query, key, value = (torch.from_numpy(a).to(device, torch.float16) for a in numbers())
    with fake_tensor.FakeTensorMode():
        fake = torch.zeros(SHAPE, dtype=torch.float16, device=device)
    negative = torch.zeros(SHAPE, dtype=torch.complex32, device=device).conj().imag
    assert negative.is_neg() and negative.dtype == torch.float16
    for bad in (
        key.to("meta"),
        key[0, 0].to_sparse(),
        key[0, 0].to_sparse_csr(),
        fake,
        negative,
        torch._efficientzerotensor(SHAPE, device=device),
    ):
        with pytest.raises(TypeError, match="^key: "):
            flashcore.attention(query, bad, value)


def test_torch_takes_no_python_call_to_read_tensors(torch_on, monkeypatch):
    torch, device = torch_on
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("this PyTorch has no C exchange API")
    arrays = [torch.from_numpy(a).to(device, torch.float16) for a in numbers()]

    def refuse(*args, **kwargs):
        raise AssertionError("called from Python")

    monkeypatch.setattr(torch.Tensor, "__dlpack__", refuse)
    monkeypatch.setattr(torch.Tensor, "__dlpack_device__", refuse)
    assert flashcore.attention(*arrays).shape == SHAPE


# JAX


def test_jax_result_is_our_memory_without_a_copy(device, monkeypatch):
    library = Jax(device)
    dlpack = importlib.import_module("jax.dlpack")
    arrays = [library.make(a, "float16") for a in numbers()]
    handed, from_dlpack = [], dlpack.from_dlpack

    def spy(buffer, *args, **kwargs):
        handed.append(_core.read_array(buffer)["address"])
        return from_dlpack(buffer, *args, **kwargs)

    monkeypatch.setattr(dlpack, "from_dlpack", spy)
    results = flashcore.attention(*arrays, return_lse=True)
    assert [library.address(result) for result in results] == handed


def test_jax_inputs_that_are_still_being_computed(device):
    library = Jax(device)
    first = library.make(np.ones((512, 512), np.float32), "float16")
    query, key, value = (library.make(a, "float16") for a in numbers())
    expected = library.float64(flashcore.attention(query, key, value))
    for _ in range(5):
        slow = first
        for _ in range(20):
            slow = slow @ first / 512
        result = flashcore.attention(query * slow[0, 0], key, value)  # slow is all ones
        assert np.abs(library.float64(result + 0) - expected).max() <= 2e-3


def test_jax_tracers_are_refused(device):
    library = Jax(device)
    query = library.make(numbers()[0], "float16")
    with pytest.raises(TypeError, match="^query: .*jax.jit"):
        library.jax.jit(lambda q: flashcore.attention(q, q, q))(query)


# Streams (on the CPU, where there is no GPU, what can be seen of them is seen)


def test_cupy_current_stream():
    library = CuPy("cuda" if _cuda() else "cpu")
    cupy = library.cupy
    arrays = [library.make(a, "float16") for a in numbers()]
    expected = library.float64(flashcore.attention(*arrays))
    late = [cupy.zeros_like(a) for a in arrays]
    big = cupy.ones((4096, 4096), "float32")
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        for _ in range(10):
            big = big @ big * 0  # the copies below wait for it
        for target, source in zip(late, arrays, strict=True):
            cupy.copyto(target, source)
        result = flashcore.attention(*late)
    stream.synchronize()
    assert np.array_equal(library.float64(result), expected)


def test_torch_and_jax_mix():
    device = "cuda" if _cuda() else "cpu"
    torch_library, jax_library = Torch(device), Jax(device)
    torch = torch_library.torch
    query, key, value = numbers()
    expected = reference(*(a.astype(np.float16) for a in (query, key, value)))[0]
    for seed in range(10):
        permuted = np.random.default_rng(seed).permutation(SHAPE[0])
        q = torch_library.make(query[permuted], "float16")
        k, v = (jax_library.make(a[permuted], "float16") for a in (key, value))
        result = flashcore.attention(q, k, v)
        assert isinstance(result, torch.Tensor)
        assert np.abs(torch_library.float64(result) - expected[permuted]).max() <= 2e-3
        del q, k, v
        q = jax_library.make(query[permuted], "float16")
        k, v = (torch_library.make(a[permuted], "float16") for a in (key, value))
        result = flashcore.attention(q, k, v)
        assert isinstance(result, jax_library.type)
        assert np.abs(jax_library.float64(result) - expected[permuted]).max() <= 2e-3


def _cuda():
    torch = pytest.importorskip("torch")
    return torch.cuda.is_available()
