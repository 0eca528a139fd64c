# SPDX-License-Identifier: Apache-2.0
"""bench/compare.py refuses wrong results and measures right ones; bench/report.py keeps README to the result files."""

from __future__ import annotations

import collections
import importlib
import json
import math
import pathlib
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest

import flashcore

torch = pytest.importorskip("torch")
ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture
def bench(monkeypatch):
    """The modules of bench/, which are scripts and no package."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    names = (
        "accuracy",
        "compare",
        "host",
        "ladder",
        "model",
        "overhead",
        "plot",
        "probes",
        "providers",
        "report",
        "suites",
        "timers",
    )
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    for name in names:
        sys.modules.pop(name, None)


PEAKS = {"float32_tflops": 0.2, "bfloat16_tflops": 0.4, "read_tbytes_per_second": 0.02}


def probed(bench, monkeypatch, *speeds):
    """Makes the probe tell PEAKS times each of `speeds` in turn, and the last one from then on."""
    left = list(speeds or (1.0,))

    def probe():
        speed = left.pop(0) if len(left) > 1 else left[0]
        return {name: value * speed for name, value in PEAKS.items()}

    monkeypatch.setattr(bench.compare, "probe_of", lambda program: ("made up", probe))


OPTIONS = SimpleNamespace(rotate=1e-6, rounds=3, milliseconds=1.0)


def run(bench, cell, device, ours=None, peers=None):
    compare = bench.compare
    ours = ours or bench.providers.flashcore_provider(None)
    return compare.run_cell(cell, device, ours, bench.providers.peers_of(device) if peers is None else peers, OPTIONS)


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
    """A peer for windows and variable lengths that is nobody's kernel: float32, a sequence at a time."""
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
        weight = score.masked_fill(hidden, -math.inf).softmax(-1)
        packed[own_q] = torch.einsum("hqk,khd->qhd", weight, value).to(out.dtype)
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
    (line, *_) = bench.compare.summary_lines(bench.suites.cpu_summary([half]))
    assert line.endswith(f"({100 * half['share_of_dot_peak']:.0f}% of that of vectors' dot products)")
    assert f"({100 * half['share_of_dot_peak']:.0f}% of vectors' dot products)" in bench.report._share(half)


def test_the_summary_has_means_and_the_lowest(bench):
    def cell(dtype, ratio, problem="", **more):
        shape = {"seqlen": 2048, "head_dim": 128, "causal": False, **more}
        return {"dtype": dtype, "problem": problem, "ratios": {"sdpa": ratio}, "label": f"{dtype} {ratio}", **shape}

    cells = [cell("float32", 1.0, share_of_peak=0.7), cell("float32", 4.0, share_of_peak=0.6)]
    cells += [cell("float32", 9.0, "wrong"), cell("float16", 3.0, causal=True, share_of_peak=0.1)]
    summary = bench.suites.cpu_summary(cells)
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


def made_up(bench, suite, backend, device="a GPU", ceiling=800.0):
    """A report with figures that say nothing, for what is done with reports."""
    cells = []
    for place, cell in enumerate(bench.suites.suites()[suite]):
        providers = {}
        for name, speed in (("flashcore", 400.0 + place), ("flash", 200.0), ("fa3", 300.0 + 2 * place)):
            time = cell.flops / speed / 1e6
            rates = {"tflops": speed, "tbytes_per_second": cell.bytes / time / 1e6}
            providers[name] = {"max_error": 0.0, "relative_error": 0.0, "microseconds": time, "spread": 0.0, **rates}
        ratios = {n: p["microseconds"] / providers["flashcore"]["microseconds"] for n, p in providers.items()}
        del ratios["flashcore"]
        cells.append({**asdict(cell), "label": cell.label, "problem": "", "providers": providers, "ratios": ratios})
    facts = {"date": "2026-01-01", "commit": "0" * 40, "device": device, "versions": {}, "driver": "1"}
    if bench.suites.is_forward(suite):
        facts["matmul_tflops"] = ceiling
    if suite == "window":
        facts["over_unmasked"] = bench.compare.over_unmasked(cells)
    means = bench.compare.geometric_means(cells)
    names = ["flashcore", "flash", "fa3"]
    head = {"kind": "compare", "suite": suite, "backend": backend, **facts}
    return {**head, "providers": names, "cells": cells, "geometric_means": means}


