# SPDX-License-Identifier: Apache-2.0
"""The Hopper kernel beside the Ampere one, on the same problems, both held to the numeric
standard; and what is its own: the edges of its tiles, packed heads, persistent blocks."""

from __future__ import annotations

import math

import cases
import pytest
from arrays import Arrays, backends, devices, on, place, torch
from pairwise import pairwise
from reference import PLAIN, Options, assert_attention
from test_varlen import BATCHES, check, make

import flashcore

HOPPER = "cuda" in devices() and "sm90" in backends("cuda")
pytestmark = pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0, and code for sm_90a")

BACKENDS = ("sm80", "sm90")
DTYPES = ("float16", "bfloat16")
HEAD_DIMS = (8, 40, 64, 72, 96, 128, 160, 192, 256)
INSTANCES = (64, 96, 128, 192, 256)  # the head dimensions that the kernel is compiled for
# Around the edges of tiles of 64, 128 and 256 rows, and of 192 keys.
EDGES = (1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257, 333)
MASKS = (
    Options(),
    Options(causal=True),
    Options(window=(70, 3)),
    Options(causal=True, window=(100, None), softcap=20.0),
    Options(softcap=30.0),
    Options(scale=-0.1),
    Options(causal=True, scale=0.3),
)
GROUPS = (3, 4, 5, 7, 71)


def grid(**parameters) -> list[dict]:
    """All-pairs cases of test_attention.py's parameters, with those given in place of theirs."""
    if not HOPPER:
        return []
    return pairwise({**cases.parameters(on("cuda")), **parameters}, cases.allowed)


EDGE_CASES = grid(head_dim=HEAD_DIMS, seqlen_q=EDGES, seqlen_k=EDGES)
GROUP_CASES = grid(head_dim=HEAD_DIMS, seqlen_q=(1, 2, 17, 130), seqlen_k=(1, 64, 150, 1000), group=GROUPS)


@pytest.fixture
def arrays() -> Arrays:
    return on("cuda")


@pytest.fixture(autouse=True)
def _the_large_kernel(_no_settings_from_outside, monkeypatch):
    """Small problems too: test_sm90_small.py has the kernel that they would get."""
    monkeypatch.setenv("FLASHCORE_SM90_KERNEL", "large")


def both(arrays, query, key, value, options=PLAIN, what="") -> None:
    """Runs bshd arrays on both machines, into poison between poison, and checks both."""
    for backend in BACKENDS:
        target = place(arrays, query.shape, str(query.dtype).removeprefix("torch."), "contiguous")
        out, lse = flashcore.attention(
            query, key, value, out=target.view, return_lse=True, backend=backend, **options.keywords()
        )
        assert_attention(arrays, out, lse, query, key, value, options, f"{backend} {what} {options}")
        assert target.surroundings_intact(), f"{backend} {what}: something was written beside out"
        if backend == "sm90":  # sums its rows in another way where no lse is asked for
            out = flashcore.attention(query, key, value, backend=backend, **options.keywords())
            assert_attention(arrays, out, None, query, key, value, options, f"no lse {what} {options}")


def both_varlen(arrays, tensors, cu_q, cu_k, options=PLAIN, used=None, what="", **hints) -> None:
    """The same for attention_varlen."""
    for backend in BACKENDS:
        target = place(arrays, tensors[0].shape, str(tensors[0].dtype).removeprefix("torch."), "contiguous")
        out, lse = flashcore.attention_varlen(
            *tensors,
            arrays.int32(cu_q),
            arrays.int32(cu_k),
            seqused_k=None if used is None else arrays.int32(used),
            out=target.view,
            return_lse=True,
            backend=backend,
            **options.keywords(),
            **hints,
        )
        check(arrays, out, lse, tensors, cu_q, cu_k, options, used, f"{backend} {what} {options}")
        assert target.surroundings_intact(), f"{backend} {what}: something was written beside out"


