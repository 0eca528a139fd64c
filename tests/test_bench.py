# SPDX-License-Identifier: Apache-2.0
"""bench/compare.py refuses wrong results and measures right ones; bench/report.py keeps README to the result files."""

from __future__ import annotations

import json
import pathlib
import sys
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture
def bench(monkeypatch):
    """The modules of bench/, which are scripts and no package."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import compare
    import report
    import suites

    yield SimpleNamespace(compare=compare, report=report, suites=suites)
    for name in ("compare", "report", "suites"):
        sys.modules.pop(name, None)


OPTIONS = SimpleNamespace(rotate=1e-6, rounds=3, milliseconds=1.0)


def run(bench, cell, device, ours=None, peers=None):
    compare = bench.compare
    ours = ours or compare.flashcore_provider(None)
    return compare.run_cell(cell, device, ours, compare.peers_of(device) if peers is None else peers, OPTIONS)


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
    result = run(bench, cell, device, spoiled(bench.compare.flashcore_provider(None), where, amount))
    assert result["problem"]
    assert "ratios" not in result and "microseconds" not in result["providers"]["flashcore"]


def test_a_backend_that_does_not_exist_is_said(bench, device):
    result = run(bench, bench.suites.Cell(1, 1, 8, 64), device, bench.compare.flashcore_provider("none such"))
    assert "none such" in result["problem"]


def test_a_peer_that_fails_is_left_out(bench, device):
    def failing(cell, q, k, v, out):
        raise RuntimeError("not here")

    cell = bench.suites.Cell(1, 2, 64, 64, dtype="float16")
    result = run(bench, cell, device, peers={**bench.compare.peers_of(device), "failing": failing})
    assert result["problem"] == "" and "failing" not in result["ratios"]
    assert "not here" in result["providers"]["failing"]["absent"]


@pytest.mark.parametrize(
    "arguments",
    [["--suite", "none"], ["--suite", "cpu", "forward"], ["--suite", "cpu", "--peers", "none"], ["--rounds", "x"]],
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


def test_from_a_result_file_to_readme(bench, monkeypatch, tmp_path, capsys):
    tiny = [bench.suites.Cell(1, 2, 33, 16, dtype="float32"), bench.suites.Cell(1, 2, 40, 16, True, "float32")]
    monkeypatch.setattr(bench.compare, "suites", lambda: {**bench.suites.suites(), "cpu": tiny})
    arguments = ["--suite", "cpu", "--output", str(tmp_path), "--rotate", "1e-6", "--milliseconds", "1", "--quiet"]
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
    assert "| 1, 2, 33, 16 fp32 |" in written and "first.json" in written and "0123456789ab" in written
    assert bench.report.main(["--check", *places]) == 0
    readme.write_text(written.replace("33, 16 fp32 | ", "33, 16 fp32 | 9"))  # a figure that no script wrote
    assert bench.report.main(["--check", *places]) == 1
    assert bench.report.main(places) == 0 and readme.read_text() == written
    (tmp_path / "first.json").unlink()
    assert bench.report.main(places) == 0
    assert readme.read_text() == f"above\n{bench.report.BEGIN}\n{bench.report.END}\nbelow\n"


def test_readme_without_markers_is_refused(bench, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("no markers\n")
    assert bench.report.main(["--check", "--readme", str(readme), "--results", str(tmp_path)]) == 1
    assert "expected the line" in capsys.readouterr().err


def test_a_file_that_is_no_report_is_refused(bench, tmp_path, capsys):
    (tmp_path / "other.json").write_text("{}")
    assert bench.report.main(["--check", "--results", str(tmp_path)]) == 1
    assert "other.json" in capsys.readouterr().err
