# SPDX-License-Identifier: Apache-2.0
"""attention_kvcache() called in every way: bad arguments, corrupt lengths and page tables, streams, captured graphs."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from arrays import place, torch
from bad_calls import MUST, Row, assert_refused, integer, other
from kvcache import make
from reference import Options

import flashcore

# --- bad arguments ----------------------------------------------------------------------------------------------------


def good_call(arrays) -> dict:
    call = {
        "query": other(arrays, (2, 1, 4, 64)),
        "key_cache": other(arrays, (9, 16, 2, 64)),
        "value_cache": other(arrays, (9, 16, 2, 64)),
        "cache_seqlens": arrays.int32([10, 40]),
        "key": other(arrays, (2, 3, 2, 64)),
        "value": other(arrays, (2, 3, 2, 64)),
        "page_table": arrays.int32([[1, 2, 3, 4], [5, 6, 7, 8]]),
    }
    call["out"] = arrays.poison((2, 1, 4, 64), arrays.half)
    return call


def bad_rows():
    for name in ("key_cache", "value_cache", "key", "value"):
        yield Row(f"{name} 3-D", lambda a, c, n=name: {n: c[n][0]}, ValueError, name, "3", "4")
        yield Row(
            f"{name} int8", lambda a, c, n=name: {n: integer(a, c[n], "int8")}, TypeError, name, "int8", "float16"
        )
        yield Row(f"{name} list", lambda a, c, n=name: {n: [1.0]}, TypeError, name, "list", "")
        yield Row(
            f"{name} dim",
            lambda a, c, n=name: {n: other(a, (*c[n].shape[:3], 72))},
            ValueError,
            name,
            "72",
            ("64", *MUST),
        )
    for name in ("key_cache", "value_cache"):
        yield Row(
            f"{name} expanded",
            lambda a, c, n=name: {n: a.strided(other(a, (9 * 2048,)), c[n].shape, (1024, 64, 0, 1), 0)},
            ValueError,
            name,
            "share memory",
            "written",
        )
    yield Row("new batch", lambda a, c: {n: c[n][:1] for n in ("key", "value")}, ValueError, "key", "1", "2")
    yield Row("new tokens", lambda a, c: {"value": c["value"][:, :2]}, ValueError, "value", "2, 2", "2, 3")
    yield Row(
        "value_cache shape", lambda a, c: {"value_cache": c["value_cache"][:8]}, ValueError, "value_cache", "8", "9"
    )
    yield Row(
        "new heads", lambda a, c: {n: other(a, (2, 3, 1, 64)) for n in ("key", "value")}, ValueError, "key", "1", "2"
    )
    yield Row("key alone", lambda a, c: {"value": None}, ValueError, "value", "missing")
    yield Row("value alone", lambda a, c: {"key": None}, ValueError, "key", "missing")
    yield Row(
        "too many new",
        lambda a, c: {n: other(a, (2, 65, 2, 64)) for n in ("key", "value")},
        ValueError,
        "key",
        "65",
        "64",
    )
    yield Row("heads", lambda a, c: {"query": other(a, (2, 1, 3, 64)), "out": None}, ValueError, "key_cache", "2", "3")
    yield Row(
        "query batch",
        lambda a, c: {"query": other(a, (3, 1, 4, 64)), "out": None},
        ValueError,
        "cache_seqlens",
        "(2,)",
        "(3,)",
    )
    for name in ("cache_seqlens", "page_table"):
        for dtype in ("int64", "float32"):
            yield Row(
                f"{name} {dtype}",
                lambda a, c, n=name, d=dtype: {n: integer(a, c[n], d)},
                TypeError,
                name,
                dtype,
                "int32",
            )
        yield Row(f"{name} dims", lambda a, c, n=name: {n: c[n][None]}, ValueError, name, ("2", "3"), ("1", "2"))
        yield Row(f"{name} on the CPU", lambda a, c, n=name: {n: c[n].cpu()}, ValueError, name, "cpu", "cuda", "cuda")
    yield Row(
        "seqlens length", lambda a, c: {"cache_seqlens": a.int32([1, 2, 3])}, ValueError, "cache_seqlens", "3", "2"
    )
    yield Row("table batch", lambda a, c: {"page_table": c["page_table"][:1]}, ValueError, "page_table", "1", "2")
    yield Row("table strides", lambda a, c: {"page_table": c["page_table"][:, ::2]}, ValueError, "page_table", "2", "1")
    yield Row(
        "page size",
        lambda a, c: {n: other(a, (9, 24, 2, 64)) for n in ("key_cache", "value_cache")},
        ValueError,
        "key_cache",
        "24",
        "16, 64, 128 or 256",
    )
    yield Row("cache batch", lambda a, c: {"page_table": None}, ValueError, "key_cache", "9", "2")
    yield Row(
        "out shape", lambda a, c: {"out": a.poison((2, 1, 2, 64), a.half)}, ValueError, "out", "2, 1, 2", "2, 1, 4"
    )
    yield Row("sm90", lambda a, c: {"backend": "sm90"}, ValueError, "backend", "sm90", "cpu", only="cpu")
    yield Row("cpu", lambda a, c: {"backend": "cpu"}, ValueError, "backend", "cpu", ("sm80", "sm90"), only="cuda")
    yield Row("layout", lambda a, c: {"layout": "sbhd"}, ValueError, "layout", "sbhd", "bhsd")
    yield Row("window", lambda a, c: {"window": (-1, 0)}, ValueError, "window", "-1", "non-negative")
    yield Row("out is query", lambda a, c: {"out": c["query"]}, ValueError, "out", "query", "")
    yield Row(
        "new keys in the cache",
        lambda a, c: {"key": c["key_cache"][:2, :3]},
        ValueError,
        "key_cache",
        "key",
        "",
    )


@pytest.mark.parametrize("row", list(bad_rows()), ids=lambda row: row.name)
def test_bad_call(device, arrays, row):
    if row.only not in ("", device):
        pytest.skip(f"a rule of {row.only} only")
    assert_refused(flashcore.attention_kvcache, arrays, good_call(arrays), row)


def test_good_call_is_good(arrays):
    flashcore.attention_kvcache(**good_call(arrays))


def test_read_only_cache(device):
    """NumPy's read-only arrays may be read, but nothing appended to."""
    if device != "cpu":
        pytest.skip("a rule of cpu only")
    cache = np.ones((1, 8, 1, 64), np.float32)
    cache.flags.writeable = False
    token = np.ones((1, 1, 1, 64), np.float32)
    length = np.array([3], np.int32)
    assert flashcore.attention_kvcache(token, cache, cache, length).shape == token.shape
    with pytest.raises((ValueError, TypeError), match="key_cache"):
        flashcore.attention_kvcache(token, cache, cache, length, key=token, value=token)


