# SPDX-License-Identifier: Apache-2.0
"""bench/report.py keeps README and its plots to the result files."""

from __future__ import annotations

import json
import math

import pytest
from bench_reports import made_up, made_up_ladder, probed, written

torch = pytest.importorskip("torch")


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
    assert bench.summaries.geometric_means(grid["cells"])["best"]["cells"] == 119
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
    assert bench.summaries.over_unmasked(window["cells"][:1]) == {}


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
