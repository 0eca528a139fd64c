# SPDX-License-Identifier: Apache-2.0
"""plan(): what would run, for devices that are not here."""

from __future__ import annotations

import itertools
import math
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from arrays import SMALL_FORMS, backends, small_form

import flashcore

# Bytes of shared memory that a block may have, as the CUDA programming guide's table of compute capabilities has them.
SHARED_MEMORY = {
    "a100": 163 * 1024,
    "l4": 99 * 1024,
    "rtx4090": 99 * 1024,
    "h100": 227 * 1024,
    "h200": 227 * 1024,
    "b200": 227 * 1024,
}
# Multiprocessors.
UNITS = {"a100": 108, "l4": 58, "rtx4090": 128, "h100": 132, "h200": 132, "b200": 148}
# A build with CUDA but without sm_90a has no sm90 for them.
SM90 = not flashcore.info()["cuda"]["built"] or "sm_90a" in flashcore.info()["cuda"]["archs"]
HOPPER = ("h100", "h200") if SM90 else ()
needs_sm90 = pytest.mark.skipif(not SM90, reason="this build has no code for sm_90a")
CAPABILITY = {"a100": "8.0", "l4": "8.9", "rtx4090": "8.9", "h100": "9.0", "h200": "9.0", "b200": "10.0"}
INSTANCES = {"sm80": (32, 64, 96, 128, 192, 256), "sm90": (64, 96, 128, 192, 256)}  # head dimensions
SM90_TILE_Q = {64: (128, 192, 256), 96: (128, 192), 128: (128,), 192: (128,), 256: (128,)}
HEAD_DIMS = (8, 16, 24, 32, 40, 64, 72, 80, 96, 104, 128, 136, 160, 192, 200, 256)


def shape_plan(name, query, key=None, **options):
    options.setdefault("dtype", "float16")
    key = key or query
    return flashcore.plan(query, key, options.pop("value", key), device=name, **options)


def chosen(gpu) -> str:
    """The machine that a GPU gets where none is forced."""
    return "sm90" if gpu in HOPPER else "sm80"


def forced(gpu) -> tuple[str, ...]:
    """The machines that a GPU has."""
    return ("sm80", "sm90") if gpu in HOPPER else ("sm80",)


