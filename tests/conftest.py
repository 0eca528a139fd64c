# SPDX-License-Identifier: Apache-2.0
"""Fixtures and settings of the whole suite. Every test takes `device` (or `arrays`) and runs on each device that is
present."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
from arrays import Arrays, backends, devices, on, torch


def pytest_addoption(parser):
    parser.addoption(
        "--full-cases",
        type=int,
        default=500,
        help="how many cases each test marked `full` takes, evenly, from its share of the whole product (0: all)",
    )


def pytest_configure(config):
    if torch is not None:
        # The reference is many small operations, and torch's waiting threads would take the cores from FlashCore's own.
        torch.set_num_threads(1)


@pytest.fixture(params=devices())
def device(request) -> str:
    """ "cpu", and "cuda" where there is one."""
    return request.param


@pytest.fixture
def arrays(device) -> Arrays:
    """What makes arrays on the device."""
    return on(device)


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch):
    """FLASHCORE_CHECK in the environment would hide what happens without it, the others a kernel."""
    for name in ("FLASHCORE_CHECK", "FLASHCORE_SM90_KERNEL", "FLASHCORE_SM90_DECODE"):
        if name in os.environ:
            monkeypatch.delenv(name)


@pytest.fixture(params=["chosen", "turned"])
def decode_kernel(request, device, monkeypatch) -> str:
    """The decode kernel that plan() chooses; and on a Hopper GPU the one with turned products, wherever it can run."""
    if request.param != "chosen":
        if "sm90" not in backends(device):
            pytest.skip("a Hopper GPU's")
        monkeypatch.setenv("FLASHCORE_SM90_DECODE", request.param)
    return request.param


@pytest.fixture
def bench(monkeypatch):
    """The modules of bench/, which are scripts and no package."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    names = (
        "accuracy",
        "cells",
        "compare",
        "host",
        "ladder",
        "model",
        "overhead",
        "plot",
        "probes",
        "providers",
        "report",
        "suites",
        "summaries",
        "surroundings",
        "text_table",
        "timers",
    )
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture(scope="session")
def cpu_build(tmp_path_factory) -> Path:
    """The folder of a build without CUDA and without Python: the static library and flashcore_bench. It is made once,
    for all tests that need it."""
    programs = sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"]
    root = Path(__file__).parents[1]
    cmake, ninja = shutil.which("cmake", path=programs), shutil.which("ninja", path=programs)
    if cmake is None or not (root / "CMakeLists.txt").exists():
        pytest.skip("no CMake here, or not the sources")
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++", "cl")):
        pytest.skip("no C++ compiler here")
    build = tmp_path_factory.mktemp("cpu_build")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    for command in (
        [cmake, "-S", root, "-B", build, "-DFLASHCORE_CUDA=OFF", "-DFLASHCORE_BENCH=ON", *generator],
        [cmake, "--build", build, "--parallel", "2"],
    ):
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return build
