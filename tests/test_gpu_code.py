# SPDX-License-Identifier: Apache-2.0
"""Every kernel instance computes rightly: those of this GPU, those that plan() takes on GPUs with less shared memory,
and the PTX that newer GPUs compile. Each in a process of its own, since device and code are chosen once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import flashcore


def run(device: str, **variables: str) -> list[str]:
    if device != "cuda":
        pytest.skip("the GPU's code")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("gpu_instances.py"))],
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
    for dtype in ("float16", "bfloat16"):
        for head_dim in (32, 64, 96, 128, 192, 256):
            assert any(f"{dtype} head_dim {head_dim} " in line for line in ran)


def test_the_tiles_of_gpus_with_less_shared_memory(device):
    """FLASHCORE_PLAN_AS takes a named device's properties in place of the GPU's."""
    ran = run(device, FLASHCORE_PLAN_AS="rtx4090")
    shape = (1, 512, 8, 256)
    plan = flashcore.plan(shape, shape, shape, dtype="float16", device="rtx4090")
    assert any(f"float16 head_dim 256 tile {plan.tile_q} x {plan.tile_k}" in line for line in ran)


def test_code_compiled_by_the_driver(device):
    """What runs on compute capability 10.x and 12.x."""
    if not any(arch.startswith("compute_") for arch in flashcore.info()["cuda"]["archs"]):
        pytest.skip("this build carries no PTX")
    assert run(device, CUDA_FORCE_PTX_JIT="1")


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
