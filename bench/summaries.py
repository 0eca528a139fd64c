# SPDX-License-Identifier: Apache-2.0
"""What the results of a suite's cells come to. Needs only the standard library."""

from __future__ import annotations

import math
import statistics
from typing import Any

from suites import Cell


def geometric_means(cells: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of the ratios, over the right cells that a peer ran; `best` is the fastest peer of each cell."""
    gathered: dict[str, list[float]] = {}
    for cell in cells:
        ratios = {} if cell["problem"] else cell["ratios"]
        for name, ratio in ratios.items():
            gathered.setdefault(name, []).append(ratio)
        if ratios:
            gathered.setdefault("best", []).append(min(ratios.values()))
    return {n: {"ratio": statistics.geometric_mean(values), "cells": len(values)} for n, values in gathered.items()}


def over_unmasked(cells: list[dict[str, Any]]) -> dict[str, float]:
    """Of each provider, its time for the window over its time for as many keys a query, none of them masked."""
    right = [cell for cell in cells if not cell["problem"]]
    times = [
        {name: p["microseconds"] for name, p in cell["providers"].items() if "microseconds" in p}
        for windowed in (True, False)
        for cell in right
        if (cell["window"] is not None) == windowed
    ]
    if len(times) != 2:  # of a part of the suite, or with a wrong cell
        return {}
    return {name: times[0][name] / times[1][name] for name in times[0] if name in times[1]}


def cpu_summary(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """What the results of the suite "cpu" come to. `dtypes`: of each its ratios' geometric mean and the lowest, with
    the cell, and the lowest share of the peak at 2,048 tokens, head dimension 128, full, where peaks were probed.
    `seed`: the ratio at the seed's shape, (1, 8, 512, 64) in float16, full; None where that was not measured."""
    right = [cell for cell in cells if not cell["problem"] and cell["ratios"]]
    dtypes: dict[str, dict[str, Any]] = {}
    for dtype in dict.fromkeys(cell["dtype"] for cell in right):
        own = [(cell["ratios"]["sdpa"], cell["label"]) for cell in right if cell["dtype"] == dtype]
        low, label = min(own)
        mean = statistics.geometric_mean(ratio for ratio, _ in own)
        dtypes[dtype] = {"cells": len(own), "ratio": mean, "lowest": low, "lowest_at": label}
    for cell in right:
        if (cell["seqlen"], cell["head_dim"], cell["causal"]) == (2048, 128, False) and "share_of_peak" in cell:
            told = dtypes[cell["dtype"]]
            for share in ("share_of_peak", "share_of_dot_peak"):
                if share in cell:
                    told[share] = min(cell[share], told.get(share, math.inf))
    seed = Cell(1, 8, 512, 64, dtype="float16").label
    return {
        "dtypes": dtypes,
        "seed": next((cell["ratios"]["sdpa"] for cell in right if cell["label"] == seed), None),
    }
