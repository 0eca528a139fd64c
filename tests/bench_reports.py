# SPDX-License-Identifier: Apache-2.0
"""What the tests of bench/ share: reports with made-up figures, README as bench/report.py makes it from them, and what
stands in for probes and providers."""

from __future__ import annotations

import json
from dataclasses import asdict

PEAKS = {"float32_tflops": 0.2, "bfloat16_tflops": 0.4, "read_tbytes_per_second": 0.02}


def probed(bench, monkeypatch, *speeds):
    """Makes the probe tell PEAKS times each of `speeds` in turn, and the last one from then on."""
    left = list(speeds or (1.0,))

    def probe():
        speed = left.pop(0) if len(left) > 1 else left[0]
        return {name: value * speed for name, value in PEAKS.items()}

    monkeypatch.setattr(bench.compare, "probe_of", lambda program: ("made up", probe))


def spoiled(function, where, amount):
    """The provider `function` with `amount` added to its result at `where`."""

    def call(cell, q, k, v, out):
        result = function(cell, q, k, v, out)
        result[where] += amount
        return result

    return call


def made_up(bench, suite, backend, device="a GPU", ceiling=800.0):
    """A report with figures that say nothing, for what is done with reports."""
    cells = []
    for place, cell in enumerate(bench.suites.suites()[suite]):
        providers = {}
        for name, speed in (("flashcore", 400.0 + place), ("flash", 200.0), ("fa3", 300.0 + 2 * place)):
            time = cell.flops / speed / 1e6
            rates = {"tflops": speed, "tbytes_per_second": cell.bytes / time / 1e6}
            providers[name] = {"max_error": 0.0, "relative_error": 0.0, "microseconds": time, "spread": 0.0, **rates}
        ratios = {n: p["microseconds"] / providers["flashcore"]["microseconds"] for n, p in providers.items()}
        del ratios["flashcore"]
        cells.append({**asdict(cell), "label": cell.label, "problem": "", "providers": providers, "ratios": ratios})
    facts = {"date": "2026-01-01", "commit": "0" * 40, "device": device, "versions": {}, "driver": "1"}
    if bench.suites.is_forward(suite):
        facts["matmul_tflops"] = ceiling
    if suite == "window":
        facts["over_unmasked"] = bench.summaries.over_unmasked(cells)
    means = bench.summaries.geometric_means(cells)
    names = ["flashcore", "flash", "fa3"]
    head = {"kind": "compare", "suite": suite, "backend": backend, **facts}
    return {**head, "providers": names, "cells": cells, "geometric_means": means}


def written(bench, folder, *reports):
    """README as it is made from `reports`, and what --check says of it."""
    for report in reports:
        (folder / f"{report['suite']}-{report['backend']}.json").write_text(json.dumps(report))
    readme = folder / "README.md"
    readme.write_text(f"{bench.report.BEGIN}\n{bench.report.END}\n")
    places = ["--readme", str(readme), "--results", str(folder)]
    assert bench.report.main(places) == 0 and bench.report.main(["--check", *places]) == 0
    return readme.read_text(), lambda: bench.report.main(["--check", *places])


def made_up_ladder(label, seqlen):
    """A report of `flashcore_bench ladder` with figures that say nothing."""
    rungs = [
        {"name": "baseline", "note": "first", "problem": "", "max_error": 1e-4, "microseconds": 1000.0, "speedup": 1.0},
        {"name": "vectorized", "note": "", "refused": "takes up to 9 keys"},
        {"name": "sm80", "note": "", "problem": "largest error", "max_error": None, "relative_error": None},
        {"name": "flashcore", "note": "", "problem": "", "max_error": 1e-4, "microseconds": 4.0, "speedup": 250.0},
    ]
    rungs[3].update(tflops=123.4, share_of_peak=0.125)
    problem = {"label": label, "batch": 1, "heads": 8, "seqlen": seqlen, "head_dim": 64}
    facts = {"date": "2026-01-01", "commit": "0" * 40, "device": "a GPU", "versions": {"flashcore": "0"}, "driver": "1"}
    reference = {"rows": 64, "allowed_error": 2e-3, "allowed_relative_error": 1e-3}
    peak = {"tflops": 900.0}
    return {"kind": "ladder", **facts, "problem": problem, "reference": reference, "peak": peak, "rungs": rungs}
