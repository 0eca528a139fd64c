# SPDX-License-Identifier: Apache-2.0
"""The Hopper kernel for small problems, forced in every form, and the stream kernel: held to the numeric standard; and
what is their own: parts without keys, the merge over warpgroups and blocks, blocks with several tiles, launches that
begin before the kernel before has ended."""

from __future__ import annotations

import itertools
import math

import pytest
from arrays import SMALL_FORMS, STREAM, Arrays, backends, devices, on, place, small_form, torch
from reference import PLAIN, Options, assert_attention

import flashcore

HOPPER = "cuda" in devices() and "sm90" in backends("cuda")
pytestmark = pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0, and code for sm_90a")

FORMS = (*SMALL_FORMS, STREAM)
DTYPES = ("float16", "bfloat16")
HEAD_DIMS = (8, 32, 40, 64, 72, 96, 128)
# Around the edges of chunks of 64 and 128 keys, of tiles of 64 and 128 rows, and of the parts of a tile's keys.
LENGTHS = (1, 2, 7, 63, 64, 65, 100, 127, 128, 129, 191, 193, 255, 256, 257, 320, 321, 383, 449, 511, 512, 513, 600)
MASKS = (
    Options(),
    Options(causal=True),
    Options(window=(70, 3)),
    Options(window=(0, 130)),
    Options(causal=True, window=(100, None), softcap=20.0),
    Options(softcap=30.0),
    Options(scale=-0.1),
    Options(causal=True, scale=0.3),
)


@pytest.fixture
def arrays() -> Arrays:
    return on("cuda")


@pytest.fixture
def force(monkeypatch):
    """Forces the small kernel in a form, or the stream kernel."""

    def set_form(form: tuple[int, int, int]) -> None:
        monkeypatch.setenv("FLASHCORE_SM90_KERNEL", small_form(form))

    return set_form


def holds(head_dim: int, seqlen_k: int, form: tuple[int, int, int]) -> bool:
    """Whether the keys fit the shared memory: always up to 600, but for large heads and few blocks of a tile."""
    return seqlen_k <= (600 if head_dim <= 64 else {FORMS[0]: 384, (64, 2, 2): 512}.get(form, 600))


def planned(query, key, value, form, options=PLAIN):
    """Also that it is the form, where that has an instance of the head dimension and kind of score. Where the stream
    kernel has none, a mask hides keys or heads would share its tiles, the large one is taken."""
    plan = flashcore.plan(query, key, value, **options.keywords())
    if form == STREAM:
        plain = not options.softcap and options.scale_for(query.shape[3]) > 0
        masks = options.causal or options.window is not None
        streams = plan.head_dim == 64 and plain and not masks and plan.packed_heads == 1 and key.shape[1] > 0
        assert plan.kernel == ("sm90_stream" if streams else "sm90_forward"), plan
        return plan
    assert plan.kernel == "sm90_small", plan
    if plan.head_dim == 64 and not options.softcap and options.scale_for(64) > 0:
        assert (plan.tile_q, plan.splits, plan.threads) == (form[0], form[1] * form[2], 2 * form[0] * form[1]), plan
    return plan


def without_maxima(query, options=PLAIN) -> bool:
    """Whether a call that wants no log-sum-exp gets weights relative to references (references.cuh): its output then
    has other bits."""
    batch, seqlen_q, heads, head_dim = query.shape
    plain = not options.softcap and options.scale_for(head_dim) > 0
    return head_dim == 64 and plain and batch * seqlen_q * heads >= 1024


def run(arrays, query, key, value, form, options=PLAIN, what="") -> None:
    """Runs bshd arrays into poison between poison, with the log-sum-exp and without, and checks the results. Not what
    the large kernel gets instead: without the log-sum-exp its weights are relative to no row's own maximum, and a few
    rows judged alone scatter beyond the standard."""
    if planned(query, key, value, form, options).kernel == "sm90_forward":
        return
    targets = [place(arrays, query.shape, str(query.dtype).removeprefix("torch."), "contiguous") for _ in range(2)]
    out, lse = flashcore.attention(query, key, value, out=targets[0].view, return_lse=True, **options.keywords())
    alone = flashcore.attention(query, key, value, out=targets[1].view, **options.keywords())
    assert_attention(arrays, out, lse, query, key, value, options, f"{what} {options}")
    if without_maxima(query, options):
        assert_attention(arrays, alone, None, query, key, value, options, f"{what} {options} without maxima")
    else:
        assert arrays.same_bits(out, alone), f"{what}: other bits without the log-sum-exp"
    for target in targets:
        assert target.surroundings_intact(), f"{what}: something was written beside out"