class TestBothMachines:
    def test_sm90_is_chosen(self, arrays):
        for dtype in DTYPES:
            for head_dim in HEAD_DIMS:
                tensors = arrays.qkv(2, 100, 100, 4, 2, head_dim, dtype, 1)
                assert flashcore.plan(*tensors) == flashcore.plan(*tensors, backend="sm90")
                for backend in BACKENDS:
                    forced = flashcore.plan(*tensors, backend=backend)
                    assert forced.backend == backend and forced.kernel == f"{backend}_forward"
                expected = flashcore.attention(*tensors, backend="sm90")
                assert arrays.same_bits(flashcore.attention(*tensors), expected)

    @pytest.mark.parametrize("case", EDGE_CASES, ids=cases.name)
    def test_edges_of_tiles(self, arrays, case):
        for backend in BACKENDS:
            cases.run(arrays, case, backend)

    @pytest.mark.parametrize("case", GROUP_CASES, ids=cases.name)
    def test_groups(self, arrays, case):
        for backend in BACKENDS:
            cases.run(arrays, case, backend)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("head_dim", HEAD_DIMS)
    def test_head_dims(self, arrays, head_dim, dtype):
        for seed, options in enumerate(MASKS):
            spread = 2.0 / (abs(options.scale_for(head_dim)) * math.sqrt(head_dim))
            both(arrays, *arrays.qkv(2, 200, 333, 6, 2, head_dim, dtype, seed, spread), options)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("head_dim", [64, 128, 256])
    @pytest.mark.parametrize("score", [1.0, 4.0, 16.0])
    def test_peaked_scores(self, arrays, score, head_dim, dtype):
        for options in (Options(), Options(causal=True), Options(softcap=30.0)):
            both(arrays, *arrays.qkv(1, 1024, 1024, 4, 2, head_dim, dtype, int(score), score), options)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("head_dim", INSTANCES)
    def test_growing_scores(self, arrays, head_dim, dtype):
        """The maximum grows from tile to tile, by little or much, to either end: where a rescaling may be left out."""
        query, key, value = arrays.qkv(1, 1500, 1500, 2, 2, head_dim, dtype, 7)
        query = abs(query)
        for steps in (1500.0, 300.0, 75.0):
            ramp = arrays.cast((arrays.arange(1500) + 1) / steps, dtype)[None, :, None, None]
            for k in (abs(key) * ramp, abs(key) * ramp.flip(1)):
                both(arrays, query, k, value, what=f"steps {steps}")
                both(arrays, query, k, value, Options(causal=True), what=f"steps {steps}")

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("head_dim", INSTANCES)
    def test_scores_that_rise_beyond_the_weights_range(self, arrays, head_dim, dtype):
        """Some keys, which the kernel comes to late, score hundreds more than all before: it runs such tiles again."""
        for group, causal in ((1, False), (1, True), (3, True)):
            query, key, value = arrays.qkv(2, 1000, 1000, 2 * group, 2, head_dim, dtype, 9, 3.0)
            key[:, 5:500:97] *= 60
            both(arrays, query, key, value, Options(causal=causal), f"group {group}")

    @pytest.mark.parametrize("head_dim", [64, 128])
    def test_many_tiles_that_are_run_again(self, arrays, head_dim):
        """More of them for each block than it has room to note, among others."""
        query, key, value = arrays.qkv(20, 520, 520, 40, 40, head_dim, "bfloat16", 9, 3.0)
        key[:, 5, ::3] *= 100
        key[:, 100, 1::3] *= 2
        plan = flashcore.plan(query, key, value, backend="sm90")
        assert plan.tiles > 3 * 12 * plan.blocks / 2
        out = flashcore.attention(query, key, value, backend="sm90")
        for b in (0, 7, 19):
            part = [a[b : b + 1] for a in (out, query, key, value)]
            assert_attention(arrays, part[0], None, *part[1:], PLAIN, f"sequence {b}")
        assert arrays.same_bits(out, flashcore.attention(query, key, value, backend="sm90"))

    @pytest.mark.parametrize("head_dim", [64, 128, 256])
    def test_long_sequences(self, arrays, head_dim):
        for options in (Options(), Options(causal=True), Options(causal=True, window=(1024, None))):
            both(arrays, *arrays.qkv(1, 4096, 4096, 2, 2, head_dim, "float16", 3), options)
        both(arrays, *arrays.qkv(1, 64, 16384, 2, 1, head_dim, "bfloat16", 4), Options(causal=True))

    @pytest.mark.parametrize("head_dim", INSTANCES)
    def test_queries_that_see_no_key(self, arrays, head_dim):
        """Rows of zeros, an lse of -inf: whole tiles of them, and those that share a tile with others."""
        for seqlen_q, seqlen_k in ((300, 100), (130, 1), (65, 64), (193, 128), (17, 0), (257, 0)):
            for heads_q in (2, 6):
                tensors = arrays.qkv(2, seqlen_q, seqlen_k, heads_q, 2, head_dim, "float16", seqlen_q)
                for options in (Options(causal=True), Options(window=(0, 0)), Options(window=(5, 2), softcap=10.0)):
                    both(arrays, *tensors, options, f"{seqlen_q} {seqlen_k}")

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("head_dim", HEAD_DIMS)
    def test_a_single_visible_key(self, arrays, head_dim, dtype):
        """The output is its value row, exactly."""
        for group in (1, 3):
            query, key, value = arrays.qkv(2, 200, 200, 2 * group, 2, head_dim, dtype, 5, 4.0)
            for backend in BACKENDS:
                out = flashcore.attention(query, key, value, window=(0, 0), backend=backend)
                assert arrays.same_bits(out, value.repeat_interleave(group, 2)), backend
                out = flashcore.attention(query, key[:, :1], value[:, :1], backend=backend)
                assert arrays.same_bits(out, value[:, :1].repeat_interleave(group, 2).expand(out.shape)), backend

    @pytest.mark.parametrize("head_dim", [64, 128])
    def test_expanded_keys_and_values(self, arrays, head_dim):
        """Strides of zero along each axis, and along several."""
        for stored in ((1, 150, 4), (2, 150, 1), (1, 150, 1), (2, 1, 4), (1, 1, 1)):
            query, key, value = arrays.qkv(2, 140, 150, 8, 4, head_dim, "float16", 9)
            key, value = (a[tuple(slice(n) for n in stored)].expand(2, 150, 4, head_dim) for a in (key, value))
            for options in (Options(), Options(causal=True)):
                both(arrays, query, key, value, options, str(stored))

    def test_any_16_byte_aligned_strides(self, arrays):
        """Rows and heads far apart, interleaved query, key and value, an address that is a multiple of 16 bytes
        alone."""
        for head_dim in (64, 72, 128):
            for group in (1, 4):
                heads = (group + 2) * 2
                packed = arrays.random((2, 150, heads * head_dim + 8), "float16", 11)[..., 8:]
                split = packed.unflatten(2, (heads, head_dim)).split([2 * group, 2, 2], dim=2)
                both(arrays, *split, Options(causal=True))
                wide = arrays.random((2, 150, heads, head_dim + 24), "bfloat16", 12)[:, ::3, :, 8 : 8 + head_dim]
                both(arrays, *wide.split([2 * group, 2, 2], dim=2), Options(window=(30, 10)))

    def test_out_of_any_strides(self, arrays):
        for head_dim in (64, 96, 128, 256):
            for heads_q, seqlen_q in ((2, 150), (8, 3)):
                tensors = arrays.qkv(2, seqlen_q, 150, heads_q, 2, head_dim, "float16", 13)
                for memory in ("padded", "transposed"):
                    for backend in BACKENDS:
                        target = place(arrays, tensors[0].shape, "float16", memory)
                        out = flashcore.attention(*tensors, causal=True, out=target.view, backend=backend)
                        assert_attention(arrays, out, None, *tensors, Options(causal=True), f"{backend} {memory}")
                        assert target.surroundings_intact()