def written(bench, folder, *reports):
    """README as it is made from `reports`, and what --check says of it."""
    for report in reports:
        (folder / f"{report['suite']}-{report['backend']}.json").write_text(json.dumps(report))
    readme = folder / "README.md"
    readme.write_text(f"{bench.report.BEGIN}\n{bench.report.END}\n")
    places = ["--readme", str(readme), "--results", str(folder)]
    assert bench.report.main(places) == 0 and bench.report.main(["--check", *places]) == 0
    return readme.read_text(), lambda: bench.report.main(["--check", *places])


def test_readme_tells_one_backend_in_full_and_the_other_in_a_line(bench, tmp_path):
    readme, _ = written(bench, tmp_path, made_up(bench, "forward", "sm80"), made_up(bench, "forward", "sm90"))
    assert readme.count("### Forward") == 1 and "FlashCore's backend sm90;" in readme
    assert "| 16, 32, 1024, 64 bf16 | 400 | 200 | 300 | fa3 | 1.33 |" in readme  # rates, not times
    (line,) = [line for line in readme.splitlines() if line.startswith("Backend sm80:")]
    assert "(12 cells)" in line and "`bench/results/forward-sm80.json`" in line
    assert "matmul reaches 800 TFLOP/s" in readme
    assert [path.name for path in tmp_path.glob("*.svg")] == ["forward-sm90.svg"]
    assert "](bench/results/forward-sm90.svg)" in readme


def test_readme_sums_up_the_grid(bench, tmp_path):
    grid = made_up(bench, "grid", "sm90")
    grid["cells"][7]["problem"] = "a reason"
    assert bench.compare.geometric_means(grid["cells"])["best"]["cells"] == 119
    readme, _ = written(bench, tmp_path, grid)
    rows = [line for line in readme.splitlines() if line.startswith("| ") and " | fa3 |" in line]
    assert len(rows) == 10 and rows[0].startswith("| 64 bf16 | 11 | ") and "wrong: a reason" in readme
    speeds = [(400 + i) / (300 + 2 * i) for i in range(12) if i != 7]
    assert rows[0].split(" | ")[2] == f"{math.prod(speeds) ** (1 / 11):.2f}"
    assert rows[0].split(" | ")[3:5] == [f"{speeds[-1]:.3f}", grid["cells"][11]["label"]]


def test_readme_holds_the_window_against_unmasked_tiles(bench, tmp_path):
    window = made_up(bench, "window", "sm90")
    assert window["over_unmasked"]["flashcore"] == pytest.approx(401 / 400)
    readme, _ = written(bench, tmp_path, window)
    assert "none masked: flashcore 1.00, flash 1.00, fa3 1.01." in readme
    assert bench.compare.over_unmasked(window["cells"][:1]) == {}


def test_check_covers_the_plots(bench, tmp_path, capsys):
    _, check = written(bench, tmp_path, made_up(bench, "forward", "sm90"), made_up(bench, "varlen", "sm90"))
    (path,) = tmp_path.glob("*.svg")
    text = path.read_text()
    path.write_text(text.replace("matmul 800", "matmul 900"))
    assert check() == 1 and "forward-sm90.svg" in capsys.readouterr().err
    path.unlink()
    assert check() == 1
    path.write_text(text)
    assert check() == 0
    (tmp_path / "gone.svg").write_text(text)  # of no report
    assert check() == 1
    written(bench, tmp_path)
    assert list(tmp_path.glob("*.svg")) == [path] and path.read_text() == text


def test_a_plot_has_a_panel_and_a_line_for_each(bench):
    from xml.etree import ElementTree

    report = made_up(bench, "grid", "sm90")
    del report["cells"][3]["providers"]["fa3"]["tflops"]  # a peer that did not run
    report["cells"][4]["problem"] = "wrong"
    drawn = ElementTree.fromstring(bench.plot.svg(report))
    of = lambda name: [e for e in drawn.iter() if e.get("class") == name]  # noqa: E731
    assert len(of("panel")) == 5 * 4 and len(of("p-flashcore")) == 1 + 5 * 4
    assert len(of("ceiling")) == 1 + 5 * 4
    marks = [len(list(e.iter("{http://www.w3.org/2000/svg}path"))) - 1 for e in of("p-fa3")[1:]]
    assert sorted(marks) == [5, 5] + [6] * 18
    heights = [float(e.get("transform").split()[1][:-1]) for e in of("mark")]
    assert min(heights) >= 0  # nothing above its panel
    assert len(list(ElementTree.fromstring(bench.plot.svg({**report, "matmul_tflops": None})).iter())) < len(
        list(drawn.iter())
    )


