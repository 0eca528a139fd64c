# SPDX-License-Identifier: Apache-2.0
"""attention_kvcache(): a few queries over a cache, contiguous or in pages, with new keys appended. In every test all
rows of the cache that belong to no sequence are NaN. (Graphs, streams and bad input are in test_kvcache_calls.py.)"""

from __future__ import annotations

import math

import pytest
from arrays import place
from kvcache import make
from reference import Options

import flashcore

RAGGED = [1, 0, 64, 333, 63, 128, 17, 700, 2]
PAGE_SIZES = (0, 16, 64, 128, 256)  # 0: contiguous
OPTIONS = (
    Options(),
    Options(causal=True),
    Options(causal=True, window=(100, None), softcap=20.0),
    Options(window=(30, 5)),
    Options(scale=-0.2),
)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_against_reference(arrays, dtype, page_size, tokens):
    if dtype not in arrays.dtypes:
        pytest.skip(f"no {dtype} here")
    for i, options in enumerate(OPTIONS):
        for new in (0, tokens):
            decoding = make(
                arrays, RAGGED, tokens, (8, 2), 64, dtype, new=new, page_size=page_size, capacity=1024, seed=7 * i + new
            )
            decoding.run(options, f"{options}, {new} new")


@pytest.mark.parametrize("head_dim", [8, 40, 64, 72, 96, 128, 160, 192, 256])
def test_head_dims_and_groups(arrays, head_dim):
    """One row of a tile and many, more than one tile of rows; several key heads and one."""
    for i, (heads, tokens) in enumerate(
        (((2, 2), 1), ((12, 3), 1), ((7, 1), 2), ((16, 1), 1), ((10, 2), 6), ((40, 1), 3))
    ):
        decoding = make(
            arrays,
            [150, 0, 64, 401],
            tokens,
            heads,
            head_dim,
            new=i % 3,
            page_size=(0, 16, 64)[i % 3],
            seed=head_dim + i,
        )
        decoding.run(Options(causal=i % 2 == 0), f"{heads}, {tokens} tokens")


@pytest.mark.parametrize("head_dim", [1, 5, 33, 100])
def test_odd_head_dims(arrays, head_dim):
    if arrays.on_gpu:
        pytest.skip("the GPU takes multiples of 8")
    make(arrays, [150, 0, 64], 3, (4, 2), head_dim, "float32", new=2, page_size=16).run(Options(causal=True))


@pytest.mark.parametrize("page_size", [0, 16, 64])
def test_long_sequences(arrays, page_size):
    """Long and short ones together: on the GPU most are divided among blocks."""
    lengths = [20000, 3, 5000, 0, 64, 8191, 128, 1]
    for tokens, new in ((1, 1), (4, 4), (1, 0)):
        decoding = make(arrays, lengths, tokens, (8, 2), 128, new=new, page_size=page_size, seed=tokens)
        decoding.run(Options(causal=True))
    make(arrays, [30000], 1, (4, 1), 64, page_size=page_size, seed=9).run()


@pytest.mark.parametrize("head_dim", [64, 96, 128, 200, 256])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_prompts(arrays, head_dim, layout):
    """Many queries a sequence: on the GPU the forward kernel's, with more room than keys, and fewer keys than
    queries."""
    lengths, tokens = [150, 0, 700, 64, 149, 1, 333, 512], 150
    for i, options in enumerate(OPTIONS):
        decoding = make(arrays, lengths, tokens, (12, 4), head_dim, capacity=800, seed=head_dim + i)
        if layout == "bshd":
            decoding.run(options, f"{options}")
            continue
        given = [x.swapaxes(1, 2) for x in (decoding.query, decoding.key_cache, decoding.value_cache)]
        seqlens = decoding.seqlens()
        out, lse = flashcore.attention_kvcache(*given, seqlens, layout=layout, return_lse=True, **options.keywords())
        decoding.check(out.swapaxes(1, 2), lse, options, f"{options}")
        plain = flashcore.attention_kvcache(*given, seqlens, layout=layout, **options.keywords())
        decoding.check(plain.swapaxes(1, 2), None, options, f"{options}, no lse")


def test_prompts_are_appended(arrays):
    """Many new tokens, whose keys are among those that their queries see."""
    for page_size in (0, 64):
        decoding = make(arrays, [200, 0, 31, 500], 150, (12, 4), 64, new=150, page_size=page_size, capacity=768)
        decoding.run(Options(causal=True))