# Sequences that end at and around the edges of tiles, empty ones between and at both ends.
TILE_EDGES = [(0, 0), (128, 128), (1, 129), (0, 5), (192, 191), (129, 64), (65, 300), (33, 0), (256, 257), (0, 0)]
VARLEN_BATCHES = {**{name: BATCHES[name] for name in ("ragged", "empty", "decode")}, "edges": TILE_EDGES}
VARLEN_CASES = pairwise(
    {
        "batch": tuple(VARLEN_BATCHES),
        "head_dim": HEAD_DIMS,
        "dtype": DTYPES,
        "group": (1, *GROUPS),
        "options": MASKS,
        "used": (False, True),
        "hints": (False, True),
    }
)


class TestBothMachinesVarlen:
    @pytest.mark.parametrize("case", VARLEN_CASES, ids=cases.name)
    def test_pairwise(self, arrays, case):
        """NaN past the used keys and past the last sequence never influences anything."""
        batch, options, head_dim = VARLEN_BATCHES[case["batch"]], case["options"], case["head_dim"]
        spread = 2.0 / (abs(options.scale_for(head_dim)) * math.sqrt(head_dim))
        heads_q = 2 * case["group"]
        tensors, cu_q, cu_k = make(arrays, batch, heads_q, 2, head_dim, case["dtype"], 21, spread, tail_q=37, tail_k=70)
        used = None
        if case["used"]:
            used = [(length * (3 + i % 4)) // 6 for i, (_, length) in enumerate(batch)]
            for a in tensors[1:]:
                for b, count in enumerate(used):
                    a[cu_k[b] + count : cu_k[b + 1]] = math.nan
        hints = {}
        if case["hints"]:
            hints = {"max_seqlen_q": max(q for q, _ in batch), "max_seqlen_k": max(k for _, k in batch)}
        both_varlen(arrays, tensors, cu_q, cu_k, options, used, case["batch"], **hints)

    @pytest.mark.parametrize("head_dim", INSTANCES)
    def test_neighbours_do_not_matter(self, arrays, head_dim):
        """All rows but one sequence's are NaN or infinite, used keys' successors too: it keeps its bits."""
        tensors, cu_q, cu_k = make(arrays, TILE_EDGES, 6, 2, head_dim, "float16", 71, tail_q=9, tail_k=9)
        used = [length - length // 3 for _, length in TILE_EDGES]
        cu = arrays.int32(cu_q), arrays.int32(cu_k)
        options = {"seqused_k": arrays.int32(used), "causal": True, "return_lse": True, "backend": "sm90"}
        clean, clean_lse = flashcore.attention_varlen(*tensors, *cu, **options)
        for b in range(len(TILE_EDGES)):
            rows_q, rows_k = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b] + used[b])
            for evil in (math.nan, math.inf, 3e4):
                spoilt = [arrays.full(a.shape, evil, "float16") for a in tensors]
                for a, original, rows in zip(spoilt, tensors, (rows_q, rows_k, rows_k), strict=True):
                    a[rows] = original[rows]
                out, lse = flashcore.attention_varlen(*spoilt, *cu, **options)
                assert arrays.same_bits(out[rows_q], clean[rows_q]), (b, evil)
                assert arrays.same_bits(lse[:, rows_q], clean_lse[:, rows_q]), (b, evil)

    @pytest.mark.parametrize("memory", ["padded", "transposed"])
    def test_strided(self, arrays, memory):
        for heads_q in (2, 6, 8):
            tensors, cu_q, cu_k = make(arrays, TILE_EDGES, heads_q, 2, 128, "bfloat16", 31)
            placed = [place(arrays, a.shape, "bfloat16", memory, a) for a in tensors]
            for backend in BACKENDS:
                target = place(arrays, tensors[0].shape, "bfloat16", memory)
                out, lse = flashcore.attention_varlen(
                    *(p.view for p in placed),
                    arrays.int32(cu_q),
                    arrays.int32(cu_k),
                    out=target.view,
                    return_lse=True,
                    backend=backend,
                )
                check(arrays, out, lse, tensors, cu_q, cu_k, what=f"{backend} {memory}")
                assert target.surroundings_intact()