def parts(text):
    """The elements of a plot by class: `of("tick")`, and what a provider's mark i is, `marks("fa3")[i]`, as (x, y)."""
    from xml.etree import ElementTree

    drawn = ElementTree.fromstring(text)
    of = lambda name: [e for e in drawn.iter() if e.get("class") == name]  # noqa: E731

    def marks(name):
        groups = [
            e for group in of(f"p-{name}")[1:] for e in group if e.get("class") == "mark"
        ]  # the first is the legend
        return [tuple(float(x) for x in e.get("transform")[10:-1].split()) for e in groups]

    return of, marks


def texts_of(text):
    """The texts below the first panel's ground, as (x, y, what)."""
    from xml.etree import ElementTree

    drawn = ElementTree.fromstring(text)
    panel = next(e for e in drawn if e.get("transform") and any(c.get("class") == "panel" for c in e))
    return [(float(e.get("x")), float(e.get("y")), e.text) for e in panel if e.tag.endswith("text")]


def test_the_plot_of_decoding_has_contiguous_single_queries_over_their_keys(bench):
    report = made_up(bench, "decode", "sm90")
    cells = bench.plot.shown(report)
    assert [(c["batch"], c["seqlen_k"]) for c in cells] == [
        (1, 4096), (1, 32768), (1, 131072), (8, 8192), (32, 4096), (64, 8192)
    ]  # fmt: skip
    report["cells"][1]["providers"]["fa3"] = {"absent": "not here"}
    report["cells"][5]["problem"] = "wrong"  # batch 64
    own = [c["providers"]["flashcore"] for c in cells]
    text = bench.plot.svg(report)
    of, marks = parts(text)
    assert (len(marks("flashcore")), len(marks("fa3"))) == (5, 4) and not of("ceiling")
    one = marks("flashcore")[:3]  # of batch 1, which are joined
    assert len([e for e in of("p-flashcore")[1] if e.get("class") == "line"]) == 1
    x = [place for place, _ in one]
    # 32k keys are alone in their place; 4k have batch 32 beside them, half a place aside.
    assert (x[2] - x[1]) / (x[2] - x[0] - bench.plot.SLOT / 2) == pytest.approx(2 / 5, abs=1e-3)  # octaves
    heights = [bench.plot.TALL - y for _, y in one]
    for height, told in zip(heights, own, strict=False):
        assert height / heights[0] == pytest.approx(told["tbytes_per_second"] / own[0]["tbytes_per_second"], abs=0.01)
    labels = [label for _, y, label in texts_of(text) if y > bench.plot.TALL + 10]
    assert sorted(labels) == sorted(["B 1", "B 32", "4k keys", "B 8", "8k keys", "B 1", "32k keys", "B 1", "128k keys"])

    highest = 2 * max(told["tbytes_per_second"] for told in own)
    peaks = {"copy_tbytes_per_second": 1.0, "read_tbytes_per_second": highest}
    text = bench.plot.svg({**report, "peaks": peaks})
    of, marks = parts(text)
    ceilings = [float(e.get("d").split()[1].split("H")[0]) for e in of("ceiling")[1:]]
    assert f">reading {highest:.2f}<" in text and len(ceilings) == 1
    assert 0 <= ceilings[0] < min(y for _, y in marks("flashcore"))
    del peaks["read_tbytes_per_second"]
    assert ">copying 1.00<" in bench.plot.svg({**report, "peaks": peaks})


