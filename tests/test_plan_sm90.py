# SPDX-License-Identifier: Apache-2.0
"""The Hopper forward kernel's plans: tiles, packed heads, and sections that give its blocks even loads."""

from __future__ import annotations

import itertools
import re

import pytest
from plans import HEAD_DIMS, INSTANCES, SM90_TILE_Q, check_grid, needs_sm90, shape_plan


@pytest.fixture
def large_kernel(monkeypatch):
    """Plans for sm90 are of the kernel for large problems, whatever the size."""
    monkeypatch.setenv("FLASHCORE_SM90_KERNEL", "large")


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
