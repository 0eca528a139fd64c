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


# Prints whether this thread has tile registers configured, before and after a call. `sttilecfg [rdi]; ret`.
TILES = """
import ctypes, mmap
import numpy as np
import flashcore

code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(bytes.fromhex("c4e2794907c3"))
store = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(ctypes.addressof(ctypes.c_char.from_buffer(code)))

def configured():
    configuration = ctypes.create_string_buffer(64)
    store(configuration)
    return any(configuration.raw)

flashcore.set_num_threads(1)
before = configured()
for keys in (3, 300):
    for dtype in (np.float32, np.float16):
        a = np.ones((1, keys, 2, 64), dtype)
        flashcore.attention(a, a, a)
        a[0, 0] = np.inf
        flashcore.attention(a, a, a)
print(flashcore.info()["cpu"]["isa"], before, configured())
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


def test_tile_registers_are_given_back(device):
    """A caller's thread is left without tiles, after fallbacks too: they would make every switch of threads dearer."""
    done = run(TILES, "avx512amx")
    if "avx512amx" not in flashcore.info()["cpu"]["isas"] or "does not support" in done.stderr:
        pytest.skip("no tile registers here")
    assert done.stdout.split() == ["avx512amx", "False", "False"], done.stderr
