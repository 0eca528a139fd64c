# SPDX-License-Identifier: Apache-2.0
"""attention_varlen(): sequences of different lengths in one call, and that none touches another's memory."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from arrays import place
from reference import (
    PLAIN,
    Options,
    assert_lse,
    cancellation,
    errors,
    meets_standard,
    reference,
    score_magnitude,
    yardstick,
)

import flashcore

# Lengths of the queries and keys of each sequence.
BATCHES = {
    "one": [(100, 130)],
    "equal": [(64, 64)] * 4,
    "ragged": [(1, 1), (200, 200), (63, 65), (129, 127), (5, 700), (300, 2)],
    "empty": [(0, 0), (40, 50), (0, 30), (20, 0), (64, 64), (0, 0)],
    "decode": [(1, length) for length in (1, 17, 64, 1000, 0, 129, 2049)],
    "many": [(3 + i % 5, 2 + 7 * i % 31) for i in range(150)],
}


def offsets(lengths) -> list[int]:
    return [0, *itertools.accumulate(lengths)]


def make(arrays, batch, heads_q, heads_k, head_dim, dtype, seed, score=2.0, tail_q=0, tail_k=0):
    """Query, key and value (total, heads, head_dim) followed by `tail` rows of NaN, and the cu_seqlens as lists."""
    cu_q, cu_k = offsets(q for q, _ in batch), offsets(k for _, k in batch)
    query = arrays.random((cu_q[-1], heads_q, head_dim), dtype, seed, score)
    key = arrays.random((cu_k[-1], heads_k, head_dim), dtype, seed + 1)
    value = arrays.random((cu_k[-1], heads_k, head_dim), dtype, seed + 2)
    tensors = [
        arrays.concatenate([a, arrays.poison((tail, *a.shape[1:]), dtype)])
        for a, tail in ((query, tail_q), (key, tail_k), (value, tail_k))
    ]
    return tensors, cu_q, cu_k


def check(arrays, out, lse, tensors, cu_q, cu_k, options=PLAIN, used=None, what=""):
    """All sequences against the numeric standard at once; rows past the last sequence are zero, their lse -inf."""
    query, key, value = tensors
    dtype = str(query.dtype).removeprefix("torch.")
    parts = []
    magnitude = 0.0
    for b in range(len(cu_q) - 1):
        end_k = cu_k[b + 1] if used is None else min(cu_k[b + 1], cu_k[b] + used[b])
        q, k, v = (
            a[None, first:last]
            for a, first, last in ((query, cu_q[b], cu_q[b + 1]), (key, cu_k[b], end_k), (value, cu_k[b], end_k))
        )
        if q.shape[1] == 0:
            continue
        expected, expected_lse = reference(arrays, q, k, v, options)
        bound = score_magnitude(arrays.float64(q), arrays.float64(k), options)
        magnitude = max(magnitude, bound)
        ours = out[None, cu_q[b] : cu_q[b + 1]]
        if lse is not None:
            assert_lse(arrays, lse[None, :, cu_q[b] : cu_q[b + 1]], expected_lse, bound, options.softcap, f"{what} {b}")
        none = (expected_lse == -math.inf).swapaxes(1, 2)
        assert not bool((ours[none] != 0).any()), f"{what}: sequence {b}: a query that sees no key is not zero"
        parts.append((ours, yardstick(arrays, q, k, v, options), expected))
    if parts:
        ours, yard, expected = (arrays.concatenate([p[i].reshape(-1) for p in parts]) for i in range(3))
        measured, allowed = errors(arrays, ours, expected), errors(arrays, yard, expected)
        cancelled = cancellation(arrays, value[: cu_k[-1]], expected) if used is None else 1.0
        assert meets_standard(measured, allowed, dtype, magnitude, cancelled), (
            f"{what}: {measured}, yardstick {allowed}"
        )
    assert tuple(out.shape) == tuple(query.shape)
    assert not bool((out[cu_q[-1] :] != 0).any()), f"{what}: rows past the last sequence are not zero"
    if lse is not None:
        assert tuple(lse.shape) == (query.shape[1], query.shape[0])
        assert not bool((lse[:, cu_q[-1] :] != -math.inf).any()), f"{what}: lse past the last sequence is not -inf"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize(
    "options",
    [Options(), Options(causal=True), Options(window=(30, 5)), Options(causal=True, window=(100, None), softcap=20.0)],
    ids=str,
)
def test_against_reference(arrays, dtype, name, options):
    if dtype not in arrays.dtypes:
        pytest.skip(f"no {dtype} here")
    # Rows past the last sequence are NaN, in the output too.
    tensors, cu_q, cu_k = make(arrays, BATCHES[name], 6, 2, 64, dtype, 21, tail_q=37, tail_k=70)
    target = place(arrays, tensors[0].shape, dtype, "contiguous")
    out, lse = flashcore.attention_varlen(
        *tensors, arrays.int32(cu_q), arrays.int32(cu_k), out=target.view, return_lse=True, **options.keywords()
    )
    check(arrays, out, lse, tensors, cu_q, cu_k, options, what=name)
    assert arrays.same_bits(out, target.view)
    assert target.surroundings_intact()


@pytest.mark.parametrize("head_dim", [8, 32, 72, 96, 160, 256])
def test_head_dims_and_groups(arrays, head_dim):
    for group in (1, 4, 7):
        tensors, cu_q, cu_k = make(arrays, BATCHES["ragged"], 2 * group, 2, head_dim, arrays.half, head_dim + group)
        out = flashcore.attention_varlen(*tensors, arrays.int32(cu_q), arrays.int32(cu_k), causal=True)
        check(arrays, out, None, tensors, cu_q, cu_k, Options(causal=True))


@pytest.mark.parametrize("memory", ["padded", "transposed"])
def test_strided(arrays, memory):
    tensors, cu_q, cu_k = make(arrays, BATCHES["ragged"], 4, 2, 64, arrays.half, 31)
    placed = [place(arrays, a.shape, arrays.half, memory, a) for a in tensors]
    target = place(arrays, tensors[0].shape, arrays.half, memory)
    out, lse = flashcore.attention_varlen(
        *(p.view for p in placed), arrays.int32(cu_q), arrays.int32(cu_k), out=target.view, return_lse=True
    )
    check(arrays, out, lse, tensors, cu_q, cu_k)
    assert target.surroundings_intact()


@pytest.mark.parametrize(
    "hints", [{}, {"max_seqlen_q": 300, "max_seqlen_k": 700}, {"max_seqlen_k": 5}, {"max_seqlen_q": 1}]
)
def test_hints_do_not_change_the_result(arrays, hints):
    """Even wrong ones: the kernel takes the truth from cu_seqlens."""
    tensors, cu_q, cu_k = make(arrays, BATCHES["ragged"], 4, 2, 64, arrays.half, 41)
    out, lse = flashcore.attention_varlen(*tensors, arrays.int32(cu_q), arrays.int32(cu_k), return_lse=True, **hints)
    check(arrays, out, lse, tensors, cu_q, cu_k)


def test_equals_attention_of_each_sequence(arrays):
    tensors, cu_q, cu_k = make(arrays, BATCHES["ragged"], 4, 2, 64, arrays.half, 51)
    options = {"causal": True, "batch_invariant": True}
    out = flashcore.attention_varlen(*tensors, arrays.int32(cu_q), arrays.int32(cu_k), **options)
    query, key, value = tensors
    for b in range(len(cu_q) - 1):
        rows_q, rows_k = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        alone = flashcore.attention_varlen(
            *(arrays.contiguous(a) for a in (query[rows_q], key[rows_k], value[rows_k])),
            arrays.int32([0, cu_q[b + 1] - cu_q[b]]),
            arrays.int32([0, cu_k[b + 1] - cu_k[b]]),
            **options,
        )
        assert arrays.same_bits(alone, out[rows_q]), f"sequence {b} has other bits alone than in the batch"
        fixed = flashcore.attention(query[None, rows_q], key[None, rows_k], value[None, rows_k], **options)
        difference = abs(arrays.float64(fixed[0]) - arrays.float64(out[rows_q]))
        assert float(difference.max()) < 4e-3


def test_seqused_k(arrays):
    """Keys past seqused_k are NaN and change nothing; causal queries stand on the last used key."""
    batch = [(10, 100), (64, 64), (7, 300), (3, 40), (33, 129), (5, 0)]
    used = [60, 64, 1, 0, 128, 0]
    for options in (Options(), Options(causal=True), Options(window=(20, 3))):
        tensors, cu_q, cu_k = make(arrays, batch, 4, 2, 64, arrays.half, 61)
        for b, count in enumerate(used):
            for a in tensors[1:]:
                arrays.poison_in_place(a[cu_k[b] + count : cu_k[b + 1]])
        out, lse = flashcore.attention_varlen(
            *tensors,
            arrays.int32(cu_q),
            arrays.int32(cu_k),
            seqused_k=arrays.int32(used),
            return_lse=True,
            **options.keywords(),
        )
        check(arrays, out, lse, tensors, cu_q, cu_k, options, used)


def test_neighbours_do_not_matter(arrays):
    """Every sequence but one is NaN, infinite or huge: that one keeps its bits."""
    batch = BATCHES["ragged"]
    tensors, cu_q, cu_k = make(arrays, batch, 4, 2, 64, arrays.half, 71)
    cu = arrays.int32(cu_q), arrays.int32(cu_k)
    clean, clean_lse = flashcore.attention_varlen(*tensors, *cu, return_lse=True)
    for b in range(len(batch)):
        for evil in (math.nan, math.inf, 6e4):
            spoilt = [arrays.full(a.shape, evil, arrays.half) for a in tensors]
            rows_q = slice(cu_q[b], cu_q[b + 1])
            rows_k = slice(cu_k[b], cu_k[b + 1])
            for a, original, rows in zip(spoilt, tensors, (rows_q, rows_k, rows_k), strict=True):
                a[rows] = original[rows]
            out, lse = flashcore.attention_varlen(*spoilt, *cu, return_lse=True)
            assert arrays.same_bits(out[rows_q], clean[rows_q]), (b, evil)
            assert arrays.same_bits(lse[:, rows_q], clean_lse[:, rows_q]), (b, evil)


def test_no_sequences_and_no_rows(arrays):
    zero = arrays.int32([0])
    for total in (0, 5):
        tensors = [arrays.random((total, heads, 64), arrays.half, 81) for heads in (4, 2, 2)]
        out, lse = flashcore.attention_varlen(*tensors, zero, zero, return_lse=True)
        assert tuple(out.shape) == (total, 4, 64) and tuple(lse.shape) == (4, total)
        assert not bool((out != 0).any()) and not bool((lse != -math.inf).any())


MALFORMED = {
    # cu_seqlens_q, cu_seqlens_k of three sequences over 100 queries and 200 keys; what is wrong; the sequence to name
    "starts late": ([3, 30, 60, 100], [0, 50, 100, 200], "cu_seqlens_q", 0),
    "starts negative": ([0, 30, 60, 100], [-5, 50, 100, 200], "cu_seqlens_k", 0),
    "decreases": ([0, 60, 30, 100], [0, 50, 100, 200], "cu_seqlens_q", 1),
    "keys decrease": ([0, 30, 60, 100], [0, 50, 200, 100], "cu_seqlens_k", 2),
    "beyond the queries": ([0, 30, 60, 101], [0, 50, 100, 200], "cu_seqlens_q", 2),
    "beyond the keys": ([0, 30, 60, 100], [0, 50, 100, 2**31 - 1], "cu_seqlens_k", 2),
    "negative": ([0, 30, -(2**31), 100], [0, 50, 100, 200], "cu_seqlens_q", 1),
}
USED = {"too many used": [50, 51, 100], "negative used": [50, 50, -1]}


def guarded_call(arrays, cu_q, cu_k, used=None):
    """Calls attention_varlen between guards of poison. Returns the exception, or None, and all that was placed."""
    shapes = ((100, 4, 64), (200, 2, 64), (200, 2, 64))
    placed = [
        place(arrays, s, arrays.half, "contiguous", arrays.random(s, arrays.half, 91 + i)) for i, s in enumerate(shapes)
    ]
    target = place(arrays, shapes[0], arrays.half, "contiguous")
    before = [arrays.copy(p.buffer) for p in placed]
    error = None
    try:
        flashcore.attention_varlen(
            *(p.view for p in placed),
            arrays.int32(cu_q),
            arrays.int32(cu_k),
            seqused_k=None if used is None else arrays.int32(used),
            out=target.view,
        )
    except ValueError as raised:
        error = raised
    arrays.synchronize()
    for p, buffer in zip(placed, before, strict=True):
        assert arrays.same_bits(p.buffer, buffer), "an input was written"
    return error, target


@pytest.mark.parametrize("name", [*MALFORMED, *USED])
def test_malformed_values_are_refused(arrays, monkeypatch, name):
    """On the CPU always, on the GPU with FLASHCORE_CHECK=1: ValueError, naming argument and sequence; nothing
    written."""
    if arrays.on_gpu:
        monkeypatch.setenv("FLASHCORE_CHECK", "1")
    if name in MALFORMED:
        cu_q, cu_k, argument, sequence = MALFORMED[name]
        error, target = guarded_call(arrays, cu_q, cu_k)
    else:
        argument, sequence = "seqused_k", 1 if name == "too many used" else 2
        error, target = guarded_call(arrays, [0, 30, 60, 100], [0, 50, 100, 200], USED[name])
    assert error is not None, "nothing was raised"
    assert argument in str(error)
    assert f"sequence {sequence}" in str(error), str(error)
    assert arrays.is_poison(target.buffer), "out was written"


@pytest.mark.parametrize("name", [*MALFORMED, *USED])
def test_malformed_values_on_the_gpu_touch_nothing_outside(arrays, name):
    """Without the check a kernel clamps: no error, nothing outside the arrays read (guards are NaN) or written."""
    if not arrays.on_gpu:
        pytest.skip("values of CPU arrays are always checked")
    cu_q, cu_k, used = [0, 30, 60, 100], [0, 50, 100, 200], USED.get(name)
    if name in MALFORMED:
        cu_q, cu_k, _, _ = MALFORMED[name]
    error, target = guarded_call(arrays, cu_q, cu_k, used)
    assert error is None
    # A row that no sequence covers may stay as it was; what was computed is no NaN, so nothing came from the guards.
    written = arrays.bits(target.view) != -1
    nan = target.view != target.view
    assert not bool((written & nan).any()), "a row of out was computed from outside the arrays"
    assert target.surroundings_intact()
    # And the device still works.
    tensors = arrays.qkv(1, 10, 10, 1, 1, 64, arrays.half, 1)
    assert np.isfinite(float(arrays.float64(flashcore.attention(*tensors)).sum()))


def test_valid_values_pass_the_check(arrays, monkeypatch):
    monkeypatch.setenv("FLASHCORE_CHECK", "1")
    tensors, cu_q, cu_k = make(arrays, BATCHES["empty"], 4, 2, 64, arrays.half, 95, tail_q=3, tail_k=4)
    out = flashcore.attention_varlen(*tensors, arrays.int32(cu_q), arrays.int32(cu_k))
    check(arrays, out, None, tensors, cu_q, cu_k)