class TestResults:
    @pytest.mark.parametrize("form", FORMS, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("head_dim", HEAD_DIMS)
    def test_masks(self, arrays, force, head_dim, dtype, form):
        force(form)
        for seed, options in enumerate(MASKS):
            spread = 2.0 / (abs(options.scale_for(head_dim)) * math.sqrt(head_dim))
            tensors = arrays.qkv(2, 200, 333, 6, 2, head_dim, dtype, seed, spread)
            run(arrays, *tensors, form, options, f"{form}")

    @pytest.mark.parametrize("form", FORMS, ids=str)
    @pytest.mark.parametrize("seqlen_k", LENGTHS)
    def test_lengths(self, arrays, force, seqlen_k, form):
        force(form)
        for i, (seqlen_q, head_dim) in enumerate(itertools.product((1, 63, 65, 130, seqlen_k), (64, 128))):
            if not holds(head_dim, seqlen_k, form):
                continue
            tensors = arrays.qkv(1, seqlen_q, seqlen_k, 4, 2, head_dim, DTYPES[i % 2], seqlen_k + i, 2.0)
            for options in (Options(), Options(causal=True)):
                run(arrays, *tensors, form, options, f"{form} {seqlen_q} {seqlen_k}")

    @pytest.mark.parametrize("form", FORMS, ids=str)
    @pytest.mark.parametrize("group", [1, 3, 4, 5, 7, 71])
    def test_groups(self, arrays, force, group, form):
        """Query heads that share a tile, rows left over, and groups that are larger than the tile."""
        force(form)
        for seqlen_q, head_dim in itertools.product((1, 2, 17), (64, 128)):
            tensors = arrays.qkv(2, seqlen_q, 150, 2 * group, 2, head_dim, "float16", group, 2.0)
            for options in (Options(), Options(causal=True), Options(window=(40, 9))):
                run(arrays, *tensors, form, options, f"{form} {group} {seqlen_q}")

    @pytest.mark.parametrize("form", FORMS, ids=str)
    @pytest.mark.parametrize("score", [1.0, 4.0, 16.0])
    def test_peaked_scores(self, arrays, force, score, form):
        """The parts' maxima differ by little and by much."""
        force(form)
        for head_dim in (64, 128):
            for options in (Options(), Options(causal=True), Options(softcap=30.0)):
                tensors = arrays.qkv(1, 300, 320, 4, 2, head_dim, "bfloat16", int(score), score)
                run(arrays, *tensors, form, options, f"{form} {head_dim}")

    @pytest.mark.parametrize("form", FORMS, ids=str)
    def test_growing_scores(self, arrays, force, form):
        """The maximum lies in the first part or the last."""
        force(form)
        query, key, value = arrays.qkv(1, 300, 500, 2, 2, 64, "float16", 7)
        query = abs(query)
        for steps in (500.0, 64.0, 16.0):
            ramp = arrays.cast((arrays.arange(500) + 1) / steps, "float16")[None, :, None, None]
            for k in (abs(key) * ramp, abs(key) * ramp.flip(1)):
                run(arrays, query, k, value, form, what=f"steps {steps}")

    @pytest.mark.parametrize("form", FORMS, ids=str)
    def test_queries_that_see_no_key(self, arrays, force, form):
        """Zeros, and an lse of -inf: whole tiles of them, single rows, and parts that have no key for some rows."""
        force(form)
        for seqlen_q, seqlen_k in ((300, 100), (130, 1), (65, 64), (193, 128), (17, 0), (257, 0)):
            for heads_q, head_dim in ((2, 64), (6, 128)):
                tensors = arrays.qkv(2, seqlen_q, seqlen_k, heads_q, 2, head_dim, "float16", seqlen_q)
                for options in (Options(causal=True), Options(window=(0, 0)), Options(window=(5, 2), softcap=10.0)):
                    run(arrays, *tensors, form, options, f"{form} {seqlen_q} {seqlen_k}")

    @pytest.mark.parametrize("form", FORMS, ids=str)
    def test_a_single_visible_key(self, arrays, force, form):
        """The output is its value row, exactly, whichever part it lies in."""
        force(form)
        for head_dim, group in itertools.product((40, 64, 128), (1, 3)):
            query, key, value = arrays.qkv(2, 300, 300, 2 * group, 2, head_dim, "bfloat16", 5, 4.0)
            planned(query, key, value, form)
            out = flashcore.attention(query, key, value, window=(0, 0))
            assert arrays.same_bits(out, value.repeat_interleave(group, 2))

    @pytest.mark.parametrize("form", FORMS, ids=str)
    def test_strides_and_layouts(self, arrays, force, form):
        force(form)
        for head_dim in (64, 72, 128):
            for memory in ("padded", "transposed"):
                tensors = arrays.qkv(2, 150, 200, 4, 2, head_dim, "float16", 13)
                placed = [place(arrays, a.shape, "float16", memory, a) for a in tensors]
                target = place(arrays, tensors[0].shape, "float16", memory)
                flashcore.attention(*(p.view for p in placed), causal=True, out=target.view)
                out = arrays.copy(target.view)
                assert_attention(arrays, out, None, *tensors, Options(causal=True), memory)
                assert target.surroundings_intact()
            bhsd = [a.transpose(1, 2).contiguous() for a in tensors]
            again = flashcore.attention(*bhsd, causal=True, layout="bhsd")
            assert arrays.same_bits(again.transpose(1, 2), out)

    @pytest.mark.parametrize("form", FORMS, ids=str)
    def test_poisoned_neighbours(self, arrays, force, form):
        """What lies behind the keys and values, and in other sequences and heads, is NaN: no bit changes."""
        force(form)
        for head_dim, seqlen_k in ((64, 129), (128, 300)):
            tensors = arrays.qkv(3, 130, seqlen_k, 4, 4, head_dim, "float16", 3)
            clean, clean_lse = flashcore.attention(*tensors, return_lse=True)
            placed = []
            for a in tensors:
                wide = arrays.full((3, a.shape[1] + 70, 4, head_dim), math.nan, "float16")
                wide[1, : a.shape[1], 1:3] = a[1, :, 1:3]
                placed.append(wide[:, : a.shape[1]])
            planned(*placed, form)
            out, lse = flashcore.attention(*placed, return_lse=True)
            assert arrays.same_bits(out[1, :, 1:3], clean[1, :, 1:3])
            assert arrays.same_bits(lse[1, 1:3], clean_lse[1, 1:3])

    @pytest.mark.parametrize("form", FORMS, ids=str)
    def test_a_nan_in_a_query_stays_in_its_row(self, arrays, force, form):
        force(form)
        for group in (1, 4):
            query, key, value = arrays.qkv(2, 20, 300, 2 * group, 2, 64, "float16", 17)
            clean, clean_lse = flashcore.attention(query, key, value, return_lse=True)
            for b, i, h in ((0, 0, 0), (1, 9, 2 * group - 1), (1, 19, group)):
                spoilt = query.clone()
                spoilt[b, i, h, 3] = math.nan
                out, lse = flashcore.attention(spoilt, key, value, return_lse=True)
                assert bool(torch.isnan(out[b, i, h]).all())
                out[b, i, h], lse[b, h, i] = clean[b, i, h], clean_lse[b, h, i]
                assert arrays.same_bits(out, clean) and arrays.same_bits(lse, clean_lse)


class TestReferences:
    """Calls without the log-sum-exp, with rows enough: weights are relative to one of a row's first scores, and rows
    for which that does not do are computed once more."""

    @pytest.mark.parametrize("form", FORMS, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("score", [20.0, 60.0, 200.0, 1000.0])
    def test_scores_far_apart(self, arrays, force, score, dtype, form):
        force(form)
        for options in (Options(), Options(causal=True), Options(window=(90, 40))):
            tensors = arrays.qkv(3, 170, 333, 4, 2, 64, dtype, int(score), score)
            assert without_maxima(tensors[0], options)
            run(arrays, *tensors, form, options, f"{form} {score}")

    @pytest.mark.parametrize("form", FORMS, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_the_largest_scores_come_last_or_first(self, arrays, force, dtype, form):
        """Scores that rise or fall by some hundreds over the keys, and by little, in some rows and all."""
        force(form)
        query, key, value = arrays.qkv(2, 300, 500, 4, 2, 64, dtype, 7)
        for every, steps in itertools.product((1, 37), (1000.0, 100.0, 20.0)):
            rising = query.clone()
            rising[:, ::every] = abs(rising[:, ::every])
            ramp = arrays.cast((arrays.arange(500) + 1) / steps, dtype)[None, :, None, None]
            for k in (abs(key) * ramp, abs(key) * ramp.flip(1), -abs(key) * ramp):
                run(arrays, rising, k, value, form, what=f"every {every} steps {steps}")

    @pytest.mark.parametrize("form", FORMS, ids=str)
    def test_first_keys_that_some_rows_do_not_see(self, arrays, force, form):
        """References are found among the first 32 keys of a part, which windows hide from some rows, or all."""
        force(form)
        for window in ((3, 0), (20, 20), (40, 0), (0, 40), (100, 3)):
            tensors = arrays.qkv(2, 400, 400, 4, 4, 64, "bfloat16", window[0], 8.0)
            run(arrays, *tensors, form, Options(window=window), f"{form}")
            run(arrays, *tensors, form, Options(causal=True, window=(window[0], None)), f"{form}")

    @pytest.mark.parametrize("form", FORMS, ids=str)
    @pytest.mark.parametrize("score", [1.0, 300.0])
    def test_a_nan_in_a_query_stays_in_its_row(self, arrays, force, score, form):
        force(form)
        query, key, value = arrays.qkv(2, 200, 300, 4, 4, 64, "bfloat16", 17, score)
        clean = flashcore.attention(query, key, value)
        for b, i, h in ((0, 0, 0), (1, 9, 3), (1, 199, 2)):
            spoilt = query.clone()
            spoilt[b, i, h, 3] = math.nan
            out = flashcore.attention(spoilt, key, value)
            assert bool(torch.isnan(out[b, i, h]).all())
            assert_attention(arrays, *without_row(out, clean, b, i, h), query, key, value)

    @pytest.mark.parametrize("form", FORMS, ids=str)
    @pytest.mark.parametrize("score", [2.0, 300.0])
    def test_poisoned_neighbours(self, arrays, force, score, form):
        force(form)
        for seqlen_k in (129, 300):
            tensors = arrays.qkv(4, 130, seqlen_k, 4, 4, 64, "float16", 3, score)
            clean = flashcore.attention(*tensors)
            placed = []
            for a in tensors:
                wide = arrays.full((4, a.shape[1] + 70, 4, 64), math.nan, "float16")
                wide[1, : a.shape[1], 1:3] = a[1, :, 1:3]
                placed.append(wide[:, : a.shape[1]])
            planned(*placed, form)
            assert arrays.same_bits(flashcore.attention(*placed)[1, :, 1:3], clean[1, :, 1:3])

    @pytest.mark.parametrize("form", FORMS, ids=str)
    def test_100_runs_give_the_same_bits(self, arrays, force, form):
        force(form)
        for causal, score in itertools.product((False, True), (1.0, 100.0)):
            tensors = arrays.qkv(2, 300, 300, 8, 4, 64, "float16", 11, score)
            first = flashcore.attention(*tensors, causal=causal)
            assert all(arrays.same_bits(flashcore.attention(*tensors, causal=causal), first) for _ in range(99))


def without_row(out, clean, b, i, h):
    """`out` with a row of `clean`, as assert_attention() takes it."""
    out[b, i, h] = clean[b, i, h]
    return out, None


class TestStream:
    """Blocks with several tiles of queries: more tiles than two for each multiprocessor."""

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_several_tiles_a_block(self, arrays, force, dtype):
        force(STREAM)
        for i, (batch, seqlen_q, seqlen_k, heads_q, heads_k) in enumerate(
            ((9, 400, 300, 16, 16), (40, 128, 128, 8, 8), (20, 257, 64, 8, 8), (150, 200, 513, 8, 8))
        ):
            tensors = arrays.qkv(batch, seqlen_q, seqlen_k, heads_q, heads_k, 64, dtype, i, 3.0)
            plan = planned(*tensors, STREAM)
            assert plan.tiles > plan.blocks > 132
            run(arrays, *tensors, STREAM, what=f"{batch} {seqlen_q} {seqlen_k}")

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_rows_whose_scores_are_all_negative(self, arrays, force, dtype):
        """Maxima are found as integers, whose order is another one below zero: rows with scores of either sign, of one
        sign alone, and of zero."""
        force(STREAM)
        query, key, value = arrays.qkv(2, 200, 300, 4, 4, 64, dtype, 21, 2.0)
        query[:, ::3] = abs(query[:, ::3])
        query[:, 1::9] = 0.0
        key[0] = -abs(key[0])
        run(arrays, query, key, value, STREAM)

    def test_chosen_where_a_multiprocessor_has_a_few_tiles(self, arrays):
        tensors = arrays.qkv(8, 512, 512, 8, 8, 64, "bfloat16", 1)
        assert flashcore.plan(*tensors).kernel == "sm90_stream"
        out, lse = flashcore.attention(*tensors, return_lse=True)
        assert_attention(arrays, out, lse, *tensors)


class TestChoice:
    def test_chosen_problems(self, arrays):
        """What plan() chooses by itself, around the change-over, beside the large kernel."""
        for batch, seqlen, head_dim in itertools.product((1, 3, 8, 33), (64, 128, 257, 512, 1000, 2048), (64, 128)):
            if batch * seqlen > 8192:
                continue
            tensors = arrays.qkv(batch, seqlen, seqlen, 4, 2, head_dim, "bfloat16", batch + seqlen)
            for options in (Options(), Options(causal=True)):
                out, lse = flashcore.attention(*tensors, return_lse=True, **options.keywords())
                assert_attention(arrays, out, lse, *tensors, options, f"{flashcore.plan(*tensors)}")

    def test_batch_invariant_calls_get_the_large_kernel(self, arrays, force):
        force((64, 2, 4))
        tensors = arrays.qkv(2, 100, 200, 4, 2, 64, "float16", 1)
        assert flashcore.plan(*tensors, batch_invariant=True).kernel == "sm90_forward"


class TestRepeatability:
    @pytest.mark.parametrize("form", FORMS, ids=str)
    def test_100_runs_give_the_same_bits(self, arrays, force, form):
        force(form)
        for causal, head_dim in itertools.product((False, True), (64, 128)):
            tensors = arrays.qkv(2, 300, 300, 8, 4, head_dim, "bfloat16", 11, 4.0)
            first = flashcore.attention(*tensors, causal=causal, return_lse=True)
            results = [flashcore.attention(*tensors, causal=causal, return_lse=True) for _ in range(99)]
            for again in results:
                assert all(arrays.same_bits(a, b) for a, b in zip(first, again, strict=True))

    @pytest.mark.parametrize("form", FORMS, ids=str)
    def test_two_streams(self, arrays, force, form):
        force(form)
        problems = [arrays.qkv(1, 300, 300, 8, 8, 64, "float16", seed) for seed in (1, 2)]
        alone = [flashcore.attention(*tensors) for tensors in problems]
        streams = [torch.cuda.Stream() for _ in problems]
        torch.cuda.synchronize()
        results = []
        for _ in range(50):
            for tensors, stream in zip(problems, streams, strict=True):
                with torch.cuda.stream(stream):
                    results.append(flashcore.attention(*tensors))
        torch.cuda.synchronize()
        for i, result in enumerate(results):
            assert arrays.same_bits(result, alone[i % 2])


class TestDependentLaunches:
    """A launch of either kernel begins while the one before still works: nothing may be read or written too early."""

    STEPS = 24

    def chain(self, x, key, value, buffers):
        """Each call's output is the next one's query and keys; two buffers are written in turn, so that a call that
        writes too early spoils what the one before still reads."""
        for step in range(self.STEPS):
            out = buffers[step % len(buffers)]
            flashcore.attention(x, x if step % 2 else key, value, out=out)
            x = out
        return x

    def expected(self, x, key, value):
        for step in range(self.STEPS):
            out = torch.empty_like(x)
            torch.cuda.synchronize()
            flashcore.attention(x, x if step % 2 else key, value, out=out)
            torch.cuda.synchronize()
            x = out
        return x

    def check_chains(self, arrays, x, key, value):
        expected = self.expected(x, key, value)
        for count in (2, 3):
            buffers = [torch.empty_like(x) for _ in range(count)]
            for _ in range(5):
                for b in buffers:
                    arrays.poison_in_place(b)
                assert arrays.same_bits(self.chain(x, key, value, buffers), expected)

    @pytest.mark.parametrize("form", FORMS, ids=str)
    @pytest.mark.parametrize("shape", [(1, 512, 8, 64), (2, 65, 3, 64), (16, 256, 8, 64), (1, 300, 4, 128)], ids=str)
    def test_output_is_the_next_input(self, arrays, force, shape, form):
        if not holds(shape[3], shape[1], form):
            pytest.skip("a part does not fit the shared memory")
        force(form)
        x, key, value = (arrays.random(shape, "bfloat16", seed, 4.0) for seed in (1, 2, 3))
        planned(x, key, value, form)
        self.check_chains(arrays, x, key, value)

    @pytest.mark.parametrize(
        "shape",
        [
            (1, 512, 8, 64),
            (8, 512, 8, 64),
            (3, 257, 5, 128),
            (1, 700, 6, 256),
            # Several tiles a block.
            (16, 512, 16, 128),
            (6, 1024, 10, 192),
        ],
        ids=str,
    )
    def test_output_of_the_large_kernel_is_its_next_input(self, arrays, monkeypatch, shape):
        monkeypatch.setenv("FLASHCORE_SM90_KERNEL", "large")
        x, key, value = (arrays.random(shape, "bfloat16", seed, 4.0) for seed in (1, 2, 3))
        assert flashcore.plan(x, key, value).kernel == "sm90_forward"
        self.check_chains(arrays, x, key, value)

    @pytest.mark.parametrize("form", FORMS, ids=str)
    def test_in_a_graph(self, arrays, force, form):
        force(form)
        x, key, value = (arrays.random((1, 512, 8, 64), "float16", seed, 4.0) for seed in (4, 5, 6))
        buffers = [torch.empty_like(x) for _ in range(2)]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.chain(x, key, value, buffers)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = self.chain(x, key, value, buffers)
        for seed in (20, 30, 40):
            for target, fresh in zip((x, key, value), (seed, seed + 1, seed + 2), strict=True):
                target.copy_(arrays.random((1, 512, 8, 64), "float16", fresh, 4.0))
            expected = self.expected(x, key, value)
            for _ in range(10):
                for b in buffers:
                    arrays.poison_in_place(b)
                graph.replay()
                assert arrays.same_bits(result, expected)

    def test_between_other_kernels(self, arrays, monkeypatch):
        """Behind and before PyTorch's kernels, a memory set, and the large kernel: eager and in a graph."""
        x, key, value = (arrays.random((1, 512, 8, 64), "bfloat16", seed, 2.0) for seed in (7, 8, 9))
        scratch, out = torch.empty_like(x), torch.empty_like(x)

        def chain(check):
            y = x.clone()
            for _ in range(8):
                y.mul_(0.75).add_(0.125)
                scratch.zero_()
                monkeypatch.setenv("FLASHCORE_SM90_KERNEL", "small:64:2:4")
                check()
                flashcore.attention(y, key, value, out=scratch)
                check()
                monkeypatch.setenv("FLASHCORE_SM90_KERNEL", "large")
                flashcore.attention(scratch, y, value, out=out)
                monkeypatch.setenv("FLASHCORE_SM90_KERNEL", "small:64:2:2")
                check()
                flashcore.attention(out, key, scratch, out=y)
                check()
            return y

        expected = chain(torch.cuda.synchronize)
        for _ in range(5):
            assert arrays.same_bits(chain(lambda: None), expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = chain(lambda: None)
        for _ in range(5):
            graph.replay()
            assert arrays.same_bits(result, expected)
