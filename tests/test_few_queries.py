# SPDX-License-Identifier: Apache-2.0
"""Few queries with many keys, as in decoding: kernels that treat such problems apart, and keys divided over tasks."""

from __future__ import annotations

import pytest
from reference import Options, assert_attention

import flashcore

DTYPES = ["float32", "float16", "bfloat16"]

# (batch, seqlen_q, heads_q, heads_k, seqlen_k, head_dim); on the CPU those of more than 8,191 keys are divided, but the
# last, which has too many rows.
SHAPES = [
    (2, 1, 8, 2, 333, 128),
    (1, 1, 4, 4, 3 * 8192 + 5, 64),
    (1, 3, 4, 2, 10000, 96),
    (2, 7, 1, 1, 50, 32),
    (1, 1, 8, 1, 16384, 256),
    (1, 1, 36, 9, 8192, 32),
    (3, 2, 12, 4, 1, 64),
    (1, 5, 2, 2, 3, 128),
    (1, 1, 9, 1, 8200, 64),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_few_queries(arrays, dtype, shape, layout):
    if dtype not in arrays.dtypes:
        pytest.skip(f"no {dtype} here")
    batch, seqlen_q, heads_q, heads_k, seqlen_k, head_dim = shape
    # The relative error of a few rows is chance, where a few weights make most of them: on a GPU, whose weights are not
    # relative to a row's own maximum, 128 rows or more are judged together (4 rows were seen at 1.37 of the yardstick,
    # 32 at 1.26).
    calls = 1 if arrays.device == "cpu" else -(-128 // (batch * seqlen_q * heads_q))
    drawn = [
        arrays.qkv(batch, seqlen_q, seqlen_k, heads_q, heads_k, head_dim, dtype, seqlen_k + 100 * i, 3.0)
        for i in range(calls)
    ]
    every = [arrays.xp.concatenate(list(of), 0) for of in zip(*drawn, strict=True)]
    for options in (Options(causal=True), Options(window=(70, 3)), Options(softcap=5.0), Options(scale=-0.2)):
        results = []
        for tensors in drawn:
            given = tensors if layout == "bshd" else [t.swapaxes(1, 2) for t in tensors]
            keywords = {"layout": layout, **options.keywords()}
            out, lse = flashcore.attention(*given, return_lse=True, **keywords)
            again, _ = flashcore.attention(*given, return_lse=True, **keywords)
            assert bool((out == again).all())
            alone = flashcore.attention(*given, **keywords)  # on Hopper not by the same softmax
            if layout == "bhsd":
                out, alone = out.swapaxes(1, 2), alone.swapaxes(1, 2)
            results.append((out, lse, alone))
        out, lse, alone = (arrays.xp.concatenate(list(of), 0) for of in zip(*results, strict=True))
        assert_attention(arrays, out, lse, *every, options, f"{shape} {options}")
        assert_attention(arrays, alone, None, *every, options, f"{shape} {options}, no lse")


def test_same_bits_whatever_the_number_of_threads(arrays):
    """How the keys are divided depends on the problem alone."""
    tensors = arrays.qkv(1, 1, 20000, 8, 2, 64, arrays.half, 3)
    threads = flashcore.get_num_threads()
    try:
        flashcore.set_num_threads(1)
        expected = flashcore.attention(*tensors)
        flashcore.set_num_threads(3)
        assert bool((flashcore.attention(*tensors) == expected).all())
    finally:
        flashcore.set_num_threads(threads)


def test_batch_invariance(arrays):
    """Asked for, a sequence gets the same bits alone and among others; the keys are then not divided."""
    query, key, value = arrays.qkv(70, 1, 8192, 8, 2, 32, arrays.half, 5)
    together = flashcore.attention(query, key, value, batch_invariant=True)
    alone = flashcore.attention(query[3:4], key[3:4], value[3:4], batch_invariant=True)
    assert bool((together[3:4] == alone).all())


def test_plan_divides_keys():
    shapes = {"device": "cpu", "dtype": "bfloat16"}
    assert flashcore.plan((1, 1, 8, 64), (1, 16384, 2, 64), (1, 16384, 2, 64), **shapes).splits == 4
    assert flashcore.plan((1, 1, 8, 64), (1, 4096, 2, 64), (1, 4096, 2, 64), **shapes).splits == 1
    assert flashcore.plan((1, 9, 8, 64), (1, 16384, 8, 64), (1, 16384, 8, 64), **shapes).splits == 1
    many = (1024, 16384, 2, 64)
    assert flashcore.plan((1024, 1, 8, 64), many, many, **shapes).splits == 1
    one = (1, 16384, 2, 64)
    assert flashcore.plan((1, 1, 8, 64), one, one, batch_invariant=True, **shapes).splits == 1


@pytest.mark.parametrize("gpu", ["a100", "h100"])
def test_plan_of_few_queries_on_a_gpu(gpu):
    """Many keys of few queries are divided over the multiprocessors, by the kernels of attention_kvcache."""
    forward, decode = {"a100": ("sm80_forward", "sm80_decode"), "h100": ("sm90_forward", "sm90_decode")}[gpu]

    def plan(batch, seqlen_q, seqlen_k, heads_q=32, heads_k=8, head_dim=128, **options):
        shapes = (batch, seqlen_q, heads_q, head_dim), (batch, seqlen_k, heads_k, head_dim)
        return flashcore.plan(shapes[0], shapes[1], shapes[1], dtype="bfloat16", device=gpu, **options)

    for batch, seqlen_q, seqlen_k in ((1, 1, 1025), (1, 1, 131072), (64, 1, 8192), (1, 16, 8192), (3, 4, 32768)):
        chosen = plan(batch, seqlen_q, seqlen_k)
        turned = gpu == "h100" and seqlen_q <= 8  # one tile of rows
        assert chosen.kernel == decode + ("_turned" if turned else ""), (batch, seqlen_q, seqlen_k)
        assert chosen.blocks >= 48, (batch, seqlen_q, seqlen_k)
        cached = (batch, seqlen_k, 8, 128)
        same = flashcore.plan(
            (batch, seqlen_q, 32, 128), cached, cached, cache_seqlens=(batch,), dtype="bfloat16", device=gpu
        )
        assert chosen == same or (gpu == "h100" and 1 < batch < 16)
    if gpu == "h100":  # sequences that are known to be equally long: a block for each multiprocessor
        for batch, cluster in ((2, 8), (4, 4), (8, 2), (16, 1)):
            chosen = plan(batch, 1, 8192)
            assert chosen.blocks == 128 and chosen.splits == 1 and chosen.workspace == 0
            assert ("a block each" if cluster == 1 else f"a cluster of {cluster} blocks") in chosen.reason
    # More rows than the decode kernels' tiles are good for; tiles for all multiprocessors; nothing to divide.
    for batch, seqlen_q, seqlen_k in ((1, 17, 8192), (1, 4096, 4096), (64, 1, 1024), (0, 1, 8192), (1, 0, 8192)):
        assert plan(batch, seqlen_q, seqlen_k).kernel == forward, (batch, seqlen_q, seqlen_k)
    assert plan(64, 16, 8192).kernel == (forward if gpu == "h100" else decode)  # where 64 rows share a tile
    assert plan(1, 1, 8192).kernel == plan(64, 1, 8192).kernel == decode + ("_turned" if gpu == "h100" else "")
    options = {"batch_invariant": True}
    assert plan(1, 1, 8192, **options).kernel == plan(64, 1, 8192, **options).kernel == decode
    assert plan(1, 16, 8192, batch_invariant=True).kernel == plan(64, 16, 8192, batch_invariant=True).kernel == decode
