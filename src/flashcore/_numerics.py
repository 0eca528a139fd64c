# SPDX-License-Identifier: Apache-2.0
"""The numeric standard of `flashcore verify`: a float64 reference, an emulation of a kernel, and the verdict.

What error is allowed is measured, not guessed: another implementation, the yardstick, computes the same problem from
the same rounded inputs. FlashCore's largest error may be at most twice the yardstick's plus 1e-5, its relative
Frobenius error at most 1.25 times the yardstick's plus 1e-6 (float32's own rounding).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from flashcore._verify_cases import Case


def visible(case: Case, queries: int, keys: int) -> np.ndarray | None:
    """Which keys each query sees, (queries, keys), the last query aligned with the last key; None: all of them."""
    left, right = case.window or (None, None)
    if case.causal:
        right = 0 if right is None else min(right, 0)
    if left is None and right is None:
        return None
    offset = np.arange(keys)[None, :] - np.arange(queries)[:, None] - (keys - queries)
    seen = np.ones((queries, keys), bool)
    if left is not None:
        seen &= offset >= -left
    if right is not None:
        seen &= offset <= right
    return seen


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """float32 `x` rounded to `dtype` (to nearest, ties to even), as float32."""
    if dtype == "float32":
        return x
    if dtype == "float16":
        return x.astype(np.float16).astype(np.float32)
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def exact(q: np.ndarray, k: np.ndarray, v: np.ndarray, seen: np.ndarray | None, case: Case) -> np.ndarray:
    """Attention of one key head in float64. q (queries, head_dim), k and v (keys, head_dim)."""
    score = q @ k.T / math.sqrt(case.head_dim)
    if case.softcap:
        score = case.softcap * np.tanh(score / case.softcap)
    if seen is not None:
        score[~seen] = -np.inf
    top = score.max(axis=1, keepdims=True)
    weight = np.exp(score - np.where(np.isfinite(top), top, 0.0), out=score)
    total = weight.sum(axis=1, keepdims=True)
    return weight @ v / np.where(total > 0.0, total, 1.0)


def emulated(q: np.ndarray, k: np.ndarray, v: np.ndarray, seen: np.ndarray | None, case: Case) -> np.ndarray:
    """The same in the arithmetic of a half-precision kernel: the yardstick where SDPA is none."""
    q, k, v = (x.astype(np.float32) for x in (q, k, v))
    top = np.full((len(q), 1), -np.inf, np.float32)
    total = np.zeros((len(q), 1), np.float32)
    out = np.zeros(q.shape, np.float32)
    tile = 128
    for begin in range(0, len(k), tile):
        score = q @ k[begin : begin + tile].T * np.float32(1.0 / math.sqrt(case.head_dim))
        if case.softcap:
            score = np.float32(case.softcap) * np.tanh(score / np.float32(case.softcap))
        if seen is not None:
            score[~seen[:, begin : begin + tile]] = -np.inf
        new_top = np.maximum(top, score.max(axis=1, keepdims=True))
        base = np.where(np.isfinite(new_top), new_top, np.float32(0.0))
        shrink = np.exp(top - base)
        weight = np.exp(score - base)
        total = total * shrink + weight.sum(axis=1, keepdims=True)
        out = out * shrink + rounded(weight, case.dtype) @ v[begin : begin + tile]
        top = new_top
    return rounded(out / np.where(total > 0.0, total, np.float32(1.0)), case.dtype)


def by_head(case: Case, q: np.ndarray, k: np.ndarray, v: np.ndarray, head: Callable[..., np.ndarray]) -> np.ndarray:
    """Runs `head` over every sequence and key head. Arrays are (batch, sequence, heads, head_dim), or packed 3-D."""
    out = np.empty(q.shape, np.float64)
    group = q.shape[-2] // k.shape[-2]
    for rows_q, rows_k in sequences(case):
        one_q, one_k, one_v, one_out = q[rows_q], k[rows_k], v[rows_k], out[rows_q]
        queries, keys = len(one_q), len(one_k)
        seen = visible(case, queries, keys)
        seen = None if seen is None else np.tile(seen, (group, 1))
        for h in range(k.shape[-2]):
            heads = slice(h * group, (h + 1) * group)
            # The group's queries, one below another.
            stacked = one_q[:, heads].swapaxes(0, 1).reshape(group * queries, -1)
            result = head(stacked, one_k[:, h], one_v[:, h], seen, case)
            one_out[:, heads] = result.reshape(group, queries, -1).swapaxes(0, 1)
    return out


def sequences(case: Case) -> Iterator[tuple[Any, Any]]:
    """Indices of each sequence's rows in the query and in the key array."""
    if case.lengths is None:
        yield from ((b, b) for b in range(case.batch))
        return
    begin = 0
    for length in case.lengths:
        yield slice(begin, begin + length), slice(begin, begin + length)
        begin += length


@dataclass(frozen=True)
class Verdict:
    """How far an output is from the float64 reference, and how far it may be."""

    max_error: float
    max_allowed: float
    relative_error: float  # Frobenius norm of the difference over the reference's
    relative_allowed: float

    @property
    def passed(self) -> bool:
        # Written so that a NaN fails.
        return bool(self.max_error <= self.max_allowed and self.relative_error <= self.relative_allowed)


def judge(out: np.ndarray, exact: np.ndarray, yardstick: np.ndarray) -> Verdict:
    """Holds `out` to the numeric standard; all three of one shape."""
    if out.shape != exact.shape:
        raise ValueError(f"out: shape is {out.shape}, expected {exact.shape}")
    norm = max(float(np.linalg.norm(exact)), np.finfo(np.float64).tiny)
    return Verdict(
        max_error=float(np.abs(out - exact).max()),
        max_allowed=2.0 * float(np.abs(yardstick - exact).max()) + 1e-5,
        relative_error=float(np.linalg.norm(out - exact)) / norm,
        relative_allowed=1.25 * float(np.linalg.norm(yardstick - exact)) / norm + 1e-6,
    )
