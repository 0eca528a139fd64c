# SPDX-License-Identifier: Apache-2.0
"""One case of the grid: makes its arrays, calls attention, checks everything about the result."""

from __future__ import annotations

import json
import zlib

import numpy as np
from arrays import Arrays, Placed, place, torch
from reference import Options, assert_attention

import flashcore

LENGTHS = (1, 2, 63, 64, 65, 127, 129, 511, 1000, 1023, 4097)
GROUPS = (1, 3, 4, 7, 71)  # query heads for each key head
WINDOWS = (None, (0, 0), (17, None), (None, 5), (100, 64), (511, 0))

# Multiply-adds of a product, and beside them what the rest of a score costs (exponentials, masks), counted as that many
# of them. The limit takes some four seconds for reference and emulation together on one core.
PER_SCORE = 200
WORK = 4097 * 4097 * (256 + PER_SCORE)
ELEMENTS = 1 << 22  # of the largest array
ROWS = 512  # queries that make the ratio of two errors mean something


def parameters(arrays: Arrays) -> dict[str, tuple]:
    memory = ["contiguous", "padded", "transposed", "expanded"]
    if not arrays.on_gpu:
        memory.append("reversed")  # negative strides exist in NumPy only
    return {
        "dtype": arrays.dtypes,
        "head_dim": arrays.head_dims(),
        "seqlen_q": LENGTHS,
        "seqlen_k": LENGTHS,
        "group": GROUPS,
        "causal": (False, True),
        "window": WINDOWS,
        "softcap": (0.0, 30.0),
        "scale": (None, 0.2, -0.1),
        "layout": ("bshd", "bhsd"),
        "memory": tuple(memory),
        "score": (1.0, 4.0, 16.0),
        "out": ("returned", "given"),
    }


def work(case: dict) -> int:
    return case["group"] * case["seqlen_q"] * case["seqlen_k"] * (case["head_dim"] + PER_SCORE)


def allowed(case: dict) -> bool:
    """Whether the case exists and is cheap enough for the default suite."""
    largest = case["head_dim"] * max(case["group"] * case["seqlen_q"], case["seqlen_k"])
    return exists(case) and work(case) <= WORK and largest <= 3 * ELEMENTS


def exists(case: dict) -> bool:
    return not (case["memory"] == "reversed" and case["dtype"] == "bfloat16")


def name(case: dict) -> str:
    """Short and unique: the values, in order."""
    return "-".join(str(value).replace(" ", "") for value in case.values())


def seed_of(case: dict) -> int:
    """The same case has the same data in every run; no two cases have the same."""
    return zlib.crc32(json.dumps(case).encode())


def extents(case: dict) -> tuple[int, int]:
    """Batch and key heads: enough queries for the errors to be comparable, within the limits on work and memory."""
    heads_k = 2 if case["group"] <= 7 and 2 * work(case) <= WORK else 1
    heads_q = heads_k * case["group"]
    batch = -(-ROWS // (heads_q * case["seqlen_q"]))
    largest = case["head_dim"] * max(case["seqlen_q"] * heads_q, case["seqlen_k"] * heads_k)
    batch = min(batch, ELEMENTS // largest, WORK // (heads_k * work(case)))
    return max(1, batch), heads_k


def in_layout(arrays: Arrays, bshd, layout: str):
    return bshd if layout == "bshd" else bshd.swapaxes(1, 2)


def run(arrays: Arrays, case: dict, backend: str | None = None) -> None:
    """Calls attention as the case says and checks output, lse, the memory around the output, and the result's type."""
    options = Options(case["causal"], case["window"], case["scale"], case["softcap"])
    layout, memory, dtype = case["layout"], case["memory"], case["dtype"]
    batch, heads_k = extents(case)
    heads_q = heads_k * case["group"]
    seed = seed_of(case)
    # `score` is the standard deviation of the scores, whatever the scale.
    spread = case["score"] / (abs(options.scale_for(case["head_dim"])) * case["head_dim"] ** 0.5)
    query, key, value = arrays.qkv(
        batch, case["seqlen_q"], case["seqlen_k"], heads_q, heads_k, case["head_dim"], dtype, seed, spread
    )
    axis = {"batch": 0, "sequence": 1 if layout == "bshd" else 2, "heads": 2 if layout == "bshd" else 1}
    placed = [
        place(arrays, bshd.shape, dtype, memory, bshd, axis[expand])
        for bshd, expand in (
            (in_layout(arrays, query, layout), "batch"),
            (in_layout(arrays, key, layout), "heads"),
            (in_layout(arrays, value, layout), "sequence" if seed % 2 else "batch"),
        )
    ]
    # What was really passed: rounded, and in the expanded case repeated.
    query, key, value = (in_layout(arrays, as_library(arrays, p.view), layout) for p in placed)

    keywords = {**options.keywords(), "layout": layout, "backend": backend}
    target: Placed | None = None
    if case["out"] == "given":
        target = place(arrays, placed[0].view.shape, dtype, "contiguous" if memory == "expanded" else memory)
        keywords["out"] = target.view
    with_lse = seed % 4 != 0
    result = flashcore.attention(*(p.view for p in placed), return_lse=with_lse, **keywords)
    out, lse = result if with_lse else (result, None)

    assert type(out) is type(placed[0].view)
    out = as_library(arrays, out)
    lse = None if lse is None else as_library(arrays, lse)
    assert_attention(arrays, in_layout(arrays, out, layout), lse, query, key, value, options, name(case))
    if target is not None:
        assert arrays.same_bits(as_library(arrays, target.view), out), (
            "out= holds something else than what was returned"
        )
        assert target.surroundings_intact(), "something was written beside out"


def as_library(arrays: Arrays, a):
    """An array of the suite's library; the only ones that are not are NumPy views with negative strides beside
    torch."""
    if torch is not None and isinstance(a, np.ndarray):
        return torch.from_numpy(a.copy())
    return a
