# SPDX-License-Identifier: Apache-2.0
"""Writes README's measured tables, and the plots, from bench/results/*.json and from nothing else.

    python bench/report.py            # rewrites bench/results/*.svg and README.md between the two markers
    python bench/report.py --check    # exit status 1 when README or a plot does not agree with the result files

A result file comes from bench/compare.py, from bench/overhead.py or bench/decoder.py (bench/host.py and
bench/model.py make their sections), or from `flashcore_bench ladder` (bench/ladder.py makes its section, and the tables
of cpp/ladder/README.md between the same markers). Of each suite on each device the report of the first of
BACKENDS is told in full; the others get a line below it. Needs only the standard library.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
import statistics
import sys
from typing import Any

import host
import ladder
import model
import plot
from suites import OURS, TITLES, is_cpu, rate_of
from summaries import cpu_summary

ROOT = pathlib.Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results: made by bench/report.py -->", "<!-- end of results -->"
BACKENDS = ("chosen by plan", "sm90", "sm80", "cpu")
IN_RATES = ("forward", "forward_more", "varlen")  # every provider in the suite's unit; elsewhere in microseconds


def load(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The reports of a folder, in the order of TITLES. Raises ValueError for a file that is none."""
    reports = []
    for path in sorted(folder.glob("*.json")):
        report = json.loads(path.read_text())
        if report.get("kind") in ("ladder", "host", "decoder"):
            continue
        if report.get("kind") != "compare" or report.get("suite") not in TITLES or report["backend"] not in BACKENDS:
            raise ValueError(f"{path}: not a report of bench/compare.py on a suite and a backend that are known here")
        reports.append({**report, "file": path.name})
    return sorted(reports, key=lambda r: (*_place(r), BACKENDS.index(r["backend"]), r["file"]))


