# SPDX-License-Identifier: Apache-2.0
"""Bad input to attention() and plan(): the right exception, which names the argument, what it got and what was
expected, and nothing written. Each row of CALLS is one kind of bad call."""

from __future__ import annotations

import math

import numpy as np
import pytest
from arrays import place, torch
from bad_calls import MUST, Row, check_message, equal_bytes, integer, options_of, other, snapshot

import flashcore


def good(arrays) -> dict:
    """A good call with everything that an error could leave traces in."""
    tensors = arrays.qkv(2, 10, 12, 4, 2, 64, arrays.half, 1)
    names = ("query", "key", "value")
    call = {
        name: place(arrays, a.shape, arrays.half, "contiguous", a).view for name, a in zip(names, tensors, strict=True)
    }
    call["out"] = place(arrays, tensors[0].shape, arrays.half, "contiguous").view
    return call


def all_of(arrays, call, convert):
    return {name: convert(call[name]) for name in ("query", "key", "value")}


def dtype_rows():
    for wrong in ("float64", "int8", "int32", "bool", "complex64", "float8_e4m3fn"):
        if wrong.startswith("float8") and (torch is None or not hasattr(torch, wrong)):
            continue
        if wrong == "float64":
            change = lambda arrays, call: all_of(arrays, call, arrays.float64)  # noqa: E731
        else:
            change = lambda arrays, call, wrong=wrong: all_of(arrays, call, lambda a: integer(arrays, a, wrong))  # noqa: E731
        yield Row(f"dtype {wrong}", change, TypeError, "query", wrong.split("_")[0], "float16")
    for name in ("key", "value"):
        yield Row(
            f"{name} of another dtype",
            lambda arrays, call, name=name: {name: arrays.cast(call[name], arrays.dtypes[-1] if torch else "float32")},
            TypeError,
            name,
            ("bfloat16", "float32"),
            "float16",
        )


def shape_rows():
    for name in ("query", "key", "value"):
        yield Row(f"{name} 3-D", lambda a, c, n=name: {n: c[n][0]}, ValueError, name, "3", "4")
        yield Row(f"{name} 5-D", lambda a, c, n=name: {n: c[n][None]}, ValueError, name, "5", "4")
        yield Row(f"{name} 0-D", lambda a, c, n=name: {n: c[n][0, 0, 0, 0]}, (ValueError, TypeError), name)
        yield Row(f"{name} 12-D", lambda a, c, n=name: {n: c[n][(None,) * 8]}, ValueError, name, "12", "4")
        yield Row(
            f"{name} other batch", lambda a, c, n=name: {n: c[n][:1]}, ValueError, ("query", "key", "value"), "1", "2"
        )
        yield Row(
            f"{name} other head dim",
            lambda a, c, n=name: {n: other(a, (*c[n].shape[:3], 32))},
            ValueError,
            ("query", "key", "value"),
            "32",
            "64",
        )
        for head_dim, wrong in ((0, "0"), (257, "257"), (264, "264"), (2**20, "1048576")):
            yield Row(
                f"head dim {head_dim}",
                lambda a, c, d=head_dim: {n: other(a, (1, 2, 2, d)) for n in ("query", "key", "value")} | {"out": None},
                ValueError,
                "query",
                wrong,
                "256",
            )
        yield Row(
            f"{name} last stride not 1",
            lambda a, c, n=name: {n: other(a, (*c[n].shape[:3], 128))[..., ::2]},
            ValueError,
            name,
            "2",
            "1",
        )
        yield Row(
            f"{name} last stride 0",
            lambda a, c, n=name: {n: a.strided(c[n].reshape(-1), c[n].shape, (64, 64, 64, 0), 0)},
            ValueError,
            name,
            "0",
            "1",
        )
    yield Row(
        "keys and values of two lengths", lambda a, c: {"value": c["value"][:, :11]}, ValueError, "value", "11", "12"
    )
    yield Row("value heads", lambda a, c: {"value": c["value"][:, :, :1]}, ValueError, "value", "1", "2")
    yield Row(
        "head counts do not divide",
        lambda a, c: {n: other(a, (2, 12, 3, 64)) for n in ("key", "value")},
        ValueError,
        ("key", "query"),
        "3",
        "4",
    )
    yield Row(
        "more key heads than query heads",
        lambda a, c: {n: other(a, (2, 12, 8, 64)) for n in ("key", "value")},
        ValueError,
        ("key", "query"),
        "8",
        "4",
    )
    yield Row(
        "no key heads",
        lambda a, c: {n: other(a, (2, 12, 0, 64)) for n in ("key", "value")},
        ValueError,
        ("key", "query"),
        "0",
    )
    yield Row(
        "bhsd shapes called bshd",
        lambda a, c: {"layout": "bhsd"},
        ValueError,
        ("key", "query", "value"),
    )
    yield Row(
        "too long",
        lambda a, c: {n: a.strided(c[n].reshape(-1), (2, 2**31, 2, 64), (0, 0, 64, 1), 0) for n in ("key", "value")},
        ValueError,
        ("key", "seqlen_k"),
        str(2**31),
    )


