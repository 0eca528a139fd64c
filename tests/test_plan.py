# SPDX-License-Identifier: Apache-2.0
"""plan(): what would run, for devices that are not here."""

from __future__ import annotations

import itertools
import math
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from arrays import backends
from plans import (
    CAPABILITY,
    HEAD_DIMS,
    HOPPER,
    INSTANCES,
    SHARED_MEMORY,
    SM90_TILE_Q,
    UNITS,
    check_grid,
    chosen,
    forced,
    needs_sm90,
    shape_plan,
)

import flashcore


@pytest.fixture(params=SHARED_MEMORY)
def gpu(request, device) -> str:
    """A GPU by name; none need be here. (`device` as in every test; the answers are the same on each.)"""
    return request.param


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_fits_the_device(gpu, head_dim, dtype):
    """The instance holds the head dimension, and its tiles of queries, keys and values fit into a block's shared
    memory."""
    for softcap, backend in itertools.product((0.0, 30.0), (None, *forced(gpu))):
        p = shape_plan(gpu, (4, 1000, 8, head_dim), dtype=dtype, softcap=softcap, backend=backend)
        assert p.backend == (backend or chosen(gpu)) and p.kernel == f"{p.backend}_forward"
        assert p.head_dim == next(d for d in INSTANCES[p.backend] if d >= head_dim)
        smallest = p.tile_k * p.head_dim * 2  # one tile of keys in 16 bits
        assert smallest <= p.shared_memory <= SHARED_MEMORY[gpu]
        assert p.threads % 32 == 0 and 32 <= p.threads <= 1024
        assert p.tile_q % 16 == 0 and p.tile_k % 16 == 0
        if p.backend == "sm90":  # 64 rows for each warpgroup that computes, and one warpgroup that loads
            assert p.tile_q in SM90_TILE_Q[p.head_dim] and p.threads == 2 * p.tile_q + 128
        assert p.splits >= 1 and p.workspace >= 0 and p.packed_heads == 1
        check_grid(p, gpu, 4, 1000, 8)
        assert gpu in p.reason and CAPABILITY[gpu] in p.reason


def test_head_dim_256_with_99_kib(device):
    """Devices of 8.6, 8.9 and 12.x have 99 KiB a block: they get smaller tiles, not an error; larger devices larger
    ones."""
    for dtype in ("float16", "bfloat16"):
        for head_dim in (200, 256):
            small = shape_plan("l4", (1, 4096, 16, head_dim), dtype=dtype)
            assert small == shape_plan("rtx4090", (1, 4096, 16, head_dim), dtype=dtype)
            assert small.shared_memory <= 101376 and small.head_dim == 256
            large = shape_plan("h100", (1, 4096, 16, head_dim), dtype=dtype, backend="sm80")
            assert large.tile_q * large.tile_k >= small.tile_q * small.tile_k
            assert large.shared_memory >= small.shared_memory


@pytest.mark.parametrize("head_dim", [1, 5, 33, 64, 100, 256])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_cpu(device, head_dim, dtype):
    p = shape_plan("cpu", (2, 100, 4, head_dim), (2, 50, 2, head_dim), dtype=dtype)
    assert p.backend == "cpu" and p.kernel == "cpu_forward"
    assert p.threads >= 1 and p.tile_q >= 1 and p.tile_k >= 1 and p.blocks >= 1
    assert p.shared_memory == 0
    assert p.reason


def test_cpu_tiles(device):
    """The more threads, the smaller the tiles of queries, down to 192; smaller ones where they differ in work."""
    before = flashcore.get_num_threads()
    chosen = []
    try:
        for threads in (1, 4, 64):
            flashcore.set_num_threads(threads)
            full, causal = (shape_plan("cpu", (1, 4096, 8, 64), causal=causal) for causal in (False, True))
            assert full.tiles == 8 * math.ceil(4096 / full.tile_q)
            assert causal.tile_q <= full.tile_q
            chosen.append(full.tile_q)
    finally:
        flashcore.set_num_threads(before)
    assert chosen == sorted(chosen, reverse=True) and set(chosen) <= {192, 384, 768} and chosen[-1] == 192


def test_cpu_tiles_of_whole_heads(device):
    """Heads of one tile each do not differ, whatever the mask: four for each thread are an even load."""
    before = flashcore.get_num_threads()
    try:
        flashcore.set_num_threads(2)
        for heads, tiles in ((8, 8), (16, 16), (4, 12)):
            assert shape_plan("cpu", (1, 512, heads, 64), causal=True).tiles == tiles
    finally:
        flashcore.set_num_threads(before)