def check_grid(p, name, batch, seqlen_q, heads_q):
    """Enough tiles for all queries of all heads, and none beyond; a block for each tile, or few that go on and on."""
    assert p.tiles == batch * (heads_q // p.packed_heads) * -(-seqlen_q // (p.tile_q // p.packed_heads))
    if p.kernel == "sm90_forward":
        assert min(p.tiles, UNITS[name]) <= p.blocks <= min(p.tiles, 4 * UNITS[name])
    elif p.kernel == "sm90_stream":
        assert p.blocks == min(p.tiles, 2 * UNITS[name])
    else:
        groups = p.threads // (2 * p.tile_q) if p.kernel == "sm90_small" else 1  # that divide a block's keys
        assert p.blocks == p.tiles * p.splits // groups


@pytest.fixture
def large_kernel(monkeypatch):
    """Plans for sm90 are of the kernel for large problems, whatever the size."""
    monkeypatch.setenv("FLASHCORE_SM90_KERNEL", "large")


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


@needs_sm90
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("seqlen_q", [1, 2, 16, 100, 128, 192, 4096])
@pytest.mark.parametrize("group", [1, 3, 4, 5, 7, 71, 200])
def test_packed_heads(device, large_kernel, group, seqlen_q, head_dim):
    """Query heads of one key head share a tile where that leaves fewer rows of it empty."""
    for causal in (False, True):
        for batch, heads_k in ((1, 1), (3, 2)):
            query, key = (batch, seqlen_q, heads_k * group, head_dim), (batch, 1000, heads_k, head_dim)
            p = shape_plan("h100", query, key, causal=causal, backend="sm90")
            assert p.backend == "sm90" and p.packed_heads in (1, group)
            check_grid(p, "h100", batch, seqlen_q, heads_k * group)
            if p.packed_heads > 1:
                assert group <= p.tile_q
                apart = batch * heads_k * group * -(-seqlen_q // p.tile_q)
                assert p.tiles < apart, "packed without need"
                assert f"{group} query heads" in p.reason
            if seqlen_q == 1 and 1 < group <= 128:
                assert p.packed_heads == group and p.tiles == batch * heads_k
            for name, backend in (("a100", None), ("h100", "sm80"), ("cpu", None)):
                assert shape_plan(name, query, key, causal=causal, backend=backend).packed_heads == 1


@needs_sm90
def test_packed_heads_of_variable_lengths(device):
    """Decoding with grouped heads packs; long sequences gain nothing that would be worth the other loads."""
    for group in (1, 3, 4, 5, 7, 71, 200):
        for total in (9, 90, 9000):
            shapes = dict(query=(total, 2 * group, 128), key=(7000, 2, 128), cu_seqlens_q=(10,), cu_seqlens_k=(10,))
            for hints in ({}, {"max_seqlen_q": total // 9, "max_seqlen_k": 7000}):
                p = shape_plan("h100", **shapes, **hints, backend="sm90")
                assert p.backend == "sm90" and p.packed_heads in (1, group)
                queries = p.tile_q // p.packed_heads
                assert queries >= 1
                assert p.tiles >= 2 * group // p.packed_heads * ((total - 9) // queries + 9)


@needs_sm90
def test_no_packed_heads_beyond_what_tma_encodes(device, large_kernel):
    """A step over the heads of a tile is one stride, and must be below 2^40 bytes."""
    for seqlen, packed in ((2**29 + 1, 1), (2**29 - 127, 4)):
        query, key = (1, 8, seqlen, 256), (1, 2, seqlen, 256)
        p = shape_plan("h100", query, key, layout="bhsd", backend="sm90")
        assert p.packed_heads == packed
        # As many queries, whose heads lie close together.
        p = shape_plan("h100", (1, seqlen, 8, 256), (1, seqlen, 2, 256), backend="sm90")
        assert p.packed_heads == 4


@needs_sm90
@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_batch_invariant_tiles(device, large_kernel, head_dim, softcap):
    """The head dimension's first tile whatever the batch, and no packed heads; both differ where it is not asked
    for."""
    free, fixed = set(), set()
    for batch, seqlen_q, heads_q in itertools.product((1, 2, 33), (1, 5, 64, 129, 300, 4096), (4, 12, 16)):
        for causal in (False, True):
            options = dict(causal=causal, softcap=softcap, backend="sm90")
            query, key = (batch, seqlen_q, heads_q, head_dim), (batch, 1000, 4, head_dim)
            plans = [shape_plan("h100", query, key, **options, batch_invariant=on) for on in (False, True)]
            check_grid(plans[1], "h100", batch, seqlen_q, heads_q)
            for found, p in zip((free, fixed), plans, strict=True):
                found.add((p.head_dim, p.tile_q, p.tile_k, p.packed_heads))
    ((instance, tile_q, _, packed),) = fixed
    assert packed == 1 and tile_q == (256 if instance == 64 and softcap == 0.0 else 128)
    assert {found[3] for found in free} == {1, 3, 4}
    assert {found[1] for found in free} == (set(SM90_TILE_Q[instance]) if softcap == 0.0 else {128})


@needs_sm90
def test_batch_invariant_tiles_of_variable_lengths(device):
    for head_dim in INSTANCES["sm90"]:
        tiles = set()
        for sequences, total, group in itertools.product((2, 10, 100), (100, 5000), (1, 4)):
            shapes = dict(query=(total, 2 * group, head_dim), key=(7000, 2, head_dim))
            starts = dict(cu_seqlens_q=(sequences,), cu_seqlens_k=(sequences,))
            p = shape_plan("h100", **shapes, **starts, batch_invariant=True, backend="sm90")
            tiles.add((p.tile_q, p.tile_k, p.packed_heads))
        ((tile_q, _, packed),) = tiles
        assert packed == 1 and tile_q == (256 if head_dim == 64 else 128)


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


def small_plan(batch, seqlen_q, heads, head_dim, seqlen_k=None, heads_k=None, name="h100", **options):
    key = (batch, seqlen_k or seqlen_q, heads_k or heads, head_dim)
    return shape_plan(name, (batch, seqlen_q, heads, head_dim), key, **options)


def small_form_of(p):
    """Rows of a tile, warpgroups and blocks that divide its keys."""
    groups = p.threads // (2 * p.tile_q)
    return p.tile_q, groups, p.splits // groups


def check_small(p, batch, seqlen_q, heads, seqlen_k):
    """A warpgroup for each 64 rows and part of the keys; the parts hold all keys, each whole in a block's memory."""
    assert p.backend == "sm90" and p.kernel == "sm90_small" and p.workspace == 0
    rows, groups, cluster = small_form_of(p)
    assert small_form_of(p) in SMALL_FORMS and p.threads == 2 * rows * groups
    check_grid(p, "h100", batch, seqlen_q, heads)
    assert p.tile_k % (64 * groups) == 0 and cluster * p.tile_k >= seqlen_k
    assert p.tile_k == 64 * groups or cluster * (p.tile_k - 128 * groups) < seqlen_k  # a chunk less would not do
    # What is sent of 64 rows: maxima and sums, and half of the outputs to the other warpgroup, a share to a block.
    sent = 64 * 8 * (groups - 1 + cluster - 1) + 64 * 4 * p.head_dim * (groups - 1 + (cluster - 1) / cluster) / groups
    ones = 16 * 128 if p.head_dim == 64 else 0  # that give the rows' sums
    arrays = (rows + 2 * p.tile_k) * p.head_dim * 2 + ones + rows // 64 * groups * sent
    assert arrays + 4 * rows < p.shared_memory <= min(arrays + 4 * rows + 1024, SHARED_MEMORY["h100"])
    assert "small problem" in p.reason and str(p.tiles) in p.reason
    assert ("divide the keys" in p.reason) == (p.splits > 1) and ("cluster" in p.reason) == (cluster > 1)


def check_stream(p, batch, seqlen_q, heads, seqlen_k):
    """Blocks that fill the GPU, each with a list of its tiles and their keys that has room."""
    assert p.backend == "sm90" and p.kernel == "sm90_stream" and p.workspace == 0
    assert (p.tile_q, p.tile_k, p.threads, p.splits, p.packed_heads) == (128, 128, 256, 1, 1)
    check_grid(p, "h100", batch, seqlen_q, heads)
    assert -(-p.tiles // p.blocks) <= 32
    assert 2 * 3 * 128 * 128 < p.shared_memory <= SHARED_MEMORY["h100"] / 2 - 1024
    assert "small problem" in p.reason and str(p.tiles) in p.reason


@needs_sm90
@pytest.mark.parametrize("head_dim", [8, 40, 64, 72, 128])
def test_small_problems(device, head_dim):
    """Few tiles get the small kernel, with as many blocks as fill the GPU where there are keys to divide."""
    seed = small_plan(1, 512, 8, head_dim)
    check_small(seed, 1, 512, 8, 512)
    assert UNITS["h100"] * 0.9 <= seed.blocks <= 2 * UNITS["h100"]
    for softcap, causal, layout in itertools.product((0.0, 20.0), (False, True), ("bshd", "bhsd")):
        shape = (1, 512, 8, head_dim) if layout == "bshd" else (1, 8, 512, head_dim)
        p = shape_plan("h200", shape, causal=causal, softcap=softcap, layout=layout)
        assert p.kernel == "sm90_small" and p.head_dim == (64 if head_dim <= 64 else 128)
    check_small(small_plan(8, 128, 8, head_dim, causal=True), 8, 128, 8, 128)
    assert small_form_of(small_plan(8, 128, 8, head_dim, causal=True))[2] == 1  # enough tiles
    assert small_plan(1, 64, 2, head_dim, 1024).splits == 8  # two tiles, many keys


@needs_sm90
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("seqlen", [1, 64, 128, 200, 256, 400, 512, 700, 1024, 1500, 2048, 4096, 8192])
def test_change_over_to_the_large_kernel(device, seqlen, head_dim):
    """From a batch on the large kernel is taken, and for every larger one; a small one that is chosen is whole."""
    kernels = []
    for batch in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 1024, 10**5):
        p = small_plan(batch, seqlen, 8, head_dim)
        if p.kernel == "sm90_small":
            check_small(p, batch, seqlen, 8, seqlen)
        elif p.kernel == "sm90_stream":
            check_stream(p, batch, seqlen, 8, seqlen)
        kernels.append(p.kernel)
        causal = small_plan(batch, seqlen, 8, head_dim, causal=True)
        assert causal.kernel == p.kernel or p.kernel == "sm90_stream" != causal.kernel
    order = ["sm90_small", "sm90_stream", "sm90_forward"]
    assert kernels == sorted(kernels, key=order.index) and kernels[-1] == "sm90_forward"
    assert (kernels[0] == "sm90_small") == (seqlen <= (700 if head_dim == 64 else 512))
    assert ("sm90_stream" in kernels) == (head_dim == 64 and seqlen <= 2048)


@needs_sm90
def test_what_the_small_kernel_leaves_to_the_large_one(device):
    assert small_plan(1, 512, 8, 64, batch_invariant=True).kernel == "sm90_forward"
    for head_dim in (136, 192, 256):
        assert small_plan(1, 512, 8, head_dim).kernel == "sm90_forward"
    assert small_plan(1, 100, 1, 64, 2**20).kernel == "sm90_forward"
    starts = dict(cu_seqlens_q=(2,), cu_seqlens_k=(2,))
    assert shape_plan("h100", (512, 8, 64), **starts).kernel == "sm90_forward"
    # Heads of a key head that the large kernel's tile holds, and not the small one's.
    p = small_plan(1, 1, 71, 128, 512, 1)
    assert p.kernel == "sm90_forward" and p.packed_heads == 71
    p = small_plan(1, 1, 32, 128, 512, 4)
    assert p.kernel == "sm90_small" and p.packed_heads == 8 and "8 query heads" in p.reason
    for name in ("a100", "b200"):
        assert small_plan(1, 512, 8, 64, name=name).kernel == "sm80_forward"


@needs_sm90
def test_what_the_stream_kernel_leaves_to_others(device, monkeypatch):
    """Masks, heads that share a tile, general scores, larger heads, nothing to do, longer lists than a block has room
    for."""
    check_stream(small_plan(8, 512, 8, 64), 8, 512, 8, 512)
    check_stream(small_plan(32, 512, 8, 64), 32, 512, 8, 512)
    check_stream(small_plan(8, 512, 8, 40, heads_k=2), 8, 512, 8, 512)
    masks = [{"causal": True}, {"window": (100, 0)}, {"window": (None, 3)}]
    for options in (*masks, {"softcap": 20.0}, {"scale": -0.1}, {"batch_invariant": True}):
        assert small_plan(8, 512, 8, 64, **options).kernel == "sm90_forward"
    assert small_plan(64, 5, 32, 64, 400, 4).packed_heads == 8
    monkeypatch.setenv("FLASHCORE_SM90_KERNEL", "stream")
    assert "forced" in small_plan(8, 8, 8, 8).reason
    for options in masks:
        assert small_plan(8, 512, 8, 64, **options).kernel == "sm90_forward"
    assert small_plan(64, 5, 32, 64, 400, 4).kernel == "sm90_forward"
    assert small_plan(8, 512, 8, 72).kernel == "sm90_forward"
    assert shape_plan("h100", (8, 512, 8, 64), (8, 0, 8, 64)).kernel == "sm90_forward"
    assert small_plan(1, 128, 1, 64, 100000).kernel == "sm90_stream"
    kernels = [small_plan(tiles, 128, 1, 64).kernel for tiles in (32 * 264, 32 * 264 + 1)]
    assert kernels == ["sm90_stream", "sm90_forward"]


@needs_sm90
def test_forced_sm90_kernel(device, monkeypatch):
    free = small_plan(1, 512, 8, 64), small_plan(8, 4096, 32, 128)
    assert [p.kernel for p in free] == ["sm90_small", "sm90_forward"]
    monkeypatch.setenv("FLASHCORE_SM90_KERNEL", "large")
    assert small_plan(1, 512, 8, 64).kernel == "sm90_forward" and small_plan(8, 4096, 32, 128) == free[1]
    monkeypatch.setenv("FLASHCORE_SM90_KERNEL", "small")
    assert small_plan(1, 512, 8, 64) == free[0] and "forced" in small_plan(1, 512, 8, 64).reason
    assert small_plan(64, 512, 32, 128).kernel == "sm90_small"
    assert small_plan(8, 4096, 32, 128).kernel == "sm90_forward"  # the keys do not fit
    for form in SMALL_FORMS:
        monkeypatch.setenv("FLASHCORE_SM90_KERNEL", small_form(form))
        p = small_plan(2, 300, 8, 64, 500)
        assert p.kernel == "sm90_small" and small_form_of(p) == form
        assert small_plan(2, 300, 8, 128, 300).tile_q == 64  # the only one
        assert small_plan(1, 512, 8, 64, batch_invariant=True).kernel == "sm90_forward"
    for wrong in ("medium", "small:", "small:64", "small:64:2", "small:96:2:1", "small:64:3:1", "small:64:2:2:1"):
        monkeypatch.setenv("FLASHCORE_SM90_KERNEL", wrong)
        with pytest.raises(ValueError, match=f"FLASHCORE_SM90_KERNEL.*{wrong}"):
            small_plan(1, 512, 8, 64)
        assert small_plan(1, 512, 8, 64, backend="sm80").kernel == "sm80_forward"
    monkeypatch.setenv("FLASHCORE_SM90_KERNEL", "")
    assert small_plan(1, 512, 8, 64) == free[0]


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


def busiest(p, pairs: int, lengths: list[float], width: int) -> tuple[float, int]:
    """How much longer than the mean the busiest block works when blocks take the tiles of sections of `width` heads in
    turn, forwards and backwards and every two rounds two blocks further on, and the rounds. `lengths` is what the tiles
    of a head take, the last one's first."""
    busy = [0.0] * p.blocks
    rounds = 0
    for first in range(0, pairs, width):
        section = [length for length in lengths for _ in range(min(width, pairs - first))]
        for begin in range(0, width * len(lengths), p.blocks):
            for place, length in enumerate(section[begin : begin + p.blocks]):
                from_first = place if rounds % 2 == 0 else p.blocks - 1 - place
                busy[(from_first - rounds // 2 * 2) % p.blocks] += length
            rounds += 1
    return max(busy) / (sum(busy) / p.blocks), rounds


@needs_sm90
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [72, 96])
def test_three_warpgroups_for_long_sequences(device, large_kernel, head_dim, causal):
    """Head dimension 96 has tiles of 192 rows where they leave few rows empty: 11% are at 512 and 1,024 tokens, 3% at
    2,048; not where fewer tiles leave multiprocessors idle, and not for capped scores, which have no such tile."""

    def tile(batch, seqlen, heads, **options):
        p = shape_plan("h100", (batch, seqlen, heads, head_dim), causal=causal, **options)
        return p.tile_q, p.tile_k

    for seqlen in (512, 1024, 2048, 4096, 8192, 16384):
        assert tile(16384 // seqlen, seqlen, 21) == ((128, 128) if seqlen < 2048 else (192, 96)), seqlen
        assert tile(16384 // seqlen, seqlen, 21, softcap=30.0) == (128, 128)
    assert tile(1, 4096, 4) == (128, 128)  # 128 tiles of 128 rows, or 88 of 192, for 132 multiprocessors


@needs_sm90
@pytest.mark.parametrize("head_dim", [40, 64])
def test_three_or_four_warpgroups(device, large_kernel, head_dim):
    """Head dimension 64: three warpgroups of 128 keys for long sequences without a causal mask, where they leave 0.8%
    of the rows empty (3% at 2,048 and 4,096 tokens), and for variable lengths; four of 64 for the others, and where the
    tile must not depend on the batch."""

    def tile(batch, seqlen, **options):
        p = shape_plan("h100", (batch, seqlen, 32, head_dim), **options)
        return p.tile_q, p.tile_k

    for seqlen in (512, 1024, 2048, 4096, 8192, 16384):
        batch = 16384 // seqlen
        assert tile(batch, seqlen) == ((256, 64) if seqlen < 8192 else (192, 128)), seqlen
        assert tile(batch, seqlen, causal=True) == tile(batch, seqlen, batch_invariant=True) == (256, 64)
        assert tile(batch, seqlen, softcap=30.0) == (128, 128)
    for causal in (False, True):
        p = shape_plan("h100", (100000, 32, head_dim), cu_seqlens_q=(65,), cu_seqlens_k=(65,), causal=causal)
        assert (p.tile_q, p.tile_k) == (192, 128)


@needs_sm90
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("seqlen", [512, 1024, 2048, 4096, 8192, 16384])
def test_uneven_tiles_are_shared_evenly(device, large_kernel, head_dim, seqlen):
    """Of the widths of a section that take the fewest rounds of the blocks, the one that gives the busiest block the
    least is planned for, and sections stay within the L2 cache's share."""
    batch, heads = 16384 // seqlen, 21 if head_dim == 96 else 2048 // head_dim
    p = shape_plan("h100", (batch, seqlen, heads, head_dim), causal=True)
    found = re.search(r"Longest tiles first among (\d+) heads", p.reason)
    width = int(found[1]) if found else 1

    def share(rows: int) -> float:  # of a tile's time: warpgroups without rows have nothing to do
        return (1 + -(-rows // 64)) / (1 + p.tile_q // 64)

    tiles = [(first, min(first + p.tile_q, seqlen)) for first in range(0, seqlen, p.tile_q)]
    lengths = [-(-end // p.tile_k) * share(end - first) + 240 / p.tile_k for first, end in reversed(tiles)]
    pairs = batch * heads
    imbalance, rounds = busiest(p, pairs, lengths, width)
    assert width <= max(16, 50 * 2**19 // (4 * seqlen * head_dim))
    assert imbalance < {96: 1.05, 192: 1.06, 256: 1.08}.get(head_dim, 1.035)
    for other in {1, 4, 8, 16, 32, pairs} - {width}:
        if other > min(pairs, 25 * 2**20 // (4 * seqlen * head_dim)):
            continue
        other_imbalance, other_rounds = busiest(p, pairs, lengths, other)
        assert rounds < other_rounds or (rounds == other_rounds and imbalance <= other_imbalance + 1e-9)
