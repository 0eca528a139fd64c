# SPDX-License-Identifier: Apache-2.0
"""FlashCore beside its peers: the same inputs, in turn, in one process; every cell checked before it is timed.

    python bench/compare.py --suite forward --backend sm80

    python bench/compare.py --suite grid --peers flash cudnn fa3 --cells 0:60            # one half,
    python bench/compare.py --suite grid --peers flash cudnn fa3 --cells 60: --append    # and the other into its file

    python bench/compare.py --suite cpu cpu_decode --probe build/bench/flashcore_bench

Peers are PyTorch SDPA's backends (`flash`, `cudnn`, `efficient`; `sdpa` on the CPU), FlashAttention-3 (`fa3`, from the
PyPI package fa3-fwd) and JAX's way to cuDNN (`jax`), where they are installed and can run the cell. For windows, varlen
and causal decoding `flash` is torch.nn.attention.varlen, PyTorch's other way to the same kernels.

Correctness: on sampled rows against float64, FlashCore's largest error is at most twice the yardstick's plus 1e-5 and
its relative Frobenius error at most 1.25 times the yardstick's plus 1e-6 (`flash`, or the best peer that ran); the
whole output is held against the yardstick's too, and after timing it must still be the same bits.

Timing, CUDA: a graph of many calls that walks through sets of random inputs and outputs of --rotate GiB in all,
replayed for about --milliseconds a round, --rounds rounds, medians. In every round each provider has its turn, in an
order in which no one always follows the same other, and runs once untimed before: on a card at its power limit a
provider's first milliseconds run at the clock that the one before has left. CPU: calls in turn, medians.
TFLOP/s count 4·B·H·Sq·Sk·D, half of it when causal, window + 1 keys a query where there is a window; TB/s count q, k, v
and o once. JAX cannot be captured in PyTorch's graph: its calls are one compiled program, timed by the clock, with its
start counted in. A ratio is a peer's time over FlashCore's. The ceiling, `matmul_tflops`, is a bfloat16 matmul of 8192³
in the same process, timed the same way.

On the CPU the processor's peaks are probed before and after every cell (bench/probes.py says how), and FlashCore's
share of the higher is told. A cell beside which they fell more than 10% below the run's best is measured again after
all others, --repeats times at most; one that stays so is marked.

Writes bench/results/NAME.json, after every cell, so that a run cut short can be continued with --cells and --append;
bench/report.py makes README's tables and plots from it. Exit status: 0, or 1 when a cell of FlashCore in the file is
wrong, 2 on bad usage.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import json
import math
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch
from probes import Peaks, add_share, keep_best, lowest, mark_steady, memory_peaks, probe_of
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from suites import Cell, cpu_summary, is_cpu, is_forward, rate_of, suites
from torch.nn.attention import SDPBackend, sdpa_kernel

import flashcore

RESULTS = pathlib.Path(__file__).parent / "results"
OURS = "flashcore"
SAMPLED_HEADS, SAMPLED_ROWS = 12, 64  # (batch, head) pairs, and queries of each, that are held against float64


# --- providers: functions of (cell, q, k, v, out) ---------------------------------------------------------------------
# Inputs are contiguous bshd; of a varlen cell (1, total, heads, head_dim). PyTorch's get transposed views of them: so
# does bshd code call SDPA, and their kernels read them as they are. A provider that cannot write into `out` returns its
# own output, of the same shape.


@functools.lru_cache(maxsize=4)
def cu_seqlens(cell: Cell, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the queries and the keys of each sequence begin. Made at a cell's first call: no graph holds the copy."""
    counts = torch.tensor([(0, 0), *cell.sequences]).cumsum(0, dtype=torch.int32)
    return counts[:, 0].contiguous().to(device), counts[:, 1].contiguous().to(device)


