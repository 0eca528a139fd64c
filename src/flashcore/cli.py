# SPDX-License-Identifier: Apache-2.0
"""The command `flashcore`: `info` says what is here, `verify` computes attention and checks it.

Exit status: 0 when all is well, 1 when a check failed, 2 when the command was used wrongly.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import flashcore


def main(argv: list[str] | None = None) -> int:
    """Runs the command line `argv` (the process's own when None) and returns the exit status."""
    parser = argparse.ArgumentParser(prog="flashcore", description="Fused attention for CPUs and NVIDIA GPUs.")
    parser.add_argument("--version", action="version", version=f"flashcore {flashcore.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="what this build holds, and which devices it sees")
    info.add_argument("--json", action="store_true", help="print JSON")

    verify = commands.add_parser("verify", help="run attention on this machine and check the results")
    verify.add_argument("--device", choices=("cpu", "cuda"), help="where to run (default: CUDA if it can be used)")
    only = "run only the cases that have such a text in their name"
    verify.add_argument("--only", default="", metavar="TEXT[,TEXT...]", help=only)
    verify.add_argument("--json", action="store_true", help="print JSON instead of a table")

    arguments = parser.parse_args(argv)
    if arguments.command == "info":
        return _info(arguments.json)
    return _verify(arguments, verify)


def _console() -> Console:
    console = Console(highlight=False)
    # A pipe or a file has no width of its own: rich would take 80 columns and break the rows.
    return console if console.is_terminal else Console(highlight=False, width=160)


def _info(as_json: bool) -> int:
    facts = flashcore.info()
    if as_json:
        print(json.dumps(facts, indent=2))
        return 0
    cuda, cpu = facts["cuda"], facts["cpu"]
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("version", facts["version"])
    table.add_row("requires", facts["requires"])
    table.add_row("CPU", escape(f"{cpu['isa']} of {', '.join(cpu['isas'])}; {cpu['threads']} threads"))
    if cuda["built"]:
        archs = cuda["archs"] if isinstance(cuda["archs"], str) else ", ".join(cuda["archs"])
        driver = f"driver's CUDA {_cuda(cuda['driver_version'])}" if cuda["driver_version"] else "no driver"
        table.add_row("CUDA", escape(f"{archs}; runtime {_cuda(cuda['runtime_version'])}, {driver}"))
    else:
        table.add_row("CUDA", "not in this build")
    if cuda["problem"]:
        table.add_row("", escape(cuda["problem"]))
    for device in facts["devices"]:
        table.add_row(
            escape(device["device"]),
            escape(
                f"{device['name']}, compute capability {device['compute_capability']}, "
                f"{device['multiprocessors']} multiprocessors, "
                f"{device['shared_memory_per_block'] // 1024} KiB shared memory a block"
            ),
        )
    _console().print(table)
    return 0


def _cuda(version: int) -> str:
    """13000 as "13.0"."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _verify(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from flashcore import verify  # imports nothing heavy by itself, but `info` need not wait for it

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    try:
        with bar:
            task = bar.add_task("starting", total=None)
            report = verify.run(
                arguments.device,
                arguments.only,
                lambda done, total, name: bar.update(task, completed=done, total=total, description=f"{name:16}"),
            )
    except (RuntimeError, ValueError) as error:  # no such device, no such case
        parser.error(str(error))
    if arguments.json:
        results = [{key: _strict(value) for key, value in r.items()} for r in report["results"]]
        print(json.dumps({**report, "results": results}, indent=2, allow_nan=False))
    else:
        _print_report(report)
    return 1 if report["failed"] else 0


def _print_report(report: dict[str, Any]) -> None:
    console = _console()
    title = f"flashcore {report['version']} on {report['device']}, arrays of {report['arrays']}"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for name in ("problem", "shape", "dtype", "kernel"):
        table.add_column(name, overflow="fold")  # a narrow terminal folds these, never the figures
    for name in ("time", "reference", "speed-up", "largest error", "allowed"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("result", no_wrap=True)
    for r in report["results"]:
        outcome = "[green]pass[/]" if r["passed"] else "[bold red]FAIL[/]"
        row = [escape(r["name"]), escape(r["shape"]), r["dtype"], escape(r["kernel"])]
        if "message" in r:
            row += ["", "", "", "", ""]
        else:
            mark = "" if r["reference"] == report["reference"] else "*"
            row += [_time(r["seconds"]), _time(r["reference_seconds"]) + mark, f"{r['speedup']:.2f}x"]
            row += [f"{r['max_error']:.2e}", f"{r['max_allowed']:.2e}"]
        table.add_row(*row, outcome)
    console.print(table)
    console.print("shape: (batch, heads, sequence, head_dim); after a slash, those of the keys", style="dim")
    other = any(r.get("reference", report["reference"]) != report["reference"] for r in report["results"])
    star = "; *: NumPy in float64, SDPA has no such option" if other else ""
    console.print(escape(f"reference: {report['reference']}{star}"), style="dim")
    for note in report["notes"]:
        console.print(escape(f"note: {note}"), style="dim")
    for r in report["results"]:
        if "message" in r:
            console.print(f"[red]{escape(r['name'])}[/]: {escape(r['message'])}")
        elif not r["passed"]:
            relative = f"relative error {r['relative_error']:.2e}, allowed {r['relative_allowed']:.2e}"
            console.print(f"[red]{escape(r['name'])}[/]: {relative}")
    style = "bold red" if report["failed"] else "bold"
    console.print(f"{report['passed']} passed, {report['failed']} failed", style=style)


def _strict(value: Any) -> Any:
    """JSON has no NaN and no infinity: a wrong result's error becomes null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


if __name__ == "__main__":
    sys.exit(main())