def test_cpu_tiles_whose_keys_are_held(device):
    """On tile registers a head is one tile where its packed keys and values are held, and heads are enough."""
    before = flashcore.get_num_threads()
    on_tiles = flashcore.info()["cpu"]["isa"] == "avx512amx"
    try:
        flashcore.set_num_threads(2)
        for seqlen, heads, dtype, held in (
            (2048, 8, "bfloat16", True),
            (2048, 7, "bfloat16", False),  # too few heads for an even load
            (2049, 8, "bfloat16", False),  # too many keys, with a head dimension of 128
            (1024, 8, "float16", True),
            (2048, 8, "float16", False),
        ):
            for causal in (False, True):
                plan = shape_plan("cpu", (1, seqlen, heads, 128), dtype=dtype, causal=causal)
                assert (plan.tile_q > 768) == (held and on_tiles), (seqlen, heads, dtype)
                assert not held or not on_tiles or plan.tiles == heads
    finally:
        flashcore.set_num_threads(before)


def test_same_question_same_answer(gpu):
    """A pure function of values; plans compare by value and are hashable, their text tells them apart."""
    for backend in (None, *forced(gpu)):
        options = dict(causal=True, backend=backend)
        plans = [shape_plan(gpu, (3, 513, 12, 128), (3, 700, 4, 128), **options) for _ in range(3)]
        assert plans[0] == plans[1] == plans[2] and hash(plans[0]) == hash(plans[1])
        assert repr(plans[0]) == repr(plans[1])
        other = shape_plan(gpu, (3, 513, 12, 64), (3, 700, 4, 64), **options)
        assert other != plans[0] and repr(other) != repr(plans[0])
        assert plans[0] != "a plan"
        for field in (
            "backend",
            "kernel",
            "head_dim",
            "tile_q",
            "tile_k",
            "packed_heads",
            "tiles",
            "threads",
            "blocks",
            "splits",
            "shared_memory",
            "workspace",
        ):
            assert f"{field}={getattr(plans[0], field)!r}" in repr(plans[0])
        with pytest.raises(AttributeError):
            plans[0].tile_q = 1


def test_a_remembered_plan_is_not_taken_for_another_problem_s(gpu):
    """A thread remembers its last plans. A new thread knows none: what it answers is what each question's answer is."""
    fixed = dict(query=(1, 512, 8, 64), key=(1, 512, 8, 64), value=(1, 512, 8, 64), dtype="float16", device=gpu)
    varlen = {**fixed, "cu_seqlens_q": (5,), "cu_seqlens_k": (5,)}
    varlen.update((name, (5000, 8, 64)) for name in ("query", "key", "value"))
    cached = {**fixed, "cache_seqlens": (4,), "query": (4, 1, 8, 64)}
    cached.update((name, (4, 9000, 8, 64)) for name in ("key", "value"))
    paged = {**cached, "page_table": (4, 90)}
    paged.update((name, (400, 64, 8, 64)) for name in ("key", "value"))
    other_gpu = "a100" if gpu != "a100" else "l4"
    options = (
        *(dict(causal=True), dict(window=(100, None)), dict(window=(None, 100)), dict(softcap=1.0), dict(scale=-1.0)),
        *(dict(scale=1.0), dict(scale=0.0), dict(batch_invariant=True), dict(backend="sm80"), dict(device=other_gpu)),
        dict(dtype="bfloat16"),
    )
    layouts, one = dict(layout="bhsd"), dict(query=(1, 1, 8, 64))
    batch = {name: (64, 512, 8, 64) for name in ("query", "key", "value")}  # of the same strides
    causal_in_window = dict(batch, causal=True, window=(100, None))
    more = {name: (1, 4096, 8, 64) for name in ("key", "value")}
    fewer_heads = {name: (1, 512, 2, 64) for name in ("key", "value")}
    wide = {name: (1, 512, 8, 128) for name in ("query", "key", "value")}
    table = {name: (100, 256, 8, 64) for name in ("key", "value")}
    hints = dict(max_seqlen_q=99), dict(max_seqlen_k=99, causal=True), dict(seqused_k=(4,))
    bounds = dict(cu_seqlens_q=(9,), cu_seqlens_k=(9,))
    questions = [
        *({**fixed, **change} for change in ({}, *options, layouts, one, more, fewer_heads, wide)),
        *({**fixed, **change} for change in (batch, dict(batch, causal=True), causal_in_window)),
        *({**varlen, **change} for change in ({}, *options, *hints, bounds)),
        *({**cached, **change} for change in ({}, *options, dict(query=(4, 3, 8, 64)))),
        *({**paged, **change} for change in ({}, table, dict(page_table=(4, 9)))),
    ]
    answers = []
    for question in questions:
        with ThreadPoolExecutor(1) as pool:
            answers.append(pool.submit(flashcore.plan, **question).result())
    assert len(set(answers)) > 12
    pairs = list(zip(questions, answers, strict=True))
    for order in (pairs, pairs[::-1], [pair for p in pairs for pair in (pairs[0], p, p, pairs[0])]):
        for question, answer in order:
            assert flashcore.plan(**question) == answer, question


