# SPDX-License-Identifier: Apache-2.0
"""bench/compare.py and bench/overhead.py refuse wrong results and measure right ones."""

from __future__ import annotations

import collections
import json
import math
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
from bench_reports import PEAKS, probed, written

import flashcore

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


def spoiled(function, where, amount):
    def call(cell, q, k, v, out):
        result = function(cell, q, k, v, out)
        result[where] += amount
        return result

    return call


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


@pytest.mark.parametrize(
    "arguments",
    [
        ["--suite", "none"],
        ["--suite", "cpu", "forward"],
        ["--suite", "cpu_decode", "decode"],
        ["--suite", "forward", "--backend", "cpu"],
        ["--suite", "cpu", "--repeats", "-1"],
        ["--suite", "cpu", "--peers", "none"],
        ["--rounds", "x"],
        ["--suite", "cpu", "--cells", "3"],
        ["--suite", "cpu", "--cells", "1000:"],
        ["--suite", "cpu", "--cells", "x:"],
    ],
)
def test_bad_usage_is_exit_status_2(bench, arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.compare.main(arguments)
    assert stopped.value.code == 2 and "usage:" in capsys.readouterr().err


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


def tiny_suite(bench, monkeypatch):
    lengths = (33, 40, 47)
    tiny = [bench.suites.Cell(1, 2, s, 16, causal, "float32") for s in lengths for causal in (False, True)]
    monkeypatch.setattr(bench.compare, "suites", lambda: {**bench.suites.suites(), "cpu": tiny})
    probed(bench, monkeypatch)
    return tiny


def test_parts_of_a_suite_come_together_in_one_file(bench, monkeypatch, tmp_path, capsys):
    labels = [c.label for c in tiny_suite(bench, monkeypatch)]
    common = ["--suite", "cpu", "--output", str(tmp_path), "--rotate", "1e-6", "--milliseconds", "1", "--rounds", "1"]
    common += ["--quiet", "--name", "parts", "--commit"]
    read = lambda: json.loads((tmp_path / "parts.json").read_text())  # noqa: E731

    assert bench.compare.main([*common, "a", "--cells", "0:1", "--append"]) == 2  # to nothing
    assert "parts.json" in capsys.readouterr().err
    assert bench.compare.main([*common, "a", "--cells", "4:"]) == 0
    assert [c["label"] for c in read()["cells"]] == labels[4:]
    assert bench.compare.main([*common, "a", "--cells", ":3", "--append"]) == 0
    assert [c["label"] for c in read()["cells"]] == labels[:3] + labels[4:]
    assert read()["geometric_means"]["sdpa"]["cells"] == 5

    before = read()
    assert bench.compare.main([*common, "a", "--cells", "2:4", "--append"]) == 0
    after = read()
    assert [c["label"] for c in after["cells"]] == labels and after["cells"][0] == before["cells"][0]
    assert after["cells"][2] != before["cells"][2]  # measured again

    def never(*_):
        raise AssertionError("measured before it was refused")

    monkeypatch.setattr(bench.compare, "run_cell", never)
    for key, value in (("commit", "b"), ("backend", "sm80"), ("providers", ["flashcore"]), ("method", {})):
        (tmp_path / "parts.json").write_text(json.dumps({**after, key: value}))
        assert bench.compare.main([*common, "a", "--append"]) == 2
        assert f"has {key} " in capsys.readouterr().err


def measured(bench, folder, *arguments):
    """The report of compare.py on the suite cpu."""
    common = ["--suite", "cpu", "--rotate", "1e-6", "--milliseconds", "1", "--rounds", "1", "--quiet", "--name", "one"]
    assert bench.compare.main([*common, "--output", str(folder), *arguments]) == 0
    return json.loads((folder / "one.json").read_text())


def test_each_cell_is_held_against_the_peaks_beside_it(bench, monkeypatch, tmp_path, capsys):
    cells = [
        bench.suites.Cell(1, 8, 512, 64, dtype="float16"),
        bench.suites.Cell(1, 1, 2048, 128, dtype="bfloat16"),
        bench.suites.Cell(2, 4, 1, 64, dtype="bfloat16", heads_k=2, seqlen_k=64, page_size=0),
    ]
    monkeypatch.setattr(bench.compare, "suites", lambda: {**bench.suites.suites(), "cpu": cells})
    probed(bench, monkeypatch, 0.95, 1.0, 0.95, 1.0)
    report = measured(bench, tmp_path)
    assert report["probe"] == "made up" and report["peaks"] == PEAKS
    seed, half, decode = report["cells"]
    assert seed["peaks"] == {"name": "float32_tflops", "before": pytest.approx(0.19), "after": 0.2}
    assert half["peaks"] == {"name": "bfloat16_tflops", "before": 0.4, "after": pytest.approx(0.38)}
    for cell, field, peak in ((seed, "tflops", 0.2), (half, "tflops", 0.4), (decode, "tbytes_per_second", 0.02)):
        assert cell["steady"] and "repeats" not in cell
        assert cell["share_of_peak"] == pytest.approx(cell["providers"]["flashcore"][field] / peak)
    summary = report["summary"]
    assert summary["seed"] == seed["ratios"]["sdpa"] == pytest.approx(summary["dtypes"]["float16"]["ratio"])
    assert summary["dtypes"]["bfloat16"]["share_of_peak"] == half["share_of_peak"]
    assert "share_of_peak" not in summary["dtypes"]["float16"]
    printed = capsys.readouterr().out
    assert "the seed's shape in float16: " in printed and "% of the peak at S 2048" in printed and "*" not in printed
    assert bench.probes.governing(half, {"float32_tflops": 1.0}) == "float32_tflops"  # there is no dot product
    bench.probes.add_share(half, {**PEAKS, "bfloat16_dot_tflops": 0.1}, PEAKS)
    assert half["share_of_dot_peak"] == pytest.approx(4 * half["share_of_peak"])
    (line, *_) = bench.text_table.summary_lines(bench.summaries.cpu_summary([half]))
    assert line.endswith(f"({100 * half['share_of_dot_peak']:.0f}% of that of vectors' dot products)")
    assert f"({100 * half['share_of_dot_peak']:.0f}% of vectors' dot products)" in bench.report._share(half)


def test_the_summary_has_means_and_the_lowest(bench):
    def cell(dtype, ratio, problem="", **more):
        shape = {"seqlen": 2048, "head_dim": 128, "causal": False, **more}
        return {"dtype": dtype, "problem": problem, "ratios": {"sdpa": ratio}, "label": f"{dtype} {ratio}", **shape}

    cells = [cell("float32", 1.0, share_of_peak=0.7), cell("float32", 4.0, share_of_peak=0.6)]
    cells += [cell("float32", 9.0, "wrong"), cell("float16", 3.0, causal=True, share_of_peak=0.1)]
    summary = bench.summaries.cpu_summary(cells)
    low = {"lowest": 1.0, "lowest_at": "float32 1.0"}
    assert summary["dtypes"]["float32"] == {"cells": 2, "ratio": pytest.approx(2.0), **low, "share_of_peak": 0.6}
    assert "share_of_peak" not in summary["dtypes"]["float16"] and summary["seed"] is None


def test_a_cell_beside_which_the_machine_slowed_down_is_measured_again(bench, monkeypatch, tmp_path, capsys):
    labels = [c.label for c in tiny_suite(bench, monkeypatch)]
    order, right = [], bench.compare.run_cell
    monkeypatch.setattr(bench.compare, "run_cell", lambda cell, *rest: order.append(cell.label) or right(cell, *rest))
    # Before the first cell, and after each: the third one has a slow machine after it, the fourth before it.
    probed(bench, monkeypatch, 1.0, 1.0, 1.0, 0.5, 1.0)
    report = measured(bench, tmp_path)
    assert order == labels + labels[2:4]
    assert [cell.get("repeats", 0) for cell in report["cells"]] == [0, 0, 1, 1, 0, 0]
    assert all(cell["steady"] for cell in report["cells"]) and "*" not in capsys.readouterr().out

    # Faster at the end than before: what was measured until then does not count. It stays slow, and that is marked.
    order.clear()
    probed(bench, monkeypatch, *[0.8] * 6, 1.0, 0.8)
    report = measured(bench, tmp_path, "--repeats", "1")
    assert order == labels * 2
    assert [cell["steady"] for cell in report["cells"]] == [False] * 6
    assert "below the run's best: 6 cells" in capsys.readouterr().out
    order.clear()
    measured(bench, tmp_path, "--repeats", "0")
    assert order == labels


def test_a_wrong_cell_is_exit_status_1_and_is_not_measured_again(bench, monkeypatch, tmp_path, capsys):
    labels = [c.label for c in tiny_suite(bench, monkeypatch)]
    wrong = spoiled(bench.providers.flashcore_provider(None), (0, 0, 0, 0), 0.5)
    monkeypatch.setattr(bench.compare, "flashcore_provider", lambda backend: wrong)
    probed(bench, monkeypatch, 1.0, 0.5)
    common = ["--suite", "cpu", "--rotate", "1e-6", "--milliseconds", "1", "--rounds", "1", "--quiet", "--name", "one"]
    assert bench.compare.main([*common, "--output", str(tmp_path)]) == 1
    report = json.loads((tmp_path / "one.json").read_text())
    assert [cell["label"] for cell in report["cells"]] == labels
    assert all(cell["problem"] and "repeats" not in cell and "peaks" not in cell for cell in report["cells"])
    assert report["summary"] == {"dtypes": {}, "seed": None}
    assert capsys.readouterr().out.count("WRONG: ") == len(labels)


def test_of_two_measurements_the_steadier_counts_and_a_wrong_one_stays(bench):
    slow, fast = ({"problem": "", "peaks": {"before": 1.0, "after": after}} for after in (0.5, 0.8))
    wrong = {"problem": "largest error"}
    better = bench.compare.better
    assert better(slow, fast) is fast and better(fast, slow) is fast and better(wrong, fast) is wrong


def test_pytorch_stands_in_for_the_probe(bench):
    name, _ = bench.probes.probe_of(None)
    peaks = bench.probes.torch_peaks(rounds=2, size=64, elements=1 << 16)
    assert name.startswith("torch") and set(peaks) == set(PEAKS) and all(0 < value < 100 for value in peaks.values())


STAND_IN = """#!{python}
import json, os, sys
report = {{"threads": int(os.environ["OMP_NUM_THREADS"]), "isa": "{isa}", "peak": {peaks}}}
assert sys.argv[1:-2] == ["peak"{arguments}]
open(sys.argv[sys.argv.index("--json") + 1], "w").write(json.dumps(report))
"""


def stand_in(isa: str, peaks: dict, arguments: str = ', "--backend", "cpu"') -> str:
    return STAND_IN.format(python=sys.executable, isa=isa, peaks=peaks, arguments=arguments)


@pytest.mark.skipif(sys.platform == "win32", reason="a script that is a program")
def test_a_program_probes_the_memory_of_a_gpu(bench, tmp_path):
    program = tmp_path / "program"
    memory = {"copy_tbytes_per_second": 3.0, "read_tbytes_per_second": 3.2}
    program.write_text(stand_in("any", {"wgmma_tflops": 700.0, **memory}, ""))
    program.chmod(0o755)
    assert bench.probes.memory_peaks(str(program)) == memory


@pytest.mark.skipif(sys.platform == "win32", reason="a script that is a program")
def test_a_program_probes(bench, tmp_path, capsys):
    import flashcore

    program = tmp_path / "program"
    isa = flashcore.info()["cpu"]["isa"]
    program.write_text(stand_in(isa, PEAKS))
    program.chmod(0o755)
    name, probe = bench.probes.probe_of(str(program))
    assert name == "flashcore_bench peak" and probe() == PEAKS
    program.write_text(stand_in("another", PEAKS))
    with pytest.raises(ValueError, match="isa another"):
        bench.probes.probe_of(str(program))
    program.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('a reason')\n")
    with pytest.raises(ValueError, match="a reason"):
        bench.probes.probe_of(str(program))
    assert bench.compare.main(["--suite", "cpu", "--probe", str(tmp_path / "none"), "--output", str(tmp_path)]) == 2
    assert "--probe: " in capsys.readouterr().err and not list(tmp_path.glob("*.json"))


def test_a_run_cut_short_keeps_its_cells(bench, monkeypatch, tmp_path):
    labels = [c.label for c in tiny_suite(bench, monkeypatch)]
    right, done = bench.compare.run_cell, []

    def cut_short(cell, *rest):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(cell)
        return right(cell, *rest)

    monkeypatch.setattr(bench.compare, "run_cell", cut_short)
    with pytest.raises(KeyboardInterrupt):
        bench.compare.main(
            ["--suite", "cpu", "--output", str(tmp_path), "--milliseconds", "1", "--quiet", "--name", "cut"]
        )
    assert [c["label"] for c in json.loads((tmp_path / "cut.json").read_text())["cells"]] == labels[:2]


def test_the_host_s_cost_from_measuring_to_readme(bench, tmp_path, capsys):
    before = flashcore.get_num_threads(), torch.get_num_threads()
    assert bench.overhead.main(["--count", "3", "--rounds", "1", "--output", str(tmp_path), "--commit", "f" * 40]) == 0
    assert (flashcore.get_num_threads(), torch.get_num_threads()) == before
    (path,) = tmp_path.glob("host*.json")
    report = json.loads(path.read_text())
    tiny = {call["name"]: call for call in report["shapes"][0]["calls"]}
    ours, peer = tiny[bench.host.OURS], tiny[bench.host.PEER]
    assert all(call["issued"] > 0 and call["alone"] > 0 for call in tiny.values())
    assert f"{bench.host.OURS}: {ours['issued']:.2f} us issued, {ours['alone']:.2f} alone" in capsys.readouterr().out
    assert bool(report.get("chains")) == torch.cuda.is_available()
    readme, check = written(bench, tmp_path)
    ratio = f"1, 1, 1, 64 fp16: {peer['issued'] / ours['issued']:.2f} and {peer['alone'] / ours['alone']:.2f}"
    assert readme.count("### What a call costs the host") == 1 and ratio in readme
    assert f"| {bench.host.OURS} | {ours['issued']:.1f} | {ours['alone']:.1f} |" in readme
    report.update(chain_label="the shape", chains=[{"name": "compiled", "microseconds": 4.44}])
    path.write_text(json.dumps(report))
    assert check() == 1
    readme, _ = written(bench, tmp_path)
    assert "on the shape: compiled 4.4." in readme


def test_interfaces_that_disagree_are_not_timed(bench, monkeypatch, tmp_path):
    calls = {bench.host.OURS: lambda: torch.ones(4), bench.host.PEER: lambda: torch.zeros(4)}
    monkeypatch.setattr(bench.overhead, "torch_calls", lambda shape, device: calls)
    with pytest.raises(RuntimeError, match=r"1, 1, 1, 64 fp16.*same result"):
        bench.overhead.main(["--count", "3", "--rounds", "1", "--output", str(tmp_path)])
    assert not list(tmp_path.iterdir())
