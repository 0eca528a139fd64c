# SPDX-License-Identifier: Apache-2.0
"""The reports of bench/decoder.py as sections of README. Needs only the standard library."""

from __future__ import annotations

import pathlib
from typing import Any

from suites import reports_of


def load(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The reports of a folder, by device."""
    return sorted(reports_of(folder, "decoder"), key=lambda r: (r["device"], r["file"]))


def section(report: dict[str, Any]) -> str:
    """One report as Markdown: milliseconds of each way behind each attention, and what bounds the prefill's ratio."""
    options = report["options"]
    errors = "; ".join(f"{name} {largest:.2g} and {norm:.2g}" for name, (largest, norm) in report["errors"].items())
    lines = [
        "### A decoder of transformers' Llama classes",
        "",
        f"{report['device']}; torch {report['torch']}, transformers {report['transformers']}; {report['date']}, commit "
        f"{report['commit'][:12]} (`bench/results/{report['file']}`). {options['layers']} layers, 16 heads of 128, 4 "
        f"of keys, bf16, random weights; a context of {options['context']} tokens. Milliseconds, medians of "
        f"{options['rounds']} rounds; the ratio is SDPA's time over FlashCore's. Logits against float32, largest and "
        f"relative error: {errors}.",
        "",
        "| | flashcore ms | sdpa ms | ratio | SDPA ran |",
        "|---|---:|---:|---:|---|",
    ]
    bounds = []
    for way, found in report["milliseconds"].items():
        ran = ", ".join(f"`{kernel}`" for kernel in found["sdpa_kernels"])
        times = " | ".join(f"{found[name]:.2f}" for name in ("flashcore", "sdpa"))
        lines.append(f"| {way} | {times} | {found['ratio']:.2f} | {ran} |")
        if "sdpa_kernels_milliseconds" in found:
            attention, total = found["sdpa_kernels_milliseconds"]
            ours, _ = found["flashcore_kernels_milliseconds"]
            bounds.append(
                f"{way}: attention is {attention:.1f} of SDPA's {total:.1f} ms on the GPU, and {ours:.1f} with "
                f"FlashCore; without any attention the ratio would be {total / (total - attention):.2f}"
            )
    return "\n".join(lines + (["", *(f"{text}." for text in bounds)] if bounds else []))
