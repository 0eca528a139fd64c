# SPDX-License-Identifier: Apache-2.0
"""The plots that bench/plot.py draws of a report: a mark for each figure, within its panel."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest
from bench_reports import made_up

pytest.importorskip("torch")


def test_a_plot_has_a_panel_and_a_line_for_each(bench):
    report = made_up(bench, "grid", "sm90")
    del report["cells"][3]["providers"]["fa3"]["tflops"]  # a peer that did not run
    report["cells"][4]["problem"] = "wrong"
    drawn = ElementTree.fromstring(bench.plot.svg(report))
    of = lambda name: [e for e in drawn.iter() if e.get("class") == name]  # noqa: E731
    assert len(of("panel")) == 5 * 4 and len(of("p-flashcore")) == 1 + 5 * 4
    assert len(of("ceiling")) == 1 + 5 * 4
    marks = [len(list(e.iter("{http://www.w3.org/2000/svg}path"))) - 1 for e in of("p-fa3")[1:]]
    assert sorted(marks) == [5, 5] + [6] * 18
    heights = [float(e.get("transform").split()[1][:-1]) for e in of("mark")]
    assert min(heights) >= 0  # nothing above its panel
    assert len(list(ElementTree.fromstring(bench.plot.svg({**report, "matmul_tflops": None})).iter())) < len(
        list(drawn.iter())
    )


def parts(text):
    """The elements of a plot by class: `of("tick")`, and what a provider's mark i is, `marks("fa3")[i]`, as (x, y)."""
    drawn = ElementTree.fromstring(text)
    of = lambda name: [e for e in drawn.iter() if e.get("class") == name]  # noqa: E731

    def marks(name):
        groups = [
            e for group in of(f"p-{name}")[1:] for e in group if e.get("class") == "mark"
        ]  # the first is the legend
        return [tuple(float(x) for x in e.get("transform")[10:-1].split()) for e in groups]

    return of, marks


def texts_of(text):
    """The texts below the first panel's ground, as (x, y, what)."""
    drawn = ElementTree.fromstring(text)
    panel = next(e for e in drawn if e.get("transform") and any(c.get("class") == "panel" for c in e))
    return [(float(e.get("x")), float(e.get("y")), e.text) for e in panel if e.tag.endswith("text")]


def test_the_plot_of_decoding_has_contiguous_single_queries_over_their_keys(bench):
    report = made_up(bench, "decode", "sm90")
    cells = bench.plot.shown(report)
    assert [(c["batch"], c["seqlen_k"]) for c in cells] == [
        (1, 4096), (1, 32768), (1, 131072), (8, 8192), (32, 4096), (64, 8192)
    ]  # fmt: skip
    report["cells"][1]["providers"]["fa3"] = {"absent": "not here"}
    report["cells"][5]["problem"] = "wrong"  # batch 64
    own = [c["providers"]["flashcore"] for c in cells]
    text = bench.plot.svg(report)
    of, marks = parts(text)
    assert (len(marks("flashcore")), len(marks("fa3"))) == (5, 4) and not of("ceiling")
    one = marks("flashcore")[:3]  # of batch 1, which are joined
    assert len([e for e in of("p-flashcore")[1] if e.get("class") == "line"]) == 1
    x = [place for place, _ in one]
    # 32k keys are alone in their place; 4k have batch 32 beside them, half a place aside.
    assert (x[2] - x[1]) / (x[2] - x[0] - bench.plot.SLOT / 2) == pytest.approx(2 / 5, abs=1e-3)  # octaves
    heights = [bench.plot.TALL - y for _, y in one]
    for height, told in zip(heights, own, strict=False):
        assert height / heights[0] == pytest.approx(told["tbytes_per_second"] / own[0]["tbytes_per_second"], abs=0.01)
    labels = [label for _, y, label in texts_of(text) if y > bench.plot.TALL + 10]
    assert sorted(labels) == sorted(["B 1", "B 32", "4k keys", "B 8", "8k keys", "B 1", "32k keys", "B 1", "128k keys"])

    highest = 2 * max(told["tbytes_per_second"] for told in own)
    peaks = {"copy_tbytes_per_second": 1.0, "read_tbytes_per_second": highest}
    text = bench.plot.svg({**report, "peaks": peaks})
    of, marks = parts(text)
    ceilings = [float(e.get("d").split()[1].split("H")[0]) for e in of("ceiling")[1:]]
    assert f">reading {highest:.2f}<" in text and len(ceilings) == 1
    assert 0 <= ceilings[0] < min(y for _, y in marks("flashcore"))
    del peaks["read_tbytes_per_second"]
    assert ">copying 1.00<" in bench.plot.svg({**report, "peaks": peaks})


