# SPDX-License-Identifier: Apache-2.0
"""flashcore.flash_attn: FlashAttention's functions by name and signature, their results, and what is refused."""

from __future__ import annotations

import inspect
import itertools

import pytest
from reference import Options, assert_attention

torch = pytest.importorskip("torch")
fa = pytest.importorskip("flashcore.flash_attn")

NONE = (-1, -1)
COMMON = {
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": NONE,
    "softcap": 0.0,
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": False,
}
REQUIRED = inspect.Parameter.empty
# What flash_attn 2.8 has, in order.
SIGNATURES = {
    "flash_attn_func": {**dict.fromkeys("qkv", REQUIRED), **COMMON},
    "flash_attn_qkvpacked_func": {"qkv": REQUIRED, **COMMON},
    "flash_attn_varlen_func": {
        **dict.fromkeys(
            ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"),
            REQUIRED,
        ),
        **COMMON,
        "block_table": None,
    },
    "flash_attn_with_kvcache": {
        **dict.fromkeys(("q", "k_cache", "v_cache"), REQUIRED),
        **dict.fromkeys(("k", "v", "rotary_cos", "rotary_sin", "cache_seqlens", "cache_batch_idx", "cache_leftpad")),
        "block_table": None,
        "softmax_scale": None,
        "causal": False,
        "window_size": NONE,
        "softcap": 0.0,
        "rotary_interleaved": True,
        "alibi_slopes": None,
        "num_splits": 0,
        "return_softmax_lse": False,
    },
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    parameters = inspect.signature(getattr(fa, name)).parameters
    assert list(parameters.items()) and {p.kind for p in parameters.values()} == {
        inspect.Parameter.POSITIONAL_OR_KEYWORD
    }
    assert [(n, p.default) for n, p in parameters.items()] == list(SIGNATURES[name].items())


CASES = tuple(itertools.product((False, True), (NONE, (17, -1), (5, 9)), (0.0, 20.0), (None, 0.2)))


def options_of(causal, window, softcap, scale):
    """The call's options, and the same for the reference."""
    ours = {"causal": causal, "window_size": window, "softcap": softcap, "softmax_scale": scale}
    sides = tuple(None if side < 0 else side for side in window)
    return ours, Options(causal, sides, scale, softcap)


def test_func(arrays):
    for seed, case in enumerate(CASES):
        keywords, options = options_of(*case)
        q, k, v = arrays.qkv(2, 70, 90, 4, 2, 48, "bfloat16", seed, score=4.0)
        out = fa.flash_attn_func(q, k, v, **keywords)
        assert_attention(arrays, out, None, q, k, v, options, str(case))
        again, lse, dropped = fa.flash_attn_func(q, k, v, 0.0, *keywords_in_order(keywords), return_attn_probs=True)
        assert arrays.same_bits(again, out) and dropped.numel() == 0
        assert_attention(arrays, again, lse, q, k, v, options, str(case))


def keywords_in_order(keywords):
    return [keywords[name] for name in ("softmax_scale", "causal", "window_size", "softcap")]


def test_qkvpacked(arrays):
    qkv = torch.stack(arrays.qkv(2, 70, 70, 4, 4, 48, "float16", 3), dim=2)
    for case in CASES:
        keywords, _ = options_of(*case)
        assert arrays.same_bits(
            fa.flash_attn_qkvpacked_func(qkv, **keywords), fa.flash_attn_func(*qkv.unbind(2), **keywords)
        )


def test_varlen(arrays):
    queries, keys = (0, 30, 31, 70), (0, 40, 45, 90)
    q, k, v = (x[0] for x in arrays.qkv(1, queries[-1], keys[-1], 4, 2, 48, "float16", 5, score=4.0))
    for case in CASES:
        keywords, options = options_of(*case)
        starts = arrays.int32(queries), arrays.int32(keys)
        out = fa.flash_attn_varlen_func(q, k, v, *starts, 39, 45, **keywords)
        again, lse, _ = fa.flash_attn_varlen_func(q, k, v, *starts, 39, 45, **keywords, return_attn_probs=True)
        assert arrays.same_bits(again, out)
        for (a, b), (c, d) in zip(itertools.pairwise(queries), itertools.pairwise(keys), strict=True):
            one = q[None, a:b], k[None, c:d], v[None, c:d]
            assert_attention(arrays, out[None, a:b], lse[None, :, a:b], *one, options, str(case))


def test_with_kvcache(arrays):
    """Three new tokens of two sequences are appended and attended to, in a plain cache and in one of pages."""
    before = (30, 7)
    for seed, case in enumerate(CASES):
        keywords, options = options_of(*case)
        q, k, v = arrays.qkv(2, 3, 40, 4, 2, 48, "bfloat16", seed, score=4.0)
        cache = [arrays.poison((2, 64, 2, 48), "bfloat16") for _ in (k, v)]
        for filled, tokens in zip(cache, (k, v), strict=True):
            for b, n in enumerate(before):
                filled[b, :n] = tokens[b, :n]
        pages = [filled.reshape(8, 16, 2, 48).flip(0).contiguous() for filled in cache]  # the last page first
        table = arrays.int32([[7, 6, 5, 4], [3, 2, 1, 0]])
        new = [torch.stack([tokens[b, n : n + 3] for b, n in enumerate(before)]) for tokens in (k, v)]
        lengths = arrays.int32(before)
        out, lse = fa.flash_attn_with_kvcache(
            q, *cache, *new, cache_seqlens=lengths, **keywords, return_softmax_lse=True
        )
        paged = fa.flash_attn_with_kvcache(q, *pages, *new, cache_seqlens=lengths, block_table=table, **keywords)
        for b, n in enumerate(before):
            one = q[b, None], k[b, None, : n + 3], v[b, None, : n + 3]
            assert arrays.same_bits(cache[0][b, : n + 3], k[b, : n + 3])
            assert arrays.is_poison(cache[0][b, n + 3 :])
            assert_attention(arrays, out[b, None], lse[b, None], *one, options, str(case))
            assert_attention(arrays, paged[b, None], None, *one, options, str(case))


def test_with_kvcache_lengths_and_splits(arrays):
    q, k, v = arrays.qkv(2, 1, 64, 4, 2, 32, "float16", 3)
    full = fa.flash_attn_with_kvcache(q, k, v)
    assert_attention(arrays, full, None, q, k, v)
    assert arrays.same_bits(fa.flash_attn_with_kvcache(q, k, v, cache_seqlens=64), full)
    some = fa.flash_attn_with_kvcache(q, k, v, cache_seqlens=20, num_splits=1)
    assert_attention(arrays, some, None, q, k[:, :20], v[:, :20])
    alone = fa.flash_attn_with_kvcache(q[:1], k[:1], v[:1], cache_seqlens=20, num_splits=1)
    assert arrays.same_bits(alone, some[:1])


def test_strides_and_head_dimensions_that_flash_attention_takes(arrays):
    """It copies what is not contiguous in the last dimension, and pads head dimensions."""
    q, k, v = arrays.qkv(2, 20, 20, 4, 2, 20, "float16", 7)
    expected = fa.flash_attn_func(q, k, v, causal=True)
    assert_attention(arrays, expected, None, q, k, v, Options(causal=True))
    assert expected.shape == q.shape
    strided = [x.mT.contiguous().mT for x in (q, k, v)]
    assert strided[0].stride(-1) != 1
    assert arrays.same_bits(fa.flash_attn_func(*strided, causal=True), expected)


def test_compiles(arrays):
    q, k, v = arrays.qkv(2, 20, 20, 4, 2, 32, "float16", 7)
    compiled = torch.compile(fa.flash_attn_func, fullgraph=True, backend="aot_eager")
    assert arrays.same_bits(compiled(q, k, v, causal=True), fa.flash_attn_func(q, k, v, causal=True))


def test_what_is_not_supported_is_refused_by_name(arrays):
    q, k, v = arrays.qkv(1, 8, 8, 2, 2, 16, "float16", 9)
    starts = arrays.int32([0, 8])
    packed = (*(x[0] for x in (q, k, v)), starts, starts, 8, 8)
    slopes = torch.ones(2, device=q.device)
    for name, args in (
        ("flash_attn_func", (q, k, v)),
        ("flash_attn_qkvpacked_func", (torch.stack([q, k, v], 2),)),
        ("flash_attn_varlen_func", packed),
    ):
        function = getattr(fa, name)
        for option, value in (("dropout_p", 0.1), ("alibi_slopes", slopes)):
            with pytest.raises(NotImplementedError, match=f"^{option}: "):
                function(*args, **{option: value})
        function(*args, deterministic=True)
        with pytest.raises(TypeError, match="unexpected keyword"):
            function(*args, no_such_option=1)
    with pytest.raises(NotImplementedError, match="^block_table: "):
        fa.flash_attn_varlen_func(*packed, block_table=starts)
    for option in ("rotary_cos", "rotary_sin", "cache_batch_idx", "cache_leftpad", "alibi_slopes", "num_splits"):
        with pytest.raises(NotImplementedError, match=f"^{option}: "):
            fa.flash_attn_with_kvcache(q, k, v, **{option: 2 if option == "num_splits" else starts})
    with pytest.raises(ValueError, match=r"requires grad.*torch\.no_grad\(\)"):
        fa.flash_attn_func(q.requires_grad_(), k, v)
