# SPDX-License-Identifier: Apache-2.0
"""Writes README's measured tables from bench/results/*.json, and from nothing else.

    python bench/report.py            # rewrites the part of README.md between the two markers
    python bench/report.py --check    # exit status 1 when README and the result files do not agree

A result file comes from bench/compare.py. Needs only the standard library.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import Any

from suites import TITLES, rate_of

ROOT = pathlib.Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results: made by bench/report.py -->", "<!-- end of results -->"
OURS = "flashcore"


def load(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The reports of a folder, in the order of TITLES. Raises ValueError for a file that is none."""
    reports = []
    for path in sorted(folder.glob("*.json")):
        report = json.loads(path.read_text())
        if report.get("kind") != "compare" or report.get("suite") not in TITLES:
            raise ValueError(f"{path}: not a report of bench/compare.py on a suite that is known here")
        reports.append({**report, "file": path.name})
    return sorted(reports, key=lambda r: (list(TITLES).index(r["suite"]), r["file"]))


def section(report: dict[str, Any]) -> str:
    """One report as Markdown: what was measured on what, and a table."""
    unit, field, factor = rate_of(report["suite"])
    names = [n for n in report["providers"] if any("microseconds" in c["providers"][n] for c in report["cells"])]
    peers = [n for n in names if n != OURS]
    versions = ", ".join(f"{name} {value}" for name, value in report["versions"].items())
    driver = f", driver {report['driver']}" if report.get("driver") else ""
    lines = [
        f"### {TITLES[report['suite']]}",
        "",
        f"{report['device']}{driver}; FlashCore's backend {report['backend']}; {versions}; {report['date']}, "
        f"commit {report['commit'][:12]} (`bench/results/{report['file']}`). "
        f"{unit} of FlashCore, then microseconds of each provider; the ratio is the best peer's time over FlashCore's.",
        "",
        f"| B, H, S, D | {unit} | {' | '.join(f'{n} us' for n in names)} | best peer | ratio |",
        "|---|" + "---:|" * (1 + len(names)) + "---|---:|",
    ]
    for cell in report["cells"]:
        if cell["problem"]:
            lines.append(f"| {cell['label']} | wrong: {cell['problem']} |" + " |" * (len(names) + 2))
            continue
        providers = cell["providers"]
        times = [_time(p["microseconds"]) if "microseconds" in (p := providers[n]) else "" for n in names]
        best = min(cell["ratios"], key=cell["ratios"].get, default="")
        ratio = f"{cell['ratios'][best]:.2f}" if best else ""
        rate = _rate(providers[OURS][field] * factor)
        lines.append(f"| {cell['label']} | {rate} | {' | '.join(times)} | {best} | {ratio} |")
    means = report["geometric_means"]
    if means:
        told = [f"{n} {means[n]['ratio']:.2f} ({means[n]['cells']} cells)" for n in [*peers, "best"] if n in means]
        lines += ["", f"Geometric means of the ratios: {', '.join(told)}."]
    return "\n".join(lines)


def _time(microseconds: float) -> str:
    return f"{microseconds:.1f}" if microseconds < 100 else f"{microseconds:.0f}"


def _rate(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def rewritten(readme: str, reports: list[dict[str, Any]]) -> str:
    """`readme` with the reports between the markers. Raises ValueError unless the markers are there once, in order."""
    head, begin, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in tail:
        raise ValueError(f"README: expected the line '{BEGIN}' and, below it, the line '{END}', once each")
    body = "".join(f"\n{section(report)}\n" for report in reports)
    return f"{head}{BEGIN}\n{body}{chr(10) if body else ''}{END}{tail}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="README's tables from the result files.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail when README differs")
    parser.add_argument("--readme", type=pathlib.Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=pathlib.Path, default=ROOT / "bench" / "results")
    options = parser.parse_args(argv)
    try:
        old = options.readme.read_text(encoding="utf-8")
        new = rewritten(old, load(options.results))
    except (OSError, ValueError, KeyError) as error:
        print(f"report.py: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    if old == new:
        return 0
    if options.check:
        print(f"{options.readme} does not agree with {options.results}: run bench/report.py", file=sys.stderr)
        return 1
    options.readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