@pytest.mark.parametrize("page_size", [16, 64, 256])
def test_prompts_over_pages(arrays, page_size):
    """On a GPU the pages are brought together for the forward kernels."""
    lengths, tokens = [150, 0, 700, 64, 149, 1, 333, 512], 200
    for i, (head_dim, options) in enumerate(zip((64, 128, 72), OPTIONS, strict=False)):
        decoding = make(
            arrays, lengths, tokens, (16, 4), head_dim, new=200 * (i == 1), page_size=page_size, capacity=1024, seed=i
        )
        decoding.run(options, f"{options}")


def test_long_capacity(arrays):
    """Much room for few keys: the grid is made for the room, the work is not."""
    make(arrays, [5, 0, 130], 1, (8, 2), 64, capacity=40000).run()
    make(arrays, [5, 0, 130], 1, (8, 2), 64, capacity=40000, new=1, page_size=256).run()


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_append_across_pages(arrays, page_size):
    """New tokens that fill a page, begin one, and span several, beside sequences that end anywhere."""
    size = page_size or 64
    for new in (1, 2, size, 2 * size + 3):
        lengths = [size - 1, size, 0, 2 * size - 2, 5, 3 * size]
        decoding = make(arrays, lengths, 2, (4, 2), 64, new=new, page_size=page_size, seed=new)
        decoding.run(Options(causal=True), f"{new} new")


def test_new_tokens_that_no_query_sees_are_appended(arrays):
    """A window that ends before them, and a call without queries."""
    for page_size in (0, 16):
        decoding = make(arrays, [100, 7, 0], 1, (4, 2), 64, new=150, page_size=page_size)
        decoding.run(Options(window=(3, 0)))
        decoding = make(arrays, [100, 7, 0], 0, (4, 2), 64, new=20, page_size=page_size)
        before = arrays.copy(decoding.key_cache), arrays.copy(decoding.value_cache)
        out, lse = decoding.call()
        assert tuple(out.shape) == (3, 0, 4, 64) and tuple(lse.shape) == (3, 4, 0)
        decoding.check_written(before)


def test_decoding_step_by_step(arrays):
    """Token after token, as a model decodes: every step sees what the ones before have appended."""
    for page_size in (0, 16):
        whole = make(arrays, [40, 60], 30, (4, 2), 64, new=30, page_size=page_size, seed=3)
        expected, _ = whole.run(Options(causal=True))
        steps = make(arrays, [40, 60], 30, (4, 2), 64, new=30, page_size=page_size, seed=3)
        lengths = steps.seqlens()
        for i in range(30):
            token = slice(i, i + 1)
            given = {**steps.keywords(), "key": steps.key[:, token], "value": steps.value[:, token]}
            out = flashcore.attention_kvcache(
                steps.query[:, token], steps.key_cache, steps.value_cache, lengths + i, causal=True, **given
            )
            difference = abs(arrays.float64(out) - arrays.float64(expected[:, token]))
            assert float(difference.max()) < 4e-3, i
        assert arrays.same_bits(steps.key_cache, whole.key_cache)


def test_one_visible_key_gives_its_value(arrays):
    for options, at in ((Options(window=(0, 0)), -1), (Options(causal=True, window=(0, None)), -1)):
        decoding = make(arrays, [1, 64, 5000, 777], 1, (4, 2), 64, page_size=64)
        out, _ = decoding.run(options)
        for b, values in enumerate(decoding.values):
            expected = values[at][[0, 0, 1, 1]]
            assert arrays.same_bits(arrays.contiguous(out[b, 0]), arrays.contiguous(expected))


def test_no_keys(arrays):
    out, lse = make(arrays, [0, 0], 2, (4, 2), 64, capacity=128).call()
    assert not bool((out != 0).any()) and not bool((lse != -math.inf).any())
    out, lse = make(arrays, [0, 0], 2, (4, 2), 64, capacity=0).call()
    assert not bool((out != 0).any()) and not bool((lse != -math.inf).any())
    out, lse = make(arrays, [], 2, (4, 2), 64, capacity=64).call()
    assert tuple(out.shape) == (0, 2, 4, 64) and tuple(lse.shape) == (0, 4, 2)