def grouped(reports: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The reports of `load` by suite and device; the first of each group is the one that is told in full."""
    return [list(group) for _, group in itertools.groupby(reports, key=_place)]


def _place(report: dict[str, Any]) -> tuple[int, str]:
    return list(TITLES).index(report["suite"]), report["device"]


def plots(reports: list[dict[str, Any]]) -> dict[str, str]:
    """The plots by file name."""
    return {_plot_of(main): plot.svg(main) for main, *_ in grouped(reports) if _plot_of(main)}


def _plot_of(report: dict[str, Any]) -> str:
    """Its file name, empty for a report that has no plot."""
    return pathlib.Path(report["file"]).with_suffix(".svg").name if plot.shown(report) else ""


def section(report: dict[str, Any], others: list[dict[str, Any]]) -> str:
    """One report as Markdown: what was measured on what, a plot and a table; a line for each other backend."""
    unit, _, _ = rate_of(report["suite"])
    versions = ", ".join(f"{name} {value}" for name, value in report["versions"].items())
    driver = f", driver {report['driver']}" if report.get("driver") else ""
    ceiling = ""
    if "matmul_tflops" in report:
        ceiling = f" An 8192³ bfloat16 matmul reaches {report['matmul_tflops']:.0f} TFLOP/s in the same run."
    if report["suite"] == "decode" and (memory := plot.memory_ceiling(report)):
        ceiling = f" {memory[0].capitalize()} memory reaches {memory[1]:.2f} TB/s in the same run."
    if report["suite"] == "grid":
        what, table = "", _summary(report)
    elif report["suite"] == "cpu":
        what, table = "", _cpu_summary(report)
    elif report["suite"] in IN_RATES:
        what, table = f"{unit} of each provider", _table(report, rates=True)
    else:
        what, table = f"{unit} of FlashCore, then microseconds of each provider", _table(report, rates=False)
    ratio = f"{what}; the ratio" if what else "The ratio"
    lines = [
        f"### {TITLES[report['suite']]}",
        "",
        f"{report['device']}{driver}; FlashCore's backend {report['backend']}; {versions}; {report['date']}, "
        f"commit {report['commit'][:12]} (`bench/results/{report['file']}`). "
        f"{ratio} is the best peer's time over FlashCore's.{ceiling}",
        "",
    ]
    if _plot_of(report):
        lines += [f"![{plot.SHOWS[report['suite']]}](bench/results/{_plot_of(report)})", ""]
    lines += table
    means = report["geometric_means"]
    if means:
        told = [
            f"{n} {means[n]['ratio']:.2f} ({means[n]['cells']} cells)" for n in [*_ran(report), "best"] if n in means
        ]
        lines += ["", f"Geometric means of the ratios: {', '.join(told)}."]
    if is_cpu(report["suite"]):
        lines += _processor(report)
    if report.get("over_unmasked"):
        told = [f"{n} {report['over_unmasked'][n]:.2f}" for n in _ran(report) if n in report["over_unmasked"]]
        text = "The window's time over that of as many queries with 1,024 keys each, none masked"
        lines += ["", f"{text}: {', '.join(told)}."]
    for other in others:
        best = other["geometric_means"].get("best")
        ratio = f"{best['ratio']:.2f} ({best['cells']} cells)" if best else "none"
        text = f"Backend {other['backend']}: geometric mean of the best peer's ratios {ratio}"
        lines += ["", f"{text}; {other['date']}, commit {other['commit'][:12]} (`bench/results/{other['file']}`)."]
    return "\n".join(lines)


def _ran(report: dict[str, Any]) -> list[str]:
    """The providers that ran a cell at least."""
    return [n for n in report["providers"] if any("microseconds" in c["providers"][n] for c in report["cells"])]


def _table(report: dict[str, Any], rates: bool) -> list[str]:
    """A line for each cell; what the providers reach in the suite's unit, or FlashCore's rate and everybody's times."""
    unit, field, factor = rate_of(report["suite"])
    names = _ran(report)
    columns = names if rates else [unit, *(f"{n} us" for n in names)]
    lines = [
        f"| B, H, S, D | {' | '.join(columns)} | best peer | ratio |",
        "|---|" + "---:|" * len(columns) + "---|---:|",
    ]
    for cell in report["cells"]:
        if cell["problem"]:
            lines.append(f"| {cell['label']} | wrong: {cell['problem']} |" + " |" * (len(columns) + 1))
            continue
        providers = cell["providers"]
        rate = {n: _rate(providers[n][field] * factor) for n in names if field in providers[n]}
        time = {n: _time(providers[n]["microseconds"]) for n in rate}
        told = [rate.get(n, "") for n in names] if rates else [rate[OURS], *(time.get(n, "") for n in names)]
        best, ratio = _best(cell)
        lines.append(f"| {cell['label']} | {' | '.join(told)} | {best} | {f'{ratio:.2f}' if best else ''} |")
    return lines


def _summary(report: dict[str, Any]) -> list[str]:
    """A line for each dtype and head dimension."""
    lines = [
        "| D | cells | ratio, geometric mean | lowest | at B, H, S, D | best peer |",
        "|---|---:|---:|---:|---|---|",
    ]
    key = lambda cell: (cell["dtype"], cell["head_dim"])  # noqa: E731
    for (dtype, head_dim), group in itertools.groupby(report["cells"], key=key):
        cells = list(group)
        lines += [f"| {c['label']} | wrong: {c['problem']} | | | | |" for c in cells if c["problem"]]
        ratios = [(ratio, cell["label"], best) for cell in cells for best, ratio in [_best(cell)] if best]
        if not ratios:
            continue
        mean = statistics.geometric_mean(ratio for ratio, _, _ in ratios)
        ratio, label, best = min(ratios)
        name = f"{head_dim} {plot.DTYPES[dtype]}"
        lines.append(f"| {name} | {len(ratios)} | {mean:.2f} | {ratio:.3f} | {label} | {best} |")
    return lines


def _cpu_summary(report: dict[str, Any]) -> list[str]:
    """A line for each dtype, and the wrong cells."""
    lines = [
        "| dtype | cells | ratio, geometric mean | lowest | at B, H, S, D | of the peak, S 2048, D 128, full |",
        "|---|---:|---:|---:|---|---:|",
    ]
    lines += [f"| {c['label']} | wrong: {c['problem']} | | | | |" for c in report["cells"] if c["problem"]]
    summary = cpu_summary(report["cells"])
    for dtype, told in summary["dtypes"].items():
        share = _share(told)
        columns = [dtype, f"{told['cells']}", f"{told['ratio']:.2f}", f"{told['lowest']:.2f}", told["lowest_at"], share]
        lines.append(f"| {' | '.join(columns)} |")
    if summary["seed"] is not None:
        lines += ["", f"The seed's shape, 1, 8, 512, 64 in fp16: {summary['seed']:.2f}."]
    return lines


def _processor(report: dict[str, Any]) -> list[str]:
    """The threads, and the processor's peaks where they were probed."""
    threads = ", ".join(f"{name} {count}" for name, count in report["threads"].items())
    texts = [f"Threads: {threads}; instruction set {report['isa']}."]
    if report.get("peaks"):
        names = {
            "float32_tflops": ("float32", "GFLOP/s"),
            "bfloat16_tflops": ("bfloat16", "GFLOP/s"),
            "bfloat16_dot_tflops": ("bfloat16 dot products of vectors", "GFLOP/s"),
            "read_tbytes_per_second": ("reading", "GB/s"),
        }
        told = [f"{names[n][0]} {_rate(1e3 * value)} {names[n][1]}" for n, value in report["peaks"].items()]
        texts.append(f"Peaks in the same run ({report['probe']}): {', '.join(told)}.")
        shares = [f"{c['label']} {_share(c)}" for c in report["cells"] if c.get("page_size") is not None and _share(c)]
        if shares:
            texts.append(f"Share of the peak of reading: {', '.join(shares)}.")
        if unsteady := sum(not cell.get("steady", True) for cell in report["cells"]):
            texts.append(f"Beside {unsteady} cells a peak was more than 10% below the run's best, after repeats too.")
    return ["", " ".join(texts)]


def _share(told: dict[str, Any]) -> str:
    dot = f" ({100 * told['share_of_dot_peak']:.0f}% of vectors' dot products)" if "share_of_dot_peak" in told else ""
    return f"{100 * told['share_of_peak']:.0f}%{dot}" if "share_of_peak" in told else ""


def _best(cell: dict[str, Any]) -> tuple[str, float]:
    """The fastest peer and its time over FlashCore's; an empty name when none ran or the cell is wrong."""
    ratios = {} if cell["problem"] else cell["ratios"]
    best = min(ratios, key=ratios.get, default="")
    return best, ratios.get(best, 0.0)


def _time(microseconds: float) -> str:
    return f"{microseconds:.1f}" if microseconds < 100 else f"{microseconds:.0f}"


def _rate(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def rewritten(readme: str, sections: list[str]) -> str:
    """`readme` with these between the markers. Raises ValueError unless the markers are there once, in order."""
    head, begin, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in tail:
        raise ValueError(f"README: expected the line '{BEGIN}' and, below it, the line '{END}', once each")
    body = "".join(f"\n{text}\n" for text in sections)
    return f"{head}{BEGIN}\n{body}{chr(10) if body else ''}{END}{tail}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="README's tables from the result files.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail when README differs")
    parser.add_argument("--readme", type=pathlib.Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=pathlib.Path, default=ROOT / "bench" / "results")
    options = parser.parse_args(argv)
    try:
        reports, ladders = load(options.results), ladder.load(options.results)
        texts = [section(main, others) for main, *others in grouped(reports)]
        texts += [host.section(report) for report in host.load(options.results)]
        texts += [model.section(report) for report in model.load(options.results)]
        texts += [ladder.section(group) for group in ladders]
        readmes = {options.readme: texts}
        ladder_readme = options.readme.parent / "cpp" / "ladder" / "README.md"
        if ladder_readme.exists():
            readmes[ladder_readme] = [ladder.tables(group) for group in ladders]
        new = {path: rewritten(path.read_text(encoding="utf-8"), texts) for path, texts in readmes.items()}
        drawn = {**plots(reports), **ladder.plots(ladders)}
        new.update({options.results / name: text for name, text in drawn.items()})
        old = {p: p.read_text(encoding="utf-8") for p in (*readmes, *sorted(options.results.glob("*.svg")))}
    except (OSError, ValueError, KeyError) as error:
        print(f"report.py: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    different = [path for path in {**new, **old} if new.get(path) != old.get(path)]
    if options.check:
        for path in different:
            print(f"{path} does not agree with {options.results}: run bench/report.py", file=sys.stderr)
        return 1 if different else 0
    for path in different:
        if path in new:
            path.write_text(new[path], encoding="utf-8")
        else:
            path.unlink()  # a plot of a report that is gone
    return 0


if __name__ == "__main__":
    sys.exit(main())
