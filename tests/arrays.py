# SPDX-License-Identifier: Apache-2.0
"""Makes and inspects arrays on one device: torch's where torch is installed, NumPy's (CPU only) where it is not.

The rest of the suite asks an `Arrays` for everything in which the two differ, and otherwise uses `Arrays.xp` (the
module torch or numpy), keeping to the calls that both spell alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

try:
    import torch
except ImportError:  # the suite still runs, on NumPy
    torch = None

import flashcore

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
# How arrays may lie in memory. "reversed" has negative strides, which only NumPy can express.
LAYOUTS_IN_MEMORY = ("contiguous", "padded", "transposed", "expanded", "reversed")


class Arrays:
    """What the tests need of an array library, on `device` ("cpu" or "cuda")."""

    def __init__(self, device: str):
        self.device = device
        self.on_gpu = device != "cpu"

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes that attention takes on this device, from this library."""
        if self.on_gpu:
            return ("float16", "bfloat16")
        return ("float32", "float16", "bfloat16") if torch else ("float32", "float16")

    @property
    def half(self) -> str:
        """A 16-bit dtype that every device takes."""
        return "float16"

    def head_dims(self) -> tuple[int, ...]:
        common = (8, 16, 32, 40, 64, 72, 80, 96, 128, 160, 192, 256)
        return common if self.on_gpu else (*common, 1, 5, 33, 100)

    def random(self, shape, dtype: str, seed: int, scale: float = 1.0):
        """Normal numbers times `scale`, rounded to dtype."""
        return self.cast(self.random64(shape, seed) * scale, dtype)

    def qkv(self, batch, seqlen_q, seqlen_k, heads_q, heads_k, head_dim, dtype, seed, score=1.0):
        """Random query, key and value in bshd. With the default scale, scores have a standard deviation of `score`."""
        query = self.random((batch, seqlen_q, heads_q, head_dim), dtype, seed, score)
        key = self.random((batch, seqlen_k, heads_k, head_dim), dtype, seed + 1)
        value = self.random((batch, seqlen_k, heads_k, head_dim), dtype, seed + 2)
        return query, key, value

    def same_bits(self, a, b) -> bool:
        return tuple(a.shape) == tuple(b.shape) and bool((self.bits(a) == self.bits(b)).all())

    def is_poison(self, a) -> bool:
        """Whether every bit of every element is set, as poison() left it."""
        return bool((self.bits(a) == -1).all())


class TorchArrays(Arrays):
    xp = torch

    def dtype(self, name: str):
        return getattr(torch, name)

    def random64(self, shape, seed):
        generator = torch.Generator(device=self.device).manual_seed(seed % 2**63)
        wide = torch.float32 if self.on_gpu else torch.float64
        return torch.randn(tuple(shape), generator=generator, device=self.device, dtype=wide)

    def poison(self, shape, dtype: str):
        """An array of NaN, every bit being set."""
        integer = torch.int32 if BYTES[dtype] == 4 else torch.int16
        return torch.full(tuple(shape), -1, dtype=integer, device=self.device).view(self.dtype(dtype))

    def poison_in_place(self, view) -> None:
        view.view(torch.int32 if view.element_size() == 4 else torch.int16).fill_(-1)

    def strided(self, flat, shape, strides, offset):
        return torch.as_strided(flat, tuple(shape), tuple(strides), offset)

    def cast(self, a, dtype: str):
        return a.to(self.dtype(dtype))

    def float64(self, a):
        return (torch.from_numpy(a.copy()) if isinstance(a, np.ndarray) else a).to(torch.float64)

    def bits(self, a):
        a = torch.from_numpy(a.copy()) if isinstance(a, np.ndarray) else a.contiguous()
        return a.view(torch.int32 if a.element_size() == 4 else torch.int16)

    def copy(self, a):
        return a.clone()

    def contiguous(self, a):
        return a.contiguous()

    def int32(self, values):
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def arange(self, n):
        return torch.arange(n, device=self.device)

    def full(self, shape, value, dtype):
        return torch.full(tuple(shape), value, dtype=self.dtype(dtype), device=self.device)

    def concatenate(self, parts, axis=0):
        return torch.cat(list(parts), dim=axis)

    def numpy_view(self, a):
        """The same memory as a NumPy array (CPU; not bfloat16)."""
        return a.numpy()

    def of_this_library(self, a) -> bool:
        return isinstance(a, torch.Tensor)

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


