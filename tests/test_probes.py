# SPDX-License-Identifier: Apache-2.0
"""bench/probes.py measures what a processor can do, by flashcore_bench or with PyTorch."""

from __future__ import annotations

import sys

import pytest
from bench_reports import PEAKS

import flashcore

pytest.importorskip("torch")

STAND_IN = """#!{python}
import json, os, sys
report = {{"threads": int(os.environ["OMP_NUM_THREADS"]), "isa": "{isa}", "peak": {peaks}}}
assert sys.argv[1:-2] == ["peak"{arguments}]
open(sys.argv[sys.argv.index("--json") + 1], "w").write(json.dumps(report))
"""


def test_pytorch_stands_in_for_the_probe(bench):
    name, _ = bench.probes.probe_of(None)
    peaks = bench.probes.torch_peaks(rounds=2, size=64, elements=1 << 16)
    assert name.startswith("torch") and set(peaks) == set(PEAKS) and all(0 < value < 100 for value in peaks.values())


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