def test_the_plot_of_small_problems_is_logarithmic_and_grouped_by_length(bench):
    report = made_up(bench, "small", "sm90")
    del report["cells"][1]["providers"]["fa3"]["microseconds"]  # float16, which it does not run
    text = bench.plot.svg(report)
    of, marks = parts(text)
    assert (len(marks("flashcore")), len(marks("fa3"))) == (12, 11)
    lines = [e.get("d").count("L") + 1 for e in of("p-flashcore")[1] if e.get("class") == "line"]
    assert lines == [3, 3, 4]  # 128 and 256 tokens with three batches each, 512 with the seed's too; float16 is alone
    below = sorted((x, label) for x, y, label in texts_of(text) if x > 0 and y == bench.plot.TALL + 15)
    assert [label for _, label in below] == ["8", "16", "32", "8", "16", "32", "1", "8", "16", "32", "1", "1"]
    assert [label for _, _, label in sorted(texts_of(text)) if label.startswith("S ")] == [
        "S 128", "S 256", "S 512", "S 512", "S 512"
    ]  # fmt: skip
    times = {n: [c["providers"][n]["microseconds"] for c in report["cells"]] for n in ("flashcore", "flash")}
    # The cells of 128 tokens are the fourth to sixth of the suite and the first of the plot.
    logs = [math.log(t) for name in times for t in times[name][3:6]]
    heights = [-y for name in times for _, y in marks(name)[:3]]
    scale = (heights[-1] - heights[0]) / (logs[-1] - logs[0])
    assert scale > 0
    for height, log in zip(heights, logs, strict=True):
        assert height - heights[0] == pytest.approx(scale * (log - logs[0]), abs=0.2)


@pytest.mark.parametrize("values", [[5.0], [9.999999999999999, 10.0], [0.02, 0.3], [1.0, 1000.0], [3.3, 3.4]])
def test_the_scales_hold_every_value(bench, values):
    for scale in (bench.plot._linear(values), bench.plot._logarithmic(values)):
        assert 2 <= len(scale.ticks) <= 12 and scale.ticks == sorted(scale.ticks)
        places = [scale.y_of(value) for value in values]
        assert all(-1e-6 <= y <= bench.plot.TALL + 1e-6 for y in places) and places == sorted(places, reverse=True)
        assert scale.y_of(scale.ticks[0]) == pytest.approx(bench.plot.TALL) and abs(scale.y_of(scale.ticks[-1])) < 1e-6


def apart(text):
    """Whether the labels of a line below the first panel leave room, at 7 units a letter."""
    rows = {}
    for x, y, label in texts_of(text):
        if y > 0 and x > 0:
            rows.setdefault(y, []).append((x - 3.5 * len(label), x + 3.5 * len(label)))
    return all(a[1] <= b[0] for row in rows.values() for a, b in zip(sorted(row), sorted(row)[1:], strict=False))


def test_labels_keep_apart_whatever_the_cells(bench):
    for suite in ("small", "decode"):
        assert apart(bench.plot.svg(made_up(bench, suite, "sm90")))
    report = made_up(bench, "decode", "sm90")
    first = report["cells"][0]
    more = [{**first, "batch": batch, "seqlen_k": keys} for batch in (2, 16, 128) for keys in (4096, 5000, 8192)]
    crowded = bench.plot.svg({**report, "cells": report["cells"] + more})
    assert apart(crowded) and len(parts(crowded)[1]("flashcore")) == 6 + 9
    assert len(parts(bench.plot.svg({**report, "cells": [first]}))[1]("flashcore")) == 1
    two = bench.plot.svg({**report, "cells": [first, {**first, "dtype": "float16"}]})
    assert len(parts(two)[0]("panel")) == 2


def test_readme_shows_the_plots_of_small_problems_and_decoding(bench, tmp_path):
    decode = {**made_up(bench, "decode", "sm90"), "peaks": {"read_tbytes_per_second": 3.25}}
    readme, check = written(bench, tmp_path, decode, made_up(bench, "small", "sm90"))
    assert sorted(path.name for path in tmp_path.glob("*.svg")) == ["decode-sm90.svg", "small-sm90.svg"]
    assert "![TB/s against the keys of a sequence](bench/results/decode-sm90.svg)" in readme
    assert "![Microseconds of a call by length and batch](bench/results/small-sm90.svg)" in readme
    assert "Reading memory reaches 3.25 TB/s in the same run." in readme
    (tmp_path / "small-sm90.svg").write_text("another")
    assert check() == 1
    for cell in decode["cells"]:  # nothing is left to show but pages
        cell["problem"] = "" if cell["page_size"] else "wrong"
    readme, _ = written(bench, tmp_path, decode)
    assert [path.name for path in tmp_path.glob("*.svg")] == ["small-sm90.svg"] and "decode-sm90.svg" not in readme


