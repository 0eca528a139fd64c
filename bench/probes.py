# SPDX-License-Identifier: Apache-2.0
"""What a processor can do at most, measured beside the cells of the CPU suites, and whether it was steady meanwhile.

A probe is a function without arguments that returns peaks by name: float32_tflops, bfloat16_tflops (where there is
one), bfloat16_dot_tflops (of vectors, where bfloat16_tflops is of products of tiles) and read_tbytes_per_second, on as
many threads as FlashCore uses. The right one is `flashcore_bench peak`, loops that keep to the registers in the
instruction set of the kernels. Without that program PyTorch's matmul and sum stand in: they tell whether the machine
has slowed down, and a share of them is no share of the processor's peak.
"""

from __future__ import annotations

import json
import os
import pathlib
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from typing import Any

Peaks = dict[str, float]
LOWEST = 0.9  # of the run's best peak, that a cell's peaks must reach, or it is measured again


def probe_of(program: str | None) -> tuple[str, Callable[[], Peaks]]:
    """The name of a probe, and the probe: that of flashcore_bench at `program`, else PyTorch's. Raises ValueError where
    the program does not measure what FlashCore runs on."""
    if program is None:
        return "torch: float32 and bfloat16 matmul, float32 sum", torch_peaks
    import flashcore

    facts = flashcore.info()["cpu"]
    report = run_program(program)
    for key in ("threads", "isa"):
        if report.get(key) != facts[key]:
            raise ValueError(f"{program}: {key} {report.get(key)}, FlashCore's {facts[key]}")
    return "flashcore_bench peak", lambda: run_program(program)["peak"]


def memory_peaks(program: str) -> Peaks:
    """What a GPU's memory reads and copies, by flashcore_bench at `program`. Raises ValueError where that fails."""
    peaks = run_program(program, "cuda")["peak"]
    return {name: value for name, value in peaks.items() if name.endswith("_tbytes_per_second")}


def run_program(program: str, device: str = "cpu") -> dict[str, Any]:
    """The report of `flashcore_bench peak` on a device. Raises ValueError where it fails."""
    import flashcore

    environment = {**os.environ, "OMP_NUM_THREADS": str(flashcore.get_num_threads())}
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "peak.json"
        backend = ["--backend", "cpu"] if device == "cpu" else []
        command = [program, "peak", *backend, "--json", str(file)]
        try:
            subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            return json.loads(file.read_text())
        except subprocess.CalledProcessError as error:
            raise ValueError(f"{' '.join(command)}: {error.stderr.strip()}") from error
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"{' '.join(command)}: {error}") from error


def torch_peaks(rounds: int = 5, size: int = 1024, elements: int = 1 << 26) -> Peaks:
    """Of PyTorch's operations; its threads are those of the call."""
    import torch

    def seconds(call: Callable[[], Any]) -> float:
        call()
        samples = []
        for _ in range(rounds):
            begin = time.perf_counter()
            call()
            samples.append(time.perf_counter() - begin)
        return statistics.median(samples)

    peaks = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(size, size, dtype=dtype)
        out = torch.empty_like(a)
        taken = seconds(lambda a=a, out=out: torch.mm(a, a, out=out))
        peaks[f"{str(dtype).removeprefix('torch.')}_tflops"] = 2.0 * size**3 / taken / 1e12
    array = torch.zeros(elements)
    array.fill_(1.0)  # or all pages may be the same one
    peaks["read_tbytes_per_second"] = 4.0 * elements / seconds(array.sum) / 1e12
    return peaks


def keep_best(best: Peaks, found: Peaks) -> None:
    """Raises each of `best` to what was found."""
    best.update({name: max(value, best.get(name, 0.0)) for name, value in found.items()})


def governing(cell: dict[str, Any], peaks: Peaks) -> str:
    """The name of the peak that a cell is held against: memory's where it decodes, else that of its dtype's products,
    which are float32's for float16, and for bfloat16 where there is no dot product."""
    if cell["page_size"] is not None:
        return "read_tbytes_per_second"
    return "bfloat16_tflops" if cell["dtype"] == "bfloat16" and "bfloat16_tflops" in peaks else "float32_tflops"


def add_share(cell: dict[str, Any], before: Peaks, after: Peaks) -> None:
    """Writes into a cell's result what was probed before and after it, and FlashCore's share of the higher; on tile
    registers also that of the vectors' dot products."""
    name = governing(cell, before)
    cell["peaks"] = {"name": name, "before": before[name], "after": after[name]}
    ours = cell["providers"]["flashcore"]
    field = "tbytes_per_second" if name.startswith("read") else "tflops"
    if field in ours:
        cell["share_of_peak"] = ours[field] / max(before[name], after[name])
        dot = max(peaks.get("bfloat16_dot_tflops", 0.0) for peaks in (before, after))
        if name == "bfloat16_tflops" and dot:
            cell["share_of_dot_peak"] = ours[field] / dot


def lowest(cell: dict[str, Any]) -> float:
    return min(cell["peaks"]["before"], cell["peaks"]["after"])


def mark_steady(cells: list[dict[str, Any]], best: Peaks) -> None:
    """Writes into each result whether the peaks beside it were within LOWEST of the run's best."""
    for cell in cells:
        if "peaks" in cell:
            cell["steady"] = lowest(cell) >= LOWEST * best[cell["peaks"]["name"]]
