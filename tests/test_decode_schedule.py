# SPDX-License-Identifier: Apache-2.0
"""How the decode kernels divide the keys of all sequences among their blocks, and what plan() says of it: the kernels'
own arithmetic, on the host."""

from __future__ import annotations

import itertools
import random
import re

import pytest

import flashcore
from flashcore import _core

TILE = 64
UNLIMITED = -1


def seen_tiles(length, tokens, new, left, right) -> tuple[int, int]:
    """The tiles of the keys that some query sees."""
    keys = length + new
    seen = [
        key
        for query in range(tokens)
        for key in range(keys)
        if (left < 0 or key >= query + keys - tokens - left) and (right < 0 or key <= query + keys - tokens + right)
    ]
    return (min(seen) // TILE, max(seen) // TILE + 1) if seen else (0, 0)


def check(lengths, capacity, tokens, new, window, lines, blocks, most_parts):
    left, right = window
    parts, merges = _core.decode_schedule(lengths, capacity, tokens, new, left, right, lines, blocks, most_parts)
    clamped = [min(max(n, 0), capacity - new) for n in lengths]
    of_item: dict[tuple[int, int], list] = {}
    work = [0] * blocks
    for block, sequence, line, begin, end, slot in parts:
        of_item.setdefault((sequence, line), []).append((begin, end, slot))
        work[block] += max(end - begin, 1) if most_parts == 0 else 1
    assert list(of_item) == [(b, line) for b in range(len(lengths)) for line in range(lines)]  # in the line's order
    slots = [slot for *_, slot in parts if slot >= 0]
    assert len(slots) == len(set(slots)), "two parts share a slot"
    most_slots = 2 * blocks if most_parts == 0 else len(lengths) * lines * most_parts
    assert all(slot < most_slots for slot in slots)

    merged = {(b, line): slots for b, line, slots in merges}
    for (b, line), pieces in of_item.items():
        begin, end = seen_tiles(clamped[b], tokens, new, left, right)
        if end == 0:
            assert pieces[0][0] == pieces[0][1] and len(pieces) == 1
        else:
            assert pieces[0][0] == begin and pieces[-1][1] == end
        assert all(a[1] == b[0] for a, b in zip(pieces, pieces[1:], strict=False)), "a gap between parts"
        # Whole items are written at once; of the others the merge finds exactly their parts, in their order.
        assert merged[b, line] == ([p[2] for p in pieces] if len(pieces) > 1 else [])
        assert (pieces[0][2] == -1) == (len(pieces) == 1)
    total = sum(work)
    busy = [n for n in work if n]
    share = -(-total // blocks)
    assert max(busy) == share and len(busy) == -(-total // share)
    assert max(busy) - min(busy) <= 1, "unequal shares"
    return {item: [p[:2] for p in pieces] for item, pieces in of_item.items()}


def drawn(rng):
    """A problem: lengths of its sequences, rows of the cache, tokens, new ones, and what they see to either side."""
    tokens, new = rng.choice((1, 2, 5, 16)), rng.choice((0, 0, 1, 3, 70))
    capacity = rng.choice((128, 640, 4096))
    batch = rng.choice((1, 2, 7, 33, 70))
    lengths = [rng.choice((0, 1, 64, rng.randrange(capacity), capacity - new)) for _ in range(batch)]
    window = rng.choice(((UNLIMITED, UNLIMITED), (UNLIMITED, 0), (100, 0), (0, 0), (300, 20)))
    return lengths, capacity, tokens, new, window


@pytest.mark.parametrize("seed", range(60))
def test_every_tile_once(device, seed):
    rng = random.Random(seed)
    lengths, capacity, tokens, new, window = drawn(rng)
    lines, blocks = rng.choice((1, 3, 8)), rng.choice((1, 2, 13, 264))
    check(lengths, capacity, tokens, new, window, lines, blocks, rng.choice((0, 0, 8, 128)))


def test_lengths_are_clamped(device):
    check([-5, 2**31 - 1, -(2**31), 100], 256, 1, 2, (UNLIMITED, 0), 2, 10, 0)


@pytest.mark.parametrize("length", [0, 1, 63, 64, 255, 257, 4096, 33000, 131072])
def test_batch_invariant_parts_depend_on_the_sequence_alone(device, length):
    """Neither on its neighbours nor on the number of blocks; and all but the last are multiples of 256 keys."""
    alone = None
    for others, blocks in (([], 1), ([5, 3000], 7), ([131072] * 5, 264)):
        for position in (0, len(others)):
            lengths = [*others[:position], length, *others[position:]]
            parts = check_quick(lengths, 131072, blocks, position)
            alone = alone or parts
            assert parts == alone
    assert all((end - begin) % 4 == 0 for begin, end in alone[:-1]) and len(alone) <= 16


def check_quick(lengths, capacity, blocks, sequence):
    parts, _ = _core.decode_schedule(lengths, capacity, 1, 0, -1, 0, 8, blocks, 16)
    found = [(begin, end) for _, b, line, begin, end, _ in parts if b == sequence and line == 3]
    return found


# --- Hopper's parts ---------------------------------------------------------------------------------------------------


def check_parts(lengths, capacity, tokens, new, window, lines, most_parts):
    """Parts by a sequence's own length."""
    parts = _core.decode_parts(lengths, capacity, tokens, new, *window, lines, 0, most_parts)
    clamped = [min(max(n, 0), capacity - new) for n in lengths]
    assert len(parts) == len(lengths)
    for length, (tiles, count) in zip(clamped, parts, strict=True):
        begin, end = seen_tiles(length, tokens, new, *window)
        assert tiles == end - begin
        assert 1 <= count <= max(tiles, 1)  # none is empty, but somebody writes the zeros of no keys
        assert count <= most_parts
    return parts


def check_teams(lengths, capacity, tokens, new, window, teams):
    """Parts by equal shares of all sequences' tiles; what each team has of them."""
    sequences = _core.decode_parts(lengths, capacity, tokens, new, *window, 8, teams, 0)
    clamped = [min(max(n, 0), capacity - new) for n in lengths]
    assert len(sequences) == len(lengths)
    work, slots = [0] * teams, []
    for length, (tiles, pieces) in zip(clamped, sequences, strict=True):
        begin, end = seen_tiles(length, tokens, new, *window)
        assert tiles == end - begin
        taken = [tile for _, first, end, step, _ in pieces for tile in range(first, end, step)]
        assert sorted(taken) == list(range(tiles)), "not every tile once"
        assert [team for team, *_ in pieces] == list(range(pieces[0][0], pieces[0][0] + len(pieces)))
        for team, first, end, step, slot in pieces:
            work[team] += max(len(range(first, end, step)), 1)
            assert (slot == -1) == (len(pieces) == 1)  # whole sequences are written at once
        # As the merge finds them: a first part has the second of its team's slots, the others the first.
        if len(pieces) > 1:
            assert [slot for *_, slot in pieces] == [2 * team + (i == 0) for i, (team, *_) in enumerate(pieces)]
            slots += [slot for *_, slot in pieces]
    assert len(slots) == len(set(slots)), "two parts share a slot"
    return work


@pytest.mark.parametrize("seed", range(60))
def test_parts(device, seed):
    rng = random.Random(seed)
    lengths, capacity, tokens, new, window = drawn(rng)
    lines, teams = rng.choice((1, 3, 8)), rng.choice((1, 2, 13, 33, 264))
    check_parts(lengths, capacity, tokens, new, window, lines, rng.choice((8, 128)))
    work = check_teams(lengths, capacity, tokens, new, window, teams)
    assert max(work) <= max(-(-sum(work) // teams), 1) * 1.25 + 1
    check_teams([lengths[0]] * len(lengths), capacity, tokens, new, window, teams)


def test_parts_of_clamped_lengths(device):
    lengths = [-5, 2**31 - 1, -(2**31), 100]
    check_parts(lengths, 256, 1, 2, (UNLIMITED, 0), 2, 8)
    check_teams(lengths, 256, 1, 2, (UNLIMITED, 0), 10)


def test_teams_take_equal_shares(device):
    """Sequences about as long as each other are divided alike, if that leaves few teams out; others by all keys."""
    whole = (UNLIMITED, 0)

    def work(lengths, teams=33):
        return check_teams(lengths, 8192, 1, 0, whole, teams)

    assert work([8192] * 8) == [32] * 32 + [0]  # four teams a sequence
    assert work([4096] * 32) == [64] * 32 + [0] and work([8192] * 64) == [256] * 32 + [0]
    assert work([8192, 8192, 8100, 8192]) == [16] * 23 + [15] + [16] * 8 + [0]
    assert max(work([4096] * 20)) == 39 and max(work([8192] + [128] * 7)) == 5
    assert work([0] * 40, 33) == [2] * 20 + [0] * 13


@pytest.mark.parametrize("length", [0, 1, 255, 257, 33000, 131072])
def test_batch_invariant_parts_depend_on_the_length_alone(device, length):
    """On Hopper as many as sm80's kernel makes."""
    for lengths in ([length], [7, length, 131072]):
        parts = check_parts(lengths, 131072, 1, 0, (UNLIMITED, 0), 8, 16)
        assert parts[lengths.index(length)][1] == len(check_quick([length], 131072, 7, 0))


def test_division_by_multiplication(device):
    rng = random.Random(1)
    divisors = [
        *range(1, 200),
        2**16 - 1,
        2**16,
        2**16 + 1,
        2**30,
        2**31 - 1,
        *(rng.randrange(1, 2**31) for _ in range(99)),
    ]
    for d in divisors:
        for x in (0, 1, d - 1, d, min(2 * d - 1, 2**31 - 1), 2**31 - 1, *(rng.randrange(2**31) for _ in range(20))):
            assert _core.divide(x, d) == x // d, (x, d)


# --- plan -------------------------------------------------------------------------------------------------------------

GPUS = {"h100": 132, "h200": 132, "a100": 108, "l4": 58, "rtx4090": 128, "b200": 148}
BLOCK_BYTES = {
    "a100": 163 << 10,
    "l4": 99 << 10,
    "rtx4090": 99 << 10,
    "h100": 227 << 10,
    "h200": 227 << 10,
    "b200": 227 << 10,
}


def decode_plan(gpu, batch=1, tokens=1, heads_q=32, heads_k=8, head_dim=128, keys=4096, page_size=0, **options):
    cache = (batch * keys // page_size, page_size, heads_k, head_dim) if page_size else (batch, keys, heads_k, head_dim)
    if page_size:
        options["page_table"] = (batch, keys // page_size)
    options.setdefault("dtype", "bfloat16")
    return flashcore.plan(
        (batch, tokens, heads_q, head_dim), cache, cache, cache_seqlens=(batch,), device=gpu, **options
    )


HOPPER = ("h100", "h200")


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("head_dim", [8, 64, 72, 96, 128, 136, 192, 200, 256])
@pytest.mark.parametrize("rows", [(1, 1), (1, 16), (2, 16), (16, 8)])
def test_plan(device, gpu, head_dim, rows):
    tokens, group = rows
    for page_size in (0, 16, 256):
        p = decode_plan(gpu, 3, tokens, 2 * group, 2, head_dim, 4096, page_size, backend="sm80")
        assert p.backend == "sm80" and p.kernel == "sm80_decode" and p.threads == 128 and p.tile_k == TILE
        assert p.head_dim == next(d for d in (64, 96, 128, 192, 256) if d >= head_dim)
        assert p.packed_heads == group
        assert p.tile_q == (32 if tokens * group > 16 and head_dim <= 128 else 16)
        assert p.shared_memory + 1024 <= BLOCK_BYTES[gpu]
        assert p.shared_memory >= p.tile_q * p.head_dim * 2 + 4 * 64 * p.head_dim  # queries and one stage
        assert 1 <= p.blocks <= 2 * GPUS[gpu]
        row_tiles = -(-tokens * group // p.tile_q)
        assert p.tiles == 3 * 2 * row_tiles * 64
        # Two slots a block, each of the rows' outputs and log-sum-exp.
        assert p.workspace == 2 * p.blocks * min(tokens * group, p.tile_q) * (head_dim + 1) * 4
        assert gpu in p.reason
        options = {"dtype": "float16", "backend": "sm80"}
        assert decode_plan(gpu, 3, tokens, 2 * group, 2, head_dim, 4096, page_size, **options) == p
        chosen = decode_plan(gpu, 3, tokens, 2 * group, 2, head_dim, 4096, page_size)
        assert chosen.backend == ("sm90" if gpu in HOPPER else "sm80")


@pytest.mark.parametrize("gpu", HOPPER)
@pytest.mark.parametrize("head_dim", [8, 64, 72, 128, 136, 192, 200, 256])
@pytest.mark.parametrize("rows", [(1, 1), (1, 16), (2, 16), (16, 8)])
def test_plan_on_hopper(device, monkeypatch, gpu, head_dim, rows):
    tokens, group = rows
    for batch, page_size in ((1, 0), (1, 16), (40, 0), (40, 256)):
        monkeypatch.setenv("FLASHCORE_SM90_DECODE", "straight")
        p = decode_plan(gpu, batch, tokens, 2 * group, 2, head_dim, 8192, page_size)
        assert p.backend == "sm90" and p.tile_k == TILE and p.packed_heads == group
        assert p.head_dim == next(d for d in (64, 128, 192, 256) if d >= head_dim)
        assert p.tile_q == (32 if tokens * group > 16 and head_dim <= 128 else 16)
        assert p.threads == 32 * (p.tile_q // 4 + 1)  # four warps for 16 rows, and the producer's
        assert p.shared_memory <= BLOCK_BYTES[gpu]
        row_tiles = -(-tokens * group // p.tile_q)
        items = batch * 2 * row_tiles
        assert p.tiles == items * 128
        assert p.kernel == "sm90_decode" and p.splits > 1
        slots = p.blocks // clusters(p)
        if batch == 1 and row_tiles == 1:
            assert p.blocks == items * p.splits * 8 == 64 and clusters(p) == 8
        elif batch == 1:  # as long as itself: as many parts as blocks that run at once
            assert p.blocks == items * p.splits <= 2 * GPUS[gpu] < 2 * GPUS[gpu] + items
        else:  # blocks that stay, for which there are two slots each
            places = GPUS[gpu] * (2 if p.head_dim * p.tile_q <= 128 * 16 else 1)
            assert 0.9 * places <= p.blocks <= places and p.blocks % (2 * row_tiles) == 0
            slots = 2 * p.blocks
        assert p.workspace == slots * min(tokens * group, p.tile_q) * (head_dim + 1) * 4
        stage = 2 * 64 * 128 * -(-p.head_dim // 64)
        assert p.shared_memory >= 2 * stage  # two tiles on their way
        assert decode_plan(gpu, batch, tokens, 2 * group, 2, head_dim, 8192, page_size, backend="sm90") == p

        # The kernel with turned products divides them alike.
        monkeypatch.setenv("FLASHCORE_SM90_DECODE", "turned")
        turned = decode_plan(gpu, batch, tokens, 2 * group, 2, head_dim, 8192, page_size)
        if (batch > 1 and p.tile_q > 16) or row_tiles > 1 or p.head_dim > 128:
            assert turned == p
            continue
        assert turned.kernel == "sm90_decode_turned" and turned.threads == 320
        assert turned.tile_q == next(n for n in (8, 16, 32) if n >= tokens * group)
        assert (turned.blocks, turned.splits, turned.workspace) == (p.blocks, p.splits, p.workspace)
        assert 2 * stage <= turned.shared_memory <= 228 * 1024 // 2 - 1024


def turned(*args, **options) -> bool:
    kernel = decode_plan("h100", *args, **options).kernel
    assert kernel in ("sm90_decode", "sm90_decode_turned")
    return kernel == "sm90_decode_turned"


def test_plan_of_turned_products(device, monkeypatch):
    """One sequence, or a few in clusters, from where that is faster."""
    for head_dim in (64, 72, 128):
        for tokens, least_keys in ((1, 64), (2, 64), (3, 1024), (4, 1024), (5, 2048), (8, 2048)):
            for page_size in (0, 16, 256):
                keys = max(least_keys, page_size)
                assert turned(1, tokens, head_dim=head_dim, keys=keys, page_size=page_size)
            assert least_keys < 1024 or not turned(1, tokens, head_dim=head_dim, keys=least_keys - 64)
        for heads_k in (1, 2, 4, 8, 64):
            assert turned(1, heads_q=4 * heads_k, heads_k=heads_k, head_dim=head_dim, keys=8192)
        assert turned(2, head_dim=head_dim, keys=8192) and turned(2, 4, head_dim=head_dim, keys=8192)
        assert turned(2, 8, head_dim=head_dim, keys=8192) == (head_dim == 64)
        # Several tiles of rows; blocks that stay, with more than 16.
        assert not turned(1, 9, head_dim=head_dim, keys=8192) and not turned(8, 5, head_dim=head_dim, keys=8192)
        assert turned(8, head_dim=head_dim, keys=8192) and turned(8, 4, head_dim=head_dim, keys=8192)
    assert not turned(1, head_dim=136) and not turned(1, head_dim=256)
    # A sequence's kernel must not depend on its neighbours, nor on the room in the cache, where that is asked for.
    assert not any(turned(batch, keys=keys, batch_invariant=True) for batch in (1, 2, 8) for keys in (64, 32768))
    monkeypatch.setenv("FLASHCORE_SM90_DECODE", "straight")
    assert not turned(1, keys=8192)
    monkeypatch.setenv("FLASHCORE_SM90_DECODE", "turned")
    assert turned(1, 8, keys=64) and not turned(8, 8, keys=8192) and not turned(1, keys=8192, batch_invariant=True)
    monkeypatch.setenv("FLASHCORE_SM90_DECODE", "")
    assert turned(1, keys=8192)
    monkeypatch.setenv("FLASHCORE_SM90_DECODE", "wgmma")
    with pytest.raises(ValueError, match="FLASHCORE_SM90_DECODE.*wgmma"):
        decode_plan("h100")


def clusters(plan) -> int:
    """Blocks that share a part."""
    found = re.search(r"a cluster of (\d) blocks each", plan.reason)
    return int(found[1]) if found else 1


def shares(plan) -> int:
    """Of a part, each computed by itself."""
    found = re.search(r"computes (\d) shares of it in turn", plan.reason)
    return int(found[1]) if found else clusters(plan)


def test_plan_of_clusters(device):
    """One sequence, its rows in one tile: about 64 blocks in clusters that merge by themselves."""
    for heads_k, cluster in ((8, 8), (6, 8), (16, 4), (12, 4), (32, 2), (64, 1)):
        for tokens, page_size in itertools.product((1, 4, 8, 16), (0, 16, 64)):
            p = decode_plan("h100", 1, tokens, 2 * heads_k, heads_k, page_size=page_size)
            assert p.blocks == heads_k * cluster and p.splits == 1 and p.workspace == 0
            assert clusters(p) == cluster and p.shared_memory <= BLOCK_BYTES["h100"]
    # 40 blocks are too few: two parts of each head, or more where there are fewer heads, and a merge.
    for heads_k, cluster, parts in ((5, 8, 2), (4, 8, 2), (2, 8, 4), (1, 8, 8), (11, 4, 2), (40, 1, 2)):
        p = decode_plan("h100", heads_q=4 * heads_k, heads_k=heads_k, keys=8192)
        assert p.blocks == heads_k * cluster * parts and p.splits == parts and p.workspace > 0
        assert clusters(p) == cluster
    # Tiles of half the size, on twice the blocks.
    for heads_k, cluster in ((8, 8), (16, 8), (32, 4), (64, 2)):
        p = decode_plan("h100", heads_q=heads_k, heads_k=heads_k, head_dim=64, keys=8192)
        assert p.blocks == heads_k * cluster and p.splits == 1 and clusters(p) == cluster
    # A few sequences, each as if it were alone, while all blocks run at once.
    few = ((2, 8, 128, 8), (3, 8, 128, 8), (2, 4, 128, 8), (4, 32, 64, 2), (2, 16, 64, 4))
    # Of 32 clusters of 8, or 64 of 4, some would have to wait: half as many blocks.
    few += ((4, 8, 128, 4), (4, 16, 64, 2))
    for batch, heads_k, head_dim, cluster in few:
        p = decode_plan("h100", batch, heads_q=4 * heads_k, heads_k=heads_k, head_dim=head_dim, keys=8192)
        assert p.blocks == batch * heads_k * cluster * p.splits <= 264 and clusters(p) == cluster
        assert p.splits == (2 if heads_k == 4 else 1)
    for options in ({"tokens": 9}, {"batch": 5}, {"keys": 256}):
        p = decode_plan("h100", **options)
        assert p.backend == "sm90" and p.workspace > 0 and clusters(p) == 1, options


def test_plan_keeps_memory_busy(device):
    """On Hopper tiles of 128 KiB and more on their way to a multiprocessor; forced, sm80 has 64."""
    for tokens, head_dim in itertools.product((1, 4, 8), (64, 128)):
        p = decode_plan("h100", 1, tokens, head_dim=head_dim, keys=8192)
        assert p.kernel == "sm90_decode_turned" and 2 * (p.shared_memory - 18 * 1024) >= 160 << 10
    for head_dim in (64, 128):
        p = decode_plan("h100", 8, head_dim=head_dim, keys=8192, batch_invariant=True)
        assert p.kernel == "sm90_decode" and 2 * (p.shared_memory - 2048 - p.tile_q * p.head_dim * 2) >= 128 << 10
        p = decode_plan("h100", 8, head_dim=head_dim, keys=8192, backend="sm80")
        assert p.blocks == 2 * 132
        assert 2 * (p.shared_memory - p.tile_q * p.head_dim * 2) >= 64 << 10


def test_plan_of_sequences_that_may_differ(device):
    """A team of blocks for each line of a sequence, as many as run at once, or in some rounds."""
    for tokens, head_dim, blocks in ((1, 128, 264), (8, 128, 128), (8, 64, 264), (1, 256, 128)):
        p = decode_plan("h100", 8, tokens, head_dim=head_dim, keys=8192)
        assert p.blocks == blocks and clusters(p) == 1, (tokens, head_dim)
        # Two slots a block.
        assert p.workspace == 2 * p.blocks * min(4 * tokens, 32) * (head_dim + 1) * 4
        assert "in teams" in p.reason and "length alone" not in p.reason
    for heads_k, blocks in ((1, 264), (5, 260), (32, 256), (96, 768), (150, 750), (300, 300)):
        assert decode_plan("h100", 16, heads_q=heads_k, heads_k=heads_k, keys=8192).blocks == blocks, heads_k
    assert decode_plan("h100", 500, heads_q=300, heads_k=300, keys=8192).workspace == 0  # one team has all
    # With more sequences than teams, and few rows, blocks merge by themselves, and count: 8 bytes a block.
    for batch, tokens, counts in ((33, 1, 0), (34, 1, 8), (64, 2, 8), (64, 3, 0), (64, 8, 0)):
        p = decode_plan("h100", batch, tokens, keys=8192)
        slot_bytes = min(4 * tokens, 32) * 129 * 4
        assert p.workspace == p.blocks * (2 * slot_bytes + counts), (batch, tokens)


@pytest.mark.parametrize("gpu", ["a100", "h100"])
def test_plan_of_prompts(device, gpu):
    """Queries that fill tiles take the forward kernel; where the cache has pages, many do."""
    kernels = {"a100": ("sm80_forward", "sm80_decode"), "h100": ("sm90_forward", "sm90_decode")}[gpu]

    def kernel(*args, **options):
        return decode_plan(gpu, *args, **options).kernel

    assert kernel(1, 8192, keys=8192) == kernel(8, 64, keys=8192) == kernel(64, 100) == kernels[0]
    few = kernel(1, 17, keys=8192), kernel(64, 16), kernel(64, 20, heads_k=32)
    assert set(few) == {kernels[1]}
    # Pages are brought together first, which takes as long as decoding some hundred rows.
    assert kernel(1, 8192, keys=8192, page_size=64) == kernel(8, 256, keys=8192, page_size=16) == kernels[0]
    assert kernel(1, 64, keys=8192, page_size=64) == kernel(8, 100, keys=8192, page_size=64) == kernels[1]
    p = decode_plan(gpu, 8, 256, keys=8192, page_size=16)
    assert p.workspace == 8 * 8192 * 8 * 128 * 2 * 2 and "brought together" in p.reason
    assert kernel(64, 256, keys=32768, page_size=16) == kernels[1]  # 8 GiB
    assert kernel(1, 8192, keys=8192, page_size=64, batch_invariant=True) == kernels[1]
    # The heads of a group share a tile on Hopper alone.
    assert kernel(64, 17) == kernels[gpu == "a100"]
    # A sequence's kernel must not depend on its neighbours, where that is asked for.
    assert kernel(1, 17, batch_invariant=True) == kernel(64, 17, batch_invariant=True) == kernels[1]
    assert kernel(1, 4096, batch_invariant=True) == kernel(64, 4096, batch_invariant=True) == kernels[0]
    short = decode_plan(gpu, 64, 128, 8, 8, 64, keys=256)  # whose attention is a small problem's
    assert short.kernel == kernels[0] and short.workspace == 0


def test_plan_without_parts(device):
    """One tile a sequence needs no workspace; nothing to compute is sm80's."""
    assert decode_plan("h100", 1, 1, 8, 8, 64, keys=64).workspace == 0
    assert decode_plan("h100", 500, 1, 8, 8, 64, keys=64).workspace == 0
    assert decode_plan("h100").workspace == 0  # a cluster's blocks merge by themselves
    assert decode_plan("h100", 90, 1, 4, 1, 64, keys=128).workspace > 0
    assert decode_plan("a100", 1, 1, 4, 1, 64, keys=128).workspace > 0
    assert decode_plan("h100", 0, keys=128).blocks == 0
    assert decode_plan("h100", 1, 0, keys=128).blocks == 0


@pytest.mark.parametrize("heads_k", [1, 2, 8, 40])
@pytest.mark.parametrize("batch", [5, 7, 33, 64, 300])
def test_teams_without_workspace_merge_nothing(device, batch, heads_k):
    rng = random.Random(batch)
    for keys in (1, 40, 64, 65, 128):
        plan = decode_plan("h100", batch, heads_q=heads_k, heads_k=heads_k, keys=keys)
        if plan.workspace > 0 or "in teams" not in plan.reason:
            continue
        for lengths in ([keys] * batch, [0] * batch, [rng.randrange(keys + 1) for _ in range(batch)]):
            teams = plan.blocks // heads_k
            for _, pieces in _core.decode_parts(lengths, keys, 1, 0, UNLIMITED, 0, heads_k, teams, 0):
                assert [slot for *_, slot in pieces] == [-1], (keys, lengths, teams)


@pytest.mark.parametrize("gpu", ["a100", "h100"])
def test_plan_batch_invariant(device, gpu):
    """The most parts of a sequence do not depend on the batch, nor on what the cache could hold beyond them."""
    for heads_k, keys in itertools.product((1, 2, 8), (256, 4096, 131072)):
        plans = [
            decode_plan(gpu, batch, heads_q=4 * heads_k, heads_k=heads_k, keys=keys, batch_invariant=True)
            for batch in (1, 3, 64)
        ]
        assert len({p.splits for p in plans}) == 1
        assert [
            p.workspace // plans[0].workspace if p.workspace else batch
            for p, batch in zip(plans, (1, 3, 64), strict=True)
        ] == [1, 3, 64]
        most = {1: 64, 2: 64, 8: 16} if gpu == "a100" else {1: 8, 2: 4, 8: 1}
        assert plans[0].splits == min(keys // 256, most[heads_k])
        assert "length alone" in plans[0].reason
        if gpu == "h100":
            all_shares = [p.blocks // clusters(p) * shares(p) for p in plans]
            assert all_shares == [8 * n * heads_k * plans[0].splits for n in (1, 3, 64)]


@pytest.mark.parametrize("batch", [1, 5, 64])
def test_batch_invariant_clusters_depend_on_the_sequence_alone(device, batch):
    """On Hopper: on its key heads and tiles of rows, neither on the batch nor on the room."""
    for keys in (64, 8192):
        for heads_k, tokens, cluster in ((8, 1, 8), (8, 8, 8), (8, 16, 8), (16, 1, 4), (40, 1, 1), (4, 32, 8)):
            p = decode_plan("h100", batch, tokens, 4 * heads_k, heads_k, keys=keys, batch_invariant=True)
            assert shares(p) == cluster >= clusters(p), (keys, heads_k, tokens)


def test_plan_of_shares_in_turn(device):
    """Where not all of a sequence's blocks would run at once, fewer, each with several of its shares."""
    for batch, keys, cluster in (
        *((1, 8192, 8), (2, 8192, 8), (4, 8192, 4), (8, 8192, 2), (12, 8192, 1), (16, 8192, 2), (32, 8192, 1)),
        *((20, 8192, 8), (64, 8192, 8), (20, 1024, 8), (64, 2048, 1)),
    ):
        p = decode_plan("h100", batch, keys=keys, batch_invariant=True)
        assert clusters(p) == cluster and shares(p) == 8 and p.blocks == batch * 8 * cluster, (batch, keys)
        assert p.shared_memory <= (113 << 10) and p.workspace == 0
    # 32 rows have no place to be brought together in between.
    assert clusters(decode_plan("h100", 8, 8, batch_invariant=True)) == 8


def test_plan_of_equal_lengths(device):
    """Known to be alike: a block for each multiprocessor, but no more clusters than run at once."""
    for batch, tokens, cluster in ((8, 1, 2), (4, 1, 4), (4, 8, 2), (2, 8, 4), (16, 1, 1)):
        p = flashcore.plan(
            (batch, tokens, 32, 128), (batch, 8192, 8, 128), (batch, 8192, 8, 128), dtype="bfloat16", device="h100"
        )
        assert p.backend == "sm90" and clusters(p) == cluster and p.blocks == batch * 8 * cluster <= 128
        assert p.blocks <= 128 and p.workspace == 0


def test_plan_on_the_cpu(device):
    p = decode_plan("cpu", 2, dtype="float32")
    assert p.backend == "cpu" and p.kernel == "cpu_forward" and p.workspace == 0
    assert decode_plan("cpu", 1, keys=16384).splits == 4
    assert decode_plan("cpu", 1, keys=16384, page_size=64).splits == 4
    assert decode_plan("cpu", 1, keys=16384, batch_invariant=True).splits == 1


def test_plan_refuses(device):
    with pytest.raises(RuntimeError, match="9.0"):
        decode_plan("a100", backend="sm90")
    with pytest.raises(ValueError, match="backend"):
        decode_plan("h100", backend="cpu")
    with pytest.raises(ValueError, match="backend"):
        decode_plan("cpu", backend="sm80")
    with pytest.raises(ValueError, match="page_table"):
        flashcore.plan((1, 1, 8, 64), (1, 9, 8, 64), (1, 9, 8, 64), page_table=(1, 2), dtype="float16", device="h100")
    with pytest.raises(ValueError, match="pages of 32"):
        decode_plan("h100", page_size=32)
