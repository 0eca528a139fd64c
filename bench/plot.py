# SPDX-License-Identifier: Apache-2.0
"""A report of bench/compare.py as an SVG: TFLOP/s against sequence length, a panel for each head dimension and mask.

The same report gives the same text, so bench/report.py --check compares it. Needs only the standard library.
"""

from __future__ import annotations

import math
from html import escape
from typing import Any

OURS = "flashcore"
PANEL_HEIGHT = 150
LEFT, TOP, GAP_X, GAP_Y, RIGHT, BOTTOM = 52, 86, 18, 52, 16, 46

# One colour for a light page, one for a dark page, and a marker, so that colour alone tells nothing.
LOOKS = {
    OURS: ("#0550ae", "#79c0ff", "circle"),
    "flash": ("#9a6700", "#d29922", "square"),
    "cudnn": ("#1a7f37", "#56d364", "triangle"),
    "efficient": ("#6e7781", "#8b949e", "cross"),
    "fa3": ("#bf3989", "#f778ba", "diamond"),
    "jax": ("#8250df", "#d2a8ff", "cross"),
}
OTHER = ("#6e7781", "#8b949e", "cross")
MARKERS = {
    "square": "M-3-3h6v6h-6z",
    "triangle": "M0-4L3.6 3H-3.6z",
    "diamond": "M0-4L4 0L0 4L-4 0z",
    "cross": "M-3-3L3 3M3-3L-3 3",
    "circle": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
}
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def svg(report: dict[str, Any]) -> str:
    """Needs at least one cell that is right. The dashed line is `matmul_tflops`, where the report has it."""
    cells = [cell for cell in report["cells"] if not cell["problem"]]
    drawn = [n for n in report["providers"] if any("tflops" in c["providers"][n] for c in cells)]
    ceiling = report.get("matmul_tflops")
    rows = list(dict.fromkeys(c["head_dim"] for c in cells))
    columns = list(dict.fromkeys((c["dtype"], c["causal"]) for c in cells))
    seqlens = sorted({c["seqlen"] for c in cells})
    values = [p["tflops"] for c in cells for p in c["providers"].values() if "tflops" in p]
    highest = max([*values, ceiling or 0])
    step = next((s for s in (20, 50, 100, 200, 250) if highest <= 5 * s), 500)
    top = step * math.ceil(highest / step)
    panel_width = 310 if len(columns) <= 2 else 220
    width = max(LEFT + len(columns) * (panel_width + GAP_X) - GAP_X + RIGHT, 40 + 104 * (len(drawn) + 2))
    height = TOP + len(rows) * (PANEL_HEIGHT + GAP_Y) - GAP_Y + BOTTOM

    def x_of(seqlen: int) -> float:
        return 14 + (panel_width - 28) * (seqlens.index(seqlen) / max(1, len(seqlens) - 1))

    def y_of(tflops: float) -> float:
        return PANEL_HEIGHT * (1 - tflops / top)

    title = f"Forward, TFLOP/s against sequence length, {report['device']}"
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(title)}">',
        _style(drawn),
        f'<rect class="page" width="{width}" height="{height}" rx="6"/>',
        f'<text class="title" x="16" y="24">{escape(title)}</text>',
    ]
    x = 22
    for name in drawn:
        sample = f"{_line([(-6, 0), (22, 0)])}{_marker(name, 8, 0)}"
        out.append(f'<g class="{_class(name)}" transform="translate({x} 46)">{sample}</g>')
        out.append(f'<text x="{x + 28}" y="50">{escape(name)}</text>')
        x += 104
    if ceiling:
        out.append(f'<path class="ceiling" d="M{x - 6} 46h28"/><text x="{x + 28}" y="50">matmul {ceiling:.0f}</text>')

    for row, head_dim in enumerate(rows):
        for column, (dtype, causal) in enumerate(columns):
            left, upper = LEFT + column * (panel_width + GAP_X), TOP + row * (PANEL_HEIGHT + GAP_Y)
            panel = [c for c in cells if (c["head_dim"], c["dtype"], c["causal"]) == (head_dim, dtype, causal)]
            out.append(f'<g transform="translate({left} {upper})">')
            name = f"D {head_dim}, {'causal' if causal else 'full'}, {DTYPES[dtype]}"
            out.append(f'<text class="panel" x="0" y="-6">{name}</text>')
            for tick in range(0, top + 1, step):
                y = y_of(tick)
                out.append(f'<path class="grid" d="M0 {y:.1f}H{panel_width}"/>')
                if column == 0:
                    out.append(f'<text class="tick" x="-6" y="{y + 4:.1f}" text-anchor="end">{tick}</text>')
            for seqlen in seqlens:
                short = f"{seqlen // 1024}k" if seqlen % 1024 == 0 else str(seqlen)
                place = f'x="{x_of(seqlen):.1f}" y="{PANEL_HEIGHT + 15}"'
                out.append(f'<text class="tick" {place} text-anchor="middle">{short}</text>')
            if ceiling:
                out.append(f'<path class="ceiling" d="M0 {y_of(ceiling):.1f}H{panel_width}"/>')
            for name in sorted(drawn, key=lambda n: n == OURS):  # ours last: on top
                points = [
                    (x_of(c["seqlen"]), y_of(c["providers"][name]["tflops"]))
                    for c in sorted(panel, key=lambda c: c["seqlen"])
                    if "tflops" in c["providers"][name]
                ]
                if points:
                    markers = "".join(_marker(name, x, y) for x, y in points)
                    out.append(f'<g class="{_class(name)}">{_line(points)}{markers}</g>')
            out.append("</g>")
    out.append(f'<text class="tick" x="{width / 2:.1f}" y="{height - 10}" text-anchor="middle">sequence length</text>')
    return "\n".join([*out, "</svg>", ""])


def _class(name: str) -> str:
    return f"p-{name}" if name in LOOKS else "p-other"


def _line(points: list[tuple[float, float]]) -> str:
    return f'<path class="line" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in points)}"/>'


def _marker(name: str, x: float, y: float) -> str:
    return f'<path class="mark" transform="translate({x:.1f} {y:.1f})" d="{MARKERS[LOOKS.get(name, OTHER)[2]]}"/>'


def _style(drawn: list[str]) -> str:
    def colours(dark: int) -> str:
        looks = {_class(name): LOOKS.get(name, OTHER)[dark] for name in drawn}
        return "".join(f".{c}{{stroke:{colour};fill:{colour}}}" for c, colour in looks.items())

    def page(paper: str, ink: str, faint: str, grid: str) -> str:
        ground = f".page{{fill:{paper}}}text{{fill:{ink}}}.tick{{fill:{faint}}}"
        return f"{ground}.grid{{stroke:{grid}}}.ceiling{{stroke:{faint}}}"

    # The picture brings its own ground: it is legible whatever page it stands on.
    return (
        "<style>text{font:12px system-ui,sans-serif}.title{font-size:14px;font-weight:600}.panel{font-weight:600}"
        ".tick{font-size:11px}.line{fill:none;stroke-width:1.5}.mark{stroke-width:1}.ceiling{stroke-dasharray:5 4}"
        f".p-{OURS} .line{{stroke-width:3}}"
        f"{page('#ffffff', '#1f2328', '#59636e', '#e3e6ea')}{colours(0)}"
        "@media(prefers-color-scheme:dark){"
        f"{page('#0d1117', '#e6edf3', '#9198a1', '#262c36')}{colours(1)}}}</style>"
    )
