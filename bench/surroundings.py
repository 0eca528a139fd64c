# SPDX-License-Identifier: Apache-2.0
"""What a measurement was made on: the device, the versions, the commit."""

from __future__ import annotations

import datetime
import pathlib
import platform
import subprocess
from importlib.metadata import version
from typing import Any

import torch

import flashcore

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results"


def _first_line(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return ""


def processor() -> str:
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def surroundings(device: str, commit: str) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit or _first_line("git", "-C", str(HERE), "rev-parse", "HEAD") or "unknown",
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "versions": {
            "flashcore": flashcore.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
    }
    if device == "cpu":
        facts["threads"] = {"flashcore": flashcore.get_num_threads(), "torch": torch.get_num_threads()}
        facts["isa"] = flashcore.info()["cpu"]["isa"]
        return facts
    facts["driver"] = _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    facts["multiprocessors"] = torch.cuda.get_device_properties(0).multi_processor_count
    cudnn = torch.backends.cudnn.version()
    facts["versions"].update(cuda=torch.version.cuda, cudnn=cudnn)
    for name in ("fa3-fwd", "jax"):
        try:
            facts["versions"][name] = version(name)
        except ModuleNotFoundError:
            pass
    return facts


def short_name(facts: dict[str, Any]) -> str:
    """The GPU of surroundings() as the name of a result file has it, "h100"; empty for the CPU."""
    return "" if "threads" in facts else facts["device"].lower().replace("nvidia ", "").split()[0]