def test_the_plot_of_small_problems_is_logarithmic_and_grouped_by_length(bench):
    report = made_up(bench, "small", "sm90")
    del report["cells"][1]["providers"]["fa3"]["microseconds"]  # float16, which it does not run
    text = bench.plot.svg(report)
    of, marks = parts(text)
    assert (len(marks("flashcore")), len(marks("fa3"))) == (12, 11)
    lines = [e.get("d").count("L") + 1 for e in of("p-flashcore")[1] if e.get("class") == "line"]
    assert lines == [3, 3, 4]  # 128 and 256 tokens with three batches each, 512 with the seed's too; float16 is alone
    below = sorted((x, label) for x, y, label in texts_of(text) if x > 0 and y == bench.plot.TALL + 15)
    assert [label for _, label in below] == ["8", "16", "32", "8", "16", "32", "1", "8", "16", "32", "1", "1"]
    assert [label for _, _, label in sorted(texts_of(text)) if label.startswith("S ")] == [
        "S 128", "S 256", "S 512", "S 512", "S 512"
    ]  # fmt: skip
    times = {n: [c["providers"][n]["microseconds"] for c in report["cells"]] for n in ("flashcore", "flash")}
    # The cells of 128 tokens are the fourth to sixth of the suite and the first of the plot.
    logs = [math.log(t) for name in times for t in times[name][3:6]]
    heights = [-y for name in times for _, y in marks(name)[:3]]
    scale = (heights[-1] - heights[0]) / (logs[-1] - logs[0])
    assert scale > 0
    for height, log in zip(heights, logs, strict=True):
        assert height - heights[0] == pytest.approx(scale * (log - logs[0]), abs=0.2)


@pytest.mark.parametrize("values", [[5.0], [9.999999999999999, 10.0], [0.02, 0.3], [1.0, 1000.0], [3.3, 3.4]])
def test_the_scales_hold_every_value(bench, values):
    for scale in (bench.plot._linear(values), bench.plot._logarithmic(values)):
        assert 2 <= len(scale.ticks) <= 12 and scale.ticks == sorted(scale.ticks)
        places = [scale.y_of(value) for value in values]
        assert all(-1e-6 <= y <= bench.plot.TALL + 1e-6 for y in places) and places == sorted(places, reverse=True)
        assert scale.y_of(scale.ticks[0]) == pytest.approx(bench.plot.TALL) and abs(scale.y_of(scale.ticks[-1])) < 1e-6


def apart(text):
    """Whether the labels of a line below the first panel leave room, at 7 units a letter."""
    rows = {}
    for x, y, label in texts_of(text):
        if y > 0 and x > 0:
            rows.setdefault(y, []).append((x - 3.5 * len(label), x + 3.5 * len(label)))
    return all(a[1] <= b[0] for row in rows.values() for a, b in zip(sorted(row), sorted(row)[1:], strict=False))


def test_labels_keep_apart_whatever_the_cells(bench):
    for suite in ("small", "decode"):
        assert apart(bench.plot.svg(made_up(bench, suite, "sm90")))
    report = made_up(bench, "decode", "sm90")
    first = report["cells"][0]
    more = [{**first, "batch": batch, "seqlen_k": keys} for batch in (2, 16, 128) for keys in (4096, 5000, 8192)]
    crowded = bench.plot.svg({**report, "cells": report["cells"] + more})
    assert apart(crowded) and len(parts(crowded)[1]("flashcore")) == 6 + 9
    assert len(parts(bench.plot.svg({**report, "cells": [first]}))[1]("flashcore")) == 1
    two = bench.plot.svg({**report, "cells": [first, {**first, "dtype": "float16"}]})
    assert len(parts(two)[0]("panel")) == 2
