# SPDX-License-Identifier: Apache-2.0
"""Numerics beyond the grid: peaked scores, NaN that must stay where it is, infinities, and magnitudes near a dtype's
end."""

from __future__ import annotations

import math

import pytest
from arrays import place
from reference import Options, assert_attention, errors, lse_tolerance, reference

import flashcore

DTYPES = ["float32", "float16", "bfloat16"]


def needs(arrays, dtype):
    if dtype not in arrays.dtypes:
        pytest.skip(f"no {dtype} here")


def cpu_only(arrays):
    if arrays.device != "cpu":
        pytest.skip("for the CPU")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", [1.0, 4.0, 16.0, 200.0, 750.0])
@pytest.mark.parametrize("options", [Options(), Options(causal=True), Options(softcap=30.0)], ids=str)
@pytest.mark.parametrize("with_lse", [False, True])
def test_peaked_scores(arrays, dtype, score, options, with_lse):
    """From flat rows to rows where one key takes all the weight; on the CPU with scores up to 10^4, whose exponents
    the GPU's kernels round too far for float16 (score · factor − offset is one FMA, offset is rounded before). Beyond,
    a float32 score's own rounding is 0.001 and decides between two keys, so that the largest errors of two right
    answers are a factor of 2 apart by chance: with scores of 3·10^4 in 2 and 3 of 60 problems (the baseline, AMX)."""
    needs(arrays, dtype)
    if score > 500:
        cpu_only(arrays)
    tensors = arrays.qkv(1, 520, 520, 4, 2, 64, dtype, int(score), score)
    result = flashcore.attention(*tensors, return_lse=with_lse, **options.keywords())
    out, lse = result if with_lse else (result, None)
    assert_attention(arrays, out, lse, *tensors, options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_growing_scores(arrays, dtype):
    """Each tile's scores exceed all before: the output so far is scaled down again and again; then the reverse."""
    needs(arrays, dtype)
    query, key, value = arrays.qkv(1, 100, 1500, 2, 2, 64, dtype, 7)
    ramp = arrays.cast((arrays.arange(1500) + 1) / 300.0, dtype)[None, :, None, None]
    query = abs(query)
    key = abs(key) * ramp
    for k in (key, -key):
        out, lse = flashcore.attention(query, k, value, return_lse=True)
        assert_attention(arrays, out, lse, query, k, value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", [1.0, 16.0, 200.0])
@pytest.mark.parametrize("with_lse", [False, True])
def test_first_keys_say_little(arrays, dtype, score, with_lse):
    """The first keys' scores are far below the later ones, for some queries and not for others: what weights are
    relative to at first does not do for long. With the log-sum-exp and without, whose sums may be others."""
    needs(arrays, dtype)
    if score > 100:
        cpu_only(arrays)
    query, key, value = arrays.qkv(1, 100, 700, 2, 2, 64, dtype, 41, score)
    key = arrays.copy(key)
    key[:, :40] = key[:, :40] * 0.001
    key[:, 300:310] = key[:, 300:310] * 4
    for options in (Options(), Options(causal=True)):
        result = flashcore.attention(query, key, value, return_lse=with_lse, **options.keywords())
        out, lse = result if with_lse else (result, None)
        assert_attention(arrays, out, lse, query, key, value, options)


@pytest.mark.parametrize("size", [0.5, 4.0])
def test_last_bits_of_float16_count(arrays, size):
    """Two kinds of keys with the same scores, in one of which all of a score's products have the last bits of both
    factors. What an implementation may leave out of those (2^-13 of an exponent at most; 0.4 of that with the smaller
    size) moves the weights from one kind to the other, and the log-sum-exp."""
    rows = 70
    near_one = arrays.full((1, rows, 1, 64), size * (1 + 2.0**-8), "float16")
    key, value = arrays.copy(near_one), arrays.full((1, rows, 1, 64), 1.0, "float16")
    key[:, 1::2, :, 0::2] = size
    key[:, 1::2, :, 1::2] = size * (1 + 2.0**-7)
    value[:, 1::2] = -1.0
    out, lse = flashcore.attention(near_one, key, value, return_lse=True)
    left_out = 2.0**-13 * math.log(2) if size < 1 else 0.0
    assert float(abs(arrays.float64(out)).max()) <= left_out / 2 + 1e-5
    _, expected = reference(arrays, near_one, key, value)
    assert float(abs(arrays.float64(lse) - expected).max()) <= left_out + lse_tolerance(8 * size**2 + 1, 0.0)


@pytest.mark.parametrize("scale", [0.0, -0.5, 1e-6, 3.0])
def test_unusual_scales(arrays, scale):
    """Zero averages the values; a negative scale prefers the keys that are least like the query."""
    for softcap in (0.0, 5.0):
        tensors = arrays.qkv(2, 130, 200, 4, 2, 64, arrays.half, 9)
        options = Options(scale=scale, softcap=softcap, causal=True)
        out, lse = flashcore.attention(*tensors, return_lse=True, causal=True, scale=scale, softcap=softcap)
        assert_attention(arrays, out, lse, *tensors, options)


def test_values_near_the_end_of_float16(arrays):
    """Averages of values of 60000 stay finite: nothing is summed up in float16."""
    query, key, _ = arrays.qkv(1, 65, 1000, 2, 2, 64, "float16", 11)
    value = arrays.full(key.shape, 6e4, "float16")
    out = flashcore.attention(query, key, value)
    # One rounding of weights near 1/1000 (2⁻¹¹), and one of the output.
    assert float(abs(arrays.float64(out) / 6e4 - 1).max()) < 2.0**-10


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_large_values_with_growing_scores(arrays, dtype):
    """Values near the end of the dtype's range under scores that exceed the first ones: no sum overflows."""
    needs(arrays, dtype)
    query, key, _ = arrays.qkv(1, 65, 300, 2, 2, 64, dtype, 43, 8.0)
    value = arrays.full(key.shape, 2.0**120, dtype)
    out = arrays.float64(flashcore.attention(query, key, value)) / 2.0**120
    assert float(abs(out - 1).max()) < (1e-5 if dtype == "float32" else 2.0**-8)


@pytest.mark.parametrize("scale", [1e-36, 1e36])
def test_values_near_the_end_of_float32(arrays, scale):
    """Values, and keys against queries of the other end, whose parts would be too small or too large for products of
    bfloat16."""
    needs(arrays, "float32")
    query, key, value = arrays.qkv(1, 130, 300, 2, 2, 64, "float32", 37)
    clean = flashcore.attention(query, key, value)
    for moved in ((query, key, value * scale), (query / scale, key * scale, value * scale)):
        out = arrays.float64(flashcore.attention(*moved)) / scale
        assert float(abs(out - arrays.float64(clean)).max()) < 1e-5


@pytest.mark.parametrize("score", [6000.0, 20000.0])
@pytest.mark.parametrize("causal", [False, True])
def test_scores_beyond_fixed_point(arrays, score, causal):
    """On tile registers weights in bfloat16 come from whole numbers, which the exponents of these scores are beyond, in
    both directions."""
    needs(arrays, "bfloat16")
    cpu_only(arrays)
    tensors = arrays.qkv(1, 130, 500, 4, 2, 64, "bfloat16", int(score), score)
    out, lse = flashcore.attention(*tensors, return_lse=True, causal=causal)
    assert_attention(arrays, out, lse, *tensors, Options(causal=causal))


@pytest.mark.parametrize("power", [58, 62, 110])
def test_queries_and_keys_of_far_magnitudes(arrays, power):
    """Queries and keys near opposite ends of bfloat16's range, whose scores are as always."""
    needs(arrays, "bfloat16")
    cpu_only(arrays)
    query, key, value = arrays.qkv(1, 100, 300, 4, 2, 64, "bfloat16", power)
    for q, k in ((query * 2.0**power, key * 2.0**-power), (query * 2.0**-power, key * 2.0**power)):
        out, lse = flashcore.attention(q, k, value, return_lse=True)
        assert_attention(arrays, out, lse, q, k, value)


@pytest.mark.parametrize("power", [-110, -70, -50, 90, 110])
def test_values_of_far_magnitudes(arrays, power):
    """Values that are all small or all large, in bfloat16."""
    needs(arrays, "bfloat16")
    cpu_only(arrays)
    query, key, value = arrays.qkv(1, 100, 300, 4, 2, 64, "bfloat16", power + 200)
    out, lse = flashcore.attention(query, key, value * 2.0**power, return_lse=True)
    assert_attention(arrays, out * 2.0**-power, lse, query, key, value)


@pytest.mark.parametrize("seqlen_q", [7, 300])
def test_hidden_keys_have_no_weight(arrays, seqlen_q):
    """A value that a row does not see is not in its result, however large: exactly no weight, in any dtype."""
    for dtype in arrays.dtypes:
        query, key, value = arrays.qkv(1, seqlen_q, 300, 2, 2, 64, dtype, 47)
        huge = arrays.copy(value)
        huge[:, 300 - seqlen_q // 2 :] = 3e4
        options = {"window": (40, 0)}
        clean = arrays.copy(flashcore.attention(query, key, value, **options))
        out = arrays.copy(flashcore.attention(query, key, huge, **options))
        rows = seqlen_q - seqlen_q // 2
        assert arrays.same_bits(out[:, :rows], clean[:, :rows]), dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_keys_and_values(arrays, dtype):
    """A key whose scores are all -inf has no weight, and the keys beside it keep theirs; an infinite value that a
    row sees alone is its result."""
    needs(arrays, dtype)
    query, key, value = arrays.qkv(1, 70, 300, 2, 2, 64, dtype, 39)
    query = abs(query) + 1
    spoilt = arrays.copy(key)
    spoilt[:, 200:] = -math.inf
    out, lse = flashcore.attention(query, spoilt, value, return_lse=True)
    assert_attention(arrays, out, lse, query, key[:, :200], value[:, :200])
    value = arrays.copy(value)
    value[:, 0] = math.inf
    out = flashcore.attention(query[:, :3], key[:, :3], value[:, :3], causal=True)
    assert bool((out[:, 0] == math.inf).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [Options(), Options(causal=True), Options(window=(300, 0))], ids=str)
@pytest.mark.parametrize("far_out", [False, True])
def test_tiles_of_whole_heads(arrays, dtype, options, far_out):
    """One thread takes heads whole where it can, many divide them: the bits are the same, also of values that products
    of tiles do not take (with bfloat16 on tile registers those from 2^100 on)."""
    needs(arrays, dtype)
    cpu_only(arrays)
    query, key, value = arrays.qkv(1, 1700, 1700, 4, 4, 64, dtype, 55)
    if far_out:
        value = arrays.copy(value)
        value[0, ::150, 2] = 6e4 if dtype == "float16" else 1e35  # all tiles see one
    before = flashcore.get_num_threads()
    results = []
    try:
        for threads in (1, 16):
            flashcore.set_num_threads(threads)
            results.append(flashcore.attention(query, key, value, return_lse=True, **options.keywords()))
    finally:
        flashcore.set_num_threads(before)
    for whole, divided in zip(*results, strict=True):
        assert arrays.same_bits(whole, divided)
    if not far_out:
        assert_attention(arrays, *results[0], query, key, value, options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("evil", [math.nan, math.inf])
def test_value_that_is_not_finite_stays_in_its_column(arrays, dtype, evil):
    """Of the one query of each sequence too, whose values may be multiplied as pairs of columns."""
    needs(arrays, dtype)
    query, key, value = arrays.qkv(2, 1, 200, 8, 2, 128, dtype, 51)
    clean, clean_lse = flashcore.attention(query, key, value, return_lse=True)
    for key_head, column in ((0, 0), (1, 33), (1, 127)):
        spoilt = arrays.copy(value)
        spoilt[1, 77, key_head, column] = evil
        out, lse = flashcore.attention(query, key, spoilt, return_lse=True)
        assert float(abs(lse - clean_lse).max()) < 1e-4
        out, fresh = arrays.copy(out), arrays.copy(clean)
        heads = slice(4 * key_head, 4 * key_head + 4)
        spoiled = out[1, :, heads, column]
        assert bool((abs(spoiled) == math.inf).all() if evil == math.inf else (spoiled != spoiled).all())
        out[1, :, heads, column] = fresh[1, :, heads, column] = 0
        assert float(abs(arrays.float64(out) - arrays.float64(fresh)).max()) < 1e-2
        rest = [h for h in range(8) if h // 4 != key_head]
        assert arrays.same_bits(out[0], fresh[0]) and arrays.same_bits(out[1][:, rest], fresh[1][:, rest])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("evil", [math.nan, math.inf])
def test_nan_in_one_of_few_queries_stays_in_its_row(arrays, dtype, evil):
    needs(arrays, dtype)
    query, key, value = arrays.qkv(2, 2, 200, 8, 2, 128, dtype, 53)
    clean = arrays.copy(flashcore.attention(query, key, value, causal=True))
    spoilt = arrays.copy(query)
    spoilt[1, 1, 5, 3] = evil
    out = arrays.copy(flashcore.attention(spoilt, key, value, causal=True))
    assert bool((out[1, 1, 5] != out[1, 1, 5]).all()), "a NaN went missing"
    out[1, 1, 5] = clean[1, 1, 5] = 0
    assert arrays.same_bits(out, clean), "a NaN reached another row"


def test_tiny_float16(arrays):
    """Subnormal inputs are numbers, too."""
    query, key, value = arrays.qkv(1, 65, 100, 2, 2, 64, "float16", 13)
    value = arrays.cast(arrays.float64(value) * 1e-6, "float16")
    out = flashcore.attention(query, key, value)
    expected, _ = reference(arrays, query, key, value)
    # Half a step of the subnormals (2⁻²⁴) for the output; weights are rounded relatively.
    assert errors(arrays, out, expected)[0] < 2.0**-24


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("evil", [math.nan, math.inf])
def test_nan_in_a_query_stays_in_its_row_without_lse(arrays, dtype, evil):
    needs(arrays, dtype)
    query, key, value = arrays.qkv(1, 140, 600, 2, 2, 64, dtype, 45)
    clean = arrays.copy(flashcore.attention(query, key, value))
    spoilt = arrays.copy(query)
    spoilt[0, 77, 1, 5] = evil
    out = arrays.copy(flashcore.attention(spoilt, key, value))
    assert bool((out[0, 77, 1] != out[0, 77, 1]).all()), "a NaN went missing"
    out[0, 77, 1] = clean[0, 77, 1] = 0
    assert arrays.same_bits(out, clean), "a NaN reached another row"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("evil", [math.nan, math.inf])
def test_nan_in_a_query_stays_in_its_row(arrays, dtype, evil):
    """One NaN (or infinity, which makes scores of both infinities) reaches that query's output alone; others keep their
    bits."""
    needs(arrays, dtype)
    query, key, value = arrays.qkv(2, 140, 200, 4, 2, 64, dtype, 15)
    clean, clean_lse = flashcore.attention(query, key, value, causal=True, return_lse=True)
    for b, i, h in ((0, 0, 0), (1, 139, 3), (0, 64, 1), (1, 77, 2)):
        spoilt = arrays.copy(query)
        spoilt[b, i, h, 5] = evil
        out, lse = flashcore.attention(spoilt, key, value, causal=True, return_lse=True)
        row = out[b, i, h]
        assert bool((row != row).all()), "a NaN went missing"
        for got, fresh, index in ((out, clean, (b, i, h)), (lse, clean_lse, (b, h, i))):
            got, fresh = arrays.copy(got), arrays.copy(fresh)
            got[index] = fresh[index] = 0
            assert arrays.same_bits(got, fresh), "a NaN reached another row"


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_in_another_head_or_batch(arrays, dtype):
    """Keys and values of other heads and other batch entries never matter."""
    needs(arrays, dtype)
    query, key, value = arrays.qkv(3, 70, 130, 6, 3, 40, dtype, 17)
    clean = flashcore.attention(query, key, value)
    spoilt_key, spoilt_value = arrays.copy(key), arrays.copy(value)
    for a in (spoilt_key, spoilt_value):
        a[0] = math.nan
        a[1, :, 0] = math.nan
        a[2, :, 2] = math.inf
    out = flashcore.attention(query, spoilt_key, spoilt_value)
    assert arrays.same_bits(out[1, :, 2:], clean[1, :, 2:])
    assert arrays.same_bits(out[2, :, :4], clean[2, :, :4])
    bad = out[0]
    assert bool((bad != bad).all())


@pytest.mark.parametrize("seqlen_k", [1, 17, 63, 64, 65, 100, 127, 129, 200])
def test_nan_after_the_arrays(arrays, seqlen_k):
    """The last tile reaches over the end of the keys: what lies there is NaN and has no part in anything."""
    for head_dim in (32, 64, 128):
        tensors = arrays.qkv(1, 70, seqlen_k, 2, 2, head_dim, arrays.half, seqlen_k)
        for memory in ("contiguous", "padded"):
            placed = [place(arrays, a.shape, arrays.half, memory, a) for a in tensors]
            before = [arrays.copy(p.buffer) for p in placed]
            out, lse = flashcore.attention(*(p.view for p in placed), return_lse=True)
            assert_attention(arrays, out, lse, *tensors)
            assert all(arrays.same_bits(p.buffer, b) for p, b in zip(placed, before, strict=True)), "input written"


@pytest.mark.parametrize("far", ["keys", "queries"])
def test_values_of_unseen_tiles_do_not_matter(arrays, far):
    """Whole tiles outside a window are not read: NaN in them reaches nothing."""
    query, key, value = arrays.qkv(1, 600, 1600, 2, 2, 64, arrays.half, 19)
    options = {"window": (40, 0)}
    clean = flashcore.attention(query, key, value, **options)
    if far == "keys":  # the first query stands on key 1000
        key[:, :600] = math.nan
        value[:, :600] = math.nan
        assert arrays.same_bits(flashcore.attention(query, key, value, **options), clean)
    else:
        query[:, 300:] = math.nan
        assert arrays.same_bits(flashcore.attention(query, key, value, **options)[:, :300], clean[:, :300])