@functools.lru_cache(maxsize=4)
def cache_of(cell: Cell, device: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The lengths of a decoding cell's sequences, and its page table. Each sequence's pages stand in random order but
    for the last one: its keys are the peers', in another order, which changes nothing where all are seen."""
    generator = torch.Generator().manual_seed(3)
    rows, first = [], 0
    for _, keys in cell.sequences if cell.page_size else ():
        pages = keys // cell.page_size
        order = torch.randperm(pages - 1, generator=generator)
        rows.append(first + torch.cat([order, torch.tensor([pages - 1])]))
        first += pages
    table = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).int().to(device) if rows else None
    return torch.tensor([keys for _, keys in cell.sequences], dtype=torch.int32).to(device), table


def sdpa_provider(backend: SDPBackend | None) -> Callable[..., torch.Tensor]:
    def call(cell: Cell, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        top_left = cell.causal and cell.seqlen != cell.keys  # SDPA's causal mask is not the one that is meant
        if cell.lengths or cell.window is not None or top_left:
            if backend is SDPBackend.FLASH_ATTENTION:
                return torch_varlen(cell, q, k, v)
            raise NotImplementedError("SDPA has no windows and no variable lengths")
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        options = {"is_causal": cell.causal, "enable_gqa": cell.heads != cell.kv_heads}
        if backend is None:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)

    return call


