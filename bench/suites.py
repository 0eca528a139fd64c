# SPDX-License-Identifier: Apache-2.0
"""The named suites of the benchmarks: their cells, their titles, and the unit in which their speed is told."""

from __future__ import annotations

import json
import math
import pathlib
import random
from dataclasses import dataclass
from typing import Any

OURS = "flashcore"  # among the providers of a result
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

TITLES = {
    "seed": "The first shape",
    "small": "Small problems",
    "forward": "Forward, 16,384 tokens, 2,048 / D heads",
    "forward_more": "Forward, more lengths and head dimensions",
    "grid": "Forward, every head dimension, length and dtype",
    "varlen": "Variable lengths, causal, 64 sequences of 64 to 4,096 tokens",
    "window": "Sliding window of 1,024 keys",
    "gqa": "Grouped-query attention, 32 query heads and 8 key heads, causal",
    "few_queries": "A query a sequence, without a cache",
    "decode": "Decode over a cache: 32 query heads and 8 key heads",
    "cpu": "CPU",
    "cpu_decode": "CPU, decode over a cache: 32 query heads and 8 key heads",
}


def reports_of(folder: pathlib.Path, kind: str) -> list[dict[str, Any]]:
    """The result files of a folder that are of this kind, with their names as "file"."""
    reports = [{**json.loads(path.read_text()), "file": path.name} for path in sorted(folder.glob("*.json"))]
    return [report for report in reports if report.get("kind") == kind]


def rate_of(suite: str) -> tuple[str, str, float]:
    """What speed a suite is told in: the unit, the field of a provider's result, and what to multiply it by."""
    special = {
        "few_queries": ("TB/s", "tbytes_per_second", 1.0),
        "decode": ("TB/s", "tbytes_per_second", 1.0),
        "cpu": ("GFLOP/s", "tflops", 1e3),
        "cpu_decode": ("GB/s", "tbytes_per_second", 1e3),
    }
    return special.get(suite, ("TFLOP/s", "tflops", 1.0))


def is_forward(suite: str) -> bool:
    """Whether a suite is held against the matmul ceiling."""
    return suite in ("forward", "forward_more", "grid")


def is_cpu(suite: str) -> bool:
    """Whether a suite runs on the CPU, where it is held against the processor's peaks."""
    return suite in ("cpu", "cpu_decode")


@dataclass(frozen=True)
class Cell:
    """One problem of a suite; arrays are (batch, sequence, heads, head_dim), or (1, total, heads, head_dim) of a varlen
    cell, which has `lengths`."""

    batch: int
    heads: int
    seqlen: int  # of a varlen cell the longest
    head_dim: int
    causal: bool = False
    dtype: str = "bfloat16"
    heads_k: int = 0  # 0: heads
    seqlen_k: int = 0  # 0: seqlen
    window: int | None = None  # keys before its own that a query sees; with causal
    lengths: tuple[int, ...] = ()  # of each sequence, its queries and its keys; `batch` is their number
    # Decoding: `seqlen` queries a sequence over a cache in pages of so many tokens, 0 for one that is contiguous. Then
    # `lengths` are of the keys alone, whole pages each, and `seqlen_k` is the longest.
    page_size: int | None = None
    batch_invariant: bool = False

    @property
    def decodes(self) -> bool:
        return self.page_size is not None

    @property
    def keys(self) -> int:
        return self.seqlen_k or self.seqlen

    @property
    def kv_heads(self) -> int:
        return self.heads_k or self.heads

    @property
    def sequences(self) -> list[tuple[int, int]]:
        """Queries and keys of each sequence, in the order in which they lie in memory."""
        lengths = [(self.seqlen if self.decodes else n, n) for n in self.lengths]
        return lengths or [(self.seqlen, self.keys)] * self.batch

    @property
    def shape_q(self) -> tuple[int, ...]:
        packed = (1, sum(queries for queries, _ in self.sequences)) if self.lengths else (self.batch, self.seqlen)
        return (*packed, self.heads, self.head_dim)

    @property
    def shape_k(self) -> tuple[int, ...]:
        packed = (1, sum(self.lengths)) if self.lengths else (self.batch, self.keys)
        return (*packed, self.kv_heads, self.head_dim)

    @property
    def flops(self) -> float:
        """4 · D for each query, head and key seen; causal counts half of all keys, a window as many as it holds."""
        if self.window is not None:
            seen = sum(queries * (self.window + 1.0) for queries, _ in self.sequences)
        else:
            whole = not self.causal or self.decodes  # what few queries do not see of a cache is not worth counting
            seen = sum(float(queries) * keys for queries, keys in self.sequences) / (1 if whole else 2)
        return 4.0 * self.heads * self.head_dim * seen

    @property
    def bytes(self) -> int:
        """Of q, k, v and o together: of one set of arrays."""
        return 2 * (math.prod(self.shape_q) + math.prod(self.shape_k)) * BYTES[self.dtype]

    @property
    def label(self) -> str:
        heads = f"{self.heads}/{self.heads_k}" if self.heads_k else f"{self.heads}"
        seqlen = f"{self.seqlen}/{self.seqlen_k}" if self.seqlen_k else f"{self.seqlen}"
        if self.lengths:
            seqlen = f"{min(self.lengths)} to {max(self.lengths)}"
            if self.decodes:
                seqlen = f"{self.seqlen}/{seqlen}"
        short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[self.dtype]
        mask = " causal" if self.causal else ""
        if self.window is not None:
            mask = f" window ({self.window}, 0)"
        pages = f" page {self.page_size}" if self.page_size else ""
        invariant = " batch-invariant" if self.batch_invariant else ""
        return f"{self.batch}, {heads}, {seqlen}, {self.head_dim} {short}{mask}{pages}{invariant}"


