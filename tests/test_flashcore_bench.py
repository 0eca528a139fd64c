# SPDX-License-Identifier: Apache-2.0
"""The program flashcore_bench, built without CUDA: what it refuses, what it measures on the CPU, its JSON."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess

import pytest

import flashcore

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture
def program(request) -> str:
    """Its path: FLASHCORE_BENCH_PROGRAM where somebody has built it already, else built here."""
    return os.environ.get("FLASHCORE_BENCH_PROGRAM") or str(request.getfixturevalue("cpu_build") / "flashcore_bench")


def run(program, *arguments):
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "arguments, named",
    [
        ([], "no command"),
        (["climb"], "climb"),
        (["attention", "--speed"], "--speed"),
        (["attention", "--shape", "1,8,512"], "--shape"),
        (["attention", "--shape", "1,8,0,64"], "--shape, S"),
        (["attention", "--shape", "1,8,512,257"], "--shape, D"),
        (["attention", "--shape", "1,8,5e2,64"], "--shape, S"),
        (["attention", "--shape", "1,8,512,64,"], "--shape"),
        (["attention", "--shape"], "--shape"),
        (["attention", "--dtype", "fp8"], "fp16"),
        (["attention", "--heads-k", "3"], "--heads-k"),
        (["attention", "--varlen", "3,4"], "--varlen"),
        (["attention", "--shape", "2,8,5,64", "--varlen", "5,4", "--seqlen-k", "9"], "--seqlen-k"),
        (["attention", "--window", "7"], "--window"),
        (["attention", "--window", "-1,0"], "--window"),
        (["attention", "--softcap", "nan"], "--softcap"),
        (["attention", "--backend", "sm70"], "sm80"),
        (["attention", "--rounds", "0"], "--rounds"),
        (["attention", "--json", "/no/such/folder/x.json"], "/no/such/folder"),
        (["attention", "--suite", "small"], "--suite"),
        (["sweep"], "--suite"),
        (["sweep", "--suite", "none"], "forward"),
        (["ladder", "--window", "1,1"], "--window"),
        (["ladder", "--dtype", "fp32"], "--dtype"),
        (["peak", "--rounds", "3"], "--rounds"),
        (["peak", "--backend", "tpu"], "--backend"),
    ],
)
def test_bad_usage_is_exit_status_2_and_prints_no_result(program, arguments, named):
    done = run(program, *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert named in done.stderr


@pytest.mark.parametrize("arguments", [["ladder"], ["peak", "--backend", "sm80"], ["attention", "--backend", "sm80"]])
def test_what_needs_a_gpu_says_so(program, arguments, tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    file = tmp_path / "x.json"
    command = [program, *arguments, "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 2 and done.stdout == "" and not file.exists()
    assert "no GPU can be used" in done.stderr


def test_help_tells_the_commands(program):
    done = run(program, "help")
    assert done.returncode == 0 and all(name in done.stdout for name in ("ladder", "attention", "sweep", "peak"))
    assert run(program, "attention", "--help").stdout == done.stdout


@pytest.mark.parametrize(
    "arguments, seen, expected",
    [
        ("--shape 1,2,64,32 --dtype fp16", 2 * 64 * 64, {"dtype": "float16", "lengths": []}),
        ("--shape 2,2,33,16 --dtype fp32 --causal", 2 * 2 * 33 * 33 / 2, {"dtype": "float32", "causal": True}),
        ("--shape 3,4,40,64 --dtype bf16 --varlen 7,40,0 --heads-k 2", 4 * (49 + 1600), {"lengths": [7, 40, 0]}),
        # Keys 0 to 2 are seen by queries 5 to 7 of 8: rows of zeros before them.
        ("--shape 1,1,8,8 --seqlen-k 3 --causal --window 1,0", 1 + 2 + 2, {"seqlen_k": 3, "window_left": 1}),
        ("--shape 1,2,50,64 --softcap 5 --scale 0.5 --window all,3", 2 * sum(min(50, i + 4) for i in range(50)), {}),
    ],
)
def test_a_problem_on_the_cpu_is_checked_and_timed(program, arguments, seen, expected, tmp_path):
    file = tmp_path / "result.json"
    options = ["--milliseconds", "1", "--rounds", "3", "--rotate", "0.0001", "--commit", 'a"b']
    done = run(program, "attention", *arguments.split(), "--backend", "cpu", *options, "--json", str(file))
    assert done.returncode == 0, done.stderr + done.stdout
    assert "pass" in done.stdout and "cpu_forward" in done.stdout
    report = json.loads(file.read_text())
    assert report["kind"] == "attention" and report["commit"] == 'a"b' and report["device"]
    (cell,) = report["cells"]
    assert cell["problem"] == "" and 0 <= cell["max_error"] <= cell["allowed_error"]
    head_dim = cell["head_dim"]
    assert cell["tflops"] == pytest.approx(4 * head_dim * seen / cell["microseconds"] / 1e6, rel=1e-6)
    assert expected.items() <= cell.items()


@pytest.mark.parametrize("threads", ["1", "2"])
@pytest.mark.parametrize("isa", flashcore.info()["cpu"]["isas"])
def test_the_peaks_of_the_processor(program, isa, threads, tmp_path):
    file = tmp_path / "peak.json"
    environment = {**os.environ, "FLASHCORE_CPU_ISA": isa, "OMP_NUM_THREADS": threads}
    command = [program, "peak", "--backend", "cpu", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    if "does not support" in done.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    assert report["kind"] == "peak" and report["isa"] == isa and report["threads"] == int(threads)
    peak = report["peak"]
    assert 1e-4 < peak["float32_tflops"] < 100 and 1e-4 < peak["read_tbytes_per_second"] < 10
    # The dot product does twice the work of a multiply-add in one instruction, a product of tiles sixteen times more.
    assert ("bfloat16_tflops" in peak) == (isa in ("avx512bf16", "avx512amx")) == ("bfloat16" in done.stdout)
    assert ("bfloat16_dot_tflops" in peak) == (isa == "avx512amx") == ("product of tiles" in done.stdout)
    assert f"{1e3 * peak['float32_tflops']:.1f} GFLOP/s" in done.stdout and isa in done.stdout


def test_without_a_gpu_the_peaks_are_the_processors(program):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([program, "peak"], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0 and "multiply-add, float32" in done.stdout


def test_a_suite_has_the_cells_of_the_python_suite(program, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    pytest.importorskip("torch")
    import suites

    file = tmp_path / "result.json"
    options = ["--milliseconds", "0.01", "--rounds", "1", "--rotate", "0", "--backend", "cpu", "--json", str(file)]
    done = run(program, "sweep", "--suite", "small", *options)
    assert done.returncode == 0, done.stderr + done.stdout
    report = json.loads(file.read_text())
    assert report["suite"] == "small"
    assert {c["label"] for c in report["cells"]} == {c.label for c in suites.suites()["small"]}
    assert len(done.stdout.splitlines()) == 1 + 12 and len(done.stderr.splitlines()) >= 12  # progress


@pytest.mark.skipif(not pathlib.Path("/proc/self/exe").exists(), reason="Linux's programs")
def test_needs_nothing_but_the_system(program):
    if shutil.which("readelf") is None:
        pytest.skip("no readelf here")
    needed = run("readelf", "-d", program).stdout
    assert "libc.so" in needed and "libstdc++" not in needed and "libcuda" not in needed
