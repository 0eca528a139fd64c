# SPDX-License-Identifier: Apache-2.0
"""bench/cells.py refuses wrong results and measures right ones, and suites have the cells of their tables."""

from __future__ import annotations

import collections
import math
from dataclasses import asdict
from types import SimpleNamespace

import pytest
from bench_reports import spoiled

torch = pytest.importorskip("torch")

OPTIONS = SimpleNamespace(rotate=1e-6, rounds=3, milliseconds=1.0)


def run(bench, cell, device, ours=None, peers=None):
    ours = ours or bench.providers.flashcore_provider(None)
    peers = bench.providers.peers_of(device) if peers is None else peers
    return bench.cells.run_cell(cell, device, ours, peers, OPTIONS)


def test_a_cell_is_checked_and_timed(bench, device):
    cell = bench.suites.Cell(2, 4, 96, 64, True, "float16", heads_k=2, seqlen_k=96)
    result = run(bench, cell, device)
    assert result["problem"] == ""
    assert set(result["ratios"]) >= {"sdpa" if device == "cpu" else "flash"}
    for name, ratio in result["ratios"].items():
        own, peer = result["providers"]["flashcore"], result["providers"][name]
        assert own["microseconds"] > 0 and ratio == pytest.approx(peer["microseconds"] / own["microseconds"])
    flops = 4 * 2 * 4 * 96 * 96 * 64 / 2
    own = result["providers"]["flashcore"]
    assert own["tflops"] == pytest.approx(flops / own["microseconds"] / 1e6)


# At an element that is sampled, at one that is not, and in a whole row that nobody wrote.
@pytest.mark.parametrize("where", [(0, 0, 0, 0), (1, slice(40, 80), 2), (0, 95, 3)])
@pytest.mark.parametrize("amount", [0.5, float("nan")])
def test_a_wrong_output_is_found_and_not_timed(bench, device, where, amount):
    cell = bench.suites.Cell(2, 4, 96, 64, dtype="float16")
    result = run(bench, cell, device, spoiled(bench.providers.flashcore_provider(None), where, amount))
    assert result["problem"]
    assert "ratios" not in result and "microseconds" not in result["providers"]["flashcore"]


def test_a_backend_that_does_not_exist_is_said(bench, device):
    result = run(bench, bench.suites.Cell(1, 1, 8, 64), device, bench.providers.flashcore_provider("none such"))
    assert "none such" in result["problem"]


@pytest.mark.parametrize("count", range(1, 8))
def test_each_provider_follows_each_other_equally_often(bench, count):
    turns = [bench.timers.order_of(count, turn) for turn in range(count * (1 + count % 2))]
    assert all(sorted(turn) == list(range(count)) for turn in turns)
    follows = collections.Counter(pair for turn in turns for pair in zip(turn, turn[1:], strict=False))
    assert len(follows) == count * (count - 1)
    assert set(follows.values()) <= {1 + count % 2}


def test_a_peer_that_fails_is_left_out(bench, device):
    def failing(cell, q, k, v, out):
        raise RuntimeError("not here")

    cell = bench.suites.Cell(1, 2, 64, 64, dtype="float16")
    result = run(bench, cell, device, peers={**bench.providers.peers_of(device), "failing": failing})
    assert result["problem"] == "" and "failing" not in result["ratios"]
    assert "not here" in result["providers"]["failing"]["absent"]


