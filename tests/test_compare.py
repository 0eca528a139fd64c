# SPDX-License-Identifier: Apache-2.0
"""bench/compare.py's runs: what they refuse, continue and repeat, and what their files hold."""

from __future__ import annotations

import json

import pytest
from bench_reports import PEAKS, probed, spoiled

pytest.importorskip("torch")


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
