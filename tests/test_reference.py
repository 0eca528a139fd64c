# SPDX-License-Identifier: Apache-2.0
"""Checks of the suite's own means: the reference, the emulation, the standard (which must refuse what is wrong), the
pairs."""

from __future__ import annotations

import pytest
from arrays import place, torch
from pairwise import pairwise, product_case, product_size, uncovered
from reference import (
    PLAIN,
    Options,
    cancellation,
    emulation,
    errors,
    meets_standard,
    reference,
    score_magnitude,
    sdpa_expresses,
    sdpa_flash,
    visible,
    yardstick,
)

OPTIONS = [
    Options(),
    Options(causal=True),
    Options(window=(5, 3)),
    Options(window=(None, 40), causal=True, scale=0.3),
    Options(window=(0, None), scale=-0.2),
]


@pytest.mark.skipif(torch is None, reason="needs torch")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_reference_is_sdpa_in_float64(arrays, options):
    """PyTorch's own attention in float64, given the mask as an array."""
    for seqlen_q, seqlen_k in ((65, 130), (40, 40), (1, 7)):
        query, key, value = (
            a.double() for a in arrays.qkv(2, seqlen_q, seqlen_k, 6, 2, 40, arrays.half, seqlen_q, 2.0)
        )
        mask = visible(arrays, options, arrays.arange(seqlen_q), arrays.arange(seqlen_k), seqlen_q, seqlen_k)
        q, k, v = (a.transpose(1, 2) for a in (query, *(x.repeat_interleave(3, 2) for x in (key, value))))
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=options.scale)
        out, lse = reference(arrays, query, key, value, options)
        assert float(abs(out - expected.transpose(1, 2)).max()) < 1e-12
        scores = (q @ k.transpose(-1, -2) * options.scale_for(40)).masked_fill(~mask, float("-inf"))
        assert float(abs(lse - scores.logsumexp(-1)).max()) < 1e-12


def test_softcap_and_blind_queries(arrays):
    """A softcap far above the scores changes little, one far below makes them all nearly equal; no key seen, zeros."""
    tensors = arrays.qkv(1, 30, 20, 2, 2, 16, arrays.half, 3)
    plain, _ = reference(arrays, *tensors)
    assert errors(arrays, reference(arrays, *tensors, Options(softcap=1e6))[0], plain)[0] < 1e-9
    flat, lse = reference(arrays, *tensors, Options(softcap=1e-9))
    assert errors(arrays, flat, reference(arrays, *tensors, Options(scale=0.0))[0])[0] < 1e-7
    for out, lse in (
        reference(arrays, *tensors, Options(causal=True)),
        emulation(arrays, *tensors, Options(causal=True)),
    ):
        assert not bool((out[:, :10] != 0).any()) and not bool((lse[:, :, :10] != float("-inf")).any())
        assert bool((lse[:, :, 10:] > float("-inf")).all())


def judge(arrays, out, tensors, options=PLAIN):
    dtype = str(tensors[0].dtype).removeprefix("torch.")
    expected, _ = reference(arrays, *tensors, options)
    yard = errors(arrays, yardstick(arrays, *tensors, options), expected)
    magnitude = score_magnitude(*(arrays.float64(a) for a in tensors[:2]), options)
    cancelled = cancellation(arrays, tensors[2], expected)
    return meets_standard(errors(arrays, out, expected), yard, dtype, magnitude, cancelled)


@pytest.mark.parametrize("tile", [16, 64, 128])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_emulation_meets_the_standard(arrays, dtype, tile):
    """Measured with PyTorch's flash backend where it can express the problem, whatever the tile."""
    if dtype not in arrays.dtypes:
        pytest.skip(f"no {dtype} here")
    for i, (seqlen_q, seqlen_k, head_dim) in enumerate(((64, 64, 64), (2, 511, 128), (129, 129, 40), (300, 1000, 8))):
        for score in (1.0, 16.0):
            tensors = arrays.qkv(8, seqlen_q, seqlen_k, 4, 2, head_dim, dtype, i, score)
            options = Options(causal=i % 2 == 0)
            assert judge(arrays, emulation(arrays, *tensors, options, tile)[0], tensors, options)


