# SPDX-License-Identifier: Apache-2.0
"""How long one call takes, on a GPU, in JAX and on a CPU; and in which order providers are timed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch


class CudaTimer:
    """A graph of calls that walks through all sets of arrays, at least once and for some milliseconds."""

    def __init__(self, call: Callable[[int], torch.Tensor], sets: int, milliseconds: float) -> None:
        kept: dict[int, torch.Tensor] = {}

        def walk(count: int) -> None:
            for i in range(count):
                # Keeping the last result of each set makes a provider that allocates rotate its outputs as well.
                kept[i % sets] = call(i % sets)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            walk(2)
            begin, end = _events()
            begin.record()
            walk(3)
            end.record()
            end.synchronize()
            kept.clear()
        guess = begin.elapsed_time(end) / 3
        self.calls = sets * max(1, math.ceil(min(5.0, milliseconds) / (guess * sets)))
        self.graph = torch.cuda.CUDAGraph()
        # Or what JAX's threads do meanwhile ends the capture, and torch 2.11, which then frees it twice, the process.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            walk(self.calls)
        self.replays = 1
        self.replays = max(1, round(milliseconds * 1e3 / (self.microseconds() * self.calls)))

    def microseconds(self) -> float:
        """Of one call, over one round."""
        begin, end = _events()
        begin.record()
        for _ in range(self.replays):
            self.graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3 / (self.calls * self.replays)


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


class JaxTimer:
    """A compiled program of calls that walks through all sets of arrays, at most 64 of them."""

    def __init__(self, attend: Callable[..., Any], sets: list[list[Any]], milliseconds: float) -> None:
        import jax

        self.sets = sets[:64]
        self.program = jax.jit(lambda sets: [attend(*arrays) for arrays in sets])
        self.repeats = 1
        self.microseconds()  # compiles
        self.repeats = max(1, round(milliseconds * 1e3 / (self.microseconds() * len(self.sets))))

    def microseconds(self) -> float:
        """Of one call, over one round."""
        begin = time.perf_counter()
        for _ in range(self.repeats):
            outputs = self.program(self.sets)
        for output in outputs:
            output.block_until_ready()
        return (time.perf_counter() - begin) * 1e6 / (self.repeats * len(self.sets))


class CpuTimer:
    def __init__(self, call: Callable[[int], torch.Tensor], sets: int, milliseconds: float) -> None:
        self.call, self.sets = call, sets
        self.calls = 1
        self.microseconds()  # warms up
        self.calls = max(1, round(milliseconds * 1e3 / self.microseconds()))

    def microseconds(self) -> float:
        begin = time.perf_counter()
        for i in range(self.calls):
            self.call(i % self.sets)
        return (time.perf_counter() - begin) * 1e6 / self.calls


def order_of(count: int, turn: int) -> list[int]:
    """The order of `count` providers in one turn: in as many turns (twice as many, if count is odd) each follows each
    other equally often, for the power that one takes slows the next (the rows of E. J. Williams's square, 1949)."""
    row = [(turn + (i + 1) // 2 * (1 if i % 2 else -1)) % count for i in range(count)]
    return row[::-1] if count % 2 and turn // count % 2 else row
