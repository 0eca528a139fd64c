# SPDX-License-Identifier: Apache-2.0
"""plan(): what would run, for devices that are not here."""

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
HEAD_DIMS = (8, 16, 24, 32, 40, 64, 72, 80, 96, 104, 128, 136, 160, 192, 200, 256)


def shape_plan(name, query, key=None, **options):
    options.setdefault("dtype", "float16")
    key = key or query
    return flashcore.plan(query, key, options.pop("value", key), device=name, **options)


@pytest.fixture(params=SHARED_MEMORY)
def gpu(request, device) -> str:
    """A GPU by name; none need be here. (`device` as in every test; the answers are the same on each.)"""
    return request.param


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_fits_the_device(gpu, head_dim, dtype):
    """The instance holds the head dimension, and its tiles of queries, keys and values fit into a block's shared
    memory."""
    for softcap in (0.0, 30.0):
        p = shape_plan(gpu, (2, 1000, 8, head_dim), dtype=dtype, softcap=softcap)
        assert p.backend == "sm80" and p.kernel == "sm80_forward"
        assert head_dim <= p.head_dim <= 256 and p.head_dim % 8 == 0
        assert p.head_dim - head_dim < 64  # not much work on padding
        smallest = p.tile_k * p.head_dim * 2  # one tile of keys in 16 bits
        assert smallest <= p.shared_memory <= SHARED_MEMORY[gpu]
        assert p.threads % 32 == 0 and 32 <= p.threads <= 1024
        assert p.tile_q % 16 == 0 and p.tile_k % 16 == 0
        assert p.splits >= 1 and p.workspace >= 0
        # Enough blocks for all queries of all heads, and none beyond what whole tiles need.
        assert p.blocks == 2 * 8 * -(-1000 // p.tile_q) * p.splits
        assert p.reason and gpu in p.reason


def test_head_dim_256_with_99_kib(device):
    """Devices of 8.6, 8.9 and 12.x have 99 KiB a block: they get smaller tiles, not an error; larger devices larger
    ones."""
    for dtype in ("float16", "bfloat16"):
        for head_dim in (200, 256):
            small = shape_plan("l4", (1, 4096, 16, head_dim), dtype=dtype)
            assert small == shape_plan("rtx4090", (1, 4096, 16, head_dim), dtype=dtype)
            assert small.shared_memory <= 101376 and small.head_dim == 256
            large = shape_plan("h100", (1, 4096, 16, head_dim), dtype=dtype)
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


def test_same_question_same_answer(gpu):
    """A pure function of values; plans compare by value and are hashable, their text tells them apart."""
    ask = dict(query=(3, 513, 12, 128), key=(3, 700, 4, 128), causal=True)
    plans = [shape_plan(gpu, **ask) for _ in range(3)]
    assert plans[0] == plans[1] == plans[2] and hash(plans[0]) == hash(plans[1])
    assert repr(plans[0]) == repr(plans[1])
    other = shape_plan(gpu, (3, 513, 12, 64), (3, 700, 4, 64), causal=True)
    assert other != plans[0] and repr(other) != repr(plans[0])
    assert plans[0] != "a plan"
    for field in (
        "backend",
        "kernel",
        "head_dim",
        "tile_q",
        "tile_k",
        "threads",
        "blocks",
        "splits",
        "shared_memory",
        "workspace",
    ):
        assert f"{field}={getattr(plans[0], field)!r}" in repr(plans[0])
    with pytest.raises(AttributeError):
        plans[0].tile_q = 1


def test_layouts(gpu):
    """The same problem in the other layout has the same plan."""
    a = shape_plan(gpu, (2, 1000, 8, 64), (2, 500, 4, 64))
    b = shape_plan(gpu, (2, 8, 1000, 64), (2, 4, 500, 64), layout="bhsd")
    assert a == b


def test_varlen(gpu):
    shapes = dict(query=(5000, 8, 64), key=(7000, 2, 64), cu_seqlens_q=(10,), cu_seqlens_k=(10,))
    p = shape_plan(gpu, **shapes, max_seqlen_q=600, max_seqlen_k=900, causal=True)
    assert p.backend == "sm80"
    # However the 5000 queries fall into 9 sequences, there are blocks for them.
    assert p.blocks >= 8 * -(-5000 // p.tile_q)
    assert p == shape_plan(gpu, **shapes, max_seqlen_q=600, max_seqlen_k=900, causal=True, seqused_k=(9,))
    assert shape_plan(gpu, **shapes).backend == "sm80"


def test_plans_for_arrays_as_for_shapes(device, arrays):
    tensors = arrays.qkv(2, 130, 200, 4, 2, 64, arrays.half, 1)
    p = flashcore.plan(*tensors, causal=True)
    by_name = shape_plan("cuda" if arrays.on_gpu else "cpu", (2, 130, 4, 64), (2, 200, 2, 64), causal=True)
    # How many threads a CPU has is this machine's matter.
    fields = ["backend", "kernel", "head_dim", "tile_q", "tile_k", "blocks", "splits", "shared_memory", "workspace"]
    assert all(getattr(p, field) == getattr(by_name, field) for field in fields)
    if arrays.on_gpu:
        assert p == by_name


def test_empty(gpu):
    for query, key in (((0, 10, 4, 64), (0, 10, 4, 64)), ((2, 0, 4, 64), (2, 10, 4, 64))):
        assert shape_plan(gpu, query, key).blocks == 0
    assert shape_plan(gpu, (2, 10, 4, 64), (2, 0, 4, 64)).blocks > 0  # zeros have to be written


def test_forced_backend_that_cannot_run(gpu):
    with pytest.raises(ValueError, match="backend"):
        shape_plan(gpu, (1, 10, 2, 64), backend="cpu")
    with pytest.raises(ValueError, match="backend"):
        shape_plan("cpu", (1, 10, 2, 64), backend="sm80")
    assert shape_plan(gpu, (1, 10, 2, 64), backend="sm80") == shape_plan(gpu, (1, 10, 2, 64))
    assert shape_plan("cpu", (1, 10, 2, 64), backend="cpu") == shape_plan("cpu", (1, 10, 2, 64))


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
@pytest.mark.parametrize("name", ["h100", "l4", "cpu"])
def test_sizes_beyond_32_bits_never_wrap(device, name, query, key):
    """Planned rightly, or refused; never planned too small."""
    try:
        p = shape_plan(name, query, key)
    except ValueError as error:
        assert any(argument in str(error) for argument in ("query", "key", "value", "seqlen"))
        return
    batch, seqlen_q, heads, _ = query
    tiles = -(-seqlen_q // p.tile_q)
    if name != "cpu":
        assert p.blocks == batch * heads * tiles * p.splits
    assert (p.blocks > 0) == (batch * heads * tiles > 0)
    assert p.workspace >= 0


def test_large_sizes_that_must_work(gpu):
    """More than 2^31 elements, and more than 65535 heads and batches (CUDA's limit for the grid's other axes)."""
    for query in ((64, 2**17, 32, 128), (70000, 16, 1, 64), (1, 16, 70000, 64), (1, 2**20, 1, 64)):
        p = shape_plan(gpu, query)
        assert p.blocks == query[0] * query[2] * -(-query[1] // p.tile_q) * p.splits


def test_a_large_problem_fills_the_device(gpu):
    p = shape_plan(gpu, (8, 4096, 32, 128), causal=True)
    assert p.blocks >= UNITS[gpu]
