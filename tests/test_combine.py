# SPDX-License-Identifier: Apache-2.0
"""combine(): partial results over disjoint keys merge into the result over all of them."""

from __future__ import annotations

import math

import pytest
from arrays import place
from reference import (
    Options,
    cancellation,
    emulation,
    errors,
    lse_tolerance,
    meets_standard,
    reference,
    score_magnitude,
)

import flashcore

DTYPES = ["float32", "float16", "bfloat16"]


def merged64(arrays, outs, lses):
    """The merge in float64 of the parts as they are: out in bshd and lse."""
    xp = arrays.xp
    lses = [arrays.float64(lse) for lse in lses]
    top = lses[0]
    for lse in lses[1:]:
        top = xp.maximum(top, lse)
    offset = xp.where(top == -math.inf, 0.0, top)
    weights = [xp.exp(lse - offset) for lse in lses]
    total = sum(weights)
    none = total == 0
    safe = xp.where(none, 1.0, total)
    out = sum((w / safe).swapaxes(1, 2)[..., None] * arrays.float64(o) for w, o in zip(weights, outs, strict=True))
    return out, xp.where(none, -math.inf, offset + xp.log(safe))


def split(arrays, tensors, bounds, options=None):
    query, key, value = tensors
    parts = [
        flashcore.attention(query, key[:, a:b], value[:, a:b], return_lse=True, **(options or {}))
        for a, b in zip(bounds, bounds[1:], strict=False)
    ]
    return [out for out, _ in parts], [lse for _, lse in parts]


