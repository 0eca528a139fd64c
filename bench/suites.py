# SPDX-License-Identifier: Apache-2.0
"""The named suites of the benchmarks: their cells, their titles, and the unit in which their speed is told."""

from __future__ import annotations

from dataclasses import dataclass

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

TITLES = {
    "seed": "The first shape",
    "small": "Small problems",
    "forward": "Forward, 16,384 tokens, 2,048 / D heads",
    "gqa": "Grouped-query attention, 32 query heads and 8 key heads, causal",
    "decode": "Decode: one query a sequence, 32 query heads and 8 key heads",
    "cpu": "CPU",
}


def rate_of(suite: str) -> tuple[str, str, float]:
    """What speed a suite is told in: the unit, the field of a provider's result, and what to multiply it by."""
    special = {"decode": ("TB/s", "tbytes_per_second", 1.0), "cpu": ("GFLOP/s", "tflops", 1e3)}
    return special.get(suite, ("TFLOP/s", "tflops", 1.0))


@dataclass(frozen=True)
class Cell:
    """One problem of a suite; arrays are (batch, sequence, heads, head_dim)."""

    batch: int
    heads: int
    seqlen: int
    head_dim: int
    causal: bool = False
    dtype: str = "bfloat16"
    heads_k: int = 0  # 0: heads
    seqlen_k: int = 0  # 0: seqlen

    @property
    def keys(self) -> int:
        return self.seqlen_k or self.seqlen

    @property
    def kv_heads(self) -> int:
        return self.heads_k or self.heads

    @property
    def flops(self) -> float:
        whole = 4.0 * self.batch * self.heads * self.seqlen * self.keys * self.head_dim
        return whole / 2 if self.causal else whole

    @property
    def bytes(self) -> int:
        """Of q, k, v and o together: of one set of arrays."""
        rows = 2 * self.seqlen * self.heads + 2 * self.keys * self.kv_heads
        return self.batch * rows * self.head_dim * BYTES[self.dtype]

    @property
    def label(self) -> str:
        heads = f"{self.heads}/{self.heads_k}" if self.heads_k else f"{self.heads}"
        seqlen = f"{self.seqlen}/{self.seqlen_k}" if self.seqlen_k else f"{self.seqlen}"
        short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[self.dtype]
        return f"{self.batch}, {heads}, {seqlen}, {self.head_dim} {short}{' causal' if self.causal else ''}"


def suites() -> dict[str, list[Cell]]:
    """The named suites: the cells of the project's tables of measured peers."""
    tokens, width = 16384, 2048
    small = [(8, 128), (16, 128), (32, 128), (8, 256), (16, 256), (32, 256), (8, 512), (16, 512), (32, 512)]
    decode = [(1, 4096), (1, 32768), (1, 131072), (8, 8192), (32, 4096), (64, 8192)]
    seed = [
        Cell(1, 8, 512, 64),
        Cell(1, 8, 512, 64, dtype="float16"),
        Cell(1, 8, 512, 64, causal=True, dtype="float16"),
    ]
    return {
        "seed": seed,
        "small": seed + [Cell(batch, 8, seqlen, 64) for batch, seqlen in small],
        "forward": [
            Cell(tokens // seqlen, width // head_dim, seqlen, head_dim, causal)
            for head_dim in (64, 128)
            for seqlen in (1024, 4096, 16384)
            for causal in (False, True)
        ],
        "gqa": [Cell(b, 32, s, 128, True, heads_k=8) for b, s in ((1, 1024), (1, 4096), (2, 8192))],
        "decode": [Cell(b, 32, 1, 128, heads_k=8, seqlen_k=s) for b, s in decode],
        "cpu": [
            *(Cell(1, 8, 512, 64, dtype=dtype) for dtype in ("float32", "bfloat16", "float16")),
            Cell(1, 8, 512, 64, True, "float32"),
            *(Cell(1, 16, 2048, 128, dtype=dtype) for dtype in ("float32", "bfloat16", "float16")),
        ],
    }
