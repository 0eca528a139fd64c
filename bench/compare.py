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
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch
from accuracy import relative_difference, sample, verdict
from probes import Peaks, add_share, keep_best, lowest, mark_steady, memory_peaks, probe_of
from providers import flashcore_provider, peers_of
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from suites import Cell, cpu_summary, is_cpu, is_forward, rate_of, suites
from timers import CpuTimer, CudaTimer, order_of

import flashcore

RESULTS = pathlib.Path(__file__).parent / "results"
OURS = "flashcore"


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