UNEVEN = [((i * 37) % 400, (i * 53) % 300 * (i % 7 > 0)) for i in range(60)]


def uneven_plan(tensors):
    cu = (len(UNEVEN) + 1,)
    shapes = [tuple(a.shape) for a in tensors]
    options = {"dtype": "float16", "device": "cuda", "backend": "sm90"}
    return flashcore.plan(*shapes, cu_seqlens_q=cu, cu_seqlens_k=cu, **options)


class TestPersistentBlocks:
    """More tiles than blocks: each block runs several, and carries nothing from one to the next."""

    @pytest.mark.parametrize("head_dim", INSTANCES)
    @pytest.mark.parametrize("heads_k", [100, 25])
    def test_many_tiles(self, arrays, heads_k, head_dim):
        tensors = arrays.qkv(3, 300, 300, 100, heads_k, head_dim, "float16", 1)
        plan = flashcore.plan(*tensors, backend="sm90")
        assert plan.backend == "sm90" and plan.tiles > plan.blocks
        for options in (Options(), Options(causal=True), Options(window=(64, 64))):
            both(arrays, *tensors, options)

    @pytest.mark.parametrize("head_dim", INSTANCES)
    def test_many_tiles_of_variable_lengths(self, arrays, head_dim):
        """The blocks draw their tiles from a counter; some tiles have no keys, some indices no tile."""
        tensors, cu_q, cu_k = make(arrays, UNEVEN, 12, 4, head_dim, "bfloat16", 3, tail_q=300, tail_k=5)
        assert uneven_plan(tensors).workspace > 0
        for options in (Options(), Options(causal=True)):
            both_varlen(arrays, tensors, cu_q, cu_k, options)

    @pytest.mark.parametrize("head_dim", INSTANCES)
    def test_tiles_with_few_rows(self, arrays, head_dim):
        """Sequences whose last tile leaves warpgroups without rows, which take part where the rows behind a sequence's
        keys, all NaN here, are cleared for the others."""
        batch = [(1 + i * 29 % 330, 1 + i * 41 % 300) for i in range(90)]
        tensors, cu_q, cu_k = make(arrays, batch, 12, 4, head_dim, "float16", 11)
        used = [length - length // 3 for _, length in batch]
        for a in tensors[1:]:
            for b, count in enumerate(used):
                a[cu_k[b] + count : cu_k[b + 1]] = math.nan
        for options in (Options(), Options(causal=True), Options(window=(70, 3))):
            both_varlen(arrays, tensors, cu_q, cu_k, options, used)

    @pytest.mark.parametrize("head_dim", INSTANCES)
    def test_whoever_runs_a_tile_gives_the_same_bits(self, arrays, head_dim):
        """Calls in a row, on two streams at once, and in two graphs replayed at once: each has a counter of its own."""
        tensors, cu_q, cu_k = make(arrays, UNEVEN, 12, 4, head_dim, "float16", 7)
        assert uneven_plan(tensors).workspace > 0
        cu = arrays.int32(cu_q), arrays.int32(cu_k)

        def call():
            return flashcore.attention_varlen(*tensors, *cu, causal=True, backend="sm90")

        first = call()
        streams = [torch.cuda.Stream() for _ in range(2)]
        graphs = []
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                out = call()
            graphs.append((graph, out))
        torch.cuda.synchronize()
        results = []
        for _ in range(20):
            for stream, (graph, _) in zip(streams, graphs, strict=True):
                with torch.cuda.stream(stream):
                    results.append(call())
                    graph.replay()
        torch.cuda.synchronize()
        assert all(arrays.same_bits(first, out) for out in results + [out for _, out in graphs])

    @pytest.mark.parametrize("head_dim", INSTANCES)
    def test_a_nan_does_not_outlive_its_tile(self, arrays, head_dim):
        """NaN in all of one head's arrays, whichever tile a block runs before or after it."""
        query, key, value = arrays.qkv(3, 300, 300, 100, 100, head_dim, "float16", 5)
        clean, clean_lse = flashcore.attention(query, key, value, causal=True, return_lse=True, backend="sm90")
        for a in (query, key, value):
            a[1, :, ::3] = math.nan
        out, lse = flashcore.attention(query, key, value, causal=True, return_lse=True, backend="sm90")
        assert bool(torch.isnan(out[1, :, ::3]).all())
        for a in (out, clean):
            a[1, :, ::3] = 0
        for a in (lse, clean_lse):
            a[1, ::3] = 0
        assert arrays.same_bits(out, clean) and arrays.same_bits(lse, clean_lse)


class TestSm90Alone:
    @pytest.mark.parametrize("head_dim", [64, 128])
    @pytest.mark.parametrize("causal", [False, True])
    def test_100_runs_give_the_same_bits(self, arrays, head_dim, causal):
        for shape in ((2, 1000, 1000, 16, 4), (4, 3, 700, 12, 4)):
            tensors = arrays.qkv(*shape, head_dim, "bfloat16", 11, 4.0)
            options = {"causal": causal, "return_lse": True, "backend": "sm90"}
            first = flashcore.attention(*tensors, **options)
            for _ in range(99):
                again = flashcore.attention(*tensors, **options)
                assert all(arrays.same_bits(a, b) for a, b in zip(first, again, strict=True))

    @pytest.mark.parametrize("head_dim", [64, 128])
    def test_100_runs_of_variable_lengths_give_the_same_bits(self, arrays, head_dim):
        tensors, cu_q, cu_k = make(arrays, BATCHES["many"] + TILE_EDGES, 6, 2, head_dim, "float16", 13)
        cu = arrays.int32(cu_q), arrays.int32(cu_k)
        options = {"causal": True, "return_lse": True, "backend": "sm90"}
        first = flashcore.attention_varlen(*tensors, *cu, **options)
        for _ in range(99):
            again = flashcore.attention_varlen(*tensors, *cu, **options)
            assert all(arrays.same_bits(a, b) for a, b in zip(first, again, strict=True))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_what_out_held_before_does_not_matter(self, arrays, dtype):
        for head_dim in INSTANCES:
            for shape in ((2, 200, 150, 4, 2), (3, 2, 150, 14, 2), (1, 300, 100, 2, 2)):
                tensors = arrays.qkv(*shape, head_dim, dtype, 15)
                options = {"causal": True, "backend": "sm90"}
                clean = flashcore.attention(*tensors, **options)
                for held in (math.nan, math.inf, 1.0):
                    out = arrays.full(tensors[0].shape, held, dtype)
                    assert arrays.same_bits(flashcore.attention(*tensors, out=out, **options), clean)

    @pytest.mark.parametrize(
        "options", [Options(), Options(causal=True), Options(window=(100, 64)), Options(causal=True, window=(70, None))]
    )
    def test_batch_invariant_whatever_the_tile(self, arrays, options):
        """Where a batch would get another tile than a sequence alone, or packed heads: the same bits nevertheless."""
        keywords = {**options.keywords(), "batch_invariant": True, "backend": "sm90"}
        tensors = arrays.qkv(33, 512, 600, 4, 4, 64, "float16", 19, 4.0)
        parts = [tuple(a[:n] for a in tensors) for n in (1, 33)]
        free = {flashcore.plan(*part, **{**keywords, "batch_invariant": False}).tile_q for part in parts}
        assert len(free) == 2, "choose other sizes: the tiles are the same"
        assert len({flashcore.plan(*part, **keywords).tile_q for part in parts}) == 1
        together = flashcore.attention(*tensors, return_lse=True, **keywords)
        for b in (0, 20):
            alone = flashcore.attention(*(a[b : b + 1] for a in tensors), return_lse=True, **keywords)
            assert all(arrays.same_bits(x, y[b : b + 1]) for x, y in zip(alone, together, strict=True)), b

        batch = [(300, 600), (1, 700), (5, 90), (128, 500), (40, 400)] * 8
        for head_dim, heads_q in ((64, 4), (64, 6), (128, 8)):
            tensors, cu_q, cu_k = make(arrays, batch, heads_q, 2, head_dim, "bfloat16", 23)
            out = flashcore.attention_varlen(*tensors, arrays.int32(cu_q), arrays.int32(cu_k), **keywords)
            for b in range(5):
                rows = slice(cu_q[b], cu_q[b + 1]), *[slice(cu_k[b], cu_k[b + 1])] * 2
                alone = flashcore.attention_varlen(
                    *(a[r] for a, r in zip(tensors, rows, strict=True)),
                    *(arrays.int32([0, r.stop - r.start]) for r in rows[:2]),
                    **keywords,
                )
                assert arrays.same_bits(alone, out[rows[0]]), (head_dim, heads_q, batch[b])

    @pytest.mark.parametrize("group", [3, 4, 7])
    def test_nan_in_a_query_stays_in_its_row_of_a_packed_tile(self, arrays, group):
        query, key, value = arrays.qkv(2, 5, 150, 2 * group, 2, 128, "float16", 17)
        assert flashcore.plan(query, key, value, backend="sm90").packed_heads == group
        clean, clean_lse = flashcore.attention(query, key, value, return_lse=True, backend="sm90")
        for b, i, h in ((0, 0, 0), (1, 4, 2 * group - 1), (1, 2, group)):
            spoilt = query.clone()
            spoilt[b, i, h, 3] = math.nan
            out, lse = flashcore.attention(spoilt, key, value, return_lse=True, backend="sm90")
            assert bool(torch.isnan(out[b, i, h]).all())
            out[b, i, h], lse[b, h, i] = clean[b, i, h], clean_lse[b, h, i]
            assert arrays.same_bits(out, clean) and arrays.same_bits(lse, clean_lse)

    @pytest.mark.parametrize(
        "shape", [(2, 300, 300, 4, 2, 64), (2, 3, 500, 8, 2, 128), (1, 129, 700, 2, 2, 256)], ids=str
    )
    def test_graph_replayed_with_new_data(self, arrays, shape):
        """Two graphs over different arrays, replayed in turn: each keeps its own descriptors of them."""
        options = {"causal": True, "backend": "sm90"}
        graphs = []
        for seed in (1, 2):
            static = list(arrays.qkv(*shape, "float16", seed))
            out = torch.empty_like(static[0])
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                flashcore.attention(*static, out=out, **options)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                flashcore.attention(*static, out=out, **options)
            graphs.append((graph, static, out))
        for seed in (50, 60, 70):
            for i, (graph, static, out) in enumerate(graphs):
                fresh = arrays.qkv(*shape, "float16", seed + i)
                for target, source in zip(static, fresh, strict=True):
                    target.copy_(source)
                arrays.poison_in_place(out)
                graph.replay()
                assert arrays.same_bits(out, flashcore.attention(*fresh, **options))

    def test_graph_replayed_with_other_lengths(self, arrays):
        tensors = [arrays.random((500, heads, 128), "bfloat16", 80 + heads) for heads in (8, 2, 2)]
        cu = arrays.int32([0, 200, 500])
        options = {"causal": True, "backend": "sm90", "max_seqlen_q": 500, "max_seqlen_k": 500}
        flashcore.attention_varlen(*tensors, cu, cu, **options)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, lse = flashcore.attention_varlen(*tensors, cu, cu, return_lse=True, **options)
        for bounds in ([0, 500, 500], [0, 1, 500], [0, 128, 256], [0, 0, 0]):
            cu.copy_(arrays.int32(bounds))
            graph.replay()
            fresh = arrays.int32(bounds)
            expected = flashcore.attention_varlen(*tensors, fresh, fresh, return_lse=True, **options)
            assert arrays.same_bits(out, expected[0]) and arrays.same_bits(lse, expected[1])

    @pytest.mark.parametrize("kernel", ["large", "small"])
    def test_descriptors_are_not_taken_for_those_of_other_views(self, arrays, kernel, monkeypatch):
        """A thread remembers the TMA engine's descriptors of its last arrays: here the same memory is seen in many
        ways, which differ in one thing each."""
        monkeypatch.setenv("FLASHCORE_SM90_KERNEL", kernel)
        memory = arrays.random((3, 2 * 4 * 256 * 64), "float16", 90)
        views = [
            [x.view(kind).as_strided((batch, rows, heads, dim), (*strides, 1)) for x in memory]
            for kind, batch, rows, heads, dim, strides in (
                (torch.float16, 2, 256, 4, 64, (65536, 256, 64)),
                (torch.float16, 1, 256, 4, 64, (65536, 256, 64)),  # the batch
                (torch.float16, 2, 200, 4, 64, (65536, 256, 64)),  # the rows
                (torch.float16, 2, 256, 2, 64, (65536, 256, 64)),  # the heads
                (torch.float16, 2, 256, 4, 56, (65536, 256, 64)),  # the head dimension
                (torch.float16, 2, 256, 4, 64, (32768, 256, 64)),  # the strides of batches,
                (torch.float16, 2, 256, 4, 64, (65536, 64, 16384)),  # of rows and heads
                (torch.bfloat16, 2, 256, 4, 64, (65536, 256, 64)),  # the dtype
            )
        ]
        copies = [[x.clone() for x in view] for view in views]  # all at once, so that none lies where another lay
        pairs = [(view, flashcore.attention(*copy)) for view, copy in zip(views, copies, strict=True)]
        for order in (pairs, pairs[::-1], pairs):
            for view, expected in order:
                assert arrays.same_bits(flashcore.attention(*view), expected)
