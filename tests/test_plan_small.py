# SPDX-License-Identifier: Apache-2.0
"""Which problems get the Hopper kernels for small problems, in which form."""

from __future__ import annotations

import itertools

import pytest
from arrays import SMALL_FORMS, small_form
from plans import SHARED_MEMORY, UNITS, check_grid, needs_sm90, shape_plan


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