@pytest.mark.parametrize("memory", ["contiguous", "padded", "transposed"])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_strides_and_layouts(arrays, memory, layout):
    """Caches, queries, new tokens and the output at any strides; nothing beside the arrays is written."""
    for page_size in (0, 16):
        decoding = make(arrays, [40, 130, 0], 2, (6, 2), 72, new=2, page_size=page_size, seed=11)
        expected, expected_lse = make(arrays, [40, 130, 0], 2, (6, 2), 72, new=2, page_size=page_size, seed=11).run(
            Options(causal=True)
        )
        order = (lambda a: a) if layout == "bshd" else (lambda a: a.swapaxes(1, 2))
        names = ("query", "key_cache", "value_cache", "key", "value")
        placed = {
            name: place(arrays, order(a).shape, arrays.half, memory, order(a))
            for name, a in ((name, getattr(decoding, name)) for name in names)
        }
        target = place(arrays, placed["query"].view.shape, arrays.half, memory)
        # A table of which every second column belongs to others.
        given = {name: placed[name].view for name in names}
        if decoding.table:
            wide = arrays.int32([[*row, *([7] * 3)] for row in decoding.table])
            given["page_table"] = wide[:, : len(decoding.table[0])]
        out, lse = flashcore.attention_kvcache(
            **given, cache_seqlens=decoding.seqlens(), causal=True, layout=layout, out=target.view, return_lse=True
        )
        assert arrays.same_bits(arrays.contiguous(order(out)), expected) and arrays.same_bits(lse, expected_lse)
        for b, length in enumerate(decoding.lengths):
            for i in range(2):
                at = decoding.row(b, length + i)
                for cache, new in (("key_cache", decoding.key), ("value_cache", decoding.value)):
                    assert arrays.same_bits(
                        arrays.contiguous(order(placed[cache].view)[at]), arrays.contiguous(new[b, i])
                    )
        for p in (*placed.values(), target):
            assert p.surroundings_intact()


def test_shared_pages(arrays):
    """Two sequences whose beginnings are the same pages."""
    decoding = make(arrays, [100, 100, 40], 1, (4, 2), 64, page_size=16, seed=21)
    for kept in (decoding.keys, decoding.values):
        kept[1] = arrays.concatenate([kept[0][:48], kept[1][48:]])
    decoding.table[1][:3] = decoding.table[0][:3]
    decoding.run()


@pytest.mark.parametrize("page_size", [0, 16, 64])
def test_neighbours_do_not_matter(arrays, page_size):
    """Every sequence but one is NaN, infinite or huge: that one keeps its bits."""
    lengths = [100, 3000, 17, 64]
    clean = make(arrays, lengths, 2, (8, 2), 64, new=2, page_size=page_size, seed=31)
    expected, expected_lse = clean.run(Options(causal=True))
    for b in range(len(lengths)):
        for evil in (math.nan, math.inf, 6e4):
            spoilt = make(arrays, lengths, 2, (8, 2), 64, new=2, page_size=page_size, seed=31)
            caches = [arrays.full(a.shape, evil, arrays.half) for a in (spoilt.key_cache, spoilt.value_cache)]
            for position in range(lengths[b]):
                at = spoilt.row(b, position)
                caches[0][at], caches[1][at] = spoilt.key_cache[at], spoilt.value_cache[at]
            spoilt.key_cache, spoilt.value_cache = caches
            for name in ("query", "key", "value"):
                a = arrays.full(getattr(spoilt, name).shape, evil, arrays.half)
                a[b] = getattr(spoilt, name)[b]
                setattr(spoilt, name, a)
            out, lse = spoilt.call(causal=True)
            assert arrays.same_bits(out[b], expected[b]), (b, evil)
            assert arrays.same_bits(lse[b], expected_lse[b]), (b, evil)


def test_same_bits_every_time(arrays):
    decoding = make(arrays, [3000, 5, 900], 1, (8, 2), 128, page_size=64)
    first = decoding.call()
    for _ in range(3):
        assert all(arrays.same_bits(a, b) for a, b in zip(decoding.call(), first, strict=True))


