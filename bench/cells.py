# SPDX-License-Identifier: Apache-2.0
"""A cell of a suite, and the ceiling beside it: checked against float64 and timed, FlashCore and its peers in turn."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from accuracy import relative_difference, sample, verdict
from suites import OURS, Cell
from timers import CpuTimer, CudaTimer, order_of


def arrays_of(cell: Cell, device: str, gib: float) -> list[tuple[torch.Tensor, ...]]:
    """Sets of random queries, keys and values, and a poisoned output each (a row that nobody writes shows), of so many
    GiB in all."""
    sets = max(2, min(1024, math.ceil(gib * 2**30 / cell.bytes)))
    generator = torch.Generator(device).manual_seed(1)
    shapes, dtype = (cell.shape_q, cell.shape_k, cell.shape_k), getattr(torch, cell.dtype)
    arrays = []
    for _ in range(sets):
        q, k, v = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for shape in shapes)
        arrays.append((q, k, v, torch.full_like(q, math.nan)))
    return arrays


def in_turn(timers: dict[str, Any], rounds: int, device: str) -> dict[str, list[float]]:
    """Microseconds of each of `timers` in each round."""
    names = list(timers)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for i in order_of(len(names), turn):
            if device == "cuda":  # a round untimed: the clock is still that of the provider before
                timers[names[i]].microseconds()
            samples[names[i]].append(timers[names[i]].microseconds())
    return samples


def run_cell(cell: Cell, device: str, ours: Callable[..., torch.Tensor], peers: dict, options: Any) -> dict[str, Any]:
    """Checks and times FlashCore and its peers on one cell; the result is ready for JSON."""
    arrays = arrays_of(cell, device, options.rotate)
    sets = len(arrays)
    exact = sample(cell, *arrays[0][:3], torch.Generator().manual_seed(2))
    providers: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[int], torch.Tensor]] = {}
    outputs: dict[str, torch.Tensor] = {}
    for name, function in {OURS: ours, **peers}.items():
        call = lambda i, function=function: function(cell, *arrays[i])  # noqa: E731
        try:
            # A copy for ours: its own array is written again and again while timing.
            outputs[name] = call(0).clone() if name == OURS else call(0)
            providers[name] = exact.errors(outputs[name])
            calls[name] = call
        except Exception as error:  # not installed, or not for this cell: it is said in the results
            providers[name] = {"absent": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    result: dict[str, Any] = {**asdict(cell), "label": cell.label, "sets": sets, "providers": providers}

    ran = [name for name in calls if name != OURS]
    yardstick = next((n for n in ("flash", "sdpa") if n in ran), None)
    if yardstick is None and ran:
        yardstick = min(ran, key=lambda n: providers[n]["relative_error"])
    if OURS not in calls:
        result["problem"] = providers[OURS]["absent"]
    elif yardstick is None:
        result["problem"] = "no peer ran, so there is no yardstick"
    else:
        difference = relative_difference(outputs[OURS], outputs[yardstick])
        result["yardstick"] = yardstick
        result["problem"] = verdict(providers[OURS], providers[yardstick], difference)
    if result["problem"]:
        return result
    for name in ran:
        outputs.pop(name)

    timer = CudaTimer if device == "cuda" else CpuTimer
    timers = {}
    for name, call in list(calls.items()):
        try:
            own = getattr(peers.get(name), "timer", None)
            timers[name] = own(cell, arrays, options.milliseconds) if own else timer(call, sets, options.milliseconds)
        except Exception as error:
            providers[name]["absent"] = f"{type(error).__name__}: {error}"
            if name == OURS:
                result["problem"] = f"while timed: {providers[name]['absent']}"
                return result
    for name, values in in_turn(timers, options.rounds, device).items():
        middle = statistics.median(values)
        providers[name]["microseconds"] = middle
        providers[name]["spread"] = (max(values) - min(values)) / middle
        providers[name]["tflops"] = cell.flops / middle / 1e6
        providers[name]["tbytes_per_second"] = cell.bytes / middle / 1e6
    if not torch.equal(arrays[0][3], outputs[OURS]):
        result["problem"] = "the output changed while it was timed"
    own = providers[OURS]["microseconds"]
    result["ratios"] = {name: providers[name]["microseconds"] / own for name in timers if name != OURS}
    return result


def matmul_tflops(options: Any, size: int = 8192) -> float:
    """Of PyTorch's bfloat16 matmul, with the timer, the rotation and the rounds of the cells."""
    sets = max(2, math.ceil(options.rotate * 2**30 / (3 * 2 * size**2)))
    generator = torch.Generator("cuda").manual_seed(1)
    shape = (3, size, size)
    arrays = [torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16) for _ in range(sets)]
    timer = CudaTimer(lambda i: torch.mm(arrays[i][0], arrays[i][1], out=arrays[i][2]), sets, options.milliseconds)
    return 2.0 * size**3 / statistics.median(timer.microseconds() for _ in range(options.rounds)) / 1e6
