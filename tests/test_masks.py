# SPDX-License-Identifier: Apache-2.0
"""Which keys a query sees, exactly: causal masks, windows and ends of sequences, at and around the edges of tiles."""

from __future__ import annotations

import math

import pytest
from reference import Options, visible

import flashcore

HUGE = 2**62  # a limit that must act as none, not wrap

MASKS = [
    Options(),
    Options(causal=True),
    Options(window=(0, 0)),
    Options(window=(0, None)),
    Options(window=(None, 0)),
    Options(window=(1, 1)),
    Options(window=(63, 64)),
    Options(window=(64, 0)),
    Options(window=(128, 127)),
    Options(window=(5, None), causal=True),
    Options(window=(None, 9), causal=True),
    Options(window=(None, None)),
    Options(window=(HUGE, HUGE)),
    Options(window=(HUGE, 3)),
    Options(window=(300, HUGE), causal=True),
]
LENGTHS = [
    (1, 1),
    (1, 200),
    (64, 64),
    (65, 63),
    (63, 65),
    (128, 256),
    (129, 127),
    (256, 256),
    (200, 1),
    (255, 30),
    (3, 256),
]


def expected_mask(arrays, options, seqlen_q, seqlen_k):
    return visible(arrays, options, arrays.arange(seqlen_q), arrays.arange(seqlen_k), seqlen_q, seqlen_k)


@pytest.mark.parametrize("softcap", [0.0, 10.0])
@pytest.mark.parametrize("options", MASKS, ids=str)
def test_each_weight(arrays, options, softcap):
    """With unit vectors for values the output is the matrix of weights: positive where a key is seen, exactly zero
    where not."""
    unit = arrays.cast(arrays.arange(256)[:, None] == arrays.arange(256)[None, :], arrays.half)
    for seqlen_q, seqlen_k in LENGTHS:
        query, key, _ = arrays.qkv(1, seqlen_q, seqlen_k, 2, 1, 256, arrays.half, seqlen_q * 1000 + seqlen_k)
        value = arrays.contiguous(unit[None, :seqlen_k, None, :])
        # Scores around zero, so that no weight of a seen key gets lost in the rounding of float16.
        out = flashcore.attention(query, key, value, **{**options.keywords(), "softcap": softcap, "scale": 0.02})
        seen = expected_mask(arrays, options, seqlen_q, seqlen_k)
        for head in range(2):
            weights = out[0, :, head]
            assert bool(((weights[:, :seqlen_k] > 0) == seen).all()), (options, seqlen_q, seqlen_k)
            assert not bool((weights[:, seqlen_k:] != 0).any()), (options, seqlen_q, seqlen_k)


@pytest.mark.parametrize("options", MASKS, ids=str)
def test_number_of_keys_seen(arrays, options):
    """With equal keys, lse is the one score plus the logarithm of how many keys a query sees; here over many tiles."""
    for seqlen_q, seqlen_k in ((700, 1100), (1100, 700), (1, 3000), (640, 640), (129, 2049)):
        query, key, value = arrays.qkv(1, seqlen_q, seqlen_k, 1, 1, 64, arrays.half, seqlen_k)
        key[:, :] = arrays.copy(key[:, :1])
        _, lse = flashcore.attention(query, key, value, return_lse=True, **options.keywords())
        score = (arrays.float64(query)[0, :, 0] * arrays.float64(key)[0, 0, 0]).sum(-1) / math.sqrt(64)
        count = expected_mask(arrays, options, seqlen_q, seqlen_k).sum(-1)
        none = count == 0
        got = arrays.float64(lse)[0, 0]
        assert bool(((got == -math.inf) == none).all()), (options, seqlen_q, seqlen_k)
        # Wrong by one key of 3000 would be 3e-4.
        wrong = arrays.xp.exp(got - score) - arrays.float64(count)
        assert float(abs(wrong / arrays.float64(count + none)).max()) < 5e-5, (options, seqlen_q, seqlen_k)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("score", [1.0, 16.0])
def test_single_visible_key_is_copied(arrays, dtype, score):
    """The output of a query that sees one key equals that key's value row exactly."""
    if dtype not in arrays.dtypes:
        pytest.skip(f"no {dtype} here")
    for head_dim in (8, 64, 128, 256):
        for seqlen_q, seqlen_k in ((1, 1), (130, 130), (70, 200), (1, 1000)):
            query, key, value = arrays.qkv(2, seqlen_q, seqlen_k, 2, 2, head_dim, dtype, head_dim, score)
            for softcap in (0.0, 20.0):
                out = flashcore.attention(query, key, value, window=(0, 0), softcap=softcap)
                assert bool((out == value[:, seqlen_k - seqlen_q :]).all())
        # One key for all queries.
        query, key, value = arrays.qkv(2, 100, 1, 2, 2, head_dim, dtype, head_dim + 1, score)
        assert bool((flashcore.attention(query, key, value) == value).all())
        # The first query of a causal square.
        query, key, value = arrays.qkv(2, 100, 100, 2, 2, head_dim, dtype, head_dim + 2, score)
        assert bool((flashcore.attention(query, key, value, causal=True)[:, 0] == value[:, 0]).all())


@pytest.mark.parametrize("causal", [True, False])
def test_queries_that_see_no_key(arrays, causal):
    """More queries than keys: the first ones stand before the first key. Zeros and -inf, whatever was there before."""
    query, key, value = arrays.qkv(2, 300, 130, 4, 2, 64, arrays.half, 5)
    target = arrays.poison(query.shape, arrays.half)
    window = None if causal else (20, 10)
    out, lse = flashcore.attention(query, key, value, causal=causal, window=window, out=target, return_lse=True)
    blind = 170 if causal else 160
    assert not bool((out[:, :blind] != 0).any()) and not bool((lse[:, :, :blind] != -math.inf).any())
    assert bool((lse[:, :, blind:] > -math.inf).all()) and bool((out[:, blind:] != 0).any())


def test_causal_is_window_to_the_right_of_zero(arrays):
    tensors = arrays.qkv(1, 200, 333, 4, 2, 64, arrays.half, 9)
    assert arrays.same_bits(flashcore.attention(*tensors, causal=True), flashcore.attention(*tensors, window=(None, 0)))
    assert arrays.same_bits(
        flashcore.attention(*tensors, causal=True, window=(40, 7)), flashcore.attention(*tensors, window=(40, 0))
    )