def assert_merge(arrays, out, lse, outs, lses, dtype, what=""):
    """Against the merge in float64 of the same parts, one rounding of whose result is the yardstick."""
    expected, expected_lse = merged64(arrays, outs, lses)
    ours = errors(arrays, out, expected)
    yard = errors(arrays, arrays.cast(expected, dtype), expected)
    finite = expected_lse != -math.inf
    largest = float(abs(arrays.xp.where(finite, expected_lse, 0.0)).max())
    assert meets_standard(ours, yard, dtype, largest), f"{what}: {ours}, yardstick {yard}"
    got = arrays.float64(lse)
    assert bool(((got == -math.inf) == ~finite).all()), what
    wrong = abs(arrays.xp.where(finite, got, 0.0) - arrays.xp.where(finite, expected_lse, 0.0))
    assert float(wrong.max()) <= 2e-6 * (1 + largest), what
    assert not bool((out[(~finite).swapaxes(1, 2)] != 0).any()), f"{what}: no key seen, but not zero"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "bounds", [(0, 1), (0, 300), (0, 1, 300), (0, 64, 65, 200, 300), tuple(range(0, 301, 10))], ids=str
)
def test_parts_make_the_whole(arrays, dtype, bounds):
    """Within the standard, the yardstick being the emulation of the same parts, merged exactly and rounded once
    more."""
    if dtype not in arrays.dtypes:
        pytest.skip(f"no {dtype} here")
    for head_dim in (8, 64, 80, 256):
        query, key, value = arrays.qkv(2, 70, bounds[-1], 6, 2, head_dim, dtype, head_dim + len(bounds), 3.0)
        outs, lses = split(arrays, (query, key, value), bounds)
        out, lse = flashcore.combine(outs, lses)
        assert arrays.of_this_library(out) and out.dtype == query.dtype
        assert_merge(arrays, out, lse, outs, lses, dtype)
        expected, expected_lse = reference(arrays, query, key, value)
        parts = [emulation(arrays, query, key[:, a:b], value[:, a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
        yard = arrays.cast(merged64(arrays, *zip(*parts, strict=True))[0], dtype)
        magnitude = score_magnitude(arrays.float64(query), arrays.float64(key), Options())
        ours = errors(arrays, out, expected)
        cancelled = cancellation(arrays, value, expected)
        assert meets_standard(ours, errors(arrays, yard, expected), dtype, magnitude, cancelled), ours
        assert float(abs(arrays.float64(lse) - expected_lse).max()) <= lse_tolerance(magnitude, 0.0)


@pytest.mark.parametrize("count", [1, 2, 3, 17, 64])
def test_number_of_parts(arrays, count):
    """Parts of very different weight, some of which saw no key, all of them for some queries."""
    outs = [arrays.random((2, 33, 3, 40), arrays.half, 100 + i) for i in range(count)]
    lses = [arrays.random((2, 3, 33), "float32", 200 + i, 8.0) for i in range(count)]
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        blind = 5 + 3 * i % 20
        lse[:, :, :blind] = -math.inf
        out[:, :blind] = 0
    out, lse = flashcore.combine(outs, lses)
    assert_merge(arrays, out, lse, outs, lses, arrays.half)
    if count == 1:
        assert arrays.same_bits(out, outs[0])


def test_all_parts_blind(arrays):
    """No part saw a key: zeros and -inf, even where the parts' outputs hold NaN."""
    outs = [arrays.poison((1, 9, 2, 16), arrays.half) for _ in range(3)]
    lses = [arrays.full((1, 2, 9), -math.inf, "float32") for _ in range(3)]
    out, lse = flashcore.combine(outs, lses)
    assert not bool((out != 0).any()) and not bool((lse != -math.inf).any())


def test_a_blind_part_changes_nothing(arrays):
    """Whatever its output holds: a weight of zero times NaN would be NaN."""
    seen = arrays.random((1, 9, 2, 16), arrays.half, 300)
    seen_lse = arrays.random((1, 2, 9), "float32", 301)
    blind, blind_lse = arrays.poison((1, 9, 2, 16), arrays.half), arrays.full((1, 2, 9), -math.inf, "float32")
    for order in ((0, 1), (1, 0)):
        outs, lses = [seen, blind], [seen_lse, blind_lse]
        out, lse = flashcore.combine([outs[i] for i in order], [lses[i] for i in order])
        assert arrays.same_bits(out, seen)
        assert float(abs(lse - seen_lse).max()) <= 1e-6


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("memory", ["padded", "transposed"])
def test_layouts_and_strides(arrays, layout, memory):
    shape = (2, 33, 3, 40)
    outs = [arrays.random(shape, arrays.half, 400 + i) for i in range(4)]
    lses = [arrays.random((2, 3, 33), "float32", 500 + i, 3.0) for i in range(4)]
    given = [out if layout == "bshd" else out.swapaxes(1, 2) for out in outs]
    placed = [place(arrays, a.shape, arrays.half, memory, a).view for a in given]
    out, lse = flashcore.combine(placed, lses, layout=layout)
    assert tuple(out.shape) == tuple(given[0].shape)
    assert_merge(arrays, out if layout == "bshd" else out.swapaxes(1, 2), lse, outs, lses, arrays.half)


def test_variable_length_parts(arrays):
    """(total, heads, head_dim) with lse (heads, total)."""
    outs = [arrays.random((50, 3, 64), arrays.half, 600 + i) for i in range(3)]
    lses = [arrays.random((3, 50), "float32", 700 + i, 3.0) for i in range(3)]
    out, lse = flashcore.combine(outs, lses)
    assert tuple(out.shape) == (50, 3, 64) and tuple(lse.shape) == (3, 50)
    assert_merge(arrays, out[None], lse[None], [o[None] for o in outs], [x[None] for x in lses], arrays.half)


def test_empty_parts(arrays):
    for shape in ((0, 5, 2, 8), (2, 0, 2, 8)):
        lse_shape = (shape[0], shape[2], shape[1])
        out, lse = flashcore.combine([arrays.poison(shape, arrays.half)] * 2, [arrays.poison(lse_shape, "float32")] * 2)
        assert tuple(out.shape) == shape and tuple(lse.shape) == lse_shape


def test_same_parts_same_bits(arrays):
    outs = [arrays.random((2, 33, 3, 64), arrays.half, 800 + i) for i in range(9)]
    lses = [arrays.random((2, 3, 33), "float32", 900 + i) for i in range(9)]
    first = flashcore.combine(outs, lses)
    again = flashcore.combine(outs, lses)
    assert all(arrays.same_bits(a, b) for a, b in zip(first, again, strict=True))
