# SPDX-License-Identifier: Apache-2.0
"""The reports of bench/overhead.py as sections of README. Needs only the standard library."""

from __future__ import annotations

import pathlib
from typing import Any

from suites import reports_of

OURS, PEER = "flashcore.attention", "torch's scaled_dot_product_attention"


def load(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The reports of a folder, by device."""
    return sorted(reports_of(folder, "host"), key=lambda r: (r["device"], r["file"]))


def _us(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def section(report: dict[str, Any]) -> str:
    """One report as Markdown: each interface's time to issue a call and to wait for a single one, shape by shape."""
    versions = ", ".join(f"{name} {value}" for name, value in report["versions"].items())
    driver = f", driver {report['driver']}" if report.get("driver") else ""
    shapes = report["shapes"]
    lines = [
        "### What a call costs the host",
        "",
        f"{report['device']}{driver}; {versions}; {report['date']}, commit {report['commit'][:12]} "
        f"(`bench/results/{report['file']}`). Microseconds of a call: to issue it, and of a lone one with "
        f"the wait for its result, both in the best of {report['method']['rounds']} rounds; on "
        f"{' and on '.join(shape['label'] for shape in shapes)}.",
        "",
        f"| behind | {' | '.join('issued | alone' for _ in shapes)} |",
        "|---|" + "---:|" * (2 * len(shapes)),
    ]
    names = list(dict.fromkeys(call["name"] for shape in shapes for call in shape["calls"]))
    calls = [{call["name"]: call for call in shape["calls"]} for shape in shapes]
    for name in names:
        cells = [_us(of.get(name, {}).get(key)) for of in calls for key in ("issued", "alone")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    told = [
        f"{shape['label']}: {of[PEER]['issued'] / of[OURS]['issued']:.2f} and "
        f"{of[PEER]['alone'] / of[OURS]['alone']:.2f}"
        for shape, of in zip(shapes, calls, strict=True)
        if OURS in of and PEER in of
    ]
    if told:
        lines += ["", f"SDPA's times over those of `{OURS}`, issued and alone: {'; '.join(told)}."]
    if report.get("chains"):
        text = "One call more in a program of dependent calls, GPU's time and host's together"
        told = ", ".join(f"{chain['name']} {_us(chain['microseconds'])}" for chain in report["chains"])
        lines += ["", f"{text}, on {report['chain_label']}: {told}."]
    return "\n".join(lines)
