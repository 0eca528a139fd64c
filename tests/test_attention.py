# SPDX-License-Identifier: Apache-2.0
"""attention() against the numeric standard: a grid over everything it takes, pairwise and whole, and random
problems; on each machine that the device has."""

from __future__ import annotations

import itertools
import random

import cases
import pytest
from arrays import backends, devices, on
from pairwise import pairwise, product_case, product_size, uncovered
from reference import Options, assert_attention

import flashcore

try:
    import hypothesis
    from hypothesis import strategies as st
except ImportError:
    hypothesis = None

GRID = {device: pairwise(cases.parameters(on(device)), cases.allowed) for device in devices()}


@pytest.mark.parametrize(
    ("device", "case"),
    [pytest.param(device, case, id=f"{device}-{cases.name(case)}") for device in GRID for case in GRID[device]],
)
def test_pairwise(arrays, case):
    for backend in backends(arrays.device):
        cases.run(arrays, case, backend)


def test_pairwise_leaves_no_pair_out(device, arrays):
    """But the one that cannot exist: NumPy, which has the negative strides, has no bfloat16."""
    impossible = {("dtype", "bfloat16"), ("memory", "reversed")}
    left_out = [pair for pair in uncovered(cases.parameters(arrays), GRID[device]) if set(pair) != impossible]
    assert not left_out


@pytest.mark.full
@pytest.mark.parametrize("share", range(64))
def test_whole_product(arrays, share, request):
    """The product has millions of cases: each of 64 shares takes --full-cases of its own at random (0: every one)."""
    parameters = cases.parameters(arrays)
    indices = range(share, product_size(parameters), 64)
    count = request.config.getoption("--full-cases")
    if count:
        indices = random.Random(share).sample(indices, min(count, len(indices)))
    failures = []
    for index in indices:
        case = product_case(parameters, index)
        if not cases.exists(case):
            continue
        for backend in backends(arrays.device):
            try:
                cases.run(arrays, case, backend)
            except AssertionError as error:
                failures.append(f"{backend}: {str(error).splitlines()[0]}")
    assert not failures, f"{len(failures)} failures in {len(indices)} cases: " + "\n".join(failures[:20])


if hypothesis:

    @st.composite
    def problems(draw, on_gpu: bool, dtypes: tuple[str, ...]):
        head_dim = draw(st.integers(1, 32)) * 8 if on_gpu else draw(st.integers(1, 256))
        side = st.one_of(st.none(), st.integers(0, 400))
        dtype = draw(st.sampled_from(dtypes))
        return {
            "dtype": dtype,
            "head_dim": head_dim,
            "seqlen_q": draw(st.integers(1, 300)),
            "seqlen_k": draw(st.integers(1, 300)),
            "group": draw(st.integers(1, 9)),
            "causal": draw(st.booleans()),
            "window": draw(st.one_of(st.none(), st.tuples(side, side))),
            "softcap": draw(st.sampled_from([0.0, 0.7, 15.0, 50.0])),
            "scale": draw(st.one_of(st.none(), st.floats(0.01, 2.0))),
            "layout": draw(st.sampled_from(["bshd", "bhsd"])),
            "memory": draw(
                st.sampled_from(["contiguous", "padded", "transposed", "expanded"])
                if on_gpu or dtype == "bfloat16"
                else st.sampled_from(["contiguous", "padded", "transposed", "expanded", "reversed"])
            ),
            # Tensor cores truncate what they add to a score, which the emulation does not: at 64 that is as much as a
            # rounding to float16. (test_numerics.py goes further where PyTorch's own kernel is the yardstick.)
            "score": draw(st.sampled_from([0.1, 1.0, 4.0, 16.0, *(() if on_gpu else (64.0,))])),
            "out": draw(st.sampled_from(["returned", "given"])),
        }

    def test_random_problems(arrays):
        @hypothesis.settings(max_examples=80, deadline=None, derandomize=True, database=None)
        @hypothesis.given(problems(arrays.on_gpu, arrays.dtypes))
        def check(case):
            for backend in backends(arrays.device):
                cases.run(arrays, case, backend)

        check()