def gpu_rows():
    def unaligned(a, c, name, stride):
        flat = other(a, (2 * 12 * 4 * 80,))
        return {name: a.strided(flat, c[name].shape, stride(c[name].shape), 0)}

    for name in ("query", "key", "value", "out"):
        yield Row(
            f"{name} rows not aligned",
            lambda a, c, n=name: unaligned(a, c, n, lambda s: (s[1] * s[2] * 68, s[2] * 68, 68, 1)),
            ValueError,
            name,
            "",
            "16",
            "cuda",
        )
        yield Row(
            f"{name} base not aligned",
            lambda a, c, n=name: {
                n: other(a, (2 * 12 * 4 * 64 + 1,))[1 : 1 + math.prod(c[n].shape)].reshape(c[n].shape)
            },
            ValueError,
            name,
            "",
            "16",
            "cuda",
        )
    for head_dim in (4, 60, 100, 255):
        yield Row(
            f"head dim {head_dim} on the GPU",
            lambda a, c, d=head_dim: {n: other(a, (1, 2, 2, d)) for n in ("query", "key", "value")} | {"out": None},
            ValueError,
            "query",
            str(head_dim),
            "8",
            "cuda",
        )
    yield Row(
        "float32 on the GPU",
        lambda a, c: all_of(a, c, lambda x: a.cast(x, "float32")),
        TypeError,
        "query",
        "float32",
        ("bfloat16", "float16"),
        "cuda",
    )
    for name in ("query", "key", "value", "out"):
        yield Row(
            f"{name} on the CPU",
            lambda a, c, n=name: {n: c[n].cpu()},
            ValueError,
            ("query", "key", "value", "out"),
            "cpu",
            "cuda",
            "cuda",
        )
    yield Row("backend cpu for CUDA arrays", lambda a, c: {"backend": "cpu"}, ValueError, "backend", "cpu", "", "cuda")
    for gpu in ("sm80", "sm90"):
        yield Row(
            f"backend {gpu} for CPU arrays", lambda a, c, x=gpu: {"backend": x}, ValueError, "backend", gpu, "", "cpu"
        )


def option_rows():
    for bad in (math.nan, math.inf, -math.inf):
        text = ("nan", "NaN") if math.isnan(bad) else ("inf", "Inf")
        yield Row(f"scale {bad}", lambda a, c, x=bad: {"scale": x}, ValueError, "scale", text, ("finite", *MUST))
        yield Row(f"softcap {bad}", lambda a, c, x=bad: {"softcap": x}, ValueError, "softcap", text, ("finite", *MUST))
    # Beyond float32, in which the kernels compute.
    yield Row("scale 1e39", lambda a, c: {"scale": 1e39}, ValueError, "scale", "1", "float32")
    yield Row("softcap negative", lambda a, c: {"softcap": -1.5}, ValueError, "softcap", "-1.5", ("0", *MUST))
    for bad in ("sbhd", "", "BSHD"):
        yield Row(f"layout {bad!r}", lambda a, c, x=bad: {"layout": x}, ValueError, "layout", bad, "bhsd")
    for bad in ("sm90x", "", "cuda"):
        yield Row(f"backend {bad!r}", lambda a, c, x=bad: {"backend": x}, ValueError, "backend", bad, "cpu")
    for bad, got in (((-1, 0), "-1"), ((None, -7), "-7"), ((0, -1), "-1")):
        yield Row(f"window {bad}", lambda a, c, x=bad: {"window": x}, ValueError, "window", got, ("0", *MUST))
    wrong_kind = (TypeError, ValueError)
    for bad in (5, "ab", (1,), (1, 2, 3), (1.5, 2), (2**70, 0), ("a", "b")):
        yield Row(f"window {bad}", lambda a, c, x=bad: {"window": x}, wrong_kind, "window", "", "")
    yield Row("scale text", lambda a, c: {"scale": "big"}, wrong_kind, "scale", "", "")
    yield Row("layout number", lambda a, c: {"layout": 3}, wrong_kind, "layout", "", "")


