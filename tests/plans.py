# SPDX-License-Identifier: Apache-2.0
"""What the tests of plan() ask it, and what they know of the devices."""

from __future__ import annotations

import pytest

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
# A build with CUDA but without sm_90a has no sm90 for Hopper GPUs.
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
