# SPDX-License-Identifier: Apache-2.0
"""attention_kvcache() on every machine that a device has, the same problems for each: against float64, and against each
other. Batches are chosen so that Hopper's kernel divides the keys in both of its ways: among the blocks of a cluster
(few sequences), and into parts."""

from __future__ import annotations

import itertools
import os
from unittest.mock import patch

import pytest
from arrays import backends
from kvcache import make
from reference import Options

import flashcore

FEW = [[5000], [0], [1], [63], [64], [700, 130], [4097, 0]]
MANY = [[3000, 0, 64, 129, 9000, 1, 17, 2048, 333, 700, 5, 63]]
OPTIONS = (
    Options(causal=True),
    Options(window=(500, 3)),
    Options(causal=True, window=(100, None), softcap=20.0),
    Options(scale=-0.2),
)


def kernels(device, head_dim):
    """The device's machines, and what FLASHCORE_SM90_DECODE says: the turned kernel has up to 128 columns."""
    for backend in backends(device):
        yield backend, "straight"
        if backend == "sm90" and head_dim <= 128:
            yield backend, "turned"


def both(arrays, lengths, tokens, heads, head_dim, options, what, **more):
    results = []
    call = {name: more.pop(name) for name in ("batch_invariant",) if name in more}
    for backend, kernel in kernels(arrays.device, head_dim):
        decoding = make(arrays, lengths, tokens, heads, head_dim, **more)
        with patch.dict(os.environ, FLASHCORE_SM90_DECODE=kernel):
            results.append(decoding.run(options, f"{backend} {kernel} {what}", backend=backend, **call))
    for out, lse in results[1:]:
        first, other = arrays.float64(results[0][0]), arrays.float64(out)  # up to a rounding to bfloat16
        assert bool((abs(other - first) <= 1e-2 + abs(first) / 64).all()), what
        seen = results[0][1] > -1e30
        assert bool((seen == (lse > -1e30)).all()), what
        if bool(seen.any()):
            assert float(abs(arrays.float64(lse[seen]) - arrays.float64(results[0][1][seen])).max()) < 1e-3, what
    return results


@pytest.mark.parametrize("page_size", [0, 16, 64, 256])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_few_and_many_sequences(arrays, head_dim, page_size):
    for i, lengths in enumerate(FEW + MANY):
        for j, tokens in enumerate((1, 4)):
            options, new = OPTIONS[(i + j) % len(OPTIONS)], (i + 2 * j) % 3
            what = f"{lengths}, {tokens} tokens, {new} new, {options}"
            both(arrays, lengths, tokens, (8, 2), head_dim, options, what, new=new, page_size=page_size, seed=i + 7 * j)


@pytest.mark.parametrize("head_dim", [8, 40, 72, 96, 136, 192, 256])
def test_head_dims_and_groups(arrays, head_dim):
    """Rows that fill a tile and more than one, in groups that do not divide it."""
    for i, (heads, tokens) in enumerate((((2, 2), 1), ((7, 1), 3), ((20, 1), 1), ((6, 2), 16), ((40, 1), 2))):
        for lengths in ([900], [65, 900, 0] * 4):
            both(arrays, lengths, tokens, heads, head_dim, OPTIONS[i % 4], f"{heads} {tokens} {lengths}", seed=i)


@pytest.mark.parametrize("page_size", [0, 16, 64, 128, 256])
@pytest.mark.parametrize("tokens", [1, 4, 16])
def test_one_long_sequence(arrays, tokens, page_size):
    """Which plan() gives to the turned kernel on Hopper, if its rows fit a tile."""
    cases = (((16, 8), 64, 4100), ((8, 4), 128, 5000), ((12, 2), 128, 6100))
    for i, (heads, head_dim, length) in enumerate(cases):
        options, new = OPTIONS[(i + tokens) % 4], (0, tokens, 3)[i]
        what = f"{length}, {heads}, {tokens} tokens, {new} new, {options}"
        both(arrays, [length], tokens, heads, head_dim, options, what, new=new, page_size=page_size, seed=i)


def test_scores_that_rise(arrays):
    """From tile to tile beyond what the weights' references leave room for, and fall again; all of one sign, and far
    from zero."""
    for tokens, rows in ((1, (8, 2)), (4, (16, 2))):
        for factor in (6.0, 40.0, -6.0):
            for backend, kernel in kernels(arrays.device, 128):
                decoding = make(arrays, [6000], tokens, rows, 128, seed=tokens)
                decoding.key_cache[0, 2000:] *= factor
                decoding.key_cache[0, 5000:] *= 0
                decoding.keys[0] = decoding.key_cache[0]
                with patch.dict(os.environ, FLASHCORE_SM90_DECODE=kernel):
                    decoding.run(Options(), f"{backend} {kernel} {tokens} {factor}", backend=backend)


@pytest.mark.parametrize("page_size", [0, 64, 256])
@pytest.mark.parametrize("head_dim", [40, 64, 128, 192, 256])
def test_one_sequence_in_clusters(arrays, head_dim, page_size):
    """About eight key heads and few rows: a cluster's blocks divide a head's keys, some of them getting none."""
    for i, length in enumerate((0, 1, 63, 64, 500, 700, 5000)):
        heads = ((16, 8), (32, 8), (12, 6), (32, 16), (8, 8))[i % 5]
        for new in (0, 2):
            options, what = OPTIONS[(i + new) % 4], f"{length}, {heads}, {new} new"
            tokens = 1 + i % 2
            sizes = {"new": new, "page_size": page_size, "capacity": max(length + new, 1000), "seed": i}
            both(arrays, [length], tokens, heads, head_dim, options, what, **sizes)


@pytest.mark.parametrize("page_size", [0, 16])
def test_capacity_beyond_the_keys(arrays, page_size):
    """A tile that is asked for before the length is known may lie behind the end, where all is NaN."""
    for lengths in ([1], [0], [100], [513, 2]):
        both(arrays, lengths, 1, (8, 2), 128, Options(), f"{lengths}", capacity=3000, page_size=page_size)


@pytest.mark.parametrize("page_size", [0, 16, 64])
def test_new_tokens_fill_tiles(arrays, page_size):
    """Appended keys that end in a tile, fill whole ones, and begin in the middle of a warp's 16."""
    for new in (1, 15, 64, 150):
        for lengths in ([0], [63], [1000], [5, 64, 120, 0, 77, 1, 2, 3, 129, 1000, 31, 16]):
            both(arrays, lengths, 2, (4, 2), 64, Options(causal=True), f"{lengths} {new}", new=new, page_size=page_size)


def test_batch_invariant(arrays):
    for head_dim, lengths in itertools.product((64, 128), ([9000], [9000, 0, 255, 256, 4000, 17])):
        both(arrays, lengths, 2, (8, 2), head_dim, Options(causal=True), f"{lengths}", batch_invariant=True)


def test_a_hopper_gpu_decodes_on_its_own_kernel(arrays):
    if "sm90" not in backends(arrays.device):
        pytest.skip("a Hopper GPU's")
    query, cache = (1, 1, 8, 64), (1, 500, 2, 64)
    plan = flashcore.plan(query, cache, cache, cache_seqlens=(1,), dtype="float16", device="cuda")
    assert plan.backend == "sm90"