def torch_varlen(cell: Cell, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    left = -1 if cell.window is None else cell.window
    options: dict[str, Any] = {"window_size": (left, 0 if cell.causal else -1)}
    if cell.heads != cell.kv_heads:
        options["enable_gqa"] = True
    packed = (x.flatten(0, 1) for x in (q, k, v))
    return varlen_attn(*packed, *cu_seqlens(cell, q.device.type), cell.seqlen, cell.keys, **options).view(q.shape)


def fa3(cell: Cell, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    import fa3_fwd_interface

    window = (-1, -1) if cell.window is None else (cell.window, 0)
    options = {"causal": cell.causal, "window_size": window}
    if cell.lengths:
        starts = cu_seqlens(cell, q.device.type)
        longest = (cell.seqlen, cell.keys)
        result = fa3_fwd_interface.flash_attn_varlen_func(q[0], k[0], v[0], *starts, *longest, **options)
    else:
        result = fa3_fwd_interface.flash_attn_func(q, k, v, **options)
    return (result[0] if isinstance(result, tuple) else result).view(q.shape)


class Jax:
    """jax.nn.dot_product_attention by one of its implementations, "cudnn" or "xla" (which is for tests), on the arrays
    where they lie. Its own timer runs many calls as one compiled program."""

    def __init__(self, implementation: str) -> None:
        self.implementation = implementation

    def attend(self, cell: Cell, q: Any, k: Any, v: Any) -> Any:
        import jax

        return jax.nn.dot_product_attention(q, k, v, is_causal=cell.causal, implementation=self.implementation)

    def arrays(self, *arrays: torch.Tensor) -> list[Any]:
        # Or JAX takes most of the GPU's memory at once, which is full of others' arrays.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        import jax

        return [jax.dlpack.from_dlpack(x) for x in arrays]

    def __call__(
        self, cell: Cell, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor
    ) -> torch.Tensor:
        if cell.lengths or cell.window is not None or (cell.causal and cell.seqlen != cell.keys):
            raise NotImplementedError("measured without windows, variable lengths and JAX's top-left causal mask")
        if q.device.type == "cuda":
            torch.cuda.synchronize()
        return torch.from_dlpack(self.attend(cell, *self.arrays(q, k, v)).block_until_ready())

    def timer(self, cell: Cell, arrays: list[tuple[torch.Tensor, ...]], milliseconds: float) -> JaxTimer:
        return JaxTimer(functools.partial(self.attend, cell), [self.arrays(*own[:3]) for own in arrays], milliseconds)


def flashcore_provider(backend: str | None) -> Callable[..., torch.Tensor]:
    def call(cell: Cell, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        window = None if cell.window is None else (cell.window, 0)
        options = {"causal": cell.causal, "window": window, "backend": backend}
        if cell.decodes:
            lengths, table = cache_of(cell, q.device.type)
            k, v = (x.view(-1, cell.page_size, *x.shape[2:]) if cell.page_size else x for x in (k, v))
            q, given = (x.view(cell.batch, cell.seqlen, *x.shape[2:]) for x in (q, out))
            options.update(page_table=table, batch_invariant=cell.batch_invariant)
            flashcore.attention_kvcache(q, k, v, lengths, out=given, **options)
            return out
        if not cell.lengths:
            return flashcore.attention(q, k, v, out=out, **options)
        options.update(max_seqlen_q=cell.seqlen, max_seqlen_k=cell.keys)
        flashcore.attention_varlen(q[0], k[0], v[0], *cu_seqlens(cell, q.device.type), out=out[0], **options)
        return out

    return call


def peers_of(device: str) -> dict[str, Callable[..., torch.Tensor]]:
    if device == "cpu":
        return {"sdpa": sdpa_provider(None)}
    return {
        "flash": sdpa_provider(SDPBackend.FLASH_ATTENTION),
        "cudnn": sdpa_provider(SDPBackend.CUDNN_ATTENTION),
        "efficient": sdpa_provider(SDPBackend.EFFICIENT_ATTENTION),
        "fa3": fa3,
        "jax": Jax("cudnn"),
    }


# --- correctness ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """Rows of a cell's output in float64: for each entry of `places` a head and rows, counted over all sequences."""

    places: list[tuple[int, torch.Tensor]]
    exact: torch.Tensor  # (sampled rows, head_dim)

    def take(self, out: torch.Tensor) -> torch.Tensor:
        packed = out.flatten(0, 1)
        return torch.cat([packed[rows, h] for h, rows in self.places]).double()

    def errors(self, out: torch.Tensor) -> dict[str, float]:
        """Largest error and relative Frobenius error of an output (batch, sequence, heads, head_dim)."""
        difference = self.take(out) - self.exact
        return {
            "max_error": difference.abs().max().item(),
            "relative_error": (difference.norm() / self.exact.norm()).item(),
        }


def sample(cell: Cell, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, generator: torch.Generator) -> Sample:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    starts = [(0, 0), *cell.sequences]
    starts_q, starts_k = (list(itertools.accumulate(counts)) for counts in zip(*starts, strict=True))
    every = len(cell.sequences) * cell.heads
    # The first and the last, and others at random: an error at the end of the grid shows.
    chosen = {0, every - 1, *torch.randint(every, (SAMPLED_HEADS,), generator=generator).tolist()}
    places, outputs = [], []
    for b, h in (divmod(i, cell.heads) for i in sorted(chosen)):
        queries, keys = cell.sequences[b]
        picked = {0, queries - 1, *torch.randint(queries, (SAMPLED_ROWS,), generator=generator).tolist()}
        rows = torch.tensor(sorted(picked), device=q.device)
        places.append((h, starts_q[b] + rows))
        own, head_k = slice(starts_k[b], starts_k[b] + keys), h // (cell.heads // cell.kv_heads)
        score = q[starts_q[b] + rows, h].double() @ k[own, head_k].double().T / math.sqrt(cell.head_dim)
        if cell.causal:
            distance = rows[:, None] + (keys - queries) - torch.arange(keys, device=q.device)
            window = keys if cell.window is None else cell.window
            score.masked_fill_((distance < 0) | (distance > window), -math.inf)
        outputs.append(torch.softmax(score, dim=-1) @ v[own, head_k].double())
    return Sample(places, torch.cat(outputs))


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def verdict(ours: dict[str, float], yardstick: dict[str, float], difference: float) -> str:
    """Empty when FlashCore's errors are within the standard, else what is wrong. Written so that a NaN is wrong."""
    if not ours["max_error"] <= 2 * yardstick["max_error"] + 1e-5:
        return f"largest error {ours['max_error']:.2e}, the yardstick's {yardstick['max_error']:.2e}"
    if not ours["relative_error"] <= 1.25 * yardstick["relative_error"] + 1e-6:
        return f"relative error {ours['relative_error']:.2e}, the yardstick's {yardstick['relative_error']:.2e}"
    # Two results that are both within the standard differ by no more than the sum of their errors; rows vary.
    allowed = 4 * (ours["relative_error"] + yardstick["relative_error"]) + 1e-6
    if not difference <= allowed:
        return f"the whole output differs from the yardstick's by {difference:.2e}, more than {allowed:.2e}"
    return ""


# --- timing -----------------------------------------------------------------------------------------------------------


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
        with torch.cuda.graph(self.graph):
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


# --- a cell -----------------------------------------------------------------------------------------------------------


def run_cell(cell: Cell, device: str, ours: Callable[..., torch.Tensor], peers: dict, options: Any) -> dict[str, Any]:
    """Checks and times FlashCore and its peers on one cell; the result is ready for JSON."""
    dtype = getattr(torch, cell.dtype)
    sets = max(2, min(1024, math.ceil(options.rotate * 2**30 / cell.bytes)))
    generator = torch.Generator(device).manual_seed(1)
    shapes = (cell.shape_q, cell.shape_k, cell.shape_k)
    arrays = []
    for _ in range(sets):
        q, k, v = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for shape in shapes)
        arrays.append((q, k, v, torch.full_like(q, math.nan)))  # poisoned: a row that nobody writes shows

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
    names = list(timers)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(options.rounds):
        for i in order_of(len(names), turn):
            if device == "cuda":  # a round untimed: the clock is still that of the provider before
                timers[names[i]].microseconds()
            samples[names[i]].append(timers[names[i]].microseconds())
    for name, values in samples.items():
        middle = statistics.median(values)
        providers[name]["microseconds"] = middle
        providers[name]["spread"] = (max(values) - min(values)) / middle
        providers[name]["tflops"] = cell.flops / middle / 1e6
        providers[name]["tbytes_per_second"] = cell.bytes / middle / 1e6
    if not torch.equal(arrays[0][3], outputs[OURS]):
        result["problem"] = "the output changed while it was timed"
    own = providers[OURS]["microseconds"]
    result["ratios"] = {name: providers[name]["microseconds"] / own for name in names if name != OURS}
    return result


def matmul_tflops(options: Any, size: int = 8192) -> float:
    """Of PyTorch's bfloat16 matmul, with the timer, the rotation and the rounds of the cells."""
    sets = max(2, math.ceil(options.rotate * 2**30 / (3 * 2 * size**2)))
    generator = torch.Generator("cuda").manual_seed(1)
    shape = (3, size, size)
    arrays = [torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16) for _ in range(sets)]
    timer = CudaTimer(lambda i: torch.mm(arrays[i][0], arrays[i][1], out=arrays[i][2]), sets, options.milliseconds)
    return 2.0 * size**3 / statistics.median(timer.microseconds() for _ in range(options.rounds)) / 1e6


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


# --- what goes into the file, and on the screen -----------------------------------------------------------------------


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
        "commit": commit or _first_line("git", "-C", str(RESULTS.parent), "rev-parse", "HEAD") or "unknown",
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


def strict(value: Any) -> Any:
    """`value` without NaN and infinities, which JSON does not have: a wrong result's error becomes null."""
    if isinstance(value, dict):
        return {key: strict(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def share_text(cell: dict[str, Any]) -> str:
    """In percent, with a star where the machine was not steady."""
    if "share_of_peak" not in cell:
        return "-"
    return f"{100 * cell['share_of_peak']:.0f}%{'' if cell['steady'] else '*'}"


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """cpu_summary() as plain text."""
    lines = []
    for dtype, told in summary["dtypes"].items():
        line = f"{dtype}: geometric mean {told['ratio']:.2f} ({told['cells']} cells), lowest {told['lowest']:.2f}"
        line += f" at {told['lowest_at']}"
        if "share_of_peak" in told:
            line += f"; {100 * told['share_of_peak']:.0f}% of the peak at S 2048, D 128, full"
        if "share_of_dot_peak" in told:
            line += f" ({100 * told['share_of_dot_peak']:.0f}% of that of vectors' dot products)"
        lines.append(line)
    if summary["seed"] is not None:
        lines.append(f"the seed's shape in float16: {summary['seed']:.2f}")
    return lines


def text_table(report: dict[str, Any]) -> str:
    """Microseconds of every provider, FlashCore's rate, and its ratio to the best peer, as plain text."""
    names = [n for n in report["providers"] if any("microseconds" in c["providers"][n] for c in report["cells"])]
    unit, field, factor = rate_of(report["suite"])
    shares = any("share_of_peak" in cell for cell in report["cells"])
    share_column = ["of peak"] if shares else []
    lines = [[report["suite"], *(f"{n} us" for n in names), unit, *share_column, "error", "best", "ratio"]]
    for cell in report["cells"]:
        if cell["problem"]:
            lines.append([cell["label"], f"WRONG: {cell['problem']}"])
            continue
        providers = cell["providers"]
        times = [f"{p['microseconds']:.1f}" if "microseconds" in (p := providers[n]) else "-" for n in names]
        speed = providers[OURS][field] * factor
        best = min(cell["ratios"], key=cell["ratios"].get, default="")
        ratio = f"{cell['ratios'][best]:.3f}" if best else "-"
        error = f"{providers[OURS]['max_error']:.1e}"
        rate = f"{speed:.3g}" if speed < 10 else f"{speed:.0f}"
        share = [share_text(cell)] if shares else []
        lines.append([cell["label"], *times, rate, *share, error, best, ratio])
    widths = [max(len(line[i]) for line in lines if len(line) == len(lines[0])) for i in range(len(lines[0]))]
    rows = []
    for first, *rest in lines:
        right = (text.rjust(width) for text, width in zip(rest, widths[1:], strict=False))  # a wrong cell has fewer
        rows.append("  ".join([first.ljust(widths[0]), *right]))
    means = ", ".join(f"{n} {m['ratio']:.3f} ({m['cells']} cells)" for n, m in report["geometric_means"].items())
    rows.append(f"geometric means of peer's time over FlashCore's: {means or 'none'}")
    if "summary" in report:
        rows += summary_lines(report["summary"])
    if "probe" in report and report["peaks"]:
        told = ", ".join(f"{name} {value:.3g}" for name, value in report["peaks"].items())
        rows.append(f"the best peaks, by {report['probe']}: {told}")
        unsteady = [cell["label"] for cell in report["cells"] if not cell.get("steady", True)]
        if unsteady:
            rows.append(f"* the peak beside it was more than 10% below the run's best: {len(unsteady)} cells")
    if report.get("over_unmasked"):
        told = ", ".join(f"{n} {ratio:.3f}" for n, ratio in report["over_unmasked"].items())
        rows.append(f"the window's time over that of as many keys, none masked: {told}")
    if "matmul_tflops" in report:
        rows.append(f"matmul: {report['matmul_tflops']:.0f} TFLOP/s")
    return "\n".join(rows)


def part(text: str) -> slice:
    """Of "FROM:TO", either of which may be left out."""
    first, last = text.split(":")
    return slice(int(first) if first else None, int(last) if last else None)


def earlier(path: pathlib.Path, report: dict[str, Any]) -> dict[str, Any]:
    """The report at `path`. Raises ValueError unless it is of the same measurement as `report`, apart from the date."""
    try:
        old = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"--append: {path}: {error}") from error
    for key in report:
        if key not in ("date", "cells", "geometric_means", "over_unmasked", "matmul_tflops", "peaks", "summary"):
            was, now = old.get(key), json.loads(json.dumps(report[key]))
            if was != now:
                raise ValueError(f"--append: {path} has {key} {was}, this run has {now}")
    return old


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="FlashCore beside its peers.", allow_abbrev=False)
    parser.add_argument("--suite", nargs="+", choices=list(suites()), default=["forward"], help="what to run")
    parser.add_argument("--backend", help="force FlashCore's backend (default: plan chooses)")
    parser.add_argument("--cells", type=part, help="FROM:TO, as 0:40: only this part of the suite; one suite only")
    parser.add_argument("--append", action="store_true", help="keep the result file's other cells; they must be alike")
    parser.add_argument("--peers", nargs="+", help="only these peers (default: all that run)")
    parser.add_argument("--name", help="of the result file (default: from suite, backend and device); one suite only")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--commit", default="", help="what to write as commit where there is no git")
    parser.add_argument("--rounds", type=int, default=6, help="turns of every provider")
    parser.add_argument("--milliseconds", type=float, help="of work a round (default: 25, on the CPU 200)")
    parser.add_argument("--rotate", type=float, help="GiB of arrays to rotate over (default: 1, on the CPU 0.03)")
    parser.add_argument(
        "--probe",
        metavar="PROGRAM",
        help="flashcore_bench, which probes the processor's peaks (default:"
        " FLASHCORE_BENCH_PROGRAM, else PyTorch's operations stand in); of the CPU suites, and of the GPU's memory"
        " beside the suite decode",
    )
    parser.add_argument("--repeats", type=int, default=2, help="of CPU cells beside which the peaks fell (default: 2)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, only the tables")
    options = parser.parse_args(argv)
    on_cpu = [is_cpu(suite) for suite in options.suite]
    options.device = "cpu" if all(on_cpu) or options.backend == "cpu" else "cuda"
    if options.device == "cuda" and any(on_cpu):
        parser.error("--suite: cpu and cpu_decode do not run beside suites of the GPU")
    if options.device == "cpu" and not all(on_cpu):
        parser.error("--backend: cpu runs the suites cpu and cpu_decode alone")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--suite: PyTorch sees no CUDA device; only the suites cpu and cpu_decode run without one")
    known = peers_of(options.device)
    if unknown := [name for name in options.peers or () if name not in known]:
        parser.error(f"--peers: {', '.join(unknown)} unknown on this device, expected some of {', '.join(known)}")
    for option in ("name", "cells"):
        if getattr(options, option) and len(options.suite) > 1:
            parser.error(f"--{option}: got more than one suite")
    if options.cells and not suites()[options.suite[0]][options.cells]:
        parser.error(f"--cells: no cell of the {len(suites()[options.suite[0]])} of {options.suite[0]}")
    if options.rounds < 1:
        parser.error("--rounds: expected 1 or more")
    if options.repeats < 0:
        parser.error("--repeats: expected 0 or more")
    options.probe = options.probe or os.environ.get("FLASHCORE_BENCH_PROGRAM") or None
    if options.milliseconds is None:
        options.milliseconds = 200.0 if options.device == "cpu" else 25.0
    if options.rotate is None:
        options.rotate = 0.03 if options.device == "cpu" else 1.0
    return options


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    device = options.device
    peers = peers_of(device)
    peers = {name: peers[name] for name in (peers if options.peers is None else options.peers)}
    ours = flashcore_provider(options.backend)
    facts = surroundings(device, options.commit)
    probe_name, probe = "", None
    memory: Peaks = {}
    try:
        if device == "cpu":
            probe_name, probe = probe_of(options.probe)
        elif options.probe and "decode" in options.suite:
            memory = memory_peaks(options.probe)
    except ValueError as error:
        print(f"--probe: {error}", file=sys.stderr)
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    short = "" if device == "cpu" else facts["device"].lower().replace("nvidia ", "").split()[0]
    reports = []
    peaks: Peaks = {}  # the best of the run, of all its suites
    for suite in options.suite:
        name = options.name or "-".join(dict.fromkeys(filter(None, (suite, options.backend, short))))
        path = options.output / f"{name}.json"
        report = {
            "kind": "compare",
            "suite": suite,
            "backend": options.backend or "chosen by plan",
            **facts,
            "method": {"rounds": options.rounds, "milliseconds": options.milliseconds, "rotate_gib": options.rotate},
            "providers": [OURS, *peers],
            "cells": [],
        }
        if probe:
            report.update(probe=probe_name, peaks=peaks)
        elif memory and suite == "decode":
            report.update(probe="flashcore_bench peak", peaks=memory)
        if options.append:
            try:
                old = earlier(path, report)
            except ValueError as error:  # before anything is measured
                print(error, file=sys.stderr)
                return 2
            report["cells"] = old["cells"]
            if "matmul_tflops" in old:
                report["matmul_tflops"] = old["matmul_tflops"]
            keep_best(peaks, old.get("peaks", {}))
        reports.append((report, path))
    for report, path in reports:
        run_suite(report, path, ours, peers, options, probe)
        print(text_table(report))
        cells = report["cells"]
        absent = {n: c["providers"][n]["absent"] for c in cells for n in peers if "absent" in c["providers"][n]}
        for peer, reason in absent.items():
            print(f"{peer} did not run every cell: {reason}")
        print(f"wrote {path}")
    return 1 if any(cell["problem"] for report, _ in reports for cell in report["cells"]) else 0


def run_suite(
    report: dict[str, Any],
    path: pathlib.Path,
    ours: Callable,
    peers: dict,
    options: Any,
    probe: Callable[[], Peaks] | None,
) -> None:
    """Runs the suite of `report`, or the part that --cells names, into it and into the file."""
    suite, device = report["suite"], options.device
    whole = suites()[suite]
    results = {cell["label"]: cell for cell in report["cells"]}
    if device == "cuda" and is_forward(suite):
        # The highest of the parts: a ceiling.
        report["matmul_tflops"] = max(matmul_tflops(options), report.get("matmul_tflops", 0.0))
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=options.quiet or not sys.stderr.isatty(),
    )
    begin = time.perf_counter()
    cells = whole[options.cells or slice(None)]
    measure = lambda cell: run_cell(cell, device, ours, peers, options)  # noqa: E731
    if probe:
        measure = ProbedMeasure(measure, probe, report["peaks"])
    with bar:
        task = bar.add_task(suite, total=len(cells))
        queue = cells
        for attempt in range(1 + options.repeats):
            for cell in queue:
                bar.update(task, description=f"{suite}: {cell.label}")
                result = measure(cell)
                if attempt > 0:
                    result = better(result, results[cell.label])
                    result["repeats"] = attempt
                results[cell.label] = result
                if device == "cuda":
                    torch.cuda.empty_cache()  # or the pools of each cell's graphs stay
                gather(report, [results[c.label] for c in whole if c.label in results])
                path.write_text(json.dumps(strict(report), indent=1, allow_nan=False) + "\n")
                bar.advance(task)
            # After all others, since a machine that has slowed down does so for minutes.
            queue = [cell for cell in cells if not results[cell.label].get("steady", True)]
            if not queue:
                break
            if attempt < options.repeats:
                bar.update(task, total=bar.tasks[task].total + len(queue))
    print(f"{suite}: {len(cells)} cells, {(time.perf_counter() - begin) / len(cells):.2f} s each", file=sys.stderr)