def test_from_a_result_file_to_readme(bench, monkeypatch, tmp_path, capsys):
    tiny = [bench.suites.Cell(1, 2, 33, 16, dtype="float32"), bench.suites.Cell(1, 2, 40, 16, True, "float32")]
    both = {"cpu": tiny, "cpu_decode": [bench.suites.Cell(2, 4, 1, 32, heads_k=2, seqlen_k=50, page_size=0)]}
    monkeypatch.setattr(bench.compare, "suites", lambda: {**bench.suites.suites(), **both})
    probed(bench, monkeypatch)
    common = ["--output", str(tmp_path), "--rotate", "1e-6", "--milliseconds", "1", "--quiet"]
    arguments = ["--suite", "cpu", *common]
    assert bench.compare.main([*arguments, "--commit", "0123456789abcdef", "--name", "first"]) == 0
    assert "geometric means" in capsys.readouterr().out
    report = json.loads((tmp_path / "first.json").read_text())
    assert report["commit"] == "0123456789abcdef" and report["versions"]["torch"] == torch.__version__
    assert report["geometric_means"]["sdpa"]["cells"] == 2

    readme = tmp_path / "README.md"
    readme.write_text(f"above\n{bench.report.BEGIN}\n{bench.report.END}\nbelow\n")
    places = ["--readme", str(readme), "--results", str(tmp_path)]
    assert bench.report.main(["--check", *places]) == 1
    assert bench.report.main(places) == 0
    written = readme.read_text()
    assert written.startswith("above\n") and written.endswith("\nbelow\n")
    means = report["summary"]["dtypes"]["float32"]
    assert f"| float32 | 2 | {means['ratio']:.2f} | {means['lowest']:.2f} | {means['lowest_at']} |  |" in written
    assert "first.json" in written and "0123456789ab" in written
    assert "(made up): float32 200 GFLOP/s, bfloat16 400 GFLOP/s, reading 20 GB/s." in written
    assert bench.report.main(["--check", *places]) == 0
    readme.write_text(written.replace("| float32 | ", "| float32 | 9"))  # a figure that no script wrote
    assert bench.report.main(["--check", *places]) == 1
    assert bench.report.main(places) == 0 and readme.read_text() == written
    assert bench.compare.main(["--suite", "cpu", "cpu_decode", *common]) == 0
    (tmp_path / "cpu.json").unlink()
    assert bench.report.main(places) == 0
    decoded = readme.read_text()
    share = json.loads((tmp_path / "cpu_decode.json").read_text())["cells"][0]["share_of_peak"]
    assert "### CPU, decode" in decoded and "| B, H, S, D | GB/s | flashcore us | sdpa us |" in decoded
    assert f"Share of the peak of reading: 2, 4/2, 1/50, 32 bf16 {100 * share:.0f}%" in decoded
    (tmp_path / "cpu_decode.json").unlink()
    (tmp_path / "first.json").unlink()
    assert bench.report.main(places) == 0
    assert readme.read_text() == f"above\n{bench.report.BEGIN}\n{bench.report.END}\nbelow\n"


def made_up_ladder(label, seqlen):
    """A report of `flashcore_bench ladder` with figures that say nothing."""
    rungs = [
        {"name": "baseline", "note": "first", "problem": "", "max_error": 1e-4, "microseconds": 1000.0, "speedup": 1.0},
        {"name": "vectorized", "note": "", "refused": "takes up to 9 keys"},
        {"name": "sm80", "note": "", "problem": "largest error", "max_error": None, "relative_error": None},
        {"name": "flashcore", "note": "", "problem": "", "max_error": 1e-4, "microseconds": 4.0, "speedup": 250.0},
    ]
    rungs[3].update(tflops=123.4, share_of_peak=0.125)
    problem = {"label": label, "batch": 1, "heads": 8, "seqlen": seqlen, "head_dim": 64}
    facts = {"date": "2026-01-01", "commit": "0" * 40, "device": "a GPU", "versions": {"flashcore": "0"}, "driver": "1"}
    reference = {"rows": 64, "allowed_error": 2e-3, "allowed_relative_error": 1e-3}
    peak = {"tflops": 900.0}
    return {"kind": "ladder", **facts, "problem": problem, "reference": reference, "peak": peak, "rungs": rungs}


