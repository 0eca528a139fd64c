# SPDX-License-Identifier: Apache-2.0
"""A report of bench/compare.py as plain text, for the screen."""

from __future__ import annotations

from typing import Any

from suites import OURS, rate_of


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
