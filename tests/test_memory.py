# SPDX-License-Identifier: Apache-2.0
"""Memory: nothing beside the arrays is read or written, offsets beyond 32 bits are right, nothing leaks."""

from __future__ import annotations

import gc
import mmap
import os
import subprocess
import sys

import numpy as np
import pytest
from arrays import torch
from reference import assert_attention

import flashcore

# Arrays that end where a page begins that may not be touched: whoever reads or writes one element too far dies.
FENCED = """
import ctypes, mmap
import numpy as np
import flashcore

libc = ctypes.CDLL(None, use_errno=True)
PAGE = mmap.PAGESIZE
keep = []

def fenced(values, front):
    pages = -(-values.nbytes // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    keep.append(memory)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (0, pages + 1):
        assert libc.mprotect(ctypes.c_void_p(address + page * PAGE), PAGE, 0) == 0
    offset = PAGE if front else (pages + 1) * PAGE - values.nbytes
    array = np.frombuffer(memory, values.dtype, values.size, offset).reshape(values.shape)
    array[...] = values
    return array

rng = np.random.default_rng(0)
for dtype in (np.float32, np.float16):
    for head_dim in (1, 5, 8, 33, 64, 100, 256):
        for seqlen_q, seqlen_k in ((1, 1), (3, 17), (65, 129), (16, 64)):
            for front in (True, False):
                shapes = ((1, seqlen_q, 2, head_dim), *((1, seqlen_k, 1, head_dim),) * 2)
                plain = [rng.standard_normal(s).astype(dtype) for s in shapes]
                arrays = [fenced(a, front) for a in plain]
                out = fenced(np.zeros(shapes[0], dtype), front)
                _, lse = flashcore.attention(*arrays, causal=True, out=out, return_lse=True)
                expected = flashcore.attention(*plain, causal=True)
                assert np.array_equal(out, expected), (dtype, head_dim, seqlen_q, seqlen_k)
                cu = [fenced(np.array([0, n], np.int32), front) for n in (seqlen_q, seqlen_k)]
                flashcore.attention_varlen(*(a[0] for a in arrays), *cu, out=out[0])
                parts = [fenced(plain[0], front), fenced(plain[0], front)]
                lses = [fenced(lse, front), fenced(lse, front)]
                flashcore.combine(parts, lses)
print("done")
"""