@pytest.mark.parametrize("page_size", [0, 16, 64])
@pytest.mark.parametrize("tokens", [1, 4])
def test_batch_invariance(arrays, page_size, tokens):
    """Asked for, a sequence gets the same bits alone and among others, in any place, and whatever the room."""
    lengths = [9000, 0, 255, 256, 4000, 17]
    options = {"causal": True, "batch_invariant": True}
    batch = make(arrays, lengths, tokens, (8, 2), 64, new=1, page_size=page_size, capacity=9728, seed=41)
    inputs = [arrays.copy(a) for a in (batch.key_cache, batch.value_cache)]
    out, lse = batch.call(**options)
    batch.check(out, lse, Options(causal=True))
    for chosen in ([0], [2], [3], [4], [5, 4, 3], [4, 0], [1, 5, 0, 2]):
        rows = slice(None) if page_size else chosen
        part = flashcore.attention_kvcache(
            batch.query[chosen],
            arrays.contiguous(inputs[0][rows]),
            arrays.contiguous(inputs[1][rows]),
            arrays.int32([lengths[b] for b in chosen]),
            key=batch.key[chosen],
            value=batch.value[chosen],
            page_table=arrays.int32([batch.table[b] for b in chosen]) if page_size else None,
            return_lse=True,
            **options,
        )
        for i, b in enumerate(chosen):
            assert arrays.same_bits(part[0][i], out[b]), (chosen, b)
            assert arrays.same_bits(part[1][i], lse[b]), (chosen, b)
    short = [2, 3, 5]
    room = make(arrays, [lengths[b] for b in short], tokens, (8, 2), 64, capacity=300, page_size=page_size, seed=43)
    more = make(arrays, [lengths[b] for b in short], tokens, (8, 2), 64, capacity=3000, page_size=page_size, seed=43)
    assert arrays.same_bits(room.call(**options)[0], more.call(**options)[0])


@pytest.mark.parametrize("page_size", [0, 16])
@pytest.mark.parametrize("heads, head_dim", [((32, 8), 128), ((16, 4), 64), ((4, 2), 256)])
def test_batch_invariance_of_many(arrays, heads, head_dim, page_size):
    """The larger the batch, the fewer blocks a sequence has, on Hopper: none of the bits changes."""
    lengths = [0, 1000, 64, 1, 513, 300, 999, 128] * (4 if arrays.on_gpu else 1)
    given = [Options(causal=True), Options(window=(200, 0)), Options(causal=True, softcap=3.0)]
    for i, options in enumerate(given):
        tokens = (1, 4, 2)[i]
        batch = make(
            arrays, lengths, tokens, heads, head_dim, new=2 * i, page_size=page_size, capacity=1024, seed=61 + i
        )
        inputs = [arrays.copy(a) for a in (batch.key_cache, batch.value_cache)]
        out, lse = batch.call(**options.keywords(), batch_invariant=True)
        batch.check(out, lse, options)
        for count in (1, 2, 4, 8, 16):
            chosen = list(range(count, min(2 * count, len(lengths))))
            rows = slice(None) if page_size else chosen
            new = {"key": batch.key[chosen], "value": batch.value[chosen]} if i else {}
            part = flashcore.attention_kvcache(
                batch.query[chosen],
                arrays.contiguous(inputs[0][rows]),
                arrays.contiguous(inputs[1][rows]),
                arrays.int32([lengths[b] for b in chosen]),
                page_table=arrays.int32([batch.table[b] for b in chosen]) if page_size else None,
                return_lse=True,
                batch_invariant=True,
                **new,
                **options.keywords(),
            )
            for at, b in enumerate(chosen):
                assert arrays.same_bits(part[0][at], out[b]), (count, b)
                assert arrays.same_bits(part[1][at], lse[b]), (count, b)


def test_equals_attention(arrays):
    """On equal lengths the answer of attention() within rounding."""
    for head_dim in (64, 128):
        decoding = make(arrays, [1000] * 3, 4, (8, 2), head_dim, seed=51)
        out, lse = decoding.run(Options(causal=True))
        fixed, fixed_lse = flashcore.attention(
            decoding.query, decoding.key_cache, decoding.value_cache, causal=True, return_lse=True
        )
        assert float(abs(arrays.float64(out) - arrays.float64(fixed)).max()) < 4e-3
        assert float(abs(arrays.float64(lse) - arrays.float64(fixed_lse)).max()) < 1e-4