def test_layouts(gpu):
    """The same problem in the other layout has the same plan."""
    for backend in (None, *forced(gpu)):
        a = shape_plan(gpu, (2, 1000, 8, 64), (2, 500, 4, 64), backend=backend)
        b = shape_plan(gpu, (2, 8, 1000, 64), (2, 4, 500, 64), layout="bhsd", backend=backend)
        assert a == b


def test_varlen(gpu):
    for backend in (None, *forced(gpu)):
        shapes = dict(query=(5000, 8, 64), key=(7000, 2, 64), cu_seqlens_q=(10,), cu_seqlens_k=(10,), backend=backend)
        p = shape_plan(gpu, **shapes, max_seqlen_q=600, max_seqlen_k=900, causal=True)
        assert p.backend == (backend or chosen(gpu))
        # However the 5000 queries fall into 9 sequences, there are tiles for them: most where each has one query too
        # many.
        queries = p.tile_q // p.packed_heads
        assert p.tiles >= 8 // p.packed_heads * ((5000 - 9) // queries + 9)
        assert min(p.tiles, UNITS[gpu]) <= p.blocks <= p.tiles
        # A counter hands the tiles out where a block gets several.
        assert p.workspace == (16 if p.backend == "sm90" and p.tiles > 2 * p.blocks else 0)
        assert p == shape_plan(gpu, **shapes, max_seqlen_q=600, max_seqlen_k=900, causal=True, seqused_k=(9,))
        assert shape_plan(gpu, **shapes).backend == p.backend
        # Hints may be wrong, so that there are tiles for all queries whatever they say.
        short = shape_plan(gpu, **shapes, max_seqlen_q=1)
        assert short.tiles >= 8 // short.packed_heads * ((5000 - 9) // (short.tile_q // short.packed_heads) + 9)


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_strides_that_tma_cannot_encode(device, layout):
    """2^40 bytes or more from one index to the next: sm90 refuses, sm80 runs. (Negative ones, which no shape has:
    tests/cpp_package/smoke.cc.)"""
    for name in HOPPER:
        far = (2, 2**20, 2**12, 128) if layout == "bshd" else (2, 2**12, 2**20, 128)  # 2^40 bytes each of the batch
        with pytest.raises(ValueError, match="backend.*sm90.*stride"):
            shape_plan(name, far, layout=layout, backend="sm90")
        p = shape_plan(name, far, layout=layout)
        assert p.backend == "sm80" and p.kernel == "sm80_forward" and name in p.reason and "TMA" in p.reason
        near = (2, *far[1:3], 120)
        assert shape_plan(name, near, layout=layout, backend="sm90").backend == "sm90"
        # The stride of an axis of extent 1 means nothing.
        assert shape_plan(name, (1, *far[1:]), layout=layout, backend="sm90").backend == "sm90"


def test_plans_for_arrays_as_for_shapes(device, arrays):
    tensors = arrays.qkv(2, 130, 200, 4, 2, 64, arrays.half, 1)
    name = "cuda" if arrays.on_gpu else "cpu"
    for backend in (None, *backends(arrays.device)):
        p = flashcore.plan(*tensors, causal=True, backend=backend)
        by_name = shape_plan(name, (2, 130, 4, 64), (2, 200, 2, 64), causal=True, backend=backend)
        # How many threads a CPU has is this machine's matter.
        fields = "backend kernel head_dim tile_q tile_k packed_heads tiles blocks splits shared_memory workspace"
        assert all(getattr(p, field) == getattr(by_name, field) for field in fields.split())
        if arrays.on_gpu:
            assert p == by_name


def test_empty(gpu):
    for backend, causal in itertools.product((None, *forced(gpu)), (False, True)):
        options = dict(backend=backend, causal=causal)
        for query, key in (((0, 10, 4, 64), (0, 10, 4, 64)), ((2, 0, 4, 64), (2, 10, 4, 64))):
            assert shape_plan(gpu, query, key, **options).blocks == 0
        assert shape_plan(gpu, (2, 10, 4, 64), (2, 0, 4, 64), **options).blocks > 0  # zeros have to be written


def test_forced_backend_that_cannot_run(gpu):
    with pytest.raises(ValueError, match="backend"):
        shape_plan(gpu, (1, 10, 2, 64), backend="cpu")
    for backend in ("sm80", "sm90"):
        with pytest.raises(ValueError, match=f"backend.*{backend}"):
            shape_plan("cpu", (1, 10, 2, 64), backend=backend)
    assert shape_plan("cpu", (1, 10, 2, 64), backend="cpu") == shape_plan("cpu", (1, 10, 2, 64))
    if gpu not in HOPPER:
        with pytest.raises(RuntimeError, match=f"{gpu}.*{re.escape(CAPABILITY[gpu])}"):
            shape_plan(gpu, (1, 10, 2, 64), backend="sm90")


