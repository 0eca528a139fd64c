# SPDX-License-Identifier: Apache-2.0
"""The reports of `flashcore_bench ladder`: as a section of README, as the tables of cpp/ladder/README.md, as a plot.

The same reports give the same text, so bench/report.py --check compares it. Needs only the standard library.
"""

from __future__ import annotations

import itertools
import math
import pathlib
from html import escape
from typing import Any

from suites import reports_of

WIDTH, LEFT, RIGHT, TOP, ROW, BOTTOM = 760, 170, 24, 74, 26, 46

# For a light page, for a dark page, and a marker, so that colour alone tells nothing.
LOOKS = (
    ("#0550ae", "#79c0ff", "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z"),
    ("#9a6700", "#d29922", "M-3-3h6v6h-6z"),
    ("#bf3989", "#f778ba", "M0-4L4 0L0 4L-4 0z"),
    ("#1a7f37", "#56d364", "M0-4L3.6 3H-3.6z"),
)


def load(folder: pathlib.Path) -> list[list[dict[str, Any]]]:
    """The reports of a folder by device, each group from the least work to the most."""
    reports = sorted(reports_of(folder, "ladder"), key=lambda r: (r["device"], _work(r), r["file"]))
    return [list(group) for _, group in itertools.groupby(reports, key=lambda r: r["device"])]


def _work(report: dict[str, Any]) -> int:
    problem = report["problem"]
    return problem["batch"] * problem["heads"] * problem["seqlen"] ** 2 * problem["head_dim"]


def _names(group: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(rung["name"] for report in group for rung in report["rungs"]))


def _rung(report: dict[str, Any], name: str) -> dict[str, Any]:
    return next((rung for rung in report["rungs"] if rung["name"] == name), {"name": name, "note": "", "refused": ""})


def _time(rung: dict[str, Any]) -> str:
    if rung.get("problem"):
        return "wrong"
    us = rung.get("microseconds")
    return "not run" if us is None else f"{us:.1f}" if us < 100 else f"{us:.0f}"


def plots(groups: list[list[dict[str, Any]]]) -> dict[str, str]:
    """By file name."""
    return {_plot_of(group): svg(group) for group in groups if _points(group)}


def _plot_of(group: list[dict[str, Any]]) -> str:
    return pathlib.Path(group[0]["file"]).with_suffix(".svg").name


def _points(group: list[dict[str, Any]]) -> list[float]:
    return [r["microseconds"] for report in group for r in report["rungs"] if "microseconds" in r]


def _measured_on(report: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in report["versions"].items())
    driver = f", driver {report['driver']}" if report.get("driver") else ""
    return f"{report['device']}{driver}; {versions}; {report['date']}, commit {report['commit'][:12]}"


