# SPDX-License-Identifier: Apache-2.0
"""Each of the CPU's instruction sets computes attention rightly; each in a process of its own, since the choice is made
once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import flashcore

# Every dtype, head dimensions that fill vectors and that do not, lengths that fill tiles and that do not. Prints the
# instruction set that ran.
CHECK = """
import sys
sys.path.insert(0, sys.argv[1])
from arrays import on, torch
from reference import Options, assert_attention
import flashcore

if torch is not None:
    torch.set_num_threads(1)
arrays = on("cpu")
seed = 0
for dtype in arrays.dtypes:
    for head_dim in (1, 5, 8, 15, 16, 33, 64, 80, 128, 256):
        for seqlen_q, seqlen_k in ((1, 70), (65, 129), (40, 333)):
            for options in (Options(), Options(causal=True, softcap=20.0)):
                seed += 3
                tensors = arrays.qkv(2, seqlen_q, seqlen_k, 4, 2, head_dim, dtype, seed, 3.0)
                out, lse = flashcore.attention(*tensors, return_lse=True, **options.keywords())
                assert_attention(arrays, out, lse, *tensors, options, f"{dtype} {head_dim} {seqlen_q} {seqlen_k}")
print(flashcore.info()["cpu"]["isa"])
"""

CALL = """
import numpy as np
import flashcore

a = np.ones((1, 2, 2, 8), np.float32)
try:
    flashcore.attention(a, a, a)
except RuntimeError as error:
    print(error)
"""


def run(code: str, isa: str):
    return subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent)],
        env={**os.environ, "FLASHCORE_CPU_ISA": isa},
        timeout=300,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512bf16", "avx512amx"])
def test_each_instruction_set(device, isa):
    if device != "cpu":
        pytest.skip("instruction sets are the CPU's")
    cpu = flashcore.info()["cpu"]
    if isa not in cpu["isas"]:
        pytest.skip(f"{isa} is not compiled in")
    if "does not support" in run(CALL, isa).stdout:
        # Best first: whatever info() chose by itself, and all before it, must run.
        assert cpu["isas"].index(isa) > cpu["isas"].index(cpu["isa"])
        pytest.skip(f"this processor has no {isa}")
    done = run(CHECK, isa)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == isa


def test_unknown_instruction_set(device):
    """Refused by name, with those that there are; no crash."""
    done = run(CALL, "mmx")
    assert done.returncode == 0, done.stderr
    assert "FLASHCORE_CPU_ISA" in done.stdout and "mmx" in done.stdout and "baseline" in done.stdout