def by_sequence(cell, q, k, v, out):
    """A peer for windows and variable lengths that is nobody's kernel: a sequence at a time, in float32 but for the
    weights, which are rounded as a fused kernel rounds them for its second product."""
    result = torch.empty_like(q)
    packed, rows_q, rows_k = result.flatten(0, 1), 0, 0
    q, k, v = (x.flatten(0, 1).float() for x in (q, k, v))
    for queries, keys in cell.sequences:
        own_q, own_k = slice(rows_q, rows_q + queries), slice(rows_k, rows_k + keys)
        key, value = (x[own_k].repeat_interleave(cell.heads // cell.kv_heads, 1) for x in (k, v))
        score = torch.einsum("qhd,khd->hqk", q[own_q], key) / math.sqrt(cell.head_dim)
        i, j = torch.arange(queries, device=q.device)[:, None], torch.arange(keys, device=q.device)
        distance = i + (keys - queries) - j
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if cell.causal:
            hidden |= distance < 0
        if cell.window is not None:
            hidden |= distance > cell.window
        score.masked_fill_(hidden, -math.inf)
        weight = (score - score.amax(-1, keepdim=True)).exp()
        product = torch.einsum("hqk,khd->qhd", weight.to(out.dtype).float(), value)
        packed[own_q] = (product / weight.sum(-1).T[..., None]).to(out.dtype)
        rows_q, rows_k = rows_q + queries, rows_k + keys
    return result


def varlen_cell(bench):
    return bench.suites.Cell(3, 4, 70, 64, True, "float16", heads_k=2, lengths=(33, 70, 1))


def window_cell(bench):
    return bench.suites.Cell(2, 4, 150, 64, True, "float16", window=20)


def decode_cell(bench):
    return bench.suites.Cell(3, 4, 1, 64, dtype="float16", heads_k=2, seqlen_k=192, page_size=64)


def mixed_decode_cell(bench):
    lengths = (64, 16, 160)
    return bench.suites.Cell(3, 4, 2, 64, True, "float16", heads_k=2, seqlen_k=160, lengths=lengths, page_size=16)


@pytest.mark.parametrize("cell_of", [varlen_cell, window_cell, decode_cell, mixed_decode_cell])
def test_variable_lengths_and_windows_are_checked_and_timed(bench, device, cell_of):
    result = run(bench, cell_of(bench), device, peers={"by sequence": by_sequence})
    assert result["problem"] == "" and result["ratios"]["by sequence"] > 0


@pytest.mark.parametrize(
    "cell_of, wrong",
    [
        (varlen_cell, {"lengths": (34, 69, 1)}),
        (window_cell, {"window": 19}),
        (window_cell, {"window": None}),
        (decode_cell, {"page_size": 16, "seqlen_k": 128}),
        (mixed_decode_cell, {"lengths": (48, 32, 160)}),
        (mixed_decode_cell, {"causal": False}),
    ],
)
def test_a_wrong_boundary_is_found(bench, device, cell_of, wrong):
    cell = cell_of(bench)
    spoiled = bench.suites.Cell(**{**asdict(cell), **wrong})
    right = bench.providers.flashcore_provider(None)
    ours = lambda cell, *arrays: right(spoiled, *arrays)  # noqa: E731
    assert "error" in run(bench, cell, device, ours, {"by sequence": by_sequence})["problem"]


def test_jax_is_checked_and_timed(bench):
    pytest.importorskip("jax")
    peers = {"jax": bench.providers.Jax("xla")}
    cell = bench.suites.Cell(2, 4, 48, 64, True, "float32", heads_k=2)
    result = run(bench, cell, "cpu", peers=peers)
    assert result["problem"] == "" and result["ratios"]["jax"] > 0
    for left_out in (window_cell(bench), varlen_cell(bench), bench.suites.Cell(1, 2, 4, 64, True, seqlen_k=9)):
        assert "measured without" in run(bench, left_out, "cpu", peers=peers)["providers"]["jax"]["absent"]


def test_sdpa_says_that_it_has_no_windows(bench, device):
    result = run(bench, window_cell(bench), device, peers={"cudnn": bench.providers.sdpa_provider(None)})
    assert "SDPA has no windows" in result["providers"]["cudnn"]["absent"] and "no peer ran" in result["problem"]


def test_the_forward_suite_has_the_cells_of_the_table(bench):
    cells = bench.suites.suites()["forward"]
    assert len(cells) == 12 and {c.batch * c.seqlen for c in cells} == {16384}
    assert {c.heads * c.head_dim for c in cells} == {2048} and {c.dtype for c in cells} == {"bfloat16"}
    assert cells[-1].flops == 2 * 16 * 16384**2 * 128 and cells[0].bytes == 4 * 16384 * 2048 * 2


def test_the_other_suites_have_the_cells_of_the_tables(bench):
    suites = bench.suites.suites()
    for name, count in (("forward_more", 30), ("grid", 120)):
        cells = suites[name]
        assert len(cells) == len({c.label for c in cells}) == count
        assert {c.batch * c.seqlen for c in cells} == {16384}
        heads = {c.head_dim: c.heads for c in cells}
        assert heads == {64: 32, 96: 21, 128: 16, 192: 10, 256: 8}
    assert not set(suites["forward"]) & set(suites["forward_more"])
    assert set(suites["forward"]) | set(suites["forward_more"]) <= set(suites["grid"])
    assert [c.dtype for c in suites["grid"]] == ["bfloat16"] * 60 + ["float16"] * 60

    first = suites["varlen"][0]
    assert first.shape_q == first.shape_k == (1, 115725, 16, 128) and suites["varlen"][1].shape_k == (1, 115725, 8, 128)
    assert first.flops / 2295e-6 == pytest.approx(531e12, rel=1e-3)  # as the peer was measured
    decode = suites["decode"]
    assert len(decode) == len({c.label for c in decode}) == 20
    assert decode[0].bytes == 2 * (4096 * 8 + 32) * 128 * 2 and decode[0].decodes
    mixed = next(c for c in decode if c.lengths)
    assert len(mixed.lengths) == 64 and all(n % 64 == 0 and 128 <= n <= 32768 for n in mixed.lengths)
    assert mixed.shape_q == (1, 64, 32, 128) and mixed.shape_k == (1, sum(mixed.lengths), 8, 128)
    cpu = suites["cpu"]
    assert len(cpu) == len({c.label for c in cpu}) == 72
    assert len({(c.heads, c.seqlen, c.head_dim, c.causal) for c in cpu}) == 3 * 2 * 2 * 2
    assert bench.suites.Cell(1, 8, 512, 64, dtype="float16") in cpu[24:48] and {c.seqlen for c in cpu[24:48]} == {512}
    few = suites["few_queries"]
    assert not any(c.decodes or c.causal for c in few) and len({c.label for c in few}) == len(few)
    assert few[0].bytes == 2 * (2048 * 8 + 32) * 128 * 2
    (cached,) = suites["cpu_decode"]
    assert cached.bytes == 2 * 8 * (8192 * 8 + 32) * 128 * 2 and cached.decodes
    window, unmasked = suites["window"]
    assert window.flops == unmasked.flops == 4 * 16 * 16384 * 1024 * 128
    assert window.bytes == unmasked.bytes