def varlen_lengths() -> tuple[int, ...]:
    import torch  # here, because bench/report.py does without it

    generator = torch.Generator().manual_seed(7)  # draws what torch.manual_seed(7) makes torch.randint draw
    return tuple(torch.randint(64, 4097, (64,), generator=generator).tolist())


def mixed_lengths() -> tuple[int, ...]:
    """Keys of 64 sequences in decoding, as many of each order of magnitude: 128 to 32,768, in pages of 64."""
    generator = random.Random(7)
    return tuple(64 * round(2 ** generator.uniform(1, 9)) for _ in range(64))


def decode_cells() -> list[Cell]:
    def cell(batch: int, keys: int, tokens: int = 1, page_size: int = 0, **more) -> Cell:
        return Cell(batch, 32, tokens, 128, tokens > 1, heads_k=8, seqlen_k=keys, page_size=page_size, **more)

    mixed = mixed_lengths()
    return [
        *(cell(b, s) for b, s in ((1, 4096), (1, 32768), (1, 131072), (8, 8192), (32, 4096), (64, 8192))),
        *(cell(b, s, page_size=size) for b, s in ((1, 32768), (8, 8192), (32, 4096)) for size in (64, 16)),
        *(cell(b, s, tokens) for b, s in ((1, 32768), (8, 8192)) for tokens in (4, 8)),
        cell(len(mixed), max(mixed), page_size=64, lengths=mixed),
        *(cell(b, s, batch_invariant=True) for b, s in ((1, 32768), (8, 8192), (64, 8192))),
    ]


def suites() -> dict[str, list[Cell]]:
    """The named suites: the cells of the project's tables of measured peers."""
    tokens, width = 16384, 2048

    def forward(head_dims: tuple[int, ...], seqlens: tuple[int, ...], dtype: str = "bfloat16") -> list[Cell]:
        return [
            Cell(tokens // seqlen, width // head_dim, seqlen, head_dim, causal, dtype)
            for head_dim in head_dims
            for seqlen in seqlens
            for causal in (False, True)
        ]

    lengths = varlen_lengths()
    small = [(8, 128), (16, 128), (32, 128), (8, 256), (16, 256), (32, 256), (8, 512), (16, 512), (32, 512)]
    seed = [
        Cell(1, 8, 512, 64),
        Cell(1, 8, 512, 64, dtype="float16"),
        Cell(1, 8, 512, 64, causal=True, dtype="float16"),
    ]
    return {
        "seed": seed,
        "small": seed + [Cell(batch, 8, seqlen, 64) for batch, seqlen in small],
        "forward": forward((64, 128), (1024, 4096, 16384)),
        "forward_more": forward((64, 128), (512, 2048, 8192)) + forward((96, 192, 256), (1024, 4096, 16384)),
        # 12 cells of a head dimension, 60 of a dtype: --cells 0:60 is bfloat16, 60:72 float16 at head dimension 64.
        "grid": [
            cell
            for dtype in ("bfloat16", "float16")
            for cell in forward((64, 96, 128, 192, 256), (512, 1024, 2048, 4096, 8192, 16384), dtype)
        ],
        "varlen": [
            Cell(len(lengths), heads, max(lengths), head_dim, True, heads_k=heads_k, lengths=lengths)
            for heads, heads_k, head_dim in ((16, 16, 128), (32, 8, 128), (32, 32, 64))
        ],
        # The last one has as many queries with 1,024 keys each, none masked.
        "window": [Cell(1, 16, 16384, 128, True, window=1023), Cell(16, 16, 1024, 128)],
        "gqa": [Cell(b, 32, s, 128, True, heads_k=8) for b, s in ((1, 1024), (1, 4096), (2, 8192))],
        # Generation as frameworks do it that keep no cache of a fixed size: key heads from 32 down to one.
        "few_queries": [
            Cell(batch, heads, 1, 128, heads_k=heads_k, seqlen_k=keys)
            for batch, heads, heads_k, keys in (
                (1, 32, 8, 2048),
                (1, 32, 8, 8192),
                (1, 32, 8, 32768),
                (8, 32, 8, 8192),
                (1, 16, 4, 8192),
                (1, 12, 2, 8192),
                (1, 8, 1, 8192),
                (4, 32, 32, 4096),
            )
        ],
        "decode": decode_cells(),
        # 24 cells of a length: --cells 24:48 is 512, the seed's among them. The dtypes of a shape follow one another.
        "cpu": [
            Cell(1, heads, seqlen, head_dim, causal, dtype)
            for seqlen in (128, 512, 2048)
            for head_dim in (64, 128)
            for causal in (False, True)
            for heads in (8, 16)
            for dtype in ("float32", "bfloat16", "float16")
        ],
        "cpu_decode": [Cell(8, 32, 1, 128, heads_k=8, seqlen_k=8192, page_size=0)],
    }