def array_rows():
    for name in ("query", "key", "value", "out"):
        for label, wrong in (
            ("list", [[1.0]]),
            ("None", None),
            ("number", 3.0),
            ("text", "tensor"),
            ("object", object()),
        ):
            if name == "out" and wrong is None:
                continue
            yield Row(
                f"{name} {label}", lambda a, c, n=name, x=wrong: {n: x}, TypeError, name, type(wrong).__name__, ""
            )


def out_rows():
    yield Row("out shape", lambda a, c: {"out": a.poison((2, 11, 4, 64), a.half)}, ValueError, "out", "11", "10")
    yield Row("out head dim", lambda a, c: {"out": a.poison((2, 10, 4, 32), a.half)}, ValueError, "out", "32", "64")
    yield Row("out 3-D", lambda a, c: {"out": c["out"][0]}, ValueError, "out", "3", "4")
    yield Row(
        "out dtype",
        lambda a, c: {"out": a.poison((2, 10, 4, 64), "float32")},
        (TypeError, ValueError),
        "out",
        "float32",
        "float16",
    )
    yield Row(
        "out last stride",
        lambda a, c: {"out": a.poison((2, 10, 4, 128), a.half)[..., ::2]},
        ValueError,
        "out",
        "2",
        "1",
    )
    yield Row(
        "out expanded",
        lambda a, c: {"out": a.strided(a.poison((64,), a.half), (2, 10, 4, 64), (0, 0, 0, 1), 0)},
        ValueError,
        "out",
        "",
        "",
    )
    yield Row("out is query", lambda a, c: {"out": c["query"]}, ValueError, "out", "query", "")
    for name in ("key", "value"):
        # Shares one row with an input: first byte to last byte counts.
        def overlapping(a, c, name=name):
            flat = other(a, (2 * 10 * 4 * 64 + 2 * 12 * 2 * 64 - 64,))
            size = math.prod(c[name].shape)
            return {
                name: flat[:size].reshape(c[name].shape),
                "out": flat[size - 64 :].reshape(c["out"].shape),
            }

        yield Row(f"out overlaps {name}", overlapping, ValueError, "out", name, "")


def read_only(a, c):
    target = np.zeros((2, 10, 4, 64), np.float16)
    target.setflags(write=False)
    return {n: np.asarray(c[n]) for n in ("query", "key", "value")} | {"out": target}


CALLS = [
    *array_rows(),
    *dtype_rows(),
    *shape_rows(),
    *gpu_rows(),
    *option_rows(),
    *out_rows(),
    Row("out read-only", read_only, (ValueError, TypeError), "out", ("read-only", "readonly", "read only"), "", "cpu"),
]


@pytest.mark.parametrize("row", CALLS, ids=lambda row: row.name)
def test_bad_call(device, arrays, row):
    if row.only not in ("", device):
        pytest.skip(f"a rule of {row.only} only")
    call = good(arrays)
    out = call["out"]
    change = row.change(arrays, call)
    huge = row.name in ("too long", "head dim 1048576")
    call = {**call, **change}
    saved = [] if huge else snapshot(arrays, call)
    with pytest.raises(row.error) as caught:
        flashcore.attention(**call)
    arrays.synchronize()
    check_message(str(caught.value), row)
    assert arrays.is_poison(out) or row.name.startswith("out overlaps")
    assert all(equal_bytes(a, b) for a, b in saved), "an array changed"


# A list for query is a shape to plan().
PLANNED = [row for row in CALLS if not row.name.startswith("out") and row.name != "query list"]


@pytest.mark.parametrize("row", PLANNED, ids=lambda row: row.name)
def test_plan_refuses_the_same(device, arrays, row):
    """plan() judges a call as attention() does."""
    if row.only not in ("", device):
        pytest.skip(f"a rule of {row.only} only")
    call = good(arrays)
    call = {**call, **row.change(arrays, call)}
    call.pop("out", None)
    with pytest.raises(row.error) as caught:
        flashcore.plan(**call)
    assert any(option in str(caught.value) for option in options_of(row.argument))


def test_threads_below_one(device):
    before = flashcore.get_num_threads()
    for bad in (0, -1):
        with pytest.raises(ValueError, match=str(bad)):
            flashcore.set_num_threads(bad)
    assert flashcore.get_num_threads() == before
