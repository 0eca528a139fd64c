# SPDX-License-Identifier: Apache-2.0
"""FlashCore beside its peers: the same inputs, in turn, in one process; every cell checked before it is timed.

    python bench/compare.py --suite forward --backend sm80

Peers are PyTorch SDPA's backends (`flash`, `cudnn`, `efficient`; `sdpa` on the CPU) and FlashAttention-3 (`fa3`, from
the PyPI package fa3-fwd), where they are installed and can run the cell.

Correctness: on sampled rows against float64, FlashCore's largest error is at most twice the yardstick's plus 1e-5 and
its relative Frobenius error at most 1.25 times the yardstick's plus 1e-6 (`flash`, or the best peer that ran); the
whole output is held against the yardstick's too, and after timing it must still be the same bits.

Timing, CUDA: a graph of many calls that walks through sets of random inputs and outputs of --rotate GiB in all,
replayed for about --milliseconds a round, providers in turn, --rounds rounds, medians. CPU: calls in turn, medians.
TFLOP/s count 4·B·H·Sq·Sk·D, half of it when causal; TB/s count q, k, v and o once. A ratio is a peer's time over
FlashCore's.

Writes bench/results/NAME.json, from which bench/report.py makes README's tables. Exit status: 0, or 1 when a cell of
FlashCore is wrong, 2 on bad usage.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from suites import Cell, rate_of, suites
from torch.nn.attention import SDPBackend, sdpa_kernel

import flashcore

RESULTS = pathlib.Path(__file__).parent / "results"
OURS = "flashcore"
SAMPLED_HEADS, SAMPLED_ROWS = 12, 64  # (batch, head) pairs, and queries of each, that are held against float64


# --- providers: functions of (cell, q, k, v, out) ---------------------------------------------------------------------
# Inputs are contiguous bshd. PyTorch's get transposed views of them, which is how bshd code calls SDPA and which their
# kernels read as they are. A provider that cannot write into `out` returns its own output.


def sdpa_provider(backend: SDPBackend | None) -> Callable[..., torch.Tensor]:
    def call(cell: Cell, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        options = {"is_causal": cell.causal, "enable_gqa": cell.heads != cell.kv_heads}
        if backend is None:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)

    return call


def fa3(cell: Cell, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    import fa3_fwd_interface

    result = fa3_fwd_interface.flash_attn_func(q, k, v, causal=cell.causal)
    return result[0] if isinstance(result, tuple) else result


def flashcore_provider(backend: str | None) -> Callable[..., torch.Tensor]:
    def call(cell: Cell, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return flashcore.attention(q, k, v, causal=cell.causal, out=out, backend=backend)

    return call


def peers_of(device: str) -> dict[str, Callable[..., torch.Tensor]]:
    if device == "cpu":
        return {"sdpa": sdpa_provider(None)}
    return {
        "flash": sdpa_provider(SDPBackend.FLASH_ATTENTION),
        "cudnn": sdpa_provider(SDPBackend.CUDNN_ATTENTION),
        "efficient": sdpa_provider(SDPBackend.EFFICIENT_ATTENTION),
        "fa3": fa3,
    }


# --- correctness ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """Rows of a cell's output in float64: `rows` of the (batch, head) `pairs`."""

    pairs: list[tuple[int, int]]
    rows: torch.Tensor
    exact: torch.Tensor  # (pairs, rows, head_dim)

    def take(self, out: torch.Tensor) -> torch.Tensor:
        return torch.stack([out[b, :, h][self.rows] for b, h in self.pairs]).double()

    def errors(self, out: torch.Tensor) -> dict[str, float]:
        """Largest error and relative Frobenius error of an output (batch, sequence, heads, head_dim)."""
        difference = self.take(out) - self.exact
        return {
            "max_error": difference.abs().max().item(),
            "relative_error": (difference.norm() / self.exact.norm()).item(),
        }