def test_nothing_beside_the_arrays_is_touched(device):
    if device != "cpu" or not sys.platform.startswith("linux"):
        pytest.skip("needs mprotect on the CPU's arrays")
    done = subprocess.run([sys.executable, "-c", FENCED], timeout=300, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert "done" in done.stdout


def sparse(elements: int) -> np.ndarray:
    """Many float16 of which only those pages that are touched take memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
    return np.frombuffer(mmap.mmap(-1, 2 * elements, flags=flags), np.float16)


@pytest.mark.parametrize("axis", ["batch", "sequence", "heads"])
def test_strides_beyond_32_bits(arrays, axis):
    """Elements more than 2^31 apart."""
    far = 2**31 + 64
    if arrays.on_gpu:
        free, _ = torch.cuda.mem_get_info()
        if free < 6 * far:
            pytest.skip("needs 12 GiB of GPU memory")
        flat = arrays.poison((2 * far + 2**16,), "float16")
    else:
        if not sys.platform.startswith("linux"):
            pytest.skip("needs memory that is taken when touched")
        flat = sparse(2 * far + 2**16)
        if torch is not None:
            flat = torch.from_numpy(flat)
    tensors = arrays.qkv(3, 3, 3, 3, 3, 64, "float16", 3)
    expected = flashcore.attention(*tensors, causal=True)
    strides = {"batch": (far, 192, 64, 1), "sequence": (192, far, 64, 1), "heads": (192, 576, far, 1)}[axis]
    views = [arrays.strided(flat, (3, 3, 3, 64), strides, 4096 * i) for i in range(4)]
    for view, a in zip(views, tensors, strict=False):
        view[...] = a
    # The fourth view lies within the range of the others and so may not be `out` while they are inputs.
    with pytest.raises(ValueError, match="out"):
        flashcore.attention(*views[:3], causal=True, out=views[3])
    assert arrays.same_bits(flashcore.attention(*views[:3], causal=True), expected)
    out = flashcore.attention(*tensors, causal=True, out=views[3])
    assert arrays.same_bits(out, expected) and arrays.same_bits(views[3], expected)


def test_long_sequence(arrays):
    """Millions of keys (on the GPU more than 2^31 elements) that are all the same memory, by a stride of 0."""
    rows, head_dim = (2**24, 256) if arrays.on_gpu else (2**20, 64)
    query = arrays.random((1, 2, 1, head_dim), "float16", 6)
    key = arrays.random((1, 1, 1, head_dim), "float16", 7)
    # Equal weights, and values whose sums are exact in float32: the output is the value.
    value = arrays.cast(arrays.float64(arrays.random((1, 1, 1, head_dim), "float16", 8)) > 0, "float16")
    key, value = (arrays.strided(a, (1, rows, 1, head_dim), (0, 0, head_dim, 1), 0) for a in (key, value))
    out, lse = flashcore.attention(query, key, value, return_lse=True)
    assert bool((out == value[:, :1]).all())
    score = (arrays.float64(query) * arrays.float64(key[:, :1])).sum(-1) / head_dim**0.5
    assert float(abs(arrays.float64(lse)[0, 0] - score[0, :, 0] - np.log(rows)).max()) < 1e-4


def test_many_batches_and_heads(arrays):
    """More than 65535 of each, which is CUDA's limit for a grid's second and third axis."""
    for shape in ((70000, 2, 1, 8), (1, 2, 70000, 8)):
        tensors = [arrays.random(shape, arrays.half, 7 + i) for i in range(3)]
        out, lse = flashcore.attention(*tensors, return_lse=True)
        assert_attention(arrays, out, lse, *tensors)


def test_products_beyond_32_bits_of_nothing(arrays):
    """No queries, but 2^33 heads of them: an empty result, or refused; never a wrapped product."""
    flat = arrays.random((64,), arrays.half, 1)
    for batch, heads in ((2**17, 2**16), (2**33, 1), (1, 2**33)):
        query = arrays.strided(flat, (batch, 0, heads, 8), (0, 0, 0, 1), 0)
        key = arrays.strided(flat, (batch, 3, heads, 8), (0, 0, 0, 1), 0)
        try:
            out = flashcore.attention(query, key, key)
        except ValueError as error:
            assert "query" in str(error) or "key" in str(error)
        else:
            assert tuple(out.shape) == (batch, 0, heads, 8)


def resident() -> int:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * mmap.PAGESIZE


def test_nothing_leaks(arrays):
    """Neither a good call nor a refused one keeps memory or a reference."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    if "asan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("AddressSanitizer keeps freed memory for a while")
    tensors = arrays.qkv(1, 64, 64, 4, 4, 64, arrays.half, 9)
    counts = [sys.getrefcount(t) for t in tensors]

    def call():
        flashcore.attention(*tensors, return_lse=True)
        for bad in ({"window": (-1, 0)}, {"out": tensors[0]}):
            with pytest.raises(ValueError):
                flashcore.attention(*tensors, **bad)
        with pytest.raises(TypeError):
            flashcore.attention(tensors[0], 3, tensors[2])

    for _ in range(100):
        call()
    gc.collect()
    before = torch.cuda.memory_allocated() if arrays.on_gpu else resident()
    for _ in range(300):
        call()
    gc.collect()
    after = torch.cuda.memory_allocated() if arrays.on_gpu else resident()
    # A leaked output of 32 KiB in each call would be 9.6 MB, a leaked lse 300 KiB.
    assert after - before < (1 if arrays.on_gpu else 4 << 20)
    assert [sys.getrefcount(t) for t in tensors] == counts


@pytest.mark.skipif(torch is None, reason="needs torch")
def test_input_that_requires_grad(arrays):
    """There is no backward pass yet: a leaf that asks for gradients is refused or taken as it is, and never
    corrupted."""
    tensors = arrays.qkv(1, 8, 8, 1, 1, 64, arrays.half, 11)
    expected = flashcore.attention(*tensors)
    leaf = tensors[0].clone().requires_grad_()
    try:
        out = flashcore.attention(leaf, *tensors[1:])
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        assert "grad" in str(error)
    else:
        assert arrays.same_bits(out, expected) and not out.requires_grad
