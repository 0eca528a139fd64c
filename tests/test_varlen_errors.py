# SPDX-License-Identifier: Apache-2.0
"""Bad input to attention_varlen() and combine(): the right exception, argument, got and expected, nothing written.
(Bad values inside cu_seqlens are in test_varlen.py.)"""

from __future__ import annotations

import math

import pytest
from bad_calls import MUST, Row, assert_refused, check_message, integer, other

import flashcore


def good_varlen(arrays) -> dict:
    call = {
        "query": other(arrays, (30, 4, 64)),
        "key": other(arrays, (40, 2, 64)),
        "value": other(arrays, (40, 2, 64)),
        "cu_seqlens_q": arrays.int32([0, 10, 30]),
        "cu_seqlens_k": arrays.int32([0, 25, 40]),
    }
    call["out"] = arrays.poison((30, 4, 64), arrays.half)
    return call


def varlen_rows():
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        for dtype in ("int64", "float32"):
            yield Row(
                f"{name} {dtype}",
                lambda a, c, n=name, d=dtype: {n: integer(a, c[n], d)},
                TypeError,
                name,
                dtype,
                "int32",
            )
        yield Row(f"{name} 2-D", lambda a, c, n=name: {n: c[n][None]}, ValueError, name, "2", "1")
        yield Row(f"{name} empty", lambda a, c, n=name: {n: c[n][:0]}, ValueError, name, "0", ("1", *MUST))
        yield Row(
            f"{name} strided",
            lambda a, c, n=name: {n: a.int32([0, 9, 9, 9, 30, 9])[::2]},
            ValueError,
            name,
            "2",
            ("contiguous", "1"),
        )
        yield Row(f"{name} list", lambda a, c, n=name: {n: [0, 10, 30]}, TypeError, name, "list", "")
    yield Row(
        "two numbers of sequences",
        lambda a, c: {"cu_seqlens_k": a.int32([0, 10, 20, 40])},
        ValueError,
        "cu_seqlens_k",
        ("4", "3"),
        ("3", "2"),
    )
    yield Row("seqused_k length", lambda a, c: {"seqused_k": a.int32([1, 2, 3])}, ValueError, "seqused_k", "3", "2")
    yield Row(
        "seqused_k dtype",
        lambda a, c: {"seqused_k": integer(a, a.int32([1, 2]), "int64")},
        (TypeError, ValueError),
        "seqused_k",
        "int64",
        "int32",
    )
    for name in ("query", "key", "value"):
        yield Row(f"{name} 4-D", lambda a, c, n=name: {n: c[n][None]}, ValueError, name, "4", "3")
        yield Row(f"{name} 2-D", lambda a, c, n=name: {n: c[n][0]}, ValueError, name, "2", "3")
    yield Row("rows of key and value", lambda a, c: {"value": c["value"][:39]}, ValueError, "value", "39", "40")
    yield Row(
        "heads do not divide",
        lambda a, c: {n: other(a, (40, 3, 64)) for n in ("key", "value")},
        ValueError,
        ("key", "query"),
        "3",
        "4",
    )
    yield Row("negative hint", lambda a, c: {"max_seqlen_q": -1}, ValueError, "max_seqlen_q", "-1", ("0", *MUST))
    yield Row(
        "negative hint of keys", lambda a, c: {"max_seqlen_k": -3}, ValueError, "max_seqlen_k", "-3", ("0", *MUST)
    )
    yield Row("out rows", lambda a, c: {"out": a.poison((29, 4, 64), a.half)}, ValueError, "out", "29", "30")
    yield Row("scale nan", lambda a, c: {"scale": math.nan}, ValueError, "scale", ("nan", "NaN"), ("finite", *MUST))
    yield Row(
        "cu_seqlens on the CPU",
        lambda a, c: {"cu_seqlens_q": c["cu_seqlens_q"].cpu()},
        ValueError,
        "cu_seqlens_q",
        "cpu",
        "cuda",
        "cuda",
    )
    yield Row(
        "out overlaps value",
        lambda a, c: (lambda flat: {"value": flat[:40, :2], "out": flat[39:69]})(other(a, (69, 4, 64))),
        ValueError,
        "out",
        "value",
        "",
    )  # fmt: skip


@pytest.mark.parametrize("row", list(varlen_rows()), ids=lambda row: row.name)
def test_bad_varlen_call(device, arrays, row):
    if row.only not in ("", device):
        pytest.skip(f"a rule of {row.only} only")
    assert_refused(flashcore.attention_varlen, arrays, good_varlen(arrays), row)


def good_combine(arrays, count=3) -> dict:
    return {
        "outs": [arrays.random((2, 9, 3, 16), arrays.half, i) for i in range(count)],
        "lses": [arrays.random((2, 3, 9), "float32", 10 + i) for i in range(count)],
    }


def combine_rows():
    yield Row("no parts", lambda a, c: {"outs": [], "lses": []}, ValueError, "outs", "0", ("1", "64"))
    yield Row("65 parts", lambda a, c: good_combine(a, 65), ValueError, "outs", "65", "64")
    yield Row("counts differ", lambda a, c: {"lses": c["lses"][:2]}, ValueError, "lses", "2", "3")
    yield Row(
        "shapes differ", lambda a, c: {"outs": [*c["outs"][:2], c["outs"][2][:, :8]]}, ValueError, "outs", "8", "9"
    )
    yield Row(
        "dtypes differ",
        lambda a, c: {"outs": [*c["outs"][:2], a.cast(c["outs"][2], "float32")]},
        TypeError,
        "outs",
        "float32",
        "float16",
    )
    yield Row("lse shape", lambda a, c: {"lses": [x.swapaxes(1, 2) for x in c["lses"]]}, ValueError, "lses", "9", "3")
    yield Row(
        "lse dtype",
        lambda a, c: {"lses": [a.cast(x, "float16") for x in c["lses"]]},
        TypeError,
        "lses",
        "float16",
        "float32",
    )
    yield Row(
        "outs int8",
        lambda a, c: {"outs": [integer(a, x, "int8") for x in c["outs"]]},
        TypeError,
        "outs",
        "int8",
        "float16",
    )
    yield Row("not an array", lambda a, c: {"outs": [3.0, *c["outs"][1:]]}, TypeError, "outs", "float", "")
    yield Row("outs 2-D", lambda a, c: {"outs": [x[0, 0] for x in c["outs"]]}, ValueError, "outs", "2", ("3", "4"))
    yield Row("layout", lambda a, c: {"layout": "sbhd"}, ValueError, "layout", "sbhd", "bhsd")


@pytest.mark.parametrize("row", list(combine_rows()), ids=lambda row: row.name)
def test_bad_combine(arrays, row):
    call = good_combine(arrays)
    call = {**call, **row.change(arrays, call)}
    with pytest.raises(row.error) as caught:
        flashcore.combine(**call)
    check_message(str(caught.value), row)