class NumpyArrays(Arrays):
    xp = np

    def dtype(self, name: str):
        return np.dtype(name)

    def random64(self, shape, seed):
        return np.random.default_rng(seed).standard_normal(tuple(shape))

    def poison(self, shape, dtype: str):
        return np.full(tuple(shape), -1, np.int32 if BYTES[dtype] == 4 else np.int16).view(dtype)

    def poison_in_place(self, view) -> None:
        view.view(np.int32 if view.itemsize == 4 else np.int16)[...] = -1

    def strided(self, flat, shape, strides, offset):
        return np.lib.stride_tricks.as_strided(
            flat[offset:], tuple(shape), tuple(s * flat.itemsize for s in strides), writeable=True
        )

    def cast(self, a, dtype: str):
        return a.astype(dtype)

    def float64(self, a):
        return np.asarray(a, np.float64)

    def bits(self, a):
        a = np.ascontiguousarray(a)
        return a.view(np.int32 if a.itemsize == 4 else np.int16)

    def copy(self, a):
        return a.copy()

    def contiguous(self, a):
        return np.ascontiguousarray(a)

    def int32(self, values):
        return np.asarray(values, np.int32)

    def arange(self, n):
        return np.arange(n)

    def full(self, shape, value, dtype):
        return np.full(tuple(shape), value, self.dtype(dtype))

    def concatenate(self, parts, axis=0):
        return np.concatenate(list(parts), axis=axis)

    def numpy_view(self, a):
        return a

    def of_this_library(self, a) -> bool:
        return isinstance(a, np.ndarray)

    def synchronize(self) -> None:
        pass


def devices() -> list[str]:
    return ["cpu", "cuda"] if torch and torch.cuda.is_available() else ["cpu"]


# The forms of sm90's kernel for small problems: rows of a tile, and warpgroups of a block and blocks of a cluster that
# divide its keys. Head dimensions above 64 and general scores have some of them, and get the first that holds the keys
# for the others.
SMALL_FORMS = ((64, 1, 1), (64, 2, 1), (128, 1, 1), (64, 2, 2), (64, 2, 4), (64, 1, 8))


# The stream kernel, in their company: tiles of 128 rows, whose blocks go through all of their keys.
STREAM = (128, 0, 1)


def small_form(form: tuple[int, int, int]) -> str:
    """The value of FLASHCORE_SM90_KERNEL that forces it."""
    return "stream" if form == STREAM else "small:" + ":".join(map(str, form))


def backends(device: str) -> tuple[str, ...]:
    """The machines that the device has: the one that plan() chooses by itself first, then what may be forced."""
    if device == "cpu":
        return ("cpu",)
    hopper = torch.cuda.get_device_capability() == (9, 0) and "sm_90a" in flashcore.info()["cuda"]["archs"]
    return ("sm90", "sm80") if hopper else ("sm80",)


def on(device: str) -> Arrays:
    return TorchArrays(device) if torch else NumpyArrays(device)


@dataclass
class Placed:
    """An array laid out inside a buffer of poison, so that whatever reads or writes beside its elements shows."""

    arrays: Arrays
    view: Any  # what attention is called with
    inner: Any  # the same elements as an array of the suite's library (never a negative stride)
    buffer: Any  # all of the memory, one-dimensional

    def surroundings_intact(self) -> bool:
        """Whether everything of the buffer outside the array is still poison. Destroys the array."""
        self.arrays.poison_in_place(self.inner)
        return self.arrays.is_poison(self.buffer)


def place(arrays: Arrays, shape, dtype: str, memory: str, values=None, expand: int = 0) -> Placed:
    """Lays a 3- or 4-D array out as `memory` (one of LAYOUTS_IN_MEMORY) says, filled with `values` or with poison.

    "expanded" gives axis `expand` a stride of zero and takes its first index of `values` for all. Guards of poison lie
    before and after the array. Whatever the way, rows stay 16-byte aligned for the GPU.
    """
    shape = tuple(shape)
    rank = len(shape)
    step = 8 if arrays.on_gpu else 3
    guard = 512
    stored = list(shape)
    order = list(range(rank))  # axes from the slowest to the fastest
    if memory == "padded":
        stored = [extent + 1 for extent in shape[:-1]] + [shape[-1] + step]
    elif memory == "transposed":
        order = [0, 2, 1, 3] if rank == 4 else [1, 0, 2]
    elif memory == "expanded":
        stored[expand] = 1
    strides = [0] * rank
    size = 1
    for axis in reversed(order):
        strides[axis] = size
        size *= stored[axis]
    if memory == "expanded":
        strides[expand] = 0
    buffer = arrays.poison((size + 2 * guard,), dtype)
    inner = arrays.strided(buffer, shape, strides, guard)
    view = inner
    if memory == "reversed":  # back to front along every axis but the last
        flip = tuple(slice(None, None, -1) for _ in shape[:-1])
        view = arrays.numpy_view(inner)[flip]
    if values is not None:
        if memory == "expanded":
            first = tuple(slice(0, 1) if axis == expand else slice(None) for axis in range(rank))
            inner[first] = values[first]
        elif memory == "reversed":
            view[...] = arrays.numpy_view(values)
        else:
            inner[...] = values
    return Placed(arrays, view, inner, buffer)