def test_jax(device):
    """JAX's arrays are immutable: a cache may be read, and is refused where it would be written to."""
    jax = pytest.importorskip("jax")
    if device != "cpu":
        pytest.skip("JAX on the CPU")
    with jax.default_device(jax.devices("cpu")[0]):
        q, cache, token = (jax.numpy.ones(shape, "float32") for shape in ((2, 1, 4, 64), (2, 40, 2, 64), (2, 1, 2, 64)))
        lengths = jax.numpy.array([3, 40], "int32")
    out, lse = flashcore.attention_kvcache(q, cache, cache, lengths, return_lse=True)
    assert isinstance(out, jax.Array) and isinstance(lse, jax.Array)
    assert float(abs(out - 1).max()) < 1e-6
    with pytest.raises(ValueError, match=r"key_cache: .*immutable.*key="):
        flashcore.attention_kvcache(q, cache, cache, lengths, key=token, value=token)


# --- corrupt lengths and page tables ----------------------------------------------------------------------------------

# Lengths of three sequences with room for 64 tokens each; pages of 16; what is named.
CORRUPT = {
    "negative length": ([10, -1, 64], None, "cache_seqlens", "sequence 1"),
    "most negative length": ([10, 64, -(2**31)], None, "cache_seqlens", "sequence 2"),
    "too long": ([65, 3, 64], None, "cache_seqlens", "sequence 0"),
    "far too long": ([10, 2**31 - 1, 64], None, "cache_seqlens", "sequence 1"),
    "page past the end": ([10, 20, 64], {(1, 1): 12}, "page 12", "sequence 1"),
    "negative page": ([10, 20, 64], {(2, 3): -1}, "page -1", "sequence 2"),
    "garbage page": ([10, 20, 64], {(0, 0): 2**31 - 1}, "page 2147483647", "sequence 0"),
}


