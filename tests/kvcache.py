# SPDX-License-Identifier: Apache-2.0
"""What the tests of attention_kvcache share: sequences in a cache whose every unused row is NaN, the call, and the
check of its result and of what it has written."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from arrays import Arrays
from reference import PLAIN, Options
from test_varlen import check as check_sequences

import flashcore

GARBAGE = 123456789  # in entries of a page table that nobody may use


@dataclass
class Decoding:
    """Sequences of `lengths` keys in the cache, `tokens` queries each, and `new` keys to append. Arrays are bshd."""

    arrays: Arrays
    lengths: list[int]
    query: Any  # (batch, tokens, heads_q, head_dim)
    key_cache: Any  # (batch, capacity, heads_k, head_dim), or (pages, page_size, heads_k, head_dim)
    value_cache: Any
    key: Any  # (batch, new, heads_k, head_dim), or None
    value: Any
    table: list[list[int]] | None  # pages of each sequence
    keys: list = field(
        default_factory=list
    )  # of each sequence, the new ones included: (length + new, heads_k, head_dim)
    values: list = field(default_factory=list)

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def new(self) -> int:
        return 0 if self.key is None else self.key.shape[1]

    def seqlens(self):
        return self.arrays.int32(self.lengths)

    def keywords(self) -> dict:
        given = {}
        if self.table is not None:
            given["page_table"] = self.arrays.int32(self.table)
        if self.key is not None:
            given.update(key=self.key, value=self.value)
        return given

    def call(self, **options):
        """Output and lse of attention_kvcache."""
        given = {**self.keywords(), "return_lse": True, **options}
        return flashcore.attention_kvcache(self.query, self.key_cache, self.value_cache, self.seqlens(), **given)

    def row(self, b: int, position: int) -> tuple[int, int]:
        """Where key `position` of sequence b lies in the cache: the indices of its first two axes."""
        if self.table is None:
            return b, position
        size = self.key_cache.shape[1]
        return self.table[b][position // size], position % size

    def check(self, out, lse, options: Options = PLAIN, what: str = "") -> None:
        """Against float64, all sequences at once."""
        tokens = self.query.shape[1]
        packed = [self.query.reshape(self.batch * tokens, *self.query.shape[2:])]
        packed += [self.arrays.concatenate(part) for part in (self.keys, self.values)]
        cu_q = [tokens * b for b in range(self.batch + 1)]
        cu_k = [0, *itertools.accumulate(len(k) for k in self.keys)]
        out = out.reshape(self.batch * tokens, *out.shape[2:])
        if lse is not None:
            assert tuple(lse.shape) == (self.batch, self.query.shape[2], tokens)
            lse = lse.swapaxes(0, 1).reshape(self.query.shape[2], self.batch * tokens)
        check_sequences(self.arrays, out, lse, packed, cu_q, cu_k, options, what=what)

    def check_written(self, before: tuple) -> None:
        """The new rows are in the caches, and nothing else has changed since `before` (copies of both)."""
        for cache, old, new in ((self.key_cache, before[0], self.key), (self.value_cache, before[1], self.value)):
            for b, length in enumerate(self.lengths):
                for i in range(self.new):
                    old[self.row(b, length + i)] = new[b, i]
            assert self.arrays.same_bits(cache, old), "the cache holds something else than what was appended"

    def run(self, options: Options = PLAIN, what: str = "", **more):
        """Calls, checks everything, and returns output and lse."""
        before = self.arrays.copy(self.key_cache), self.arrays.copy(self.value_cache)
        out, lse = self.call(**options.keywords(), **more)
        self.check(out, lse, options, what)
        self.check_written(before)
        return out, lse


def make(
    arrays: Arrays,
    lengths,
    tokens: int = 1,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 64,
    dtype: str | None = None,
    *,
    new: int = 0,
    page_size: int = 0,
    capacity: int | None = None,
    seed: int = 1,
    score: float = 2.0,
) -> Decoding:
    """Random sequences; rows of the caches that belong to none are NaN, and unused entries of the page table garbage.
    Pages are in random order, some of them belong to nobody. `capacity`: of each sequence; default: the least."""
    dtype = dtype or arrays.half
    heads_q, heads_k = heads
    batch, lengths = len(lengths), list(lengths)
    capacity = max([*lengths, 0]) + new if capacity is None else capacity
    query = arrays.random((batch, tokens, heads_q, head_dim), dtype, seed, score)
    old = [arrays.random((sum(lengths), heads_k, head_dim), dtype, seed + 1 + i) for i in range(2)]
    fresh = (
        [arrays.random((batch, new, heads_k, head_dim), dtype, seed + 3 + i) for i in range(2)] if new else [None] * 2
    )
    table = None
    if page_size:
        per_sequence = -(-capacity // page_size)
        used = [-(-(n + new) // page_size) for n in lengths]
        order = np.random.default_rng(seed).permutation(sum(used) + 3).tolist()
        table = [[order.pop() if i < n else GARBAGE for i in range(per_sequence)] for n in used]
        shape = (sum(used) + 3, page_size, heads_k, head_dim)
    else:
        shape = (batch, capacity, heads_k, head_dim)
    made = Decoding(arrays, lengths, query, *(arrays.poison(shape, dtype) for _ in range(2)), *fresh, table)
    starts = [0, *itertools.accumulate(lengths)]
    for b, length in enumerate(lengths):
        for rows, cache, appended, kept in (
            (old[0], made.key_cache, made.key, made.keys),
            (old[1], made.value_cache, made.value, made.values),
        ):
            mine = rows[starts[b] : starts[b + 1]]
            if table is None:
                cache[b, :length] = mine
            else:
                for i in range(0, length, page_size):
                    count = min(page_size, length - i)
                    cache[table[b][i // page_size], :count] = mine[i : i + count]
            kept.append(arrays.concatenate([mine, appended[b]]) if new else mine)
    return made
