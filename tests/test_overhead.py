# SPDX-License-Identifier: Apache-2.0
"""bench/overhead.py measures what a call costs the host, and refuses interfaces that disagree."""

from __future__ import annotations

import json

import pytest
from bench_reports import written

import flashcore

torch = pytest.importorskip("torch")


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
