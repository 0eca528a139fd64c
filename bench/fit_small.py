# SPDX-License-Identifier: Apache-2.0
"""Measures on which problems sm90's kernels for small problems beat the large one, and prints the rows of
cpp/sm90/small_choice.inc anew.

    python bench/fit_small.py > bench/results/small_choice.txt

For every head dimension, number of keys and number of tiles of 64 rows: every form of the small kernel, the stream
kernel, and the large kernel, each in a graph as bench/compare.py times it, in turn, full and causal. The smallest
product of the two times wins. Causal problems do not stream: with the stream kernel for the full one comes the best
other one for the causal, and the rows for them follow. Needs a GPU of compute capability 9.0. Exit status: 0, or 2 on
bad usage.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
from dataclasses import dataclass

import torch
from suites import Cell
from timers import CudaTimer

import flashcore

VARIABLE = "FLASHCORE_SM90_KERNEL"
LARGE = "large"
# Rows of a tile, warpgroups of a block and blocks of a cluster that divide its keys: what small_tiles.inc has.
SMALL = ("64:1:1", "64:2:1", "128:1:1", "64:2:2", "64:2:4", "64:1:8")
STREAM = "stream"
FORMS = (LARGE, STREAM, *(f"small:{form}" for form in SMALL))


@dataclass(frozen=True)
class Point:
    """A problem of the fit: `heads` heads of `keys` queries and keys each, batch 1."""

    head_dim: int
    keys: int
    heads: int

    @property
    def tiles(self) -> int:
        return self.heads * math.ceil(self.keys / 64)


def heads_for(tiles: int, keys: int) -> int:
    return max(1, round(tiles * 64 / keys))


def runs(point: Point, form: str) -> bool:
    """Whether plan() takes the form for the problem: where it does not fit, or has no instance, it takes another."""
    os.environ[VARIABLE] = form
    shape = (1, point.keys, point.heads, point.head_dim)
    plan = flashcore.plan(shape, shape, shape, dtype="bfloat16", device="cuda")
    if form == LARGE:
        return plan.kernel == "sm90_forward"
    if form == STREAM:
        return plan.kernel == "sm90_stream"
    rows, groups, cluster = map(int, form.split(":")[1:])
    got = plan.tile_q, plan.threads, plan.splits
    return plan.kernel == "sm90_small" and got == (rows, 2 * rows * groups, groups * cluster)


def measure(point: Point, options: argparse.Namespace) -> dict[str, float]:
    """Microseconds by form: the geometric mean of full and causal."""
    forms = [form for form in FORMS if runs(point, form)]
    times = dict.fromkeys(forms, 1.0)
    for causal in (False, True):
        cell = Cell(1, point.heads, point.keys, point.head_dim, causal)
        sets = max(2, min(1024, math.ceil(options.rotate * 2**30 / cell.bytes)))
        arrays = [
            [torch.randn(cell.shape_q, device="cuda", dtype=torch.bfloat16) for _ in range(4)] for _ in range(sets)
        ]

        def call(i: int, arrays: list[list[torch.Tensor]] = arrays, causal: bool = causal) -> torch.Tensor:
            return flashcore.attention(*arrays[i][:3], causal=causal, out=arrays[i][3])

        timers = {}
        for form in forms:
            os.environ[VARIABLE] = form  # what the graph captures
            timers[form] = CudaTimer(call, sets, options.milliseconds)
        samples: dict[str, list[float]] = {form: [] for form in forms}
        for turn in range(options.rounds):
            for i in range(len(forms)):
                form = forms[(i + turn) % len(forms)]
                samples[form].append(timers[form].microseconds())
        medians = {form: statistics.median(samples[form]) for form in forms}
        if causal and STREAM in forms:
            medians[STREAM] = min(median for form, median in medians.items() if form != STREAM)
        for form in forms:
            times[form] *= medians[form]
    return {form: math.sqrt(product) for form, product in times.items()}


def rows_of(head_dim: int, keys: int, best: list[tuple[int, str]]) -> list[str]:
    """The table's rows from the best form at each number of tiles, in order, up to the first that the large kernel
    wins. A row reaches to the geometric mean of the last number of tiles that it wins and the next one."""
    rows = []
    for (tiles, form), (following, other) in zip(best, [*best[1:], (best[-1][0], "")], strict=True):
        if form == LARGE:
            break
        if form != other:
            limit = round(math.sqrt(tiles * following))
            shape = "128, 0, 1" if form == STREAM else ", ".join(form.split(":")[1:])
            rows.append(f"FLASHCORE_SM90_SMALL_CHOICE({head_dim}, {keys}, {limit}, {shape})")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--keys", type=int, nargs="+", default=[128, 256, 512, 1024, 2048, 4096])
    parser.add_argument(
        "--tiles", type=int, nargs="+", default=[8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 1024, 2048]
    )
    parser.add_argument("--rotate", type=float, default=0.25, help="GiB of arrays that the calls walk through")
    parser.add_argument("--milliseconds", type=float, default=4.0, help="of a round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        parser.error("needs a GPU of compute capability 9.0")
    units = torch.cuda.get_device_properties(0).multi_processor_count
    table = []
    print(f"# {torch.cuda.get_device_name()}, {units} multiprocessors, bfloat16, us by form", flush=True)
    for head_dim in options.head_dims:
        for keys in options.keys:
            best: list[tuple[int, str]] = []
            uneven: list[tuple[int, str]] = []
            for heads in sorted({heads_for(tiles, keys) for tiles in options.tiles}):
                point = Point(head_dim, keys, heads)
                times = measure(point, options)
                tiles = round(point.tiles * 132 / units)
                best.append((tiles, min(times, key=times.__getitem__)))
                uneven.append((tiles, min((form for form in times if form != STREAM), key=times.__getitem__)))
                told = "  ".join(f"{form} {time:.2f}" for form, time in sorted(times.items(), key=lambda x: x[1]))
                print(f"# D {head_dim} keys {keys} tiles {point.tiles}: {told}", flush=True)
                if best[-1][1] == LARGE and len(best) > 1 and best[-2][1] == LARGE:
                    break  # larger problems are the large kernel's, too
            rows = rows_of(head_dim, keys, best)
            table += rows + [row for row in rows_of(head_dim, keys, uneven) if row not in rows]
    print(*table, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