def guarded_call(arrays, lengths, pages, new):
    """Calls attention_kvcache on 12 pages between guards of poison; all rows of the cache are finite. Returns what was
    raised, and what was placed."""
    shapes = {
        "query": (3, 2, 4, 128),
        "key_cache": (12, 16, 2, 128),
        "value_cache": (12, 16, 2, 128),
        "key": (3, new, 2, 128),
        "value": (3, new, 2, 128),
    }
    placed = {
        name: place(arrays, shape, arrays.half, "contiguous", arrays.random(shape, arrays.half, 91 + i))
        for i, (name, shape) in enumerate(shapes.items())
    }
    target = place(arrays, shapes["query"], arrays.half, "contiguous")
    table = [[4 * b + i for i in range(4)] for b in range(3)]
    for (b, i), page in (pages or {}).items():
        table[b][i] = page
    call = {name: p.view for name, p in placed.items() if new or "cache" in name or name == "query"}
    error = None
    try:
        flashcore.attention_kvcache(
            **call, cache_seqlens=arrays.int32(lengths), page_table=arrays.int32(table), causal=True, out=target.view
        )
    except ValueError as raised:
        error = raised
    arrays.synchronize()
    return error, placed, target


@pytest.mark.parametrize("name", CORRUPT)
def test_corrupt_values_are_refused(arrays, monkeypatch, name):
    """On the CPU always, on the GPU with FLASHCORE_CHECK=1: ValueError, naming argument and sequence; nothing
    written."""
    if arrays.on_gpu:
        monkeypatch.setenv("FLASHCORE_CHECK", "1")
    lengths, pages, *named = CORRUPT[name]
    for new in (0, 3):
        shorter = [n - new if n == 64 else n for n in lengths]
        error, _, target = guarded_call(arrays, shorter, pages, new)
        assert error is not None, "nothing was raised"
        assert all(text in str(error) for text in named), str(error)
        assert arrays.is_poison(target.buffer), "out was written"
    fits = [10, 20, 60]
    assert guarded_call(arrays, fits, None, 3)[0] is None
    error, *_ = guarded_call(arrays, fits, None, 5)
    assert "cache_seqlens" in str(error) and "sequence 2" in str(error)


@pytest.mark.parametrize("name", CORRUPT)
@pytest.mark.parametrize("new", [0, 3])
def test_corrupt_values_on_the_gpu_touch_nothing_outside(arrays, decode_kernel, name, new):
    """Without the check: no error, nothing outside the arrays read (guards are NaN) or written, and the other
    sequences' results are what they are."""
    if not arrays.on_gpu:
        pytest.skip("values of CPU arrays are always checked")
    lengths, pages, *_ = CORRUPT[name]
    error, placed, target = guarded_call(arrays, lengths, pages, new)
    assert error is None
    assert not bool((target.view != target.view).any()), "a row of out was computed from outside the arrays"
    good = [n if 0 <= n <= 64 - new else 10 for n in lengths]
    _, _, expected = guarded_call(arrays, good, None, new)
    for b in range(3):
        if good[b] == lengths[b] and not any(at[0] == b for at in pages or {}):
            difference = abs(arrays.float64(target.view[b]) - arrays.float64(expected.view[b]))
            assert float(difference.max()) < 2e-3
    for p in (*placed.values(), target):
        assert p.surroundings_intact()


