# SPDX-License-Identifier: Apache-2.0
"""A report of bench/compare.py as an SVG. Of forward suites TFLOP/s against sequence length, a panel for each head
dimension and mask; of decoding TB/s against the keys of a sequence; of small problems microseconds by length and batch.

The same report gives the same text, so bench/report.py --check compares it. Needs only the standard library.
"""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

from suites import OURS

PANEL_HEIGHT = 150
LEFT, TOP, GAP_X, GAP_Y, RIGHT, BOTTOM = 52, 86, 18, 52, 16, 46
# Where cells stand side by side: the place of one, the room between two groups, and the least room that a group's name
# takes; the panel's height, and its cells' labels' below it.
SLOT, GROUP_GAP, GROUP_WIDTH, TALL, LABELS = 46, 16, 76, 240, 26

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


# What the plot of a suite shows, for who does not see it.
SHOWS = {
    "forward": "TFLOP/s against sequence length",
    "grid": "TFLOP/s against sequence length",
    "small": "Microseconds of a call by length and batch",
    "decode": "TB/s against the keys of a sequence",
}


def shown(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells that the report's plot shows: none where it has no plot."""
    cells = [cell for cell in report["cells"] if report["suite"] in SHOWS and not cell["problem"]]
    if report["suite"] == "decode":  # one query a sequence over contiguous caches of one length
        cells = [c for c in cells if c["seqlen"] == 1 and c["page_size"] == 0 and not c["lengths"]]
        cells = [c for c in cells if not c["batch_invariant"]]
    return cells


def memory_ceiling(report: dict[str, Any]) -> tuple[str, float] | None:
    """What was measured of memory beside a suite that decodes, and how many TB/s."""
    names = {"reading": "read_tbytes_per_second", "copying": "copy_tbytes_per_second"}
    found = report.get("peaks") or {}
    return next(((name, found[field]) for name, field in names.items() if found.get(field)), None)


def svg(report: dict[str, Any]) -> str:
    """Needs at least one cell of `shown`."""
    return {"small": _small, "decode": _decode}.get(report["suite"], _forward)(report)


def _forward(report: dict[str, Any]) -> str:
    """The dashed line is `matmul_tflops`, where the report has it."""
    cells = shown(report)
    drawn = _drawn(report, "tflops")
    ceiling = report.get("matmul_tflops")
    rows = list(dict.fromkeys(c["head_dim"] for c in cells))
    columns = list(dict.fromkeys((c["dtype"], c["causal"]) for c in cells))
    seqlens = sorted({c["seqlen"] for c in cells})
    values = [p["tflops"] for c in cells for p in c["providers"].values() if "tflops" in p]
    highest = max([*values, ceiling or 0])
    step = next((s for s in (20, 50, 100, 200, 250) if highest <= 5 * s), 500)
    top = step * math.ceil(highest / step)
    panel_width = 310 if len(columns) <= 2 else 220
    width = LEFT + len(columns) * (panel_width + GAP_X) - GAP_X + RIGHT
    height = TOP + len(rows) * (PANEL_HEIGHT + GAP_Y) - GAP_Y + BOTTOM

    def x_of(seqlen: int) -> float:
        return 14 + (panel_width - 28) * (seqlens.index(seqlen) / max(1, len(seqlens) - 1))

    def y_of(tflops: float) -> float:
        return PANEL_HEIGHT * (1 - tflops / top)

    title = f"Forward, TFLOP/s against sequence length, {report['device']}"
    line = f"matmul {ceiling:.0f}" if ceiling else ""
    width, out = _page(title, width, height, drawn, line)
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
                place = f'x="{x_of(seqlen):.1f}" y="{PANEL_HEIGHT + 15}"'
                out.append(f'<text class="tick" {place} text-anchor="middle">{_short(seqlen)}</text>')
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


@dataclass(frozen=True)
class _Slot:
    """The place of a cell in a panel."""

    cell: dict[str, Any]
    x: float
    label: str
    line: Any  # the marks of slots that have the same one are joined


@dataclass(frozen=True)
class _Group:
    """Slots side by side with a name below them."""

    slots: list[_Slot]
    name: tuple[str, ...]  # its lines


@dataclass(frozen=True)
class _Panel:
    name: str
    groups: list[_Group]
    width: float


@dataclass(frozen=True)
class _Scale:
    ticks: list[float]
    y_of: Callable[[float], float]


def _decode(report: dict[str, Any]) -> str:
    """Keys on a log scale. Batches of as many keys stand side by side around these, and a batch's marks are joined. The
    dashed line is what `memory_ceiling` finds."""
    field, ceiling = "tbytes_per_second", memory_ceiling(report)
    panels = []
    for (heads, heads_k, head_dim, dtype), cells in _by(shown(report), "heads", "heads_k", "head_dim", "dtype"):
        lengths = _by(cells, "seqlen_k")
        octaves = [math.log2(keys / lengths[0][0][0]) for (keys,), _ in lengths]
        rooms = [max(GROUP_WIDTH, SLOT * len(group)) for _, group in lengths]
        between = [
            ((rooms[i] + rooms[i - 1]) / 2 + GROUP_GAP) / (octaves[i] - octaves[i - 1]) for i in range(1, len(lengths))
        ]
        unit = max([*between, 560 / max(1.0, octaves[-1])])  # an octave's width: no two groups touch
        groups = []
        for (_, group), octave in zip(lengths, octaves, strict=True):
            first = rooms[0] / 2 + unit * octave - SLOT * (len(group) - 1) / 2
            slots = [_Slot(c, first + SLOT * i, f"B {c['batch']}", c["batch"]) for i, c in enumerate(group)]
            groups.append(_Group(slots, (f"{_short(group[0]['seqlen_k'])} keys",)))
        name = f"{heads} query heads, {heads_k or heads} key heads, D {head_dim}, {DTYPES[dtype]}"
        panels.append(_Panel(name, groups, (rooms[0] + rooms[-1]) / 2 + unit * octaves[-1]))
    title = f"Decode, one query a sequence: TB/s against its keys, {report['device']}"
    scale = _linear([*_values(report, field), *([ceiling[1]] if ceiling else [])])
    caption = "keys of a sequence, on a log scale; batches (B) of as many keys stand side by side"
    return _side_by_side(report, title, field, panels, scale, caption, ceiling)


def _small(report: dict[str, Any]) -> str:
    """A group for each length, mask and dtype: its batches in turn, whose marks are joined."""
    panels = []
    for (heads, heads_k, head_dim), cells in _by(shown(report), "heads", "heads_k", "head_dim"):
        groups, x = [], 0.0
        for (causal, dtype, seqlen), group in _by(cells, "causal", "dtype", "seqlen"):
            room = max(GROUP_WIDTH, SLOT * len(group))
            first = x + (room - SLOT * (len(group) - 1)) / 2
            slots = [_Slot(c, first + SLOT * i, f"{c['batch']}", len(groups)) for i, c in enumerate(group)]
            groups.append(_Group(slots, (f"S {seqlen}", f"{DTYPES[dtype]}{' causal' if causal else ''}")))
            x += room + GROUP_GAP
        name = f"{heads}/{heads_k} heads, D {head_dim}" if heads_k else f"{heads} heads, D {head_dim}"
        panels.append(_Panel(name, groups, x - GROUP_GAP))
    title = f"Small problems: microseconds of a call, on a log scale, {report['device']}"
    scale = _logarithmic(_values(report, "microseconds"))
    return _side_by_side(report, title, "microseconds", panels, scale, "batch, and below it the length (S)", None)


def _side_by_side(
    report: dict[str, Any],
    title: str,
    field: str,
    panels: list[_Panel],
    scale: _Scale,
    caption: str,
    ceiling: tuple[str, float] | None,
) -> str:
    drawn = _drawn(report, field)
    below = LABELS + 14 * max(len(group.name) for panel in panels for group in panel.groups)
    height = TOP + len(panels) * (TALL + below + GAP_Y) - GAP_Y + 36
    line = f"{ceiling[0]} {ceiling[1]:.2f}" if ceiling else ""
    width, out = _page(title, LEFT + math.ceil(max(p.width for p in panels)) + RIGHT, height, drawn, line)
    step = min(9.0, (SLOT - 8) / len(drawn))
    for row, panel in enumerate(panels):
        out.append(f'<g transform="translate({LEFT} {TOP + row * (TALL + below + GAP_Y)})">')
        out.append(f'<text class="panel" x="0" y="-6">{escape(panel.name)}</text>')
        for tick in scale.ticks:
            y = scale.y_of(tick)
            out.append(f'<path class="grid" d="M0 {y:.1f}H{panel.width:.1f}"/>')
            out.append(f'<text class="tick" x="-6" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
        for group in panel.groups:
            left, right = group.slots[0].x, group.slots[-1].x
            for slot in group.slots:
                place = f'x="{slot.x:.1f}" y="{TALL + 15}" text-anchor="middle"'
                out.append(f'<text class="tick" {place}>{escape(slot.label)}</text>')
            out.append(f'<path class="grid" d="M{left - SLOT / 2 + 4:.1f} {TALL + 22}H{right + SLOT / 2 - 4:.1f}"/>')
            for i, text in enumerate(group.name):
                place = f'x="{(left + right) / 2:.1f}" y="{TALL + 36 + 14 * i}" text-anchor="middle"'
                out.append(f"<text {place}>{escape(text)}</text>")
        if ceiling:
            out.append(f'<path class="ceiling" d="M0 {scale.y_of(ceiling[1]):.1f}H{panel.width:.1f}"/>')
        slots = [slot for group in panel.groups for slot in group.slots]
        joined = collections.Counter(slot.line for slot in slots)
        for name in sorted(drawn, key=lambda n: n == OURS):  # ours last: on top
            beside = step * (drawn.index(name) - (len(drawn) - 1) / 2)
            lines: dict[Any, list[tuple[float, float]]] = {}
            for slot in slots:
                if field in slot.cell["providers"][name]:
                    # A mark that no line leads to stands beside the others'; what is joined keeps to one x, or a slope
                    # would tell another value.
                    x = slot.x + (beside if joined[slot.line] == 1 else 0)
                    lines.setdefault(slot.line, []).append((x, scale.y_of(slot.cell["providers"][name][field])))
            marks = "".join(
                f"{_line(points) if len(points) > 1 else ''}{''.join(_marker(name, x, y) for x, y in points)}"
                for points in lines.values()
            )
            if marks:
                out.append(f'<g class="{_class(name)}">{marks}</g>')
        out.append("</g>")
    out.append(f'<text class="tick" x="{width / 2:.1f}" y="{height - 10}" text-anchor="middle">{caption}</text>')
    return "\n".join([*out, "</svg>", ""])


def _by(cells: list[dict[str, Any]], *keys: str) -> list[tuple[tuple[Any, ...], list[dict[str, Any]]]]:
    """The cells by these fields, in their order; those of a group from the smallest batch to the largest."""
    of = lambda cell: tuple(cell[key] for key in keys)  # noqa: E731
    ordered = sorted(cells, key=lambda cell: (*of(cell), cell["batch"]))
    return [(values, list(group)) for values, group in itertools.groupby(ordered, key=of)]


def _drawn(report: dict[str, Any], field: str) -> list[str]:
    """The providers that have something to show."""
    return [n for n in report["providers"] if any(field in cell["providers"][n] for cell in shown(report))]


def _values(report: dict[str, Any], field: str) -> list[float]:
    return [p[field] for cell in shown(report) for p in cell["providers"].values() if field in p]


def _linear(values: list[float]) -> _Scale:
    """From nothing to the highest or above it, in four to eight round steps."""
    highest = max(values)
    decade = 10.0 ** math.floor(math.log10(highest))
    step = decade * next(s for s in (0.2, 0.5, 1.0, 2.0) if highest <= 8 * s * decade)
    count = math.ceil(highest / step)
    return _Scale([step * i for i in range(count + 1)], lambda value: TALL * (1 - value / (step * count)))


def _logarithmic(values: list[float]) -> _Scale:
    """From a round number to a round number, the values between them: 1, 2, 5, 10 and so on."""
    lowest, highest = min(values), max(values)
    decades = range(math.floor(math.log10(lowest)) - 1, math.ceil(math.log10(highest)) + 1)
    rounds = [factor * 10.0**decade for decade in decades for factor in (1, 2, 5)]
    low, high = max(r for r in rounds if r <= lowest), min(r for r in rounds if r >= highest and r > lowest)
    ticks = [r for r in rounds if low <= r <= high]
    return _Scale(ticks, lambda value: TALL * (1 - math.log(value / low) / math.log(high / low)))


def _short(count: int) -> str:
    return f"{count // 1024}k" if count % 1024 == 0 else str(count)


def _page(title: str, width: int, height: int, drawn: list[str], line: str) -> tuple[int, list[str]]:
    """The width, with room for title and legend, and what comes before the panels. `line` names the dashed line."""
    width = max(width, 40 + 104 * (len(drawn) + 2), 32 + 8 * len(title))
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
    if line:
        out.append(f'<path class="ceiling" d="M{x - 6} 46h28"/><text x="{x + 28}" y="50">{escape(line)}</text>')
    return width, out


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
