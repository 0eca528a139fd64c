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
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from cells import matmul_tflops, run_cell
from probes import Peaks, add_share, keep_best, lowest, mark_steady, memory_peaks, probe_of
from providers import flashcore_provider, peers_of
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from suites import OURS, Cell, is_cpu, is_forward, suites
from summaries import cpu_summary, geometric_means, over_unmasked
from surroundings import RESULTS, short_name, surroundings
from text_table import text_table


def part(text: str) -> slice:
    """Of "FROM:TO", either of which may be left out."""
    first, last = text.split(":")
    return slice(int(first) if first else None, int(last) if last else None)


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
    reports = []
    peaks: Peaks = {}  # the best of the run, of all its suites
    for suite in options.suite:
        name = options.name or "-".join(dict.fromkeys(filter(None, (suite, options.backend, short_name(facts)))))
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


def strict(value: Any) -> Any:
    """`value` without NaN and infinities, which JSON does not have: a wrong result's error becomes null."""
    if isinstance(value, dict):
        return {key: strict(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