def test_keys_in_missing_pages_are_left_out(arrays, decode_kernel):
    """On the GPU: as if the keys of such a page were not there."""
    if not arrays.on_gpu:
        pytest.skip("values of CPU arrays are always checked")
    decoding = make(arrays, [60, 100], 1, (4, 2), 128, page_size=16, seed=5)
    decoding.table[1][2] = -7
    out, lse = decoding.call()
    for kept in (decoding.keys, decoding.values):
        kept[1] = arrays.concatenate([kept[1][:32], kept[1][48:]])
    decoding.check(out, lse)


# --- streams and graphs -----------------------------------------------------------------------------------------------


def gpu_only(arrays):
    if not arrays.on_gpu:
        pytest.skip("streams and graphs are CUDA's")


def decodings(arrays, count):
    """Different in everything; most are divided among blocks."""
    for i in range(count):
        yield make(
            arrays,
            [3000 + 111 * i, 70 * i, 9000],
            1 + i % 2,
            (8, 2),
            (64, 128)[i % 2],
            new=i % 3,
            page_size=(0, 16, 64)[i % 3],
            seed=100 + i,
        )


def test_two_streams_at_once(arrays, decode_kernel):
    gpu_only(arrays)
    work = list(decodings(arrays, 4))
    alone = [w.call(causal=True) for w in work]
    streams = [torch.cuda.Stream() for _ in work]
    torch.cuda.synchronize()
    results = []
    for _ in range(20):
        for w, stream in zip(work, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(w.call(causal=True))
    torch.cuda.synchronize()
    for i, result in enumerate(results):
        assert all(arrays.same_bits(a, b) for a, b in zip(result, alone[i % 4], strict=True)), i


class Captured:
    """A graph of one call, whose lengths may be changed."""

    def __init__(self, decoding, **options):
        self.decoding = decoding
        self.lengths = decoding.seqlens()
        self.given = {**decoding.keywords(), **options}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.call()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out, self.lse = self.call()

    def call(self):
        d = self.decoding
        return flashcore.attention_kvcache(
            d.query, d.key_cache, d.value_cache, self.lengths, return_lse=True, **self.given
        )

    def check_with(self, scales, options):
        """Replays with each scale's part of the lengths, into poison."""
        d = self.decoding
        lengths, keys, values = list(d.lengths), list(d.keys), list(d.values)
        for scale in scales:
            now = [int(n * scale) for n in lengths]
            self.lengths.copy_(d.arrays.int32(now))
            d.arrays.poison_in_place(self.out)
            self.graph.replay()
            torch.cuda.synchronize()
            d.keys = [k[:n] for k, n in zip(keys, now, strict=True)]
            d.values = [v[:n] for v, n in zip(values, now, strict=True)]
            d.check(self.out, self.lse, options, f"{now}")


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("page_size", [0, 64])
def test_graph_replayed_with_other_lengths(arrays, decode_kernel, page_size, batch_invariant):
    """What is captured with some lengths is right for others: the work is divided on the device."""
    gpu_only(arrays)
    decoding = make(arrays, [5000, 64, 9000, 1], 2, (8, 2), 128, page_size=page_size, capacity=9216, seed=3)
    graph = Captured(decoding, causal=True, batch_invariant=batch_invariant)
    graph.check_with((1.0, 0.5, 0.0, 0.03, 0.9), Options(causal=True))


def test_graph_of_a_prompt_replayed_with_other_lengths(arrays):
    gpu_only(arrays)
    decoding = make(arrays, [5000, 64, 900, 1], 300, (8, 2), 128, capacity=5120, seed=4)
    Captured(decoding, causal=True).check_with((1.0, 0.5, 0.0, 0.3), Options(causal=True))


@pytest.mark.parametrize("lengths", [[10, -1, 999, 400], [2**31 - 1, 3, -(2**31), 401]], ids=str)
def test_corrupt_lengths_of_prompts_touch_nothing_outside(arrays, lengths):
    """The guards around the cache are NaN; so is the rest of it."""
    gpu_only(arrays)
    shapes = {"query": (4, 150, 12, 64), "key_cache": (4, 400, 4, 64), "value_cache": (4, 400, 4, 64)}
    placed = {
        name: place(arrays, shape, arrays.half, "contiguous", arrays.random(shape, arrays.half, 7 + i))
        for i, (name, shape) in enumerate(shapes.items())
    }
    target = place(arrays, shapes["query"], arrays.half, "contiguous")
    views = [p.view for p in placed.values()]
    flashcore.attention_kvcache(*views, arrays.int32(lengths), causal=True, out=target.view)
    expected = flashcore.attention_kvcache(*views, arrays.int32([min(max(n, 0), 400) for n in lengths]), causal=True)
    arrays.synchronize()
    assert not bool((target.view != target.view).any()) and arrays.same_bits(target.view, expected)
    for p in (*placed.values(), target):
        assert p.surroundings_intact()


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("page_size", [0, 64])
def test_lengths_written_right_ahead_of_the_call(arrays, decode_kernel, page_size, batch_invariant):
    """A kernel that starts while the one ahead ends looks at the lengths then: what counts is what they become."""
    gpu_only(arrays)
    for count in (1, 5, 12):
        lengths = [5000, 64, 9000, 1, 700, 0, 333, 2100] * 2 if count > 1 else [9000]
        decoding = make(arrays, lengths[:count], 1, (8, 2), 128, page_size=page_size, capacity=9216, seed=count)
        given = decoding.keywords() | {"batch_invariant": batch_invariant}
        now = [arrays.int32([int(n * scale) for n in lengths[:count]]) for scale in (1.0, 0.02, 0.6, 0.0)]

        def call(seqlens, decoding=decoding, given=given):
            d = decoding
            return flashcore.attention_kvcache(d.query, d.key_cache, d.value_cache, seqlens, return_lse=True, **given)

        expected = [call(x) for x in now]
        torch.cuda.synchronize()
        seqlens = now[0].clone()
        results = []
        for i in range(40):
            seqlens.copy_(now[i % len(now)])
            results.append(call(seqlens))
        torch.cuda.synchronize()
        for i, result in enumerate(results):
            assert all(arrays.same_bits(a, b) for a, b in zip(result, expected[i % len(now)], strict=True)), i


@pytest.mark.parametrize("keys", [4096, 40000])
@pytest.mark.parametrize("page_size", [16, 64])
def test_page_table_written_by_the_call_ahead(arrays, decode_kernel, page_size, keys):
    """A kernel that starts while the one ahead ends looks at the table then: what counts is what it becomes. The call
    ahead has a key that outweighs all others, so that its output is that key's value: the bits of page numbers."""
    gpu_only(arrays)
    pages, first = 512, 1024  # as halves, numbers below 1,024 would not be normal
    device, half = torch.device("cuda"), torch.float16
    generator = torch.Generator().manual_seed(keys + page_size)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(device, half)

    tables = [first + torch.randperm(pages, generator=generator).to(device, torch.int32) for _ in range(2)]
    ahead = [random(1, keys, 8, 128) for _ in range(2)]
    queries = []
    for i, (table, at) in enumerate(zip(tables, (keys // 3, keys - 2), strict=True)):
        direction = torch.zeros(128, device=device, dtype=half)
        direction[64 * i : 64 * i + 64] = 8
        ahead[0][0, at] = direction
        ahead[1][0, at] = table.view(half).view(8, 128)
        queries.append(direction.expand(1, 1, 8, 128).contiguous())
    query, caches = random(1, 1, 8, 128), [random(first + pages, page_size, 2, 128) for _ in range(2)]
    lengths = arrays.int32([keys]), arrays.int32([pages * page_size - 5])

    def call(table):
        return flashcore.attention_kvcache(query, *caches, lengths[1], page_table=table)

    expected = [call(table.view(1, pages)) for table in tables]
    written = torch.full((1, pages), -7, device=device, dtype=torch.int32)
    torch.cuda.synchronize()
    results = []
    for i in range(40):
        flashcore.attention_kvcache(queries[i % 2], *ahead, lengths[0], out=written.view(half).view(1, 1, 8, 128))
        results.append(call(written))
    torch.cuda.synchronize()
    assert torch.equal(written[0], tables[1])
    for i, result in enumerate(results):
        assert arrays.same_bits(result, expected[i % 2]), i


def replay_side_by_side(arrays, graphs, alone, times):
    """Replays each graph on a stream of its own, all at once: each has the bits that its call has alone."""
    streams = [torch.cuda.Stream() for _ in graphs]
    torch.cuda.synchronize()
    for _ in range(times):
        for g, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                g.graph.replay()
    torch.cuda.synchronize()
    for g, expected in zip(graphs, alone, strict=True):
        assert arrays.same_bits(g.out, expected[0]) and arrays.same_bits(g.lse, expected[1])


def test_two_graphs_side_by_side(arrays, decode_kernel):
    """Replayed at once on two streams, each with a workspace of its own."""
    gpu_only(arrays)
    work = list(decodings(arrays, 2))
    alone = [w.call(causal=True) for w in work]
    graphs = [Captured(w, causal=True) for w in work]
    replay_side_by_side(arrays, graphs, alone, 20)


def test_calls_one_after_another(arrays, decode_kernel):
    """A call's workspace becomes the next one's: the merge of the one is done before the other writes."""
    gpu_only(arrays)
    work = list(decodings(arrays, 3))
    alone = [w.call(causal=True) for w in work]
    results = [work[i % 3].call(causal=True) for i in range(60)]
    for i, result in enumerate(results):
        assert all(arrays.same_bits(a, b) for a, b in zip(result, alone[i % 3], strict=True)), i


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("count", [1, 3, 7, 40])
def test_workspace_may_hold_anything(arrays, decode_kernel, count, batch_invariant):
    """Parts of a sequence are counted in the workspace, which nobody clears, before a call or a graph's replay."""
    gpu_only(arrays)
    lengths, heads = [9000, 70, 3000, 0, 1, 64, 5000][:count], (8, 2)
    if count > 7:  # more than there are teams of blocks for each of 8 key heads
        lengths, heads = [71 * i * i % 1000 for i in range(count)], (16, 8)
    decoding = make(arrays, lengths, 2, heads, 128, seed=count)
    options = {"causal": True, "batch_invariant": batch_invariant}
    shapes = [tuple(x.shape) for x in (decoding.query, decoding.key_cache, decoding.value_cache)]
    plan = flashcore.plan(*shapes, cache_seqlens=(count,), dtype=arrays.half, device="cuda", **options)
    assert plan.workspace > 0 or batch_invariant
    expected = decoding.call(**options)
    decoding.check(*expected, Options(causal=True))
    graph = Captured(decoding, **options)
    for low, high in ((-(2**63), 2**63 - 1), (0, 4), (-1, 0)) * 2:
        # More memory than the call takes, all of which the allocator gives again.
        left = [torch.randint(low, high, (plan.workspace // 8 + 1,), device="cuda") for _ in range(8)]
        del left
        results = [decoding.call(**options) for _ in range(3)]
        graph.graph.replay()
        for result in (*results, (graph.out, graph.lse)):
            assert all(arrays.same_bits(a, b) for a, b in zip(result, expected, strict=True)), (low, high)


def test_graphs_of_many_sequences(arrays, decode_kernel):
    """Blocks that merge by themselves: two graphs side by side, and replayed with other lengths."""
    gpu_only(arrays)
    work = [make(arrays, [(71 + 8 * g) * i * i % 1500 for i in range(40)], 1, (16, 8), 128, seed=g) for g in range(2)]
    alone = [w.call() for w in work]
    graphs = [Captured(w) for w in work]
    replay_side_by_side(arrays, graphs, alone, 30)
    graphs[0].check_with((0.5, 0.0, 0.03, 1.0, 0.9), Options())


def test_nothing_is_kept(arrays):
    decoding = make(arrays, [300, 20], 1, new=1, page_size=16)
    arguments = (decoding.query, decoding.key_cache, decoding.key)
    counts = [sys.getrefcount(a) for a in arguments]
    for _ in range(50):
        decoding.call()
    assert [sys.getrefcount(a) for a in arguments] == counts