def sample(cell: Cell, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, generator: torch.Generator) -> Sample:
    every = cell.batch * cell.heads
    # The first and the last, and others at random: an error at the end of the grid shows.
    chosen = {0, every - 1, *torch.randint(every, (SAMPLED_HEADS,), generator=generator).tolist()}
    pairs = [divmod(i, cell.heads) for i in sorted(chosen)]
    picked = {0, cell.seqlen - 1, *torch.randint(cell.seqlen, (SAMPLED_ROWS,), generator=generator).tolist()}
    rows = torch.tensor(sorted(picked), device=q.device)
    group = cell.heads // cell.kv_heads
    outputs = []
    for b, h in pairs:
        score = q[b, :, h][rows].double() @ k[b, :, h // group].double().T / math.sqrt(cell.head_dim)
        if cell.causal:
            last = rows[:, None] + (cell.keys - cell.seqlen)
            score.masked_fill_(torch.arange(cell.keys, device=q.device) > last, -math.inf)
        outputs.append(torch.softmax(score, dim=-1) @ v[b, :, h // group].double())
    return Sample(pairs, rows, torch.stack(outputs))


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


# --- a cell -----------------------------------------------------------------------------------------------------------


def run_cell(cell: Cell, device: str, ours: Callable[..., torch.Tensor], peers: dict, options: Any) -> dict[str, Any]:
    """Checks and times FlashCore and its peers on one cell; the result is ready for JSON."""
    dtype = getattr(torch, cell.dtype)
    sets = max(2, min(1024, math.ceil(options.rotate * 2**30 / cell.bytes)))
    generator = torch.Generator(device).manual_seed(1)
    shape_q = (cell.batch, cell.seqlen, cell.heads, cell.head_dim)
    shape_k = (cell.batch, cell.keys, cell.kv_heads, cell.head_dim)
    arrays = []
    for _ in range(sets):
        q, k, v = (torch.randn(s, generator=generator, device=device, dtype=dtype) for s in (shape_q, shape_k, shape_k))
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
            timers[name] = timer(call, sets, options.milliseconds)
        except Exception as error:
            providers[name]["absent"] = f"{type(error).__name__}: {error}"
            if name == OURS:
                result["problem"] = f"while timed: {providers[name]['absent']}"
                return result
    names = list(timers)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(options.rounds):
        for i in range(len(names)):  # each round begins with another provider
            name = names[(i + turn) % len(names)]
            samples[name].append(timers[name].microseconds())
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


def geometric_means(cells: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of the ratios, over the cells that a peer ran; `best` is the fastest peer of each cell."""
    gathered: dict[str, list[float]] = {}
    for cell in cells:
        ratios = cell.get("ratios", {})
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
    try:
        from importlib.metadata import version

        facts["versions"]["fa3-fwd"] = version("fa3-fwd")
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


def text_table(report: dict[str, Any]) -> str:
    """Microseconds of every provider, FlashCore's rate, and its ratio to the best peer, as plain text."""
    names = [n for n in report["providers"] if any("microseconds" in c["providers"][n] for c in report["cells"])]
    unit, field, factor = rate_of(report["suite"])
    lines = [[report["suite"], *(f"{n} us" for n in names), unit, "error", "best", "ratio"]]
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
        lines.append([cell["label"], *times, f"{speed:.3g}" if speed < 10 else f"{speed:.0f}", error, best, ratio])
    widths = [max(len(line[i]) for line in lines if len(line) == len(lines[0])) for i in range(len(lines[0]))]
    rows = []
    for first, *rest in lines:
        right = (text.rjust(width) for text, width in zip(rest, widths[1:], strict=False))  # a wrong cell has fewer
        rows.append("  ".join([first.ljust(widths[0]), *right]))
    means = ", ".join(f"{n} {m['ratio']:.3f} ({m['cells']} cells)" for n, m in report["geometric_means"].items())
    return "\n".join([*rows, f"geometric means of peer's time over FlashCore's: {means or 'none'}"])


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="FlashCore beside its peers.", allow_abbrev=False)
    parser.add_argument("--suite", nargs="+", choices=list(suites()), default=["forward"], help="what to run")
    parser.add_argument("--backend", help="force FlashCore's backend (default: plan chooses)")
    parser.add_argument("--peers", nargs="+", help="only these peers (default: all that run)")
    parser.add_argument("--name", help="of the result file (default: from suite, backend and device); one suite only")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--commit", default="", help="what to write as commit where there is no git")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every provider")
    parser.add_argument("--milliseconds", type=float, help="of work a round (default: 25, on the CPU 200)")
    parser.add_argument("--rotate", type=float, help="GiB of arrays to rotate over (default: 1, on the CPU 0.03)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, only the tables")
    options = parser.parse_args(argv)
    options.device = "cpu" if options.suite == ["cpu"] or options.backend == "cpu" else "cuda"
    if options.device == "cuda" and "cpu" in options.suite:
        parser.error("--suite: cpu runs alone")
    if options.device == "cpu" and options.suite != ["cpu"]:
        parser.error("--backend: cpu runs the suite cpu alone")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--suite: PyTorch sees no CUDA device; only the suite cpu runs without one")
    known = peers_of(options.device)
    if unknown := [name for name in options.peers or () if name not in known]:
        parser.error(f"--peers: {', '.join(unknown)} unknown on this device, expected some of {', '.join(known)}")
    if options.name and len(options.suite) > 1:
        parser.error("--name: got more than one suite")
    if options.rounds < 1:
        parser.error("--rounds: expected 1 or more")
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
    options.output.mkdir(parents=True, exist_ok=True)
    bad = False
    for suite in options.suite:
        cells = suites()[suite]
        results = []
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=options.quiet or not sys.stderr.isatty(),
        )
        with bar:
            task = bar.add_task(suite, total=len(cells))
            for cell in cells:
                bar.update(task, description=f"{suite}: {cell.label}")
                results.append(run_cell(cell, device, ours, peers, options))
                bar.advance(task)
        report = {
            "kind": "compare",
            "suite": suite,
            "backend": options.backend or "chosen by plan",
            **facts,
            "method": {"rounds": options.rounds, "milliseconds": options.milliseconds, "rotate_gib": options.rotate},
            "providers": [OURS, *peers],
            "cells": results,
            "geometric_means": geometric_means(results),
        }
        short = "cpu" if device == "cpu" else facts["device"].lower().replace("nvidia ", "").split()[0]
        name = options.name or "-".join(dict.fromkeys(filter(None, (suite, options.backend, short))))
        path = options.output / f"{name}.json"
        path.write_text(json.dumps(strict(report), indent=1, allow_nan=False) + "\n")
        print(text_table(report))
        absent = {n: c["providers"][n]["absent"] for c in results for n in peers if "absent" in c["providers"][n]}
        for peer, reason in absent.items():
            print(f"{peer} did not run every cell: {reason}")
        print(f"wrote {path}")
        bad |= any(c["problem"] for c in results)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