@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_strides_of_extent_one_are_ignored(arrays, which):
    """Such a stride means nothing; here it is one that would break every rule about alignment."""
    tensors = dict(zip(("query", "key", "value"), arrays.qkv(1, 40, 50, 1, 1, 64, arrays.half, 3), strict=True))
    a = tensors[which]
    odd = {**tensors, which: arrays.strided(a.reshape(-1), a.shape, (3, 64, 7, 1), 0)}
    for backend in backends(arrays.device):
        expected = flashcore.attention(**tensors, backend=backend)
        assert arrays.same_bits(flashcore.attention(**odd, backend=backend), expected)


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize(
    "extents",
    [
        # batch, seqlen_q, seqlen_k, heads_q, heads_k
        (0, 5, 7, 2, 2),
        (2, 0, 7, 4, 2),
        (2, 0, 0, 2, 2),
        (2, 5, 0, 6, 2),
        (0, 0, 0, 2, 1),
    ],
)
def test_empty(arrays, extents, layout):
    """An empty batch or no queries: an empty result. No keys: zeros, and an lse of -inf."""
    batch, seqlen_q, seqlen_k, heads_q, heads_k = extents
    tensors = arrays.qkv(batch, seqlen_q, seqlen_k, heads_q, heads_k, 32, arrays.half, 5)
    tensors = [arrays.contiguous(cases.in_layout(arrays, a, layout)) for a in tensors]
    for causal, backend in itertools.product((False, True), backends(arrays.device)):
        target = arrays.poison(tensors[0].shape, arrays.half)
        out, lse = flashcore.attention(
            *tensors, layout=layout, causal=causal, out=target, return_lse=True, backend=backend
        )
        assert tuple(out.shape) == tuple(tensors[0].shape)
        assert tuple(lse.shape) == (batch, heads_q, seqlen_q)
        assert not bool((out != 0).any())
        assert not bool((lse != float("-inf")).any())
        assert arrays.same_bits(target, out)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_same_call_same_bits(arrays, dtype):
    if dtype not in arrays.dtypes:
        pytest.skip(f"no {dtype} here")
    tensors = arrays.qkv(2, 300, 700, 6, 2, 64, dtype, 11, 4.0)
    for backend in backends(arrays.device):
        options = {"causal": True, "return_lse": True, "backend": backend}
        first = flashcore.attention(*tensors, **options)
        for _ in range(5):
            again = flashcore.attention(*tensors, **options)
            assert all(arrays.same_bits(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 3000), (5, 700), (300, 300)])
def test_batch_invariant(arrays, seqlen_q, seqlen_k):
    """A sequence gets the same bits alone and in any batch."""
    tensors = arrays.qkv(9, seqlen_q, seqlen_k, 4, 2, 64, arrays.half, 13, 4.0)
    for backend in backends(arrays.device):
        options = {"causal": True, "batch_invariant": True, "return_lse": True, "backend": backend}
        together = flashcore.attention(*tensors, **options)
        for first, last in ((0, 1), (8, 9), (3, 7)):
            some = flashcore.attention(*(a[first:last] for a in tensors), **options)
            assert all(arrays.same_bits(a, b[first:last]) for a, b in zip(some, together, strict=True))


def test_backends_by_name(arrays):
    """Forced to the machine that would run anyway, the bits are the same. One that this device has not is refused."""
    tensors = arrays.qkv(1, 100, 100, 2, 2, 64, arrays.half, 17)
    here = backends(arrays.device)
    chosen = flashcore.plan(*tensors).backend
    assert chosen == here[0]
    for backend in here:
        out = flashcore.attention(*tensors, backend=backend)
        assert_attention(arrays, out, None, *tensors, Options())
        if chosen == backend:
            assert arrays.same_bits(out, flashcore.attention(*tensors))
    if "sm90" not in here:
        with pytest.raises(RuntimeError if arrays.on_gpu else ValueError, match="sm90"):
            flashcore.attention(*tensors, backend="sm90")