class ProbedMeasure:
    """Measures a cell with the processor's peaks before and after it, and keeps the best of these in `peaks`."""

    def __init__(self, measure: Callable[[Cell], dict[str, Any]], probe: Callable[[], Peaks], peaks: Peaks) -> None:
        self.measure, self.probe, self.peaks = measure, probe, peaks
        self.last = self.probed()

    def probed(self) -> Peaks:
        found = self.probe()
        keep_best(self.peaks, found)
        return found

    def __call__(self, cell: Cell) -> dict[str, Any]:
        result, before = self.measure(cell), self.last
        self.last = self.probed()
        if not result["problem"]:
            add_share(result, before, self.last)
        return result


def better(new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """Of two measurements of a cell that beside which the peaks fell less; a wrong result stays."""
    return new if new["problem"] or lowest(new) >= lowest(old) else old


def gather(report: dict[str, Any], cells: list[dict[str, Any]]) -> None:
    """Writes into `report` its cells and what they come to."""
    report["cells"] = cells
    mark_steady(cells, report.get("peaks", {}))
    report["geometric_means"] = geometric_means(cells)
    if report["suite"] == "window":
        report["over_unmasked"] = over_unmasked(cells)
    if report["suite"] == "cpu":
        report["summary"] = cpu_summary(cells)


if __name__ == "__main__":
    sys.exit(main())