def test_forced_backend(gpu):
    """sm80 runs on every GPU, sm90 on Hopper, where it is chosen; the plan is the same when it is forced."""
    for head_dim in HEAD_DIMS:
        query, key = (3, 700, 6, head_dim), (3, 500, 2, head_dim)
        free = shape_plan(gpu, query, key, causal=True)
        assert free.backend == chosen(gpu) and "forced" not in free.reason
        for backend in forced(gpu):
            p = shape_plan(gpu, query, key, causal=True, backend=backend)
            assert p.backend == backend and p.kernel.startswith(f"{backend}_") and "forced" in p.reason
            assert (p == free) == (backend == chosen(gpu)) and p.packed_heads in ((1,) if backend == "sm80" else (1, 3))
            check_grid(p, gpu, 3, 700, 6)


def test_what_a_gpu_refuses(gpu):
    with pytest.raises(TypeError, match="float32"):
        shape_plan(gpu, (1, 10, 2, 64), dtype="float32")
    for head_dim in (4, 60, 255):
        with pytest.raises(ValueError, match=str(head_dim)):
            shape_plan(gpu, (1, 10, 2, head_dim))


def test_bad_questions(device):
    shape = (1, 10, 2, 64)
    with pytest.raises(ValueError, match="device.*gtx480|gtx480.*device"):
        shape_plan("gtx480", shape)
    with pytest.raises((TypeError, ValueError), match="dtype"):
        shape_plan("h100", shape, dtype="float64")
    with pytest.raises((TypeError, ValueError), match="dtype"):
        flashcore.plan(shape, shape, shape, device="h100")
    with pytest.raises((TypeError, ValueError), match="device"):
        flashcore.plan(shape, shape, shape, dtype="float16")
    with pytest.raises(ValueError, match="query"):
        shape_plan("h100", (1, -10, 2, 64))
    with pytest.raises(ValueError, match="key"):
        shape_plan("h100", shape, (2, 10, 2, 64))
    with pytest.raises((TypeError, ValueError), match="query"):
        shape_plan("h100", (1, 10, "2", 64))
    with pytest.raises((TypeError, ValueError), match="query"):
        shape_plan("h100", (1, 10, 2**70, 64))


@pytest.mark.parametrize(
    ("query", "key"),
    [
        # Products beyond 32 bits and beyond 64.
        ((2**20, 128, 2**12, 64), (2**20, 128, 2**12, 64)),
        ((2**16, 2**20, 64, 128), (2**16, 2**20, 64, 128)),
        ((2**31, 1, 4, 64), (2**31, 1, 4, 64)),
        ((1, 1, 2**31 + 8, 64), (1, 1, 2**31 + 8, 64)),
        ((2**33, 2**29, 2**20, 64), (2**33, 2**29, 2**20, 64)),
        ((2**40, 2**30, 2**40, 256), (2**40, 2**30, 2**40, 256)),
        ((1, 2**30, 1, 64), (1, 2**30, 1, 64)),
        ((1, 2**30 + 1, 1, 64), (1, 1, 1, 64)),
        ((1, 2**62, 1, 8), (1, 2**62, 1, 8)),
        ((2**31, 0, 2**31, 64), (2**31, 4, 2**31, 64)),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("name", "backend"),
    [("h100", None), pytest.param("h100", "sm90", marks=needs_sm90), ("l4", None), ("cpu", None)],
)
def test_sizes_beyond_32_bits_never_wrap(device, name, backend, query, key):
    """Planned rightly, or refused; never planned too small."""
    try:
        p = shape_plan(name, query, key, backend=backend)
    except ValueError as error:
        arguments = ("query", "key", "value", "seqlen", *(["strides that TMA cannot"] if backend else []))
        assert any(argument in str(error) for argument in arguments)
        return
    batch, seqlen_q, heads, _ = query
    if name != "cpu":
        check_grid(p, name, batch, seqlen_q, heads)
    assert (p.blocks > 0) == (batch * heads * seqlen_q > 0)
    assert p.workspace >= 0


def test_large_sizes_that_must_work(gpu):
    """More than 2^31 elements, and more than 65535 heads and batches (CUDA's limit for the grid's other axes)."""
    for query in ((64, 2**17, 32, 128), (70000, 16, 1, 64), (1, 16, 70000, 64), (1, 2**20, 1, 64)):
        for backend, causal in itertools.product((None, *forced(gpu)), (False, True)):
            check_grid(shape_plan(gpu, query, backend=backend, causal=causal), gpu, *query[:3])


def test_a_large_problem_fills_the_device(gpu):
    for backend in (None, *forced(gpu)):
        assert shape_plan(gpu, (8, 4096, 32, 128), causal=True, backend=backend).blocks >= UNITS[gpu]
