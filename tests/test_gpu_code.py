# SPDX-License-Identifier: Apache-2.0
"""Every kernel instance computes rightly: those of this GPU, those that plan() takes on GPUs with less shared memory,
and the PTX that newer GPUs compile. Each in a process of its own, since device and code are chosen once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from arrays import SMALL_FORMS, backends

import flashcore

# The head dimensions that each machine's kernel is compiled for.
INSTANCES = {"sm80": (32, 64, 96, 128, 192, 256), "sm90": (64, 96, 128, 192, 256)}


def run(device: str, *parts: str, **variables: str) -> list[str]:
    if device != "cuda":
        pytest.skip("the GPU's code")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("gpu_instances.py")), *parts],
        env={**os.environ, **variables},
        timeout=300,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_every_instance_of_this_gpu(device):
    ran = run(device)
    for backend in backends(device):
        for dtype in ("float16", "bfloat16"):
            for head_dim in INSTANCES[backend]:
                assert any(line.startswith(f"{backend}_forward {dtype} head_dim {head_dim} ") for line in ran)
            if backend == "sm80":  # one slice of rows, and two where the kernel has them
                tiles = {(d, rows) for d in (64, 96, 128, 192, 256) for rows in ((16, 32) if d <= 128 else (16,))}
                assert all(f"sm80_decode {dtype} head_dim {d} tile {rows} x 64" in ran for d, rows in tiles)
            if backend == "sm90":
                tiles = {(d, rows) for d in (64, 128, 192, 256) for rows in ((16, 32) if d <= 128 else (16,))}
                assert all(f"sm90_decode {dtype} head_dim {d} tile {rows} x 64" in ran for d, rows in tiles)
                turned = [(d, rows) for d in (64, 128) for rows in (8, 16, 32)]
                assert all(f"sm90_decode_turned {dtype} head_dim {d} tile {rows} x 64" in ran for d, rows in turned)
            if backend == "sm90":  # the small kernel's tiles: head dimension, rows, threads, splits
                plain = [(64, rows, 2 * rows * groups, groups * blocks) for rows, groups, blocks in SMALL_FORMS]
                plain += [(128, 64, 128, 1), (128, 64, 256, 4), (128, 64, 256, 8)]
                general = [(d, 64, threads, splits) for d in (64, 128) for threads, splits in ((128, 1), (256, 8))]
                for tiles, kind in ((plain, True), (general, False)):
                    for head_dim, rows, threads, splits in tiles:
                        start = f"sm90_small {dtype} head_dim {head_dim} tile {rows} x "
                        end = f" threads {threads} plain {kind} splits {splits}"
                        assert any(line.startswith(start) and line.endswith(end) for line in ran)
                assert any(line.startswith(f"sm90_stream {dtype} head_dim 64 tile 128 x 128") for line in ran)
            if backend == "sm90":  # packed heads, and each of the tiles where there are several
                assert all(any(dtype in line and f"packed {n}" in line for line in ran) for n in (3, 4))
                for head_dim, tiles in ((64, {128, 192, 256}), (96, {128, 192})):
                    start = f"sm90_forward {dtype} head_dim {head_dim} "
                    assert tiles == {int(line.split()[5]) for line in ran if start in line}


def test_the_tiles_of_gpus_with_less_shared_memory(device):
    """FLASHCORE_PLAN_AS takes a named device's properties in place of the GPU's."""
    ran = run(device, "sm80", "decode", FLASHCORE_PLAN_AS="rtx4090")
    shape = (1, 512, 8, 256)
    plan = flashcore.plan(shape, shape, shape, dtype="float16", device="rtx4090")
    assert any(f"float16 head_dim 256 tile {plan.tile_q} x {plan.tile_k}" in line for line in ran)


def test_code_compiled_by_the_driver(device):
    """What runs on compute capability 10.x and 12.x: the sm80 kernels, the only ones that have PTX."""
    if not any(arch.startswith("compute_") for arch in flashcore.info()["cuda"]["archs"]):
        pytest.skip("this build carries no PTX")
    assert run(device, "sm80", "decode", CUDA_FORCE_PTX_JIT="1")


def test_planning_as_an_unknown_device_is_refused(device):
    if device != "cuda":
        pytest.skip("the GPU's code")
    code = "import torch, flashcore; a = torch.ones(1, 8, 1, 64, device='cuda').half(); flashcore.attention(a, a, a)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FLASHCORE_PLAN_AS": "riva128"},
        timeout=120,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "ValueError" in done.stderr and "riva128" in done.stderr and "rtx4090" in done.stderr