WRONG = {
    "scale 1% off": lambda a, q, k, v: emulation(a, q, k, v, Options(scale=1.01 * q.shape[-1] ** -0.5))[0],
    "last key missing": lambda a, q, k, v: emulation(a, q, k[:, :-1], v[:, :-1])[0],
    "keys shifted": lambda a, q, k, v: emulation(a, q, k, a.concatenate([v[:, 1:], v[:, :1]], 1))[0],
    "heads swapped": lambda a, q, k, v: a.concatenate([emulation(a, q, k, v)[0][:, :, 1:], q[:, :, :1]], 2),
    "output rounded through bfloat16": lambda a, q, k, v: a.cast(
        a.cast(emulation(a, q, k, v)[0], "bfloat16" if torch else "float16"), str(q.dtype).removeprefix("torch.")
    ),
    "one element wrong": lambda a, q, k, v: _spoil(a, emulation(a, q, k, v)[0], 0.5),
    "one NaN": lambda a, q, k, v: _spoil(a, emulation(a, q, k, v)[0], float("nan")),
    "row sums of rounded scores": lambda a, q, k, v: emulation(
        a, a.cast(a.cast(q, "float16") * 1.001, "float16"), k, v
    )[0],
}


def _spoil(arrays, out, by):
    out = arrays.copy(out)
    out[0, -1, 0, 3] += by
    return out


@pytest.mark.parametrize("wrong", WRONG)
def test_the_standard_refuses(arrays, wrong):
    """Each of these is wrong by little; none may pass."""
    dtypes = {"output rounded through bfloat16": "float16" if torch else "float32"}
    tensors = arrays.qkv(4, 100, 200, 2, 2, 64, dtypes.get(wrong, "float16"), 5, 2.0)
    if wrong == "output rounded through bfloat16" and not torch:
        pytest.skip("NumPy has no bfloat16")
    out = WRONG[wrong](arrays, *tensors)
    assert not judge(arrays, out, tensors)
    assert judge(arrays, emulation(arrays, *tensors)[0], tensors)


def test_float32_standard_refuses_half_precision(arrays):
    """The floor that float32 has lets no computation in half precision pass."""
    if "float32" not in arrays.dtypes:
        pytest.skip("no float32 here")
    for score in (1.0, 16.0):
        tensors = arrays.qkv(4, 100, 200, 2, 2, 64, "float32", 7, score)
        halves = [arrays.cast(a, "float16") for a in tensors]
        assert not judge(arrays, arrays.cast(emulation(arrays, *halves)[0], "float32"), tensors)


@pytest.mark.skipif(torch is None, reason="needs torch")
def test_yardstick_is_sdpa_where_it_can_be(arrays):
    tensors = arrays.qkv(1, 50, 50, 6, 2, 64, arrays.half, 9)
    for options, expressible in (
        (Options(), True),
        (Options(causal=True), True),
        (Options(window=(3, 3)), False),
        (Options(softcap=1.0), False),
        (Options(scale=-1.0), False),
    ):
        assert sdpa_expresses(*tensors[:2], options) == expressible
        if expressible:
            ours = yardstick(arrays, *tensors, options)
            assert arrays.same_bits(ours, sdpa_flash(*tensors, options))
    assert not sdpa_expresses(tensors[0][:, :20], tensors[1], Options(causal=True))


@pytest.mark.parametrize("memory", ["contiguous", "padded", "transposed", "expanded", "reversed"])
def test_placed_arrays(arrays, memory):
    """They hold what they should, and a write beside them shows."""
    if memory == "reversed" and arrays.on_gpu:
        pytest.skip("NumPy only")
    for shape in ((2, 5, 3, 8), (5, 3, 8)):
        values = arrays.random(shape, "float16", 11)
        placed = place(arrays, shape, "float16", memory, values)
        got = arrays.float64(placed.view)
        expected = arrays.float64(values)
        if memory == "expanded":
            expected = expected[:1] + 0 * expected
        assert bool((got == expected).all())
        if memory != "expanded":
            assert placed.surroundings_intact()
            placed = place(arrays, shape, "float16", memory, values)
            placed.buffer[511] = 0  # the last element of the guard in front
            assert not placed.surroundings_intact()


def test_pairs(device):
    parameters = {"a": (1, 2, 3), "b": ("x", "y"), "c": tuple(range(5)), "d": (False, True)}
    cases = pairwise(parameters)
    assert not list(uncovered(parameters, cases))
    assert 15 <= len(cases) <= 22  # 3 × 5 pairs of a and c are the least
    assert cases == pairwise(parameters)
    assert list(uncovered(parameters, cases[:3]))
    some = pairwise(parameters, lambda case: not (case["a"] == 1 and case["b"] == "x"))
    assert list(uncovered(parameters, some)) == [(("a", 1), ("b", "x"))]
    whole = [product_case(parameters, i) for i in range(product_size(parameters))]
    assert len({tuple(case.values()) for case in whole}) == len(whole) == 60