def section(group: list[dict[str, Any]]) -> str:
    """One device's reports as a section of README: a plot, and each rung's microseconds and speed-up."""
    files = ", ".join(f"`bench/results/{report['file']}`" for report in group)
    lines = [
        "### The ladder",
        "",
        f"{_measured_on(group[0])} ({files}). Microseconds of each step of [cpp/ladder](cpp/ladder/README.md), and in "
        "brackets how many times as fast as the first it is.",
        "",
    ]
    if _points(group):
        lines += [f"![Latency of the ladder's rungs](bench/results/{_plot_of(group)})", ""]
    lines += [
        f"| B, H, S, D | {' | '.join(report['problem']['label'] for report in group)} |",
        "|---|" + "---:|" * len(group),
    ]
    for name in _names(group):
        cells = []
        for report in group:
            rung = _rung(report, name)
            speedup = f" ({rung['speedup']:.1f})" if "speedup" in rung and not rung.get("problem") else ""
            cells.append(_time(rung) + speedup)
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def tables(group: list[dict[str, Any]]) -> str:
    """One device's reports in full: the study's table for each problem."""
    lines = []
    for report in group:
        peak = report.get("peak", {}).get("tflops")
        reference = report["reference"]
        told = f"{_measured_on(report)} (`bench/results/{report['file']}`). {reference['rows']} rows are held against "
        told += f"float64; an error of {reference['allowed_error']:.2e} is allowed."
        if peak:
            told += f" The tensor cores' peak, measured: {peak:.0f} TFLOP/s."
        lines += [f"### {report['problem']['label']}", "", told, ""]
        lines += [
            "| rung | us | speed-up | TFLOP/s | of peak | largest error | | |",
            "|---|---:|---:|---:|---:|---:|---|---|",
        ]
        for rung in report["rungs"]:
            if "refused" in rung:
                lines.append(f"| `{rung['name']}` | | | | | | not run | {rung['refused']} |")
                continue
            number = lambda key, form, rung=rung: format(rung[key], form) if rung.get(key) is not None else ""  # noqa: E731
            verdict = f"wrong: {rung['problem']}" if rung["problem"] else "pass"
            cells = [
                _time(rung),
                number("speedup", ".1f"),
                number("tflops", ".3g"),
                number("share_of_peak", ".1%"),
                number("max_error", ".1e"),
                verdict,
                rung["note"],
            ]
            lines.append(f"| `{rung['name']}` | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def svg(group: list[dict[str, Any]]) -> str:
    """Latency of each rung on a log scale, a line for each problem. Needs at least one time."""
    names, points = _names(group), _points(group)
    low, high = math.floor(math.log10(min(points))), math.ceil(math.log10(max(points)))
    high = max(high, low + 1)
    height = TOP + ROW * len(names) + BOTTOM
    title = f"The ladder: microseconds of a call, {group[0]['device']}"

    def x_of(us: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (math.log10(us) - low) / (high - low)

    def y_of(row: int) -> float:
        return TOP + ROW * (row + 0.5)

    def page(dark: int, paper: str, ink: str, faint: str, grid: str) -> str:
        ground = f".page{{fill:{paper}}}text{{fill:{ink}}}.tick{{fill:{faint}}}.grid{{stroke:{grid}}}"
        return ground + "".join(f".s{i}{{stroke:{look[dark]};fill:{look[dark]}}}" for i, look in enumerate(LOOKS))

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="{escape(title)}">',
        "<style>text{font:12px system-ui,sans-serif}.title{font-size:14px;font-weight:600}.tick{font-size:11px}"
        ".line{fill:none;stroke-width:2}"
        f"{page(0, '#ffffff', '#1f2328', '#59636e', '#e3e6ea')}@media(prefers-color-scheme:dark){{"
        f"{page(1, '#0d1117', '#e6edf3', '#9198a1', '#262c36')}}}</style>",
        f'<rect class="page" width="{WIDTH}" height="{height}" rx="6"/>',
        f'<text class="title" x="16" y="24">{escape(title)}</text>',
    ]
    for decade in range(low, high + 1):
        x = x_of(10.0**decade)
        out.append(f'<path class="grid" d="M{x:.1f} {TOP}V{TOP + ROW * len(names)}"/>')
        place = f'x="{x:.1f}" y="{TOP + ROW * len(names) + 16}" text-anchor="middle"'
        out.append(f'<text class="tick" {place}>{10.0**decade:g}</text>')
    for row, name in enumerate(names):
        out.append(f'<text x="{LEFT - 10}" y="{y_of(row) + 4:.1f}" text-anchor="end">{escape(name)}</text>')
    for i, report in enumerate(group):
        look = i % len(LOOKS)
        mark = f'd="{LOOKS[look][2]}"'
        x = 22 + i * 230
        out.append(f'<g class="s{look}"><path transform="translate({x} 46)" {mark}/></g>')
        out.append(f'<text x="{x + 10}" y="50">{escape(report["problem"]["label"])}</text>')
        places = [
            (x_of(_rung(report, name)["microseconds"]), y_of(row))
            for row, name in enumerate(names)
            if "microseconds" in _rung(report, name)
        ]
        if places:
            line = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
            marks = "".join(f'<path transform="translate({x:.1f} {y:.1f})" {mark}/>' for x, y in places)
            out.append(f'<g class="s{look}"><path class="line" d="M{line}"/>{marks}</g>')
    place = f'x="{(LEFT + WIDTH - RIGHT) / 2:.1f}" y="{height - 10}" text-anchor="middle"'
    out.append(f'<text class="tick" {place}>microseconds</text>')
    return "\n".join([*out, "</svg>", ""])