def test_the_ladder_in_both_readmes(bench, tmp_path):
    from xml.etree import ElementTree

    own = tmp_path / "cpp" / "ladder" / "README.md"
    own.parent.mkdir(parents=True)
    empty = f"above\n{bench.report.BEGIN}\n{bench.report.END}\nbelow\n"
    own.write_text(empty)
    _, check = written(bench, tmp_path)
    assert own.read_text() == empty  # nothing without results
    for name, seqlen in (("ladder-long", 1024), ("ladder-short", 512)):
        report = made_up_ladder(f"1, 8, {seqlen}, 64 fp16", seqlen)
        (tmp_path / f"{name}.json").write_text(json.dumps(report))
    assert check() == 1
    readme, check = written(bench, tmp_path)
    assert readme.count("### The ladder") == 1 and "](bench/results/ladder-short.svg)" in readme  # the shortest first
    assert "| B, H, S, D | 1, 8, 512, 64 fp16 | 1, 8, 1024, 64 fp16 |" in readme
    assert "| `flashcore` | 4.0 (250.0) | 4.0 (250.0) |" in readme and "| `vectorized` | not run | not run |" in readme
    assert "| `sm80` | wrong | wrong |" in readme
    text = own.read_text()
    assert text.startswith("above\n") and text.count("### 1, 8,") == 2 and "takes up to 9 keys" in text
    assert "| `flashcore` | 4.0 | 250.0 | 123 | 12.5% | 1.0e-04 | pass |" in text and "wrong: largest error" in text

    drawn = ElementTree.fromstring((tmp_path / "ladder-short.svg").read_text())
    lines = [e for e in drawn.iter() if e.get("class") == "line"]
    assert len(lines) == 2 and all(line.get("d").count("L") == 1 for line in lines)
    own.write_text(text.replace("250.0", "251.0"))
    assert check() == 1


def test_readme_without_markers_is_refused(bench, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("no markers\n")
    assert bench.report.main(["--check", "--readme", str(readme), "--results", str(tmp_path)]) == 1
    assert "expected the line" in capsys.readouterr().err


def test_a_file_that_is_no_report_is_refused(bench, tmp_path, capsys):
    (tmp_path / "other.json").write_text("{}")
    assert bench.report.main(["--check", "--results", str(tmp_path)]) == 1
    assert "other.json" in capsys.readouterr().err


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


def test_a_decoder_s_times_in_readme(bench, tmp_path):
    way = {"flashcore": 50.0, "sdpa": 60.0, "ratio": 1.2, "sdpa_kernels": ["_scaled_dot_product_cudnn_attention"]}
    shares = {"sdpa_kernels_milliseconds": [12.0, 60.0], "flashcore_kernels_milliseconds": [9.0, 57.0]}
    report = {
        "kind": "decoder",
        "device": "a GPU",
        "options": {"layers": 24, "context": 8192, "rounds": 3},
        "torch": "2",
        "transformers": "5",
        "date": "2026-11-25",
        "commit": "f" * 40,
        "errors": {"flashcore": [0.01, 0.001], "sdpa": [0.01, 0.001]},
        "milliseconds": {"prefill": {**way, **shares}, "token, growing cache": way},
    }
    (tmp_path / "decoder.json").write_text(json.dumps(report))
    readme, check = written(bench, tmp_path)
    assert "| prefill | 50.00 | 60.00 | 1.20 | `_scaled_dot_product_cudnn_attention` |" in readme
    assert "attention is 12.0 of SDPA's 60.0 ms on the GPU, and 9.0 with FlashCore" in readme
    assert "without any attention the ratio would be 1.25." in readme and check() == 0


def test_interfaces_that_disagree_are_not_timed(bench, monkeypatch, tmp_path):
    calls = {bench.host.OURS: lambda: torch.ones(4), bench.host.PEER: lambda: torch.zeros(4)}
    monkeypatch.setattr(bench.overhead, "torch_calls", lambda shape, device: calls)
    with pytest.raises(RuntimeError, match=r"1, 1, 1, 64 fp16.*same result"):
        bench.overhead.main(["--count", "3", "--rounds", "1", "--output", str(tmp_path)])
    assert not list(tmp_path.iterdir())
